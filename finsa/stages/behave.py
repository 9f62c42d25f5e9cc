"""Test the behavior of finished runs on changed rows of their test split."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from finsa.config import BehaveStage, Behavior, RunConfig, catalogue, locate, read_section
from finsa.data.prompts import with_target
from finsa.errors import ConfigError, Problem, RunError
from finsa.evaluation import behavior, figures, finished_runs, pages
from finsa.inference import predictor
from finsa.runs import files
from finsa.runs.progress import Display
from finsa.runs.run_folder import Result
from finsa.session import Session


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Change the test rows by the rules, predict those that a run answers correctly, and count what fails.

    Raises:
        ConfigError: for rules that do not fit the labels or the language.
        RunError: for runs that are not comparable, or without one class per row.
    """
    stage = cfg.stage
    assert isinstance(stage, BehaveStage)
    named = [cfg.run] if cfg.run is not None else [cfg.runs] if isinstance(cfg.runs, str) else list(cfg.runs or ())
    runs, _ = finished_runs.load(finished_runs.find_folders(named))
    runs, skipped = finished_runs.comparable(runs, "any", [locate(name) for name in named])
    if runs[0].task != "classification":
        raise RunError(f"run: {runs[0].path} is of task={runs[0].task}; tests of behavior need one class per row")
    groups, _ = finished_runs.group(runs)
    several = {one.path: len(group.runs) > 1 for group in groups for one in group.runs}
    names = {one.path: group.name for group in groups for one in group.runs}
    runs = [one for one in runs if one.path in names]
    records = {one.path: predictor.read(str(one.path)) for one in runs}  # all folders, before a model is loaded
    rows = finished_runs.read_lines(runs[0].path / "predictions.jsonl")
    texts, gold = [str(row["text"]) for row in rows], [str(row["gold"]) for row in rows]
    rules = _rules(cfg, stage, texts)
    made = behavior.cases(texts, gold, runs[0].labels, rules, stage.only)
    failed, wrong = dict[str, dict[int, bool]](), list[str]()
    display = Display(cfg.train.progress_seconds)
    for one in runs:
        name = names[one.path] + (f" seed {one.config['seed']}" if several[one.path] else "")
        places = [place for place, case in enumerate(made) if one.correct[case.row]]
        of_places = [(rows[made[place].row], made[place].text) for place in places]
        changed = [with_target(row["target"], text) if "target" in row else text for row, text in of_places]
        predictor.announce(records[one.path].name)
        model = predictor.load(records[one.path], cfg.train.score_tokens, cfg.train.threads, session=session)
        try:
            with display.work(f"changed rows, {name}", len(places)) as work:
                found = model(changed, work.moved).predicted
        finally:
            model.close()
        failed[name] = {place: label != made[place].expected for place, label in zip(places, found, strict=True)}
        for case, label in zip([made[place] for place in places], found, strict=True):
            if label != case.expected:
                line = {"run": name, "rule": case.rule, "id": rows[case.row]["id"], "text": texts[case.row]}
                line |= {"changed": case.text, "expected": case.expected, "label": label}
                wrong.append(json.dumps(line, ensure_ascii=False) + "\n")
    rated, pairs = behavior.rates(made, failed), behavior.paired(made, failed)
    folder = Path(cfg.output or f"{cfg.output_dir}/behave_{datetime.now():%Y-%m-%d_%H-%M-%S}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "behave_failures.jsonl", "".join(wrong))
    used = {name: rule for name, rule in rules.rules.items() if stage.only is None or name in stage.only}
    worst = max(rated, key=lambda one: one["rate_low"] or 0)
    most = f"{worst['run']} fails {worst['failures']:,} of {worst['tested']:,} rows changed by {worst['rule']}"
    remarks = [f"Highest lower end of an interval: {most}.", *(f"{name}: {one.about}." for name, one in used.items())]
    if unused := used.keys() - {case.rule for case in made}:
        remarks.append(f"No test row is changed by: {', '.join(sorted(unused))}.")
    remarks += [f"{path} was skipped: {reason}" for path, reason in skipped.items()]
    facts = {"rules": rules.name, "test rows": f"{len(rows):,}", "runs": ", ".join(map(str, names))}
    file, label = folder / "behave.png", "share of failures"
    figure = figures.bars(rated, "rule", "run", "rate", "Failure rates by rule", label, file)
    pages.publish(folder, "behave", "Tests of behavior", facts, remarks, behavior.tables(rated, pairs), figure, rated)
    return Result("behave", folder, {f"{one['run']}, {one['rule']}": one for one in rated})


def _rules(cfg: RunConfig, stage: BehaveStage, texts: list[str]) -> Behavior:
    """The rules of the command: a file, a file of ``conf/behavior``, or those for the language of the texts."""
    if stage.rules is None and cfg.behavior is not None:
        return cfg.behavior
    name = behavior.language(texts)
    if stage.rules is None and name is None:
        text = f"there are none for the language of these rows, such as '{texts[0][:40]}'"
        text += "; write some: stage.rules=<file.yaml>"
        raise ConfigError([Problem("behavior", text)])
    file = stage.rules or str(catalogue.file_of("behavior", str(name)))
    return read_section(Behavior, "stage.rules", file)
