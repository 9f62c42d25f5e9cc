"""Reports: from run folders to ``report.csv``, ``report.md``, ``report.html`` and figures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from finsa.config import Published, ReportStage, data_title, demonstration, read_section
from finsa.config.base import MEASURES, headline
from finsa.errors import RunError
from finsa.evaluation import costs, finished_runs, moe, pages, report_figures, selective, tables
from finsa.evaluation import published as published_tables
from finsa.evaluation.comparison import COVERAGES, SCORES, Comparison, Record, compare, forward_gaps, on_mixed_texts
from finsa.evaluation.figures import Figure
from finsa.evaluation.finished_runs import Run, RunGroup
from finsa.evaluation.tables import MISSING, Table, format_value
from finsa.runs import files

# Sections of the page: title, tables by the first word of their key, figures by file name.
SECTIONS = (
    ("Over the data sets", ("suite",), ()),
    ("Scores", ("scores", "measures"), ("f1", "scores", "calibration")),
    ("Abstaining", ("abstaining", "selection"), ("risk_coverage",)),
    ("Tests", ("tests", "baseline", "targets"), ()),
    ("Time", ("forward", "periods"), ()),
    ("Mixture", ("mixture",), ("router",)),
    ("Published", ("comparison", "published"), ()),
    ("Classes", ("classes",), ("confusion_matrices", "precision_recall", "label_distribution")),
    ("Training and cost", ("answers", "costs"), ("pareto", "training_curves", "penalties")),
    ("Runs", ("runs", "skipped"), ()),
)
ON_TERMINAL = (
    "suite",
    "scores",
    "measures",
    "abstaining",
    "selection",
    "tests",
    "baseline",
    "targets",
    "forward",
    "mixture",
    "comparison",
    "answers",
    "costs",
    "published",
    "skipped",
)
TITLES = {name: tables.TITLES[name] for name in SCORES}
COSTS = {
    "rows_per_second": "samples/s",
    "peak_memory_gib": "peak memory (GiB)",
    "trainable_parameters": "trainable parameters",
    "seconds_to_best": "seconds to the best score",
    "training_seconds": "training seconds",
    "wall_seconds": "total seconds",
    "prompt_tokens": "tokens per prompt",
    "milliseconds_per_row": "ms per test row",
}
THOUGHTS = {"thought_tokens": "thought tokens per answer", "thoughts_cut": "thoughts cut (share)"}


@dataclass(frozen=True)
class Report:
    """The contents of a report.

    Args:
        title: page title.
        facts: data, model, device and version of the runs.
        remarks: the summary, one sentence each.
        tables: by key; see `SECTIONS`.
        comparison: of the run groups; None if only a published table is reported.
        published: the published table's rows; None without one.
        suite: records of a table over several data sets; None for one.
    """

    title: str
    facts: dict[str, str]
    remarks: list[str]
    tables: dict[str, Table]
    comparison: Comparison | None
    published: published_tables.Analysis | None
    suite: list[Record] | None = None


def build(
    paths: Sequence[Path],
    options: ReportStage,
    published: Published | None,
    failed: Mapping[str, str],
    named: Collection[Path] = (),
) -> Report:
    """Read runs and compare them.

    Args:
        paths: run folders; none to report a published table alone.
        options: of the stage.
        published: the table to compare the runs with; None: the one named by the runs' configurations.
        failed: jobs without a folder and their errors.
        named: the paths that the user named individually, which may not be skipped.

    Raises:
        RunError: for folders that cannot be read, or runs that cannot be compared.
        ConfigError: for an unknown ``stage.baseline``.
    """
    all_tables: dict[str, Table] = {}
    facts, remarks, comparison = {}, [], None
    skipped = dict(failed)
    if paths:
        runs, unfinished = finished_runs.load(paths)
        paths, skipped = [run.path for run in runs], skipped | unfinished
        published = published or _configured_table(runs)
    beside = published  # a table over several data sets, of which these runs have none
    if published is not None and not isinstance(published.data, str):
        found = [run.data for run in runs] if paths else []
        sets = {data: [path for path, its in zip(paths, found, strict=False) if its == data] for data in published.data}
        sets = {data: of_data for data, of_data in sets.items() if of_data}
        if len(sets) > 1 or not paths:
            return _over_sets(sets, options, published, skipped, named)
        published = published.of(found[0])
    if paths:
        gaps, compared = forward_gaps(runs, options)
        runs, others = finished_runs.comparable(compared, options.training_rows, () if gaps else named)
        groups, notes = finished_runs.group(runs)
        prices = None if options.prices is None else read_section(costs.Prices, "stage.prices", options.prices)
        comparison = compare(groups, options)
        costs.add(comparison.records, comparison.groups, prices)
        skipped |= others
        facts, remarks = _facts(runs), [*comparison.remarks, *notes]
        for group in comparison.groups:
            remarks += moe.remarks(group.name, group.runs[0].metrics)
        remarks += list(dict.fromkeys(filter(None, (demonstration(run.config) for run in runs))))[:1]
        all_tables = _tables(comparison, published, options)
        if (options.risk or options.coverage) and "selection" not in all_tables:
            remarks.append(
                "Limits of risk and coverage need one class per row and validation predictions: no run has both."
            )
        if prices and (unknown := prices.runs.keys() - {group.name for group in groups}):
            remarks.append(f"stage.prices: no configuration is called {', '.join(sorted(unknown))}.")
        if gaps:
            all_tables["forward"] = _forward(gaps)
            remarks[:0] = [_gap_remark(gap) for gap in gaps]
    if beside is not None and published is None:
        all_tables["suite"] = _suite(published_tables.across(beside, {}), beside)
        known = f"data {runs[0].data} instead of {', '.join(beside.data)}"
        remarks.append(f"The published table {beside.name} has no row for these runs: {known}.")
    analysis = published_tables.analyze(published) if published else None
    if published is not None and analysis is not None:
        all_tables["published"] = _published(analysis, published.name, published.source)
        if comparison is not None and "comparison" not in all_tables:
            differences = "; ".join(published_tables.mismatches(published, comparison.groups))
            remarks.append(f"The published table {published.name} has no row for these runs: {differences}.")
        remarks += [f"Published table {published.name}: {remark}" for remark in analysis.remarks]
    if skipped:
        all_tables["skipped"] = _skipped(skipped)
        remarks.append(f"{len(skipped)} jobs or folders were skipped; see the last table.")
    title = f"{facts.get('data', published.name if published else '')}: report"
    return Report(title, facts, remarks, all_tables, comparison, analysis)


def _over_sets(
    sets: Mapping[str, Sequence[Path]],
    options: ReportStage,
    published: Published,
    failed: Mapping[str, str],
    named: Collection[Path],
) -> Report:
    """One report over several data sets: a table of all systems, the tables of each set, and what differs."""
    assert not isinstance(published.data, str)
    reports = {data: build(paths, options, published, {}, named) for data, paths in sets.items()}
    by_key, by_data, differences, remarks = dict[str, Table](), dict[str, list[Record]](), list[str](), list[str]()
    for data, one in reports.items():
        assert one.comparison is not None
        groups = one.comparison.groups
        described = [_described(group) for group in groups]
        by_data[data] = [more | record for more, record in zip(described, one.comparison.records, strict=True)]
        kept = [key for key in one.tables if key.split(" ")[0] not in ("comparison", "published", "costs", "classes")]
        by_key |= {f"{key} {data}": replace(one.tables[key], title=f"{data}: {one.tables[key].title}") for key in kept}
        n, rows = published.data[data].n, len(groups[0].runs[0].rows)
        if n not in (None, rows):
            differences.append(f"{data} has {rows:,} test rows here and {n:,} in the publications")
        trained = {str(run.config["data"]["name"]) for group in groups for run in group.runs} - {data}
        if trained:
            differences.append(f"{data} is scored by runs trained on {', '.join(sorted(trained))}")
        remarks.append(f"{data}: {one.comparison.remarks[0]}")
    bases = sorted({record["base"] for of_data in by_data.values() for record in of_data})
    sizes = [row.billions for row in published.rows.values() if row.billions]
    if bases and sizes:
        span = f"{min(sizes):g} to {max(sizes):g} billion parameters"
        differences.insert(0, f"base models ({', '.join(bases)} here, {span} in the publications)")
    notes = [note for test in published.data.values() for note in test.notes]
    remarks = [
        *([f"What differs: {'; '.join(differences)}."] if differences else []),
        "Only scores of the same measure can be compared.",
        *(*notes, *published.notes, *remarks),
    ]
    suite = published_tables.across(published, by_data)
    by_key = {"suite": _suite(suite, published), **by_key}
    if failed:
        by_key["skipped"] = _skipped(failed)
    written = datetime.now().astimezone().isoformat(timespec="minutes")
    facts = {"data": ", ".join(published.data), "source": published.source, "written": written}
    return Report(f"{published.name}: report", facts, remarks, by_key, None, None, suite)


def _skipped(reasons: Mapping[str, str]) -> Table:
    return Table("Skipped", ["job or folder", "reason"], [list(pair) for pair in reasons.items()], words=("reason",))


def _described(group: RunGroup) -> Record:
    """Base model, size in billions of parameters and training of a run group."""
    method, facts = group.runs[0].config["method"], group.runs[0].facts
    encoder = (method.get("baseline") or {}).get("hub_id")
    base = group.model if not method.get("baseline") else encoder or "no pretrained model"
    total = facts.get("total_parameters")
    return {"base": base, "billions": total / 1e9 if total else None, "training": group.method}


def _suite(records: Sequence[Record], published: Published) -> Table:
    rows = []
    for record in records:
        cells = []
        for data in published.data:
            low, high = record.get(f"{data}_low"), record.get(f"{data}_high")
            interval = "" if low is None or high is None else f" {low:.2f}-{high:.2f}"
            cells.append(MISSING if record.get(data) is None else f"{record[data]:.3f}{interval}")
        size = "" if record["billions"] is None else f"{record['billions']:.2g}"
        more = [record["base"] or MISSING, size or MISSING, record["training"] or MISSING]
        rows.append([record["system"], record["measure"].replace("_", " ").replace("f1", "F1"), *cells, *more])
    sets = len(published.data)
    columns = ["system", "measure", *published.data, "base model", "billions", "training"]
    caption = f"Rows with an interval (95 %) are these runs; the others are as published: {published.source}."
    optional = (sets + 4, sets + 3, sets + 2)
    words = ("measure", "base model", "training")
    return Table(
        f"{published.name}: these runs beside published figures", columns, rows, caption, words=words, optional=optional
    )


def _configured_table(runs: Sequence[Run]) -> Published | None:
    """The published table named by the runs' configurations; None if they name none or several."""
    named = {str(run.config.get("published")): run.config.get("published") for run in runs}
    (values, *others) = named.values()
    if others or values is None:
        return None
    return Published.model_validate(values, strict=False)  # not strict: YAML has lists instead of tuples


def _facts(runs: Sequence[Run]) -> dict[str, str]:
    first = runs[0]
    found: Any = ()
    if first.task == "multi_label":
        found = first.truth.sum(axis=0).astype(int)
    elif first.task != "regression":
        found = np.bincount(first.gold, minlength=len(first.labels))
    by_label = ", ".join(f"{label} {count:,}" for label, count in zip(first.labels, found, strict=True))
    if first.task == "regression":
        by_label = f"mean {first.truth.mean():.3f}, standard deviation {first.truth.std():.3f}"
    facts: dict[str, Any] = {
        "data": data_title(first.config["data"]),
        "test rows": f"{len(first.rows):,}: {by_label}",
        "data fingerprint": first.facts.get("data_fingerprint"),
        "model": ", ".join(dict.fromkeys(str(run.config["model"]["name"]) for run in runs)),
        "device": ", ".join(dict.fromkeys(str(run.facts["device"]) for run in runs if run.facts.get("device"))),
        "commit": ", ".join(dict.fromkeys(str(run.facts.get("git_commit"))[:12] for run in runs)),
        "written": datetime.now().astimezone().isoformat(timespec="minutes"),
    }
    return {name: str(value) for name, value in facts.items() if value}


def write(report: Report, folder: Path) -> None:
    """Write tables, figures and the page into a folder.

    Raises:
        RunError: for a file that cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[Figure] = []
    if report.comparison is not None:
        drawn = report_figures.draw(report.comparison, folder / "figures")
    figures = {figure.file.stem: figure for figure in drawn}
    sections = [
        (
            name,
            [table for one in keys for key, table in report.tables.items() if key.split(" ")[0] == one],
            [figures[one] for one in pictures if one in figures],
        )
        for name, keys, pictures in SECTIONS
    ]
    texts = {"report.md": _markdown(report, [figure.file.relative_to(folder) for figure in drawn])}
    texts["report.html"] = pages.render(report.title, report.facts, report.remarks, sections, "figures/", chinese=True)
    if report.comparison is not None:
        texts["report.csv"] = tables.to_csv(report.comparison.records)
    if report.suite is not None:
        texts["report.csv"] = tables.to_csv(report.suite)
    if report.published is not None:
        texts["published.csv"] = tables.to_csv(report.published.records)
    for name, text in texts.items():
        try:
            files.write_text(folder / name, text)
        except OSError as error:
            raise RunError(f"{folder / name} cannot be written: {error.strerror}") from None


def _markdown(report: Report, figures: Sequence[Path]) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in report.facts.items())
    remarks = "\n".join(f"- {remark}" for remark in report.remarks)
    images = "\n".join(f"![{file.stem.replace('_', ' ')}]({file.as_posix()})" for file in figures)
    parts = [f"# {report.title}", facts, remarks, *(table.markdown() for table in report.tables.values()), images]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def show(report: Report, folder: Path, again: str | None) -> None:
    """Print the main tables, the summary and the paths of the remaining files.

    Args:
        again: the command that writes this report again; None if no runs were compared.
    """
    for name in ON_TERMINAL:
        for key, table in report.tables.items():
            if key.split(" ")[0] == name and (name != "published" or "comparison" not in report.tables):
                table.show()
    for remark in report.remarks:
        tables.console().print(remark, highlight=False, markup=False)
    print(f"report: {folder / 'report.html'} (also report.md, report.csv, figures/)")
    if again is not None:
        print(f"to use another baseline: {again} stage.baseline=<configuration>")


# ------------------------------------------------------------------------------------------------ tables


def _tables(comparison: Comparison, published: Published | None, options: ReportStage) -> dict[str, Table]:
    groups, records, baseline = comparison.groups, comparison.records, comparison.baseline
    task = groups[0].runs[0].task
    by_key = {"scores": _scores(records, task)}
    measures = list(dict.fromkeys(name for group in groups for name in group.runs[0].report.get("measures") or {}))
    if measures:
        by_key["measures"] = _measures(records, measures)
    if task not in MEASURES:
        by_key["abstaining"] = _abstaining(records)
        if found := _selection(groups, options):
            by_key["selection"] = selective.table(found, "Limits of risk and coverage on the test split")
    if len(groups) > 1:
        top = groups[0].name
        by_key["tests"] = _tests(records, top, "vs_best_", f"Against the best, {top}", task)
        if baseline != top and len(groups) > 2:
            by_key["baseline"] = _tests(records, baseline, "", f"Against {baseline}", task)
    if published is not None and task not in MEASURES:
        for group, record in zip(groups, records, strict=True):
            record |= published_tables.published_scores(published, group, record)
        if any(record["published_row"] for record in records):
            differences = published_tables.mismatches(published, groups)
            by_key["comparison"] = _published_comparison(records, published.name, differences)
    if mixed := on_mixed_texts(groups, options):
        by_key["targets"] = _mixed_texts(mixed)
    periods = {group.name: scored for group in groups if (scored := group.runs[0].report.get("periods"))}
    if periods:
        by_key["periods"] = tables.by_period(periods)
    for group in groups:
        for number, table in enumerate(moe.tables(group.name, group.runs[0].metrics)):
            by_key[f"mixture {group.name} {number}"] = table
    classes = [
        [record["arm"], label, *(_cell(record, f"{name}_{label}") for name in ("precision", "recall", "f1"))]
        for record in records
        for label in groups[0].runs[0].labels
    ]
    columns = ["configuration", "class", "precision", "recall", "F1"]
    if classes:
        by_key["classes"] = Table("By class", columns, classes, words=("class",))
    if any(record["seconds_per_1000"] is not None for record in records):
        by_key["answers"] = costs.table(records, task)
    by_key["costs"] = _costs(records)
    in_runs = MEASURES.get(task, ("accuracy", "macro_f1"))[:2]
    runs = [
        [
            group.name,
            str(run.config["seed"]),
            *(format_value(name, run.report[name]) or MISSING for name in in_runs),
            str(run.path),
        ]
        for group in groups
        for run in group.runs
    ]
    columns = ["configuration", "seed", *(tables.TITLES[name] for name in in_runs), "folder"]
    return {**by_key, "runs": Table("Runs", columns, runs, words=("folder",))}


def _cell(record: Record, name: str) -> str:
    return format_value(name, record.get(name)) or MISSING


def _think(records: Sequence[Record]) -> bool:
    """Whether any model wrote thoughts, whose price then stands beside the scores."""
    return any(record.get("thought_tokens") is not None for record in records)


def _scores(records: Sequence[Record], task: str) -> Table:
    """Scores of all groups, as ``0.6808 ± 0.0123 (0.6450-0.7170)``, with the spread if there are several runs."""
    rows, plain = [], task not in MEASURES
    shown = {name: tables.TITLES[name] for name in MEASURES.get(task, SCORES)}
    further = ("macro_precision", "macro_recall", "calibration_error") if plain else ()
    for record in records:
        row = [record["arm"], str(record["runs"])]
        for name in shown:
            spread = f" ± {_cell(record, f'{name}_sd')}" if record[f"{name}_sd"] is not None else ""
            between = "-" if plain else " to "  # correlations may be negative
            interval = f" ({_cell(record, f'{name}_low')}{between}{_cell(record, f'{name}_high')})"
            row.append(f"{_cell(record, name)}{spread}{interval if record[f'{name}_low'] is not None else ''}")
        price = ("prompt_tokens", "thought_tokens", "milliseconds_per_row") if _think(records) else ()
        rows.append(row + [_cell(record, name) for name in (*further, *price)])
    marked = next((number for number, record in enumerate(records) if record["best"]), None)
    how = "accuracy: Wilson, F1: bootstrap over rows" if plain else "bootstrap over rows"
    caption = f"In parentheses: 95 % intervals ({how})."
    if any(record["runs"] > 1 for record in records):
        caption += " Several runs: mean ± standard deviation over seeds, bootstrap over rows and runs."
    columns = ["configuration", "runs", *shown.values(), *("macro-P", "macro-R", "ECE")[: len(further)]]
    columns += [COSTS["prompt_tokens"], THOUGHTS["thought_tokens"], COSTS["milliseconds_per_row"]] * _think(records)
    optional = (7, 6, 5, 4, 1) if plain else (*range(len(shown) + 1, 2, -1), 1)
    return Table("Scores on the test split", columns, rows, caption, marked, optional=optional)


def _measures(records: Sequence[Record], names: Sequence[str]) -> Table:
    """Further measures, with intervals of single runs, and of the mean cost of several."""
    rows = []
    for record in records:
        cells = []
        for name in names:
            known = record.get(f"{name}_low") is not None
            interval = f" ({_cell(record, f'{name}_low')}-{_cell(record, f'{name}_high')})" if known else ""
            cells.append((format_value(name, record.get(name)) or MISSING) + interval)
        rows.append([record["arm"], *cells])
    caption = (
        "In parentheses: 95 % bootstrap intervals over rows, of the cost also over runs; of several runs, the mean."
    )
    columns = ["configuration", *(name.replace("_", " ") for name in names)]
    return Table("Further measures on the test split", columns, rows, caption, optional=range(len(names), 1, -1))


def _abstaining(records: Sequence[Record]) -> Table:
    """The area under the risk-coverage curve, and the error rate if only the surest predictions are used."""
    rates = [f"error_at_{share:.0%}" for share in COVERAGES]
    rows = []
    for record in records:
        known = record["aurc_low"] is not None
        interval = f" ({_cell(record, 'aurc_low')}-{_cell(record, 'aurc_high')})" if known else ""
        rows.append([record["arm"], _cell(record, "aurc") + interval, *(_cell(record, name) for name in rates)])
    caption = (
        "AURC: mean error rate over all shares of answered rows, the surest first; lower is better. In parentheses: "
        "95 % bootstrap intervals; of several runs, the mean. stage.risk sets a limit."
    )
    columns = ["configuration", "AURC", *(f"error at {share:.0%}" for share in COVERAGES)]
    return Table("If unsure predictions are left out (test split)", columns, rows, caption, optional=(3,))


def _selection(groups: Sequence[RunGroup], options: ReportStage) -> dict[str, Any]:
    """Realized risk and coverage on the test rows of every run with validation predictions, if limits are set."""
    found = {}
    for group in groups if options.risk is not None or options.coverage is not None else ():
        for run in group.runs:
            place = run.path if run.facts.get("stage") != "evaluate" else Path(str(run.facts.get("run")))
            rows = selective.validation(place, run.labels)
            test = selective.read(run.path / "predictions.jsonl", run.labels, (None, "test"))
            if rows is not None and test is not None:
                name = group.name if len(group.runs) == 1 else f"{group.name} {run.config['seed']}"
                found[name] = selective.realized(selective.choose(options, run.labels, rows), test.probs, test.gold)
    return found


def _tests(records: Sequence[Record], reference: str, prefix: str, title: str, task: str) -> Table:
    """Paired tests of all other groups against the group `reference`, whose columns begin with `prefix`."""
    rows = []
    for record in records:
        if record["arm"] != reference:
            low, high, fixed, broken = (
                _cell(record, prefix + name) for name in ("difference_low", "difference_high", "fixed", "broken")
            )
            difference, p, mcnemar, verdict = (
                _cell(record, prefix + name) for name in ("difference", "bootstrap_p_holm", "mcnemar_p_holm", "verdict")
            )
            cells = [difference, f"{low} to {high}", p, f"{fixed} / {broken}", mcnemar, verdict]
            rows.append([record["arm"], *cells])
    measure, plain = tables.TITLES[headline(task)], task not in MEASURES
    columns = ["configuration", f"{measure} difference", "interval", "p", "fixed / broken", "McNemar p", "verdict"]
    caption = f"Difference: {measure} of the configuration minus that of {reference}, by a paired bootstrap. "
    if plain:
        caption += (
            f"Fixed, broken: rows that only the configuration, only {reference} classifies correctly, with the exact "
            "McNemar test. "
        )
    else:  # one class per row only
        rows, columns = [[*row[:4], row[6]] for row in rows], [*columns[:4], columns[6]]
    if len(rows) > 1:
        columns = [f"{name} (Holm)" if name in ("interval", "p", "McNemar p") else name for name in columns]
        caption += (
            f"Holm: corrected for {len(rows)} comparisons; each interval has the confidence level of its comparison's "
            "step in Holm's procedure, 95 % or more. "
        )
    else:
        caption += "The interval is for 95 %. "
    caption += "Better or worse: p of the difference below 0.05, that is, its interval excludes 0."
    return Table(title, columns, rows, caption, words=("verdict",), optional=(5, 4, 2) if plain else (2,))


def _mixed_texts(records: Sequence[Record]) -> Table:
    """Scores on the rows whose text has several targets with different labels; the first record is the reference."""
    rows = []
    for record in records:
        cells = [
            f"{_cell(record, name)} ({_cell(record, f'{name}_low')}-{_cell(record, f'{name}_high')})"
            for name in TITLES
            if name in record
        ]
        tested = "difference" in record
        interval = f"{_cell(record, 'difference_low')} to {_cell(record, 'difference_high')}" if tested else MISSING
        tests = [_cell(record, name) if tested else MISSING for name in ("difference", "bootstrap_p_holm", "verdict")]
        rows.append([record["arm"], *cells, tests[0], interval, *tests[1:]])
    columns = [
        "configuration",
        TITLES["accuracy"],
        TITLES["macro_f1"],
        "macro-F1 difference",
        "interval",
        "p",
        "verdict",
    ]
    caption = (
        f"The {records[0]['n']:,} test rows whose text has several targets with different labels. In parentheses: 95 % "
        f"bootstrap intervals. Difference from {records[0]['arm']}: paired bootstrap, interval and p corrected by Holm."
    )
    return Table(
        "Texts whose targets have different labels", columns, rows, caption, words=("verdict",), optional=(4, 1)
    )


def _forward(gaps: Sequence[Record]) -> Table:
    rows = []
    for gap in gaps:
        scores = [f"{gap['macro_f1']:.4f} ({gap['rule']})", f"{gap['forward_macro_f1']:.4f}", f"{gap['gap']:.4f}"]
        rows.append([gap["arm"], *scores, f"{gap['gap_low']:.4f} to {gap['gap_high']:.4f}"])
    columns = ["configuration", "macro-F1, mixed in time", "on later rows", "gap", "interval"]
    caption = "Gap: how much lower macro-F1 is on rows later than all training rows. 95 % bootstrap over rows and runs."
    return Table("Forward in time", columns, rows, caption)


def _gap_remark(gap: Record) -> str:
    found = "the interval contains 0" if gap["gap_low"] <= 0 <= gap["gap_high"] else "expect the score on later rows"
    return (
        f"Macro-F1 of {gap['arm']} is {gap['gap']:.4f} ({gap['gap_low']:.4f} to {gap['gap_high']:.4f}) lower on later "
        f"rows than on a split mixed in time: {found}."
    )


def _costs(records: Sequence[Record]) -> Table:
    rows, shown = [], COSTS | (THOUGHTS if _think(records) else {})
    for record in records:
        cells = {name: _cell(record, name) for name in shown}
        if record["trainable_parameters"] is not None:
            cells["trainable_parameters"] = f"{record['trainable_parameters']:,}"
        rows.append([record["arm"], *cells.values()])
    caption = "Best score: the validation that selected the checkpoint, counted from the start of training."
    return Table("Cost", ["configuration", *shown.values()], rows, caption, optional=(5, 4, 3, 6, 7, 8))


def _published_comparison(records: Sequence[Record], name: str, mismatches: Sequence[str]) -> Table:
    rows = [
        [record["arm"], record["published_row"] or MISSING]
        + [_cell(record, key) for score in SCORES for key in (f"published_{score}", f"{score}_minus_published")]
        for record in records
    ]
    columns = ["configuration", "published row", *(text for title in TITLES.values() for text in (title, "difference"))]
    caption = (
        "Scores as published: from the confusion matrix if there is one, otherwise as printed. Differences: these "
        "runs minus the publication."
    )
    if mismatches:
        caption += f" These runs differ from the published setup: {'; '.join(mismatches)}."
    title = f"Comparison with the published table {name}"
    return Table(title, columns, rows, caption, words=("published row",), optional=(7, 6, 3, 2, 1))


def _published(analysis: published_tables.Analysis, name: str, source: str) -> Table:
    """The rows of a published table with intervals and tests."""
    rows = []
    for record in analysis.records:
        accuracy = _cell(record, "accuracy")
        if record["right"] is not None:
            accuracy += f" ({_cell(record, 'accuracy_low')}-{_cell(record, 'accuracy_high')})"
        low, high = _cell(record, "p_low"), _cell(record, "p_high")
        scores = [_cell(record, key) for key in ("macro_f1", "macro_f1_recomputed", "weighted_f1", "against")]
        row = [record["row"], _cell(record, "right"), accuracy, *scores, low if low == high else f"{low} to {high}"]
        rows.append([*row, _cell(record, "p_high_holm"), _cell(record, "verdict")])
    columns = ["row", "correct", "accuracy", "macro-F1", "recomputed", "weighted-F1", "against"]
    columns += ["McNemar p", "largest p (Holm)", "verdict"]
    caption = (
        f"{source}. Scores as printed; recomputed: macro-F1 over the real classes, from the confusion matrix; 95 % "
        "Wilson intervals. If only totals are published, p is the range over all pairs that fit them, and a "
        "verdict is given if it holds for all of them."
    )
    notes = [f"{record['row']}: {record['note']}" for record in analysis.records if record["note"]]
    if notes:
        caption += f" Notes. {'. '.join(notes)}."
    title = f"The published table {name}"
    return Table(title, columns, rows, caption, words=("against", "verdict"), optional=(5, 1, 7, 4, 6, 8))
