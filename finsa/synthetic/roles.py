"""Generated documents by the analyst who would read them: a split of our own making, after the texts are written.

FinTeamExperts trains a macro, a micro and a quantitative analyst on corpora that are not public. Generated documents
have no such corpora behind them, so a rule divides them: what speaks of industries, boards and indices is macro; of the
rest, what is dense in figures is quant, and what is about one company in words is micro.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from finsa.synthetic import generator

MACRO = re.compile("行业|板块|政策|指数|早报|周报")
DENSE = 0.05  # share of digits
SPARE = 5  # documents drawn at first for each that is wanted; about a third is of a role


def role_of(document: str) -> str:
    """``macro``, ``quant`` or ``micro``."""
    if MACRO.search(document):
        return "macro"
    return "quant" if sum(letter.isdigit() for letter in document) >= DENSE * len(document) else "micro"


def corpus(documents: int, seed: int, role: str, exclude: Collection[str] = ()) -> list[str]:
    """Generate documents of one role.

    Args:
        documents: how many.
        seed: the same seed gives the same list; of different roles, no document occurs in two lists.
        role: macro, micro or quant.
        exclude: texts that no document may contain.
    """
    found, number = list[str](), SPARE * documents
    while len(found) < documents:  # drawing more begins with the same ones
        drawn = generator.corpus(number, seed, exclude)
        found, number = [document for document in drawn if role_of(document) == role], 2 * number
    return found[:documents]
