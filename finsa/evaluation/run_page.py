"""The page of a run, ``index.html``: scores, classes, mistakes, curves, rows and commands, in English and Chinese.

Curves are inline SVG and need no drawing library; the page has no script and asks for nothing from elsewhere.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from finsa.config import LOWER_IS_BETTER, USED_BY, RunConfig, demonstration, safety
from finsa.config.base import headline
from finsa.evaluation import pages, tables
from finsa.evaluation.tables import MISSING, Table
from finsa.runs.run_folder import RunFolder
from finsa.runs.weight_files import read_json
from finsa.session import current_job

FILE = "index.html"
BASE = "base model (zero-shot)"
SHOWN, MOST, CHARACTERS = 12, 20_000, 240  # mistakes shown, predictions read for them, and characters of a text
POINTS, SIDE = 400, 1000  # points of a curve, and width and height of the drawing area
DESCRIBED = 20  # points of a curve that its description lists


class Score(NamedTuple):
    """A measure of one or two models.

    Args:
        title: of the measure.
        cells: value and interval of each model.
        marks: start and width of the interval, and the value, in percent of the scale; None without a value.
    """

    title: str
    cells: list[str]
    marks: list[tuple[float, float, float] | None]


class Chart(NamedTuple):
    """A curve.

    Args:
        title, note, x: title, what is next to it, and name of the horizontal axis.
        path: of the SVG, in an area of SIDE by SIDE.
        dots, joined: whether its points are shown, and whether they are joined.
        x_ticks, y_ticks: positions in percent, from the left and from the top, and labels.
        alt: a description for readers who cannot see it.
    """

    title: str
    note: str
    x: str
    path: str
    dots: bool
    joined: bool
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    alt: str


def render(
    cfg: RunConfig,
    folder: RunFolder,
    name: str,
    split: str | None,
    facts: Mapping[str, str],
    values: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    more: Mapping[str, tuple[Sequence[Table], Sequence[Any]]],
) -> str:
    """Render the page; whatever the folder lacks is left out.

    Args:
        cfg: of the run.
        folder: with ``ledger.json`` and predictions, if they exist.
        name: of the scored model.
        split: the scored split; None if none was scored.
        facts: settings and measurements.
        values: contents of ``metrics.json``.
        log: of the training.
        more: further tables and figures by section: ``Scores``, ``Time``, ``Mixture``.
    """
    ledger = read_json(folder.path / "ledger.json") or {}
    report: dict[str, Any] = values[split] if split is not None else {}
    arms = {name: report, **({BASE: values["base"]} if values.get("base") else {})} if report else {}
    measure = headline(report.get("task"))
    worst = math.inf if measure in LOWER_IS_BETTER else -math.inf
    best_first = sorted(arms, key=lambda arm: arms[arm].get(measure) or worst, reverse=measure not in LOWER_IS_BETTER)
    arms = {arm: arms[arm] for arm in best_first}
    wrong, numbers = None, None
    if report.get("task") == "regression":
        points = [(one["gold"], one["number"]) for one in islice(_predictions(folder.path), 2 * POINTS)]
        numbers = _chart("Predicted by true number", "true number", points, True, joined=False) if points else None
    elif report:
        wrong = round(report["n"] * (1 - report.get("accuracy", report.get("subset_accuracy", 1))))
    matrix = report.get("confusion") if len(report.get("per_class", ())) <= tables.MANY else None
    classes = []
    if "per_class" in report:
        found = tables.by_class(report, "By class")
        kept = "" if matrix else found.caption
        classes = [replace(found, columns=found.columns[:5], rows=[row[:5] for row in found.rows], caption=kept)]
        if matrix is None and "confusion" in report:
            classes.append(tables.frequent_errors(report))
    rows = [replace(tables.rows_by_split(ledger), caption="")] if ledger.get("splits") else []
    cells = [[bucket, f"{count:,}"] for bucket, count in ledger.get("buckets", {}).items() if count]
    if len(cells) > 1:
        rows.append(Table("Rows read", ["use", "rows"], cells))
    template = pages.environment(pages.TEMPLATES).get_template("run.html.j2")
    return template.render(
        title=f"{name}, {cfg.data.title}: run",
        name=name,
        data=cfg.data.title,
        demonstration=demonstration(cfg.model_dump(mode="json")),
        tiles=list(_tiles(folder.facts, split, values, wrong)),
        arms=list(arms),
        scores=list(_scores(arms)),
        matrix=matrix,
        labels=list(report.get("per_class", ())),
        classes=classes,
        numbers=numbers,
        wrong=wrong,
        mistakes=_mistakes(folder.path, report.get("task")) if report else [],
        charts=list(_charts(log)),
        rows=rows,
        more=more,
        commands=list(_commands(cfg, folder)),
        facts=facts,
        remarks=(values.get("router") or {}).get("warnings", []),
        many_rows=tables.MANY,
    )


# ------------------------------------------------------------------------------------------------ scores


def _tiles(
    facts: Mapping[str, Any], split: str | None, values: Mapping[str, Any], wrong: int | None
) -> Iterator[tuple[str, str, str]]:
    """Title, value and note of the numbers at the top: score, that of the base model or another one, mistakes, time."""
    if split is not None:
        report = values[split]
        titles, measure = tables.scores_of(report), headline(report.get("task"))
        other = next(one for one in titles if one != measure)
        second = (values["base"], measure, BASE) if values.get("base") else (report, other, titles[other])
        for one, key, title in ((report, measure, titles[measure]), second):
            low, high = one["intervals"].get(key) or (None, None)
            interval = "no interval" if low is None else f"95 %: {low:.3f} to {high:.3f}"
            yield title, MISSING if one.get(key) is None else f"{one[key]:.4f}", interval
        count = f"{report['n']:,}"
        yield ("rows", count, split) if wrong is None else ("mistakes", f"{wrong:,}", f"of {count} {split} rows")
    trainable, total = facts.get("trainable_parameters"), facts.get("total_parameters")
    trained = f"{trainable:,} of {total:,} parameters trained" if trainable and total else "nothing is trained"
    timed = (("training", trained), ("scoring", "of this split"))
    for what, note in [(what, note) for what, note in timed if facts.get(f"{what}_seconds")][:1]:
        seconds = facts[f"{what}_seconds"]
        yield f"{what} time", f"{seconds:.1f} s" if seconds < 100 else str(timedelta(seconds=round(seconds))), note


def _scores(arms: Mapping[str, Mapping[str, Any]]) -> Iterator[Score]:
    """All measures of the models, with their places on a scale from 0 to 1, extended if values lie outside."""
    named = {key: title for one in arms.values() for key, title in tables.scores_of(one).items()}
    named |= {key: key.replace("_", " ") for one in arms.values() for key in one.get("measures") or {}}
    for key, title in named.items():
        values = [one.get(key, (one.get("measures") or {}).get(key)) for one in arms.values()]
        pairs = [one["intervals"].get(key) for one in arms.values()]
        pairs = [pair if pair and None not in pair else None for pair in pairs]  # of a measure that is not defined
        known = [end for pair in pairs if pair for end in pair] + [value for value in values if value is not None]
        low = min([0.0, *known])
        span = (1.0 if max(known, default=1) <= 1 else 1.05 * max(known)) - low
        cells, marks = [], list[tuple[float, float, float] | None]()
        for value, pair in zip(values, pairs, strict=True):
            between = " to " if low < 0 else "-"
            interval = f" ({pair[0]:.3f}{between}{pair[1]:.3f})" if pair else ""
            cells.append(MISSING if value is None else f"{value:.4f}{interval}")
            place = None
            if value is not None:
                left, right, at = (round(100 * (one - low) / span, 2) for one in (*(pair or (value, value)), value))
                place = (left, round(right - left, 2), at)
            marks.append(place)
        yield Score(title, cells, marks)


# ------------------------------------------------------------------------------------------------ mistakes


def _mistakes(folder: Path, task: str | None) -> list[dict[str, str]]:
    """The worst of the wrong rows: by the distance of numbers, levels or sets, then by confidence."""
    found = list[tuple[float, float, int, dict[str, Any]]]()
    for place, record in enumerate(_predictions(folder)):
        gold, label = record["gold"], record["number" if task == "regression" else "label"]
        if gold == label or (task == "multi_label" and set(gold) == set(label)):
            continue
        probs, distance = record.get("probs") or {}, 0.0
        if task == "regression":
            distance = abs(gold - label)
        elif task == "multi_label":
            distance = len(set(gold) ^ set(label))
        elif "level" in record:
            distance = abs(list(probs).index(gold) - list(probs).index(label))
        confidence = 0.0 if isinstance(label, list) else float(probs.get(label, 0.0))
        found.append((distance, confidence, -place, record))
    worst = heapq.nlargest(SHOWN, found, key=lambda one: one[:3])
    described = []
    for distance, confidence, _, record in worst:
        label = record["number"] if task == "regression" else record["label"]
        gold, label = map(_named, (record["gold"], label))
        text = str(record["text"])
        if "target" in record:
            text = f"{record['target']}: {text}"
        text = text[:CHARACTERS].rstrip() + "…" if len(text) > CHARACTERS else text
        note = f"probability {confidence:.3f}" if confidence else ""
        note = f"error {distance:.4g}" if task == "regression" else note
        described.append({"id": str(record["id"]), "text": text, "gold": gold, "label": label, "note": note})
    return described


def _named(value: float | str | list[str] | None) -> str:
    """A label, a number, or the labels of a row; a generated answer may name none."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ("; ".join(value) if isinstance(value, list) else value) or "no label"


def _predictions(folder: Path) -> Iterator[dict[str, Any]]:
    file = next((folder / name for name in ("predictions.jsonl", "answers.jsonl") if (folder / name).is_file()), None)
    if file is not None:
        with file.open(encoding="utf-8") as lines:
            yield from map(json.loads, islice(lines, MOST))


# ------------------------------------------------------------------------------------------------ curves


def _charts(log: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    """Training loss, validation loss and validation score by step; or the score by penalty of a linear classifier."""
    keys = {key for record in log for key in record}
    score = next((one for one in ("eval_macro_f1", "eval_rmse") if one in keys), None)
    titles = {"loss": "Training loss", "eval_loss": "Validation loss"}
    titles |= {} if score is None else {score: f"Validation {tables.TITLES[score.removeprefix('eval_')]}"}
    by_penalty = "strength" in keys
    for key, title in titles.items():
        across = "strength" if by_penalty else "step"
        known = {one[across]: one[key] for one in log if across in one and math.isfinite(one.get(key, math.nan))}
        points = sorted(known.items())
        if len(points) < 2 or (by_penalty and key != score):
            continue
        note = ""
        if key == score:
            sign = -1 if key.removeprefix("eval_") in LOWER_IS_BETTER else 1
            place, value = max(points, key=lambda point: sign * point[1])
            note = f"best {value:.4f} at {'C' if by_penalty else 'step'} {place:g}"
        steps = "C, the inverse strength of the penalty" if by_penalty else "optimizer step"
        yield _chart(title, steps, points, key != "loss", note, log_x=by_penalty)


def _chart(
    title: str,
    x: str,
    points: Sequence[tuple[float, float]],
    dots: bool,
    note: str = "",
    joined: bool = True,
    log_x: bool = False,
) -> Chart:
    """Scale points to the drawing area; a curve of very many points is thinned."""
    if joined:
        points = [*points[: -1 : math.ceil(len(points) / POINTS)], points[-1]]
    lowest, highest = min(one for _, one in points), max(one for _, one in points)
    log_y = joined and 0 < 20 * lowest < highest  # a loss that starts high would be a flat line otherwise
    along = [math.log10(one) if log_x else one for one, _ in points]
    up = [math.log10(one) if log_y else one for _, one in points]
    x_low, x_high, y_low, y_high = min(along), max(along), min(up), max(up)
    edge = 0.06 * (y_high - y_low) or 0.5
    y_low, y_high = (0.0 if not log_y and 0 <= y_low < 0.2 * y_high else y_low - edge), y_high + edge
    width, height = (x_high - x_low) or 1, y_high - y_low
    at = [
        f"{SIDE * (one - x_low) / width:.0f} {SIDE * (y_high - other) / height:.0f}"
        for one, other in zip(along, up, strict=True)
    ]
    described = ", ".join(f"{one:g}: {other:.3f}" for one, other in points[:DESCRIBED])
    described += f" and {len(points) - DESCRIBED} more" if len(points) > DESCRIBED else ""
    path = "M" + ("L" if joined else "h0M").join(at) + "h0"
    marks = [one for one, _ in points] if log_x else _ticks(x_low, x_high)
    x_ticks = [((math.log10(one) if log_x else one), f"{one:g}") for one in marks]
    y_ticks = [(one, f"{10**one:g}" if log_y else f"{one:g}") for one in _ticks(y_low, y_high)]
    if log_y:
        y_ticks = [(place, text) for place, text in y_ticks if place == round(place)]
    return Chart(
        title,
        note,
        x,
        path,
        (dots and len(points) <= POINTS // 5) or not joined,
        joined,
        [(round(100 * (place - x_low) / width, 2), text) for place, text in x_ticks],
        [(round(100 * (y_high - place) / height, 2), text) for place, text in y_ticks],
        f"{title} by {'C' if log_x else x}: {described}.",
    )


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in an interval: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / most or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * one for one in (1, 2, 2.5, 5, 10) if power * one >= rough)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{step * one:.6g}") for one in range(first, math.floor(high / step + 1e-9) + 1)]


# ------------------------------------------------------------------------------------------------ commands


def _commands(cfg: RunConfig, folder: RunFolder) -> Iterator[tuple[str, str]]:
    """What to do with the run: title and command."""
    stage, job, place = cfg.stage.name, current_job(), _shown(folder.path)
    if job is not None and job.choices.get("stage") == stage:  # not a part of a search, a chain or a mixture
        words = [word for word in job.overrides if not word.startswith(("resume=", "fresh="))]
        command = safety.masked(shlex.join(["python", "run.py", *words]))
        yield "This run", command
        if stage in USED_BY["resume"]:
            yield "Resume it after an interruption", f"{command} resume=true"
    if stage in ("train", "evaluate"):
        yield "Repeat it and compare every result", f"python run.py stage=rerun run={place}"
    source = folder.facts.get("run") if stage == "evaluate" else place if stage != "pretrain" else None
    if source in (None, "None"):
        return
    model = _shown(Path(str(source)))
    chinese = any("一" <= letter <= "鿿" for letter in cfg.data.prompt)
    text = "公司上半年净利润同比增长三成" if chinese else "Net profit rose by a third"
    target = (" target=公司" if chinese else " target=company") if cfg.data.asks_for_target else ""
    yield "Predict a text", f"python run.py stage=predict run={model} text={shlex.quote(text)}{target}"
    yield "Predict a file", f"python run.py stage=predict run={model} input=texts.csv output=answers.csv"
    yield "Serve it in the browser and by HTTP", f"python run.py stage=serve run={model}"
    if cfg.method.baseline is None and cfg.method.learn != "nothing" and stage != "cascade":
        what = " stage.what=merged" if cfg.method.learn == "all" else ""
        yield "Push it to a model hub", f"python run.py stage=push run={model} stage.repo=my-org/my-model{what}"
    yield "Compare it with others", f"python run.py stage=report runs={_shown(folder.path.parent)}"


def _shown(path: Path) -> str:
    """A path for a command line: relative to the working directory if it is inside it, otherwise absolute."""
    inside = path.is_absolute() and path.is_relative_to(Path.cwd())
    return shlex.quote(os.path.relpath(path) if inside else str(path))
