"""Answer files of any system, read by the rules of several publications, which decide the scores.

An answer that a rule cannot read is None and counted as such, never taken for a label.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import polars as pl

from finsa.config import AuditStage, locate
from finsa.config.stages import AnswerRule, Parsing
from finsa.data import readers
from finsa.data.prompts import without_thoughts
from finsa.errors import DataError, RunError, counted
from finsa.evaluation import metrics
from finsa.evaluation.comparison import SCORES, Record
from finsa.evaluation.tables import TITLES, Table, of_records

FINLLM = {"positive": 0, "negative": 1, "neutral": 2}  # the search order of the published code
STRICT = "strict"  # the rule that the others are compared with
MOST_LABELS = 50
EDGES = string.punctuation + string.whitespace + "。，；：！？“”‘’（）《》"


def plain(text: str) -> str:
    """A text without thoughts, in NFKC and lower case, without white space and punctuation at its ends."""
    return unicodedata.normalize("NFKC", without_thoughts(text)).lower().strip(EDGES)


def parse(answer: str, words: Sequence[str], rule: Parsing) -> int | None:
    """Parse the label of an answer.

    Args:
        answer: the generated text, without the prompt; a think block in it is ignored.
        words: label words, (c,).
        rule: ``exact``: the answer must equal a label word, apart from case, width, and punctuation at its ends.
            ``contains``: the first label word, in their order, that occurs in the answer, ignoring case; ``first``: the
            one that occurs earliest in it. ``aidf``: the part before the first line break or 。 must equal a label
            word, ignoring case. ``finllm``: ``contains`` in the order positive, negative, neutral, then the other
            labels. ``letter``: the only option that OpenFinData's pattern finds; none or several mean no label.
            ``letter_strict``: the answer must be a single option letter. ``letter_last``: the last option in the
            answer.

    Returns:
        The label's index; None for an answer without a label.
    """
    if rule == "exact":
        known = [plain(word) for word in words]
        return known.index(plain(answer)) if plain(answer) in known else None
    answer, lowered = without_thoughts(answer), [word.lower() for word in words]
    if rule == "aidf":
        start = re.split(r"[\n。]", answer.strip())[0].strip().lower()
        return lowered.index(start) if start in lowered else None
    if rule in ("contains", "first", "finllm"):
        places = [answer.lower().find(word) for word in lowered]
        found = [number for number, place in enumerate(places) if place >= 0]
        key = {
            "first": lambda number: places[number],
            "finllm": lambda number: FINLLM.get(lowered[number], len(FINLLM)),
        }
        return min(found, key=key.get(rule, lambda number: number), default=None)
    if rule == "letter_strict":
        return words.index(answer.strip()) if answer.strip() in words else None
    options = "".join(map(re.escape, words))
    found_options = re.findall(rf"(?:选项)?([{options}])[：.]?", answer)
    if not found_options or (rule == "letter" and len(found_options) > 1):
        return None
    return words.index(found_options[-1])


def read(answer: str, gold: int, labels: Sequence[str], rule: AnswerRule) -> int | None:
    """The class that a publication counts an answer as; None for none, which is always wrong.

    Args:
        answer: the generated text.
        gold: its true class.
        labels: of the data, (c,).
        rule: of the publication.
    """
    order = rule.order or tuple(labels)
    found = parse(answer, order, rule.parse)
    name = rule.unread if found is None else order[found]
    if rule.wrong == "text" and name != labels[gold]:
        name = answer  # as the publication compares it: a prediction of a class only if it is exactly its name
    return labels.index(name) if name in labels else None


@dataclass(frozen=True)
class System:
    """The answers of one system.

    Args:
        name: of the file or the run folder.
        gold: true labels as written, (n,).
        answers: generated texts, (n,).
    """

    name: str
    gold: list[str]
    answers: list[str]


def load(names: Sequence[str], stage: AuditStage) -> list[System]:
    """Read answer files, or the generated answers of run folders.

    Raises:
        RunError: for a run folder without generated answers.
        DataError: for a file without the columns, or with rows that cannot be read.
    """
    systems = []
    for written in names:
        path = locate(written)
        file = path / "answers.jsonl" if path.is_dir() else path
        if not file.is_file():
            if not path.is_dir():
                raise DataError(f"input: there is no file {path}")
            command = f"python run.py stage=evaluate stage.protocol=generate run={path}"
            raise RunError(f"input: {path} has no generated answers (answers.jsonl); {command} writes them")
        try:
            raw = readers.read(file)
        except DataError as error:
            raise DataError(str(error).replace("data.files", "input")) from None
        columns = raw.columns()
        chosen = []
        for key, candidates in (("gold", stage.gold), ("answer", stage.answer)):
            found = [name for name in candidates if name in columns]
            if not found:
                has = f"no column {' or '.join(candidates)}, only {', '.join(columns)}"
                raise DataError(f"input: {file} has {has}; name the column with the {key} text: stage.{key}=[<column>]")
            chosen.append(found[0])
        if not raw.frame.height:
            raise DataError(f"input: {file} has no rows")
        rows = raw.frame.select(*(pl.col(name).fill_null("") for name in chosen), readers.LINE, readers.FATE).rows()
        for gold, _, line, fate in rows:
            if fate is not None or not gold.strip():
                raise DataError(f"input: {file}, line {line}: {fate or f'{chosen[0]} is empty'}")
        systems.append(
            System(path.stem if path.is_file() else path.name, [row[0] for row in rows], [row[1] for row in rows])
        )
    for number, system in enumerate(systems):
        if system.name in [other.name for other in systems[:number]]:
            raise DataError(
                f"input: two files are called {system.name}; rename one of them, the tables show these names"
            )
    return systems


def audit(systems: Sequence[System], stage: AuditStage) -> tuple[list[Record], list[str]]:
    """Score every system by every rule.

    Returns:
        One record per system and rule: ``unread`` answers, the scores with 95 % intervals, and their ranks among the
        systems; and the remarks, of which those about the order of systems come first.

    Raises:
        DataError: for gold labels that are none of the labels, or too many to be labels.
    """
    written = stage.labels or tuple(sorted({plain(gold) for system in systems for gold in system.gold}))
    known = {plain(label): number for number, label in enumerate(written)}
    if len(known) < len(written):
        raise DataError(f"stage.labels: {', '.join(written)}: two of them are the same apart from case and punctuation")
    if len(written) > MOST_LABELS:
        raise DataError(
            f"input: {len(written):,} different gold labels ({', '.join(written[:3])}, …); check stage.gold"
        )
    for system in systems:
        if strange := next((gold for gold in system.gold if plain(gold) not in known), None):
            raise DataError(
                f"input: {system.name} has the gold label '{strange}'; stage.labels are {', '.join(written)}"
            )
    rules = {}
    for name, rule in stage.reading_rules.items():
        named = (*(rule.order or ()), *([rule.unread] if rule.unread else []))
        if {plain(label) for label in named} <= known.keys():  # with the labels as these files spell them
            order, unread = (
                tuple(written[known[plain(label)]] for label in labels) for labels in (rule.order or (), named)
            )
            rules[name] = rule.model_copy(update={"order": order or None, "unread": rule.unread and unread[-1]})
    records: list[Record] = []
    for name, rule in rules.items():
        of_rule: list[Record] = []
        for system in systems:
            gold = [known[plain(one)] for one in system.gold]
            found = [read(answer, one, written, rule) for answer, one in zip(system.answers, gold, strict=True)]
            report = metrics.report_parsed(gold, found, written, stage.seed)
            record = {"system": system.name, "rule": name, "n": len(gold), "unread": found.count(None)}
            for score in SCORES:
                low, high = report["intervals"][score]
                record |= {score: report[score], f"{score}_low": low, f"{score}_high": high}
            of_rule.append(record)
        for record in of_rule:
            record |= {f"{score}_rank": 1 + sum(o[score] > record[score] for o in of_rule) for score in SCORES}
        records += of_rule
    return records, _remarks(records, systems, stage, rules)


def _remarks(
    records: Sequence[Record], systems: Sequence[System], stage: AuditStage, rules: Mapping[str, AnswerRule]
) -> list[str]:
    by_key = {(record["rule"], record["system"]): record for record in records}
    remarks = []
    if len(systems) == 1:
        ends = [one(records, key=lambda record: record["weighted_f1"]) for one in (min, max)]
        least, most = (f"{record['weighted_f1']:.4f} ({record['rule']})" for record in ends)
        differs = ends[0]["weighted_f1"] < ends[1]["weighted_f1"]
        same = f"Weighted F1 is {ends[0]['weighted_f1']:.4f} by every rule."
        remarks.append(f"Weighted F1: {least} to {most}." if differs else same)
    for name in stage.reading_rules:
        if name not in rules:
            remarks.append(f"The rule {name} was left out: the gold labels do not have all of its labels.")
    for rule in rules:
        for first, second in combinations([system.name for system in systems], 2):
            for score in SCORES:
                after = by_key[rule, first][score] - by_key[rule, second][score]
                before = by_key[STRICT, first][score] - by_key[STRICT, second][score]
                if before * after < 0:
                    top, low = (first, second) if after > 0 else (second, first)
                    remarks.append(
                        f"By {rule}, {top} has a higher {TITLES[score]} than {low} "
                        f"({by_key[rule, top][score]:.4f}, {by_key[rule, low][score]:.4f}); strictly read, a lower one "
                        f"({by_key[STRICT, top][score]:.4f}, {by_key[STRICT, low][score]:.4f})."
                    )
    if len(systems) > 1 and len(rules) > 1 and not any(remark.startswith("By ") for remark in remarks):
        remarks.append("No rule changes the order of any two systems.")
    if len({tuple(map(plain, system.gold)) for system in systems}) > 1:
        remarks.append("The systems have different gold labels or rows, so their ranks compare different test sets.")
    return [*remarks, *(f"{name}: {rule.about}" for name, rule in rules.items())]


def table(records: Sequence[Record]) -> Table:
    """The scores by system and rule."""
    columns = {"system": "system", "rule": "rule", "weighted_f1": "weighted-F1", "weighted_f1_rank": "rank"}
    columns |= {"accuracy": "accuracy", "macro_f1": "macro-F1", "unread": "unread"}
    caption = (
        f"{', '.join(dict.fromkeys(counted(record['n']) for record in records))}. In parentheses: 95 % intervals "
        "(accuracy: Wilson, F1: bootstrap over rows). Rank: among the systems, by weighted F1. Unread: answers that "
        "the rule counts as no class. F1 is averaged over the gold labels."
    )
    return of_records("Scores by reading rule", records, columns, caption, words=("rule",), optional=(6, 5))
