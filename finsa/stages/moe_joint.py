"""A mixture of experts: the runs it is made of, router warm-up, joint training, and what it is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finsa.config import MoeJointStage, RunConfig
from finsa.data import dataset, tokenized
from finsa.evaluation import finished_runs, moe, run_results
from finsa.evaluation.moe import MIXTURE, UNION
from finsa.inference.scoring import FloatArray, LabelScorer, scorer
from finsa.models import base, factory, hardware, quantization, tokenizers
from finsa.models.moe.mixture import Mixture
from finsa.runs import files, processes, run_folder, trackers
from finsa.runs.run_folder import Result, RunFolder
from finsa.session import Session
from finsa.training import expert_runs, joint, results, schedule
from finsa.training.expert_runs import Members
from finsa.training.watchdog import Watch

Classes = NDArray[np.int64]


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Gather experts, build the mixture, warm up, train jointly, score the test split once, write the run folder."""
    session = session or Session()
    stage = cfg.stage
    assert isinstance(stage, MoeJointStage)
    quantization.require_library(cfg.method)
    data = dataset.load(cfg.data, session)
    data.require("train", "validation", "test")
    expert_runs.names(stage, data)
    rows = tokenized.build(cfg, data, tokenizers.load_tokenizer(cfg.model), session)
    schedule.steps_of(cfg.train, sum(rows.class_counts(cfg)), processes.world())
    hardware.prepare(cfg.train)
    own = _own(cfg, stage, data, session)
    made_of = expert_runs.gather(cfg, stage, rows, lambda text: print(text, flush=True), session)
    with (
        run_folder.start(own, data.fingerprint, session) as folder,
        trackers.track(cfg, folder.path, session.group) as tracker,
        Watch(cfg.train, folder.path).watching() as watch,
    ):
        folder.note(**expert_runs.facts(made_of))
        return _run(cfg, stage, rows, made_of, folder, tracker, watch, session)


def _own(cfg: RunConfig, stage: MoeJointStage, data: dataset.Dataset, session: Session) -> RunConfig:
    """The configuration of the mixture's own run: ``resume=true`` may find that only its experts had been begun.

    Raises:
        RunError: where there is nothing to resume.
    """
    if not cfg.resume or run_folder.unfinished(cfg) is not None:
        return cfg
    if run_folder.finished(cfg, data.fingerprint) is not None or not expert_runs.begun(cfg, stage, data, session):
        run_folder.to_resume(cfg, None, session)
    return cfg.model_copy(update={"resume": False})


def _run(
    cfg: RunConfig,
    stage: MoeJointStage,
    rows: tokenized.TokenizedDataset,
    made_of: Members,
    folder: RunFolder,
    tracker: trackers.Tracker,
    watch: Watch,
    session: Session,
) -> Result:
    with watch.display.work("loading the model", None):
        backbone = base.load_base(cfg.model, cfg.seed, cfg.method.quantization, session)
    try:
        model = factory.mix(cfg, stage, backbone, made_of.adapters, rows.renderer)
        joint.start(model, stage, cfg.method.head)
        alone = _alone(cfg, rows, model, watch) if stage.compare else {}
        model.learn(experts=True)
        trainable, total = base.count_parameters(model)
        folder.note(trainable_parameters=trainable, total_parameters=total)
        folder.note(device=hardware.describe(base.dtype(cfg.model)))
        fitted, (validation, held) = joint.learn(
            cfg, stage, model, rows, watch, results.recorder(folder, tracker, session)
        )
        metrics: dict[str, Any] = {"validation": validation}
        with files.staged(folder.path) as place:
            model.save(place, rows.dataset.labels.names)
            rows.renderer.tokenizer.save_pretrained(place / "tokenizer")
        reader = scorer(model, rows.renderer, cfg.train.score_tokens)
        scores = _scored(reader, rows, "test", watch)
        gates = reader.gates
        arms = {MIXTURE: scores.argmax(axis=1), **_otherwise(cfg, rows, model, watch)} if stage.compare else {}
    except BaseException:
        session.base_models.clear()  # half a job may have left experts on it
        raise
    assert gates is not None
    domains = rows.dataset.splits["test"]["domain"].to_list()
    metrics |= {
        "test": run_results.report(rows, "test", scores),
        "router": moe.analyze_gates(gates, domains, model.experts),
    }
    results.calibrate(cfg, rows, folder, metrics, {"validation": held, "test": scores})
    if stage.compare:
        metrics["mixture"] = _compare(rows, made_of, {**arms, **moe.expert_answers(alone, domains)}, folder)
    folder.note(**fitted.facts(), scoring=reader.rule)
    results.write(cfg, rows, folder, tracker, metrics, scores, gates, model.experts)
    factory.release(model)
    _show(metrics)
    return Result("moe_joint", folder.path, metrics, metrics["validation"]["macro_f1"])


def _scored(reader: LabelScorer, rows: tokenized.TokenizedDataset, title: str, watch: Watch) -> FloatArray:
    prompts = rows.prompts("test")
    with watch.display.work(f"scoring {title}", len(prompts)) as work:
        return reader.score(prompts, work.moved)


def _answers(cfg: RunConfig, rows: tokenized.TokenizedDataset, model: Mixture, title: str, watch: Watch) -> Classes:
    reader = scorer(model, rows.renderer, cfg.train.score_tokens)
    return _scored(reader, rows, f"test with {title}", watch).argmax(axis=1)


def _alone(cfg: RunConfig, rows: tokenized.TokenizedDataset, model: Mixture, watch: Watch) -> dict[str, Classes]:
    """What each expert, as its own run has left it, answers to all test rows."""
    found = {}
    for number, name in enumerate(model.experts):
        with model.alone(number):
            found[name] = _answers(cfg, rows, model, f"expert {name}", watch)
    return found


def _otherwise(cfg: RunConfig, rows: tokenized.TokenizedDataset, model: Mixture, watch: Watch) -> dict[str, Classes]:
    """What the trained mixture answers when it is routed otherwise than configured."""
    found = {}
    for routing in sorted({"soft", "hard"} - {model.stage.routing}):
        with model.routed(routing):
            found[f"{MIXTURE}, {routing} routing"] = _answers(cfg, rows, model, f"{routing} routing", watch)
    return found


def _compare(
    rows: tokenized.TokenizedDataset, made_of: Members, arms: dict[str, Classes], folder: RunFolder
) -> list[dict[str, Any]]:
    """Compare answers row by row, and keep them as ``comparison.jsonl``."""
    test, names = rows.dataset.splits["test"], rows.dataset.labels.names
    if made_of.union is not None:
        arms[UNION] = _of_union(made_of.union)
    gold, domains = np.array(rows.gold("test")), test["domain"].to_list()
    folder.write_lines(
        "comparison.jsonl",
        (
            {
                "id": identity,
                "domain": domains[place],
                "gold": names[gold[place]],
                "answers": {arm: names[answers[place]] for arm, answers in arms.items()},
            }
            for place, identity in enumerate(test["id"].to_list())
        ),
    )
    return moe.compare(arms, gold, domains, names)


def _of_union(path: Path) -> Classes:
    """The union's own answers: its rows are the mixture's, which is how it was found."""
    found, _ = finished_runs.load([path])
    return found[0].predicted


def _show(metrics: dict[str, Any]) -> None:
    for table in moe.tables("this mixture", metrics):
        table.show()
    for warning in metrics["router"]["warnings"]:
        print(f"warning: {warning}")
