"""An ordinary training run from data to run folder: the main stage, and the experts that a mixture lacks."""

from __future__ import annotations

from typing import Any

import torch

from finsa import files, processes, runs, tracking
from finsa.config import RunConfig, TrainStage
from finsa.data import table, task
from finsa.evaluation import outcome
from finsa.inference.scoring import LabelScorer, scorer
from finsa.modeling import base, hardware, learner, quantization, tokenizers
from finsa.runs import Result, RunFolder
from finsa.training import fit, objective, plan, results, schedule


def run(cfg: RunConfig) -> Result:
    """Fit on the training split, choose on validation, score the test split once, write the run folder."""
    quantization.require_library(cfg.method)
    data = table.load(cfg.data)
    data.require(*(("test",) if cfg.method.learn == "nothing" else ("train", "validation", "test")))
    tokenizer = tokenizers.load_tokenizer(cfg.model)
    job = task.build(cfg, data, tokenizer)
    if cfg.method.learn != "nothing":
        schedule.steps_of(cfg.train, sum(job.class_counts(cfg)), processes.world())
    hardware.prepare(cfg.train)
    planned = plan.make(
        cfg, job, job.prompts("test" if cfg.method.learn == "nothing" else "train").lengths, processes.world()
    )
    with runs.start(cfg, data.fingerprint) as folder, tracking.track(cfg, folder.path, runs.sweep_name()) as tracker:
        folder.note(memory_plan=planned.facts())
        return _run(cfg.model_copy(update={"train": planned.of(cfg.train)}), job, folder, tracker)


def _run(cfg: RunConfig, job: task.Task, folder: RunFolder, tracker: tracking.Tracker) -> Result:
    keep, quantized = cfg.method.learn != "all", cfg.method.quantization
    backbone = base.load_base(cfg.model, cfg.seed, keep, quantized)
    metrics: dict[str, Any] = {}
    try:
        assert isinstance(cfg.stage, TrainStage)
        compared = cfg.method.learn != "nothing" and cfg.stage.compare_base
        lasting = cfg.method.learn == "all" or cfg.train.strategy in ("fsdp", "deepspeed")
        if compared and lasting:  # the base will not be what it was
            metrics["base"] = _report(cfg, job, backbone)
        model, held = _learn(cfg, job, backbone, folder, tracker, metrics)
        reader = scorer(model, job.renderer, cfg.train.score_tokens)
        scores = reader.score(job.prompts("test"))
        learner.release(model)
        if compared and not lasting:  # training starts sooner
            metrics["base"] = _report(cfg, job, backbone)
    except BaseException:
        base.forget(backbone)  # half a job may have left adapters or changed weights on it
        raise
    metrics["test"] = outcome.report(job, "test", scores)
    known = {} if held is None else {"validation": held}
    results.calibrate(cfg, job, folder, metrics, {**known, "test": scores})
    folder.note(scoring=reader.rule)
    results.write(cfg, job, folder, tracker, metrics, scores)
    return Result("train", folder.path, metrics, metrics.get("validation", {}).get("macro_f1"))


def _learn(
    cfg: RunConfig,
    job: task.Task,
    backbone: Any,
    folder: RunFolder,
    tracker: tracking.Tracker,
    metrics: dict[str, Any],
) -> tuple[torch.nn.Module, Any]:
    """Train what the method trains and save it; the validation score of the chosen checkpoint goes into `metrics`.

    Returns:
        The model, and its scores of the validation rows; None where nothing was learnt.
    """
    model = learner.build(cfg, backbone, job.renderer)
    trainable, total = base.count_parameters(model)
    folder.note(trainable_parameters=trainable, total_parameters=total, device=hardware.describe(base.dtype(cfg.model)))
    if cfg.method.learn == "nothing":
        return model, None

    reader = scorer(model, job.renderer, cfg.train.score_tokens)
    held = job.prompts("validation")[: cfg.train.validation_rows]
    rows, ids = job.training_rows(cfg), job.table.splits["train"]["id"]
    fitted = fit.fit(
        model=model,
        tokenizer=job.renderer.tokenizer,
        rows=rows,
        validate=lambda _: outcome.validation(job, reader.score(held)),
        train=cfg.train,
        seed=cfg.seed,
        folder=folder.path / "checkpoints",
        record=results.recorder(folder, tracker),
        objective=objective.of(cfg.method, job.renderer, job.class_counts(cfg)),
        lr_ratio=cfg.method.adapter.lr_ratio if cfg.method.adapter else 1.0,
        log=folder.log_file,
        identify=lambda row: str(ids[rows.order[row]]),
    )
    scores = reader.score(held)
    metrics["validation"] = outcome.validation(job, scores)
    folder.note(**fitted.facts())
    with processes.whole(model):
        if processes.first():
            with files.staged(folder.path) as place:
                learner.save(cfg, model, place, job.table.labels.names)
                job.renderer.tokenizer.save_pretrained(place / "tokenizer")
    return model, scores


def _report(cfg: RunConfig, job: task.Task, model: torch.nn.Module) -> dict[str, Any]:
    scores = LabelScorer(model, job.renderer, cfg.train.score_tokens).score(job.prompts("test"))
    return outcome.report(job, "test", scores)
