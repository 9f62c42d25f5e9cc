"""Compose finished runs to a cascade: each answers the texts that it is sure of, and leaves the others to the next."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from finsa.config import CascadeStage, RunConfig
from finsa.config.base import headline
from finsa.data import dataset, tokenized
from finsa.data.values import TASKS
from finsa.errors import ConfigError, Problem, RunError
from finsa.evaluation import cascades, run_results, selective
from finsa.evaluation.tables import Table, percent
from finsa.inference import predictor
from finsa.inference.predictor import Cascade, Record
from finsa.runs import run_folder, trackers
from finsa.runs.progress import Display
from finsa.runs.run_folder import Result
from finsa.session import Session
from finsa.training import results


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Choose thresholds on the validation predictions of the runs, score the test split, write the run folder.

    Raises:
        ConfigError: for fewer than two runs, or runs that cannot be composed.
        RunError: if a run has no validation or test predictions, or the rows have changed.
    """
    session, stage = session or Session(), cfg.stage
    assert isinstance(stage, CascadeStage)
    names = [cfg.runs] if isinstance(cfg.runs, str) else cfg.runs or []
    members = [predictor.read(name) for name in names]
    if problem := _problem(members):
        raise ConfigError([Problem("runs", problem)])
    labels, last = members[-1].labels, members[-1]
    held, tests = list[selective.Rows](), list[selective.Rows]()
    for member in members:
        validation = selective.validation(member.path, labels.names)
        test = selective.read(member.path / "predictions.jsonl", labels.names, (None, "test"))
        if validation is None:
            raise RunError(
                f"runs: {member.path} has no {selective.FILE}, on which thresholds are chosen. Repeat the run with "
                f"this version, or run python run.py stage=evaluate run={member.path} stage.split=validation and "
                "copy predictions.jsonl from the folder that it writes to this file"
            )
        if test is None:
            raise RunError(f"runs: {member.path} has no predictions.jsonl of the test rows; name a run folder")
        held.append(validation)
        tests.append(test)
    known = min(len(rows.ids) for rows in held)  # train.validation_rows may differ
    held = [rows.first(known) for rows in held]
    for split, rows in (("validation", held), ("test", tests)):
        if other := next((place for place, one in enumerate(rows) if one.ids != rows[0].ids), None):
            text = f"{members[0].path} and {members[other].path} have different {split} rows"
            raise ConfigError([Problem("runs", f"{text}; a cascade needs runs on the same ones")])
    data = dataset.load(last.cfg.data, session)
    if data.fingerprint != last.facts.get("data_fingerprint"):
        raise RunError(f"runs: the rows have changed since {last.path} was trained on them")

    # Thresholds, and what they do on the validation rows.
    probs, gold = np.stack([rows.probs for rows in held]), held[0].gold
    thresholds = cascades.choose(probs, gold, stage.tolerance, stage.confidence)
    source = cascades.answering(probs.max(axis=2), thresholds)
    composed = probs[source, np.arange(len(source))]
    scores = [cascades.macro_f1(one.argmax(axis=1), gold, len(labels.names)) for one in (composed, probs[-1])]
    if (source == len(members) - 1).all():
        print(
            f"warning: the {len(gold):,} validation rows do not show for any threshold that macro-F1 is at most "
            f"{stage.tolerance:g} lower, so the last run answers all; set a larger stage.tolerance or use more rows"
        )

    # The run: that of the last member under another name.
    name = "-".join(["cascade", *(member.cfg.method.name for member in members)])[:80]
    own = {
        key: getattr(cfg, key) for key in ("stage", "output_dir", "tracking", "published", "output", "resume", "run")
    }
    own |= {"runs": tuple(str(member.path) for member in members), "fresh": False, "reuse_outdated": False}
    own |= {"method": last.cfg.method.model_copy(update={"name": name}), "experiment": None, "sweep": None}
    own |= {"per_method": None}
    made = last.cfg.model_copy(update=own)
    held_out = np.log(np.maximum(composed, 10.0**-selective.DIGITS))
    labeled = tokenized.Labeled(data, **tokenized.labeled_settings(made, session))
    predictor.announce(name)
    with (
        run_folder.start(made, data.fingerprint, session) as folder,
        trackers.track(made, folder.path, session.group) as tracker,
    ):
        sums = {
            key: sum(member.facts.get(key) or 0 for member in members)
            for key in ("trainable_parameters", "total_parameters", "training_seconds")
        }
        described: dict[str, Any] = {"runs": list(own["runs"]), "names": [member.name for member in members]}
        described |= {"thresholds": thresholds, "validation_macro_f1": scores[0], "last_macro_f1": scores[1]}
        devices = [member.facts["device"] for member in members if member.facts.get("device")]
        folder.note(cascade=described, scoring=Cascade.RULE, device=next(iter(devices), None), **sums)
        record = Record(folder.path, made, folder.facts, labels, members=tuple(members))
        model = predictor.load(record, made.train.score_tokens)
        started = time.monotonic()
        with Display(made.train.progress_seconds).work("scoring test", len(tests[0].ids)) as work:
            log_probs = model.score(labeled, "test", work.moved)
        folder.note(scoring_seconds=round(time.monotonic() - started, 6))
        gates = model.gates
        model.close()
        metrics: dict[str, Any] = {"validation": run_results.validation(labeled, held_out)}
        splits = {"validation": held_out, "test": log_probs}
        calibrated = made.train.model_copy(update={"calibrate": False})  # its runs are calibrated already
        results.calibrate(made.model_copy(update={"train": calibrated}), labeled, folder, metrics, splits)
        results.write(made, labeled, folder, tracker, metrics, log_probs, gates, model.experts)
    assert gates is not None
    cells = []
    for place, member in enumerate(members):
        bar = f"{thresholds[place]:.6f}" if place < len(thresholds) else "-"
        cost = member.facts.get("scoring_seconds")
        each = "-" if cost is None else f"{1000 * cost / len(log_probs):.3g}"
        cells.append([member.name, bar, percent((source == place).mean(), 1), percent(gates[:, place].mean(), 1), each])
    caption = (
        "A run answers if its confidence is above the threshold. Macro-F1 on the validation rows: "
        f"{scores[0]:.4f}, of the last run alone {scores[1]:.4f}. Seconds of each run alone; of the cascade: "
        f"{1000 * folder.facts['scoring_seconds'] / len(log_probs):.3g}."
    )
    columns = ["run", "threshold", "answers (validation)", "answers (test)", "s per 1,000"]
    Table("Cascade", columns, cells, caption, optional=(4,)).show()
    saved = np.stack([one.probs for one in tests])
    source = cascades.answering(saved.max(axis=2), thresholds)
    same = saved[source, np.arange(len(source))].argmax(axis=1) == log_probs.argmax(axis=1)
    print(f"equal to the composition of the saved predictions: {same.sum():,} of {len(same):,} test rows")
    return Result("cascade", folder.path, metrics, metrics["validation"].get(headline(data.labels.task)))


def _problem(members: list[Record]) -> str | None:
    """The first reason why runs cannot be composed; None if they can."""
    if len({member.path for member in members}) < max(2, len(members)):
        return "a cascade needs at least two different runs, the cheapest first, as in runs=[<run>,<run>]"
    first = members[0]
    for member in members:
        path, labels = member.path, member.labels
        if member.members:
            return f"{path} is itself a cascade; name the runs that it consists of"
        if labels.task in TASKS:
            return f"{path} has task={labels.task}; a cascade needs one class per row, with probabilities"
        if labels.names != first.labels.names:
            of_first = f"{first.path} the labels {', '.join(first.labels.names)}"
            return f"{path} has the labels {', '.join(labels.names)}, and {of_first}"
        if member.cfg.data.asks_for_target != first.cfg.data.asks_for_target:
            return f"only one of {path} and {first.path} reads the targets of the texts"
        if member.facts.get("data_fingerprint") != first.facts.get("data_fingerprint"):
            return f"{path} and {first.path} were trained on different data"
    return None
