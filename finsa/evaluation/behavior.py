"""Tests of behavior: changed test rows whose predicted label must stay or flip (CheckList, Ribeiro et al. 2020).

Invariance tests (``stay``) and directional expectation tests (``flip``), only on rows that a run answers correctly: a
failure is a changed row for which it does not predict the expected label.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from finsa.config import Behavior
from finsa.errors import ConfigError, DataError, Problem, suggest
from finsa.evaluation import metrics, statistics
from finsa.evaluation.comparison import Record
from finsa.evaluation.tables import Table, of_records

HAN, LATIN = re.compile(r"[\u4e00-\u9fff]"), re.compile(r"[A-Za-z]")


@dataclass(frozen=True)
class Case:
    """A changed row.

    Args:
        rule: name of the rule.
        row: number of the row.
        text: as changed.
        expected: the label that must be predicted.
        expect: of the rule.
    """

    rule: str
    row: int
    text: str
    expected: str
    expect: str = "stay"


def language(texts: Sequence[str]) -> str | None:
    """``zh`` or ``en``, whose rules are in ``conf/behavior``, by the script of most texts; None for other scripts."""
    for name, script in (("zh", HAN), ("en", LATIN)):
        if 2 * sum(len(script.findall(text)) > 0.3 * len(re.sub(r"\W|\d", "", text)) for text in texts) > len(texts):
            return name
    return None


def cases(
    texts: Sequence[str], gold: Sequence[str], labels: Sequence[str], rules: Behavior, only: Sequence[str] | None
) -> list[Case]:
    """Apply the rules to rows.

    Args:
        texts, gold: of the test rows, (n,).
        labels: of the run.
        rules: of the language.
        only: names of the rules to apply; None: all.

    Raises:
        ConfigError: for a rule that does not exist, or that needs opposite labels where the labels have none.
        DataError: if no rule applies to any row.
    """
    if unknown := next((name for name in only or () if name not in rules.rules), None):
        raise ConfigError([Problem("stage.only", f"there is no rule '{unknown}'. {suggest(unknown, rules.rules)}")])
    chosen = {name: rule for name, rule in rules.rules.items() if only is None or name in only}
    poles = next((pair for pair in rules.opposites if {pair.positive, pair.negative} <= set(labels)), None)
    needing = [name for name, rule in chosen.items() if rule.expect == "flip" or rule.of]
    if needing and poles is None:
        others = ",".join(name for name in chosen if name not in needing) or "<rule>"
        text = (
            f"the rules {', '.join(needing)} need opposite labels, and {', '.join(labels)} have none in its opposites; "
            f"add them, or choose other rules, as in stage.only=[{others}]"
        )
        raise ConfigError([Problem(f"behavior {rules.name}", text)])
    sides, made = dict[str, tuple[str, str]](), list[Case]()
    if poles is not None:
        sides = {poles.positive: ("positive", poles.negative), poles.negative: ("negative", poles.positive)}
    for name, rule in chosen.items():
        for row, (text, label) in enumerate(zip(texts, gold, strict=True)):
            side, opposite = sides.get(label, (None, None))
            expected = label if rule.expect == "stay" else opposite
            if expected is not None and rule.of in (None, side) and (new := rule.changed(text)) != text:
                made.append(Case(name, row, new, expected, rule.expect))
    if not made:
        raise DataError(
            f"behavior {rules.name}: no rule applies to any of the {len(texts):,} test rows; are they in its language?"
        )
    return made


def rates(made: Sequence[Case], failed: Mapping[str, Mapping[int, bool]]) -> list[Record]:
    """Failure rates by rule and run, with 95 % Wilson intervals.

    Args:
        made: from `cases`.
        failed: by run and number of the case, whether it fails; only cases of rows that the run answers correctly.
    """
    records = []
    for rule, expect in dict.fromkeys((case.rule, case.expect) for case in made):
        places = [place for place, case in enumerate(made) if case.rule == rule]
        for run, its in failed.items():
            outcomes = [its[place] for place in places if place in its]
            low, high = metrics.wilson(sum(outcomes), len(outcomes)) if outcomes else (None, None)
            record: Record = {"rule": rule, "run": run, "expect": expect, "rows": len(places), "tested": len(outcomes)}
            record |= {"failures": sum(outcomes), "rate": sum(outcomes) / len(outcomes) if outcomes else None}
            records.append({**record, "rate_low": low, "rate_high": high})
    return records


def paired(made: Sequence[Case], failed: Mapping[str, Mapping[int, bool]]) -> list[Record]:
    """Exact McNemar tests between runs by rule, on the rows that both answer correctly, corrected by Holm over all."""
    records = []
    for first, second in combinations(failed, 2):
        both = failed[first].keys() & failed[second].keys()
        for rule in dict.fromkeys(case.rule for case in made):
            places = [place for place in both if made[place].rule == rule]
            pairs = [(failed[first][place], failed[second][place]) for place in places]
            only = pairs.count((True, False)), pairs.count((False, True))
            record: Record = {"rule": rule, "first": first, "second": second, "tested": len(pairs)}
            record |= {"only_first": only[0], "only_second": only[1], "mcnemar_p": statistics.mcnemar(*only)}
            records.append(record)
    corrected = statistics.holm([record["mcnemar_p"] for record in records])
    return [{**record, "mcnemar_p_holm": p} for record, p in zip(records, corrected, strict=True)]


def tables(records: Sequence[Record], pairs: Sequence[Record]) -> list[Table]:
    """Failure rates by rule and run, and the paired tests between runs, if there are several."""
    columns = {"rule": "rule", "run": "run", "expect": "label must", "rows": "rows", "tested": "tested"}
    columns |= {"failures": "failures", "rate": "failure rate"}
    caption = (
        "Rows: those that the rule changes; tested: those of them that the run answers correctly before the change. "
        "Failure: the changed row does not get the expected label. In parentheses: 95 % Wilson intervals."
    )
    words = ("run", "label must")
    made = [of_records("Failures by rule", records, columns, caption, words=words, optional=(3, 2))]
    columns = {"rule": "rule", "first": "first", "second": "second", "tested": "rows"}
    columns |= {"only_first": "only first fails", "only_second": "only second fails", "mcnemar_p_holm": "p (Holm)"}
    caption = f"Rows that both runs answer correctly; exact McNemar test, corrected for {len(pairs)} tests."
    title = "Failures of two runs on the same rows"
    paired = of_records(title, pairs, columns, caption, words=("first", "second"), optional=(3,))
    return [*made, paired] if pairs else made
