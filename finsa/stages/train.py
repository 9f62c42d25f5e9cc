"""The main stage: source, ledger, splits, rows, model, trainer, scorer, report, run folder."""

from __future__ import annotations

from typing import Any

import torch

from finsa import runs, tracking
from finsa.config import RunConfig, TrainStage
from finsa.data import table, task
from finsa.evaluation import outcome, tables
from finsa.inference.scoring import LabelScorer, scored_answers
from finsa.modeling import adapters, base, hardware, tokenizers
from finsa.runs import Result, RunFolder
from finsa.training import fit, schedule


def run(cfg: RunConfig) -> Result:
    """Fit on the training split, choose on validation, score the test split once, write the run folder."""
    data = table.load(cfg.data)
    data.require(*(("test",) if cfg.method.learn == "nothing" else ("train", "validation", "test")))
    tokenizer = tokenizers.load_tokenizer(cfg.model)
    job = task.build(cfg, data, tokenizer)
    if cfg.method.learn != "nothing":
        schedule.steps_of(cfg.train, len(job.training_order(cfg)), fit.processes())
    hardware.prepare(cfg.train)
    with runs.start(cfg, data.fingerprint) as folder, tracking.track(cfg, folder.path, runs.sweep_name()) as tracker:
        return _run(cfg, job, folder, tracker)


def _run(cfg: RunConfig, job: task.Task, folder: RunFolder, tracker: tracking.Tracker) -> Result:
    backbone = base.load_base(cfg.model, cfg.seed, keep=cfg.method.learn != "all")
    metrics: dict[str, Any] = {}
    try:
        assert isinstance(cfg.stage, TrainStage)
        if cfg.method.learn != "nothing" and cfg.stage.compare_base:
            metrics["base"] = _report(cfg, job, backbone)
        model = _learn(cfg, job, backbone, folder, tracker, metrics)
        scores = LabelScorer(model, job.renderer, cfg.train.score_tokens).score(job.prompts("test"))
    except BaseException:
        base.forget(backbone)  # half a job may have left adapters or changed weights on it
        raise
    metrics["test"] = outcome.report(job, "test", scores)
    _write(cfg, job, folder, tracker, metrics, scores)
    if cfg.method.adapter is not None:
        adapters.detach(model)
    return Result("train", folder.path, metrics, metrics.get("validation", {}).get("macro_f1"))


def _learn(
    cfg: RunConfig,
    job: task.Task,
    backbone: Any,
    folder: RunFolder,
    tracker: tracking.Tracker,
    metrics: dict[str, Any],
) -> torch.nn.Module:
    """Train what the method trains and save it; the validation score of the chosen checkpoint goes into `metrics`."""
    model: Any = backbone
    if cfg.method.adapter is not None:
        model = adapters.attach(backbone, cfg.model, cfg.method.adapter, cfg.seed)
    elif cfg.method.learn == "all":
        model.requires_grad_(True)
    trainable, total = base.count_parameters(model)
    folder.note(trainable_parameters=trainable, total_parameters=total, device=hardware.describe(base.dtype(cfg.model)))
    if cfg.method.learn == "nothing":
        return model

    def record(step: int, values: dict[str, float]) -> None:
        folder.log(step, values)
        tracker.log(step, values)

    scorer = LabelScorer(model, job.renderer, cfg.train.score_tokens)
    held = job.prompts("validation")[: cfg.train.validation_rows]
    fitted = fit.fit(
        model=model,
        tokenizer=job.renderer.tokenizer,
        rows=job.training_rows(cfg),
        validate=lambda _: outcome.validation(job, scorer.score(held)),
        train=cfg.train,
        seed=cfg.seed,
        folder=folder.path / "checkpoints",
        record=record,
    )
    metrics["validation"] = outcome.validation(job, scorer.score(held))
    folder.note(**fitted.facts())
    name = "model" if cfg.method.learn == "all" else f"adapters/{cfg.data.domain or 'default'}"
    model.save_pretrained(folder.path / name)
    job.renderer.tokenizer.save_pretrained(folder.path / "tokenizer")
    return model


def _report(cfg: RunConfig, job: task.Task, model: torch.nn.Module) -> dict[str, Any]:
    scores = LabelScorer(model, job.renderer, cfg.train.score_tokens).score(job.prompts("test"))
    return outcome.report(job, "test", scores)


def _write(
    cfg: RunConfig,
    job: task.Task,
    folder: RunFolder,
    tracker: tracking.Tracker,
    metrics: dict[str, Any],
    scores: Any,
) -> None:
    folder.note(**job.fingerprints(), scoring=scored_answers(job.renderer)[1])
    outcome.write_ledger(job, folder)
    folder.write_json("metrics.json", metrics)
    folder.write_lines("predictions.jsonl", outcome.predictions(job, "test", scores))
    figure = outcome.draw(metrics["test"], f"{cfg.method.name}, {cfg.model.name}, {cfg.data.name}", folder.path)
    tracker.summary(outcome.flat(metrics))
    tracker.figure("confusion matrix", figure)
    rows = {f"{cfg.model.name} as it is": metrics["base"]} if "base" in metrics else {}
    tables.show_ledger(job.table.ledger, job.truncated())
    tables.show_report(metrics["test"], f"{cfg.method.name} on the test split, by class")
    tables.show_comparison({**rows, cfg.method.name: metrics["test"]}, f"{cfg.data.name}, test split")
    print(f"run folder: {folder.path}")
