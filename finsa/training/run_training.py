"""An ordinary training run from data to run folder: the main stage, and the experts that a mixture lacks."""

from __future__ import annotations

import sys
from typing import Any

import torch

from finsa.config import RunConfig, TrainStage
from finsa.data import dataset, tokenized
from finsa.data.rows import Encoded
from finsa.evaluation import run_results
from finsa.inference.scoring import FloatArray, LabelScorer, scorer
from finsa.models import base, factory, hardware, quantization, tokenizers
from finsa.runs import files, processes, run_folder, trackers
from finsa.runs.run_folder import Result, RunFolder
from finsa.session import Session
from finsa.training import fit, memory_plan, objective, results, schedule
from finsa.training.watchdog import Watch


def run(cfg: RunConfig, session: Session) -> Result:
    """Fit on the training split, choose on validation, score the test split once, write the run folder."""
    quantization.require_library(cfg.method)
    data = dataset.load(cfg.data, session)
    data.require(*(("test",) if cfg.method.learn == "nothing" else ("train", "validation", "test")))
    tokenizer = tokenizers.load_tokenizer(cfg.model)
    job = tokenized.build(cfg, data, tokenizer, session)
    if cfg.method.learn != "nothing":
        schedule.steps_of(cfg.train, sum(job.class_counts(cfg)), processes.world())
    hardware.prepare(cfg.train)
    lengths = job.prompts("test" if cfg.method.learn == "nothing" else "train").lengths
    planned = memory_plan.make(cfg, job, lengths, processes.world())
    if judged := memory_plan.verdict(planned, cfg, job, lengths, processes.world()):
        print(f"warning: about {planned.peak() / 2**30:.2f} GiB of memory are needed: {judged}", file=sys.stderr)
    with (
        run_folder.start(cfg, data.fingerprint, session) as folder,
        trackers.track(cfg, folder.path, session.group) as tracker,
        Watch(cfg.train, folder.path).watching() as watch,
    ):
        folder.note(memory_plan=planned.facts())
        return _run(cfg.model_copy(update={"train": planned.of(cfg.train)}), job, folder, tracker, watch, session)


def _run(
    cfg: RunConfig,
    job: tokenized.TokenizedDataset,
    folder: RunFolder,
    tracker: trackers.Tracker,
    watch: Watch,
    session: Session,
) -> Result:
    quantized = cfg.method.quantization
    if cfg.method.learn == "all":
        session.base_models.clear()  # the memory that a model of earlier jobs takes is needed
    with watch.display.work("loading the model", None):
        backbone = base.load_base(cfg.model, cfg.seed, quantized, None if cfg.method.learn == "all" else session)
    metrics: dict[str, Any] = {}
    try:
        assert isinstance(cfg.stage, TrainStage)
        compared = cfg.method.learn != "nothing" and cfg.stage.compare_base
        lasting = cfg.method.learn == "all" or cfg.train.strategy in ("fsdp", "deepspeed")
        if compared and lasting:  # the base will not be what it was
            metrics["base"] = run_results.report(job, "test", _base_scores(cfg, job, backbone, watch))
        model, held = _learn(cfg, job, backbone, folder, tracker, metrics, watch, session)
        reader = scorer(model, job.renderer, cfg.train.score_tokens)
        if cfg.method.learn == "nothing":
            scores = _base_scores(cfg, job, backbone, watch)
        else:
            scores = _scored(reader, job.prompts("test"), "test", watch)
        factory.release(model)
        if compared and not lasting:  # training starts sooner
            metrics["base"] = run_results.report(job, "test", _base_scores(cfg, job, backbone, watch))
    except BaseException:
        session.base_models.clear()  # half a job may have left adapters or changed weights on it
        raise
    metrics["test"] = run_results.report(job, "test", scores)
    known = {} if held is None else {"validation": held}
    results.calibrate(cfg, job, folder, metrics, {**known, "test": scores})
    folder.note(scoring=reader.rule)
    results.write(cfg, job, folder, tracker, metrics, scores)
    return Result("train", folder.path, metrics, metrics.get("validation", {}).get("macro_f1"))


def _learn(
    cfg: RunConfig,
    job: tokenized.TokenizedDataset,
    backbone: Any,
    folder: RunFolder,
    tracker: trackers.Tracker,
    metrics: dict[str, Any],
    watch: Watch,
    session: Session,
) -> tuple[torch.nn.Module, Any]:
    """Train what the method trains and save it; the validation score of the chosen checkpoint goes into `metrics`.

    Returns:
        The model, and its scores of the validation rows; None where nothing was learnt.
    """
    model = factory.build(cfg, backbone, job.renderer)
    trainable, total = base.count_parameters(model)
    folder.note(trainable_parameters=trainable, total_parameters=total, device=hardware.describe(base.dtype(cfg.model)))
    if cfg.method.learn == "nothing":
        return model, None

    reader = scorer(model, job.renderer, cfg.train.score_tokens)
    held = job.prompts("validation")[: cfg.train.validation_rows]
    rows, ids = job.training_rows(cfg), job.dataset.splits["train"]["id"]
    validated: list[FloatArray] = []  # scores of each validation

    def validate(_: torch.nn.Module) -> dict[str, float]:
        validated.append(_scored(reader, held, "validation", watch))
        return run_results.validation(job, validated[-1])

    fitted = fit.fit(
        model=model,
        tokenizer=job.renderer.tokenizer,
        rows=rows,
        validate=validate,
        train=cfg.train,
        seed=cfg.seed,
        folder=folder.path / "checkpoints",
        record=results.recorder(folder, tracker, session),
        objective=objective.of(cfg.method, job.renderer, job.class_counts(cfg)),
        lr_ratio=cfg.method.adapter.lr_ratio if cfg.method.adapter else 1.0,
        log=folder.log_file,
        watch=watch,
        identify=lambda row: str(ids[rows.order[row]]),
    )
    known = fitted.best_validation  # the weights are those of that validation
    scores = validated[known] if known is not None else _scored(reader, held, "validation", watch)
    metrics["validation"] = run_results.validation(job, scores)
    folder.note(**fitted.facts())
    with processes.whole(model):
        if processes.first():
            with files.staged(folder.path) as place:
                factory.save(cfg, model, place, job.dataset.labels.names)
                job.renderer.tokenizer.save_pretrained(place / "tokenizer")
    return model, scores


def _scored(reader: LabelScorer, prompts: Encoded, split: str, watch: Watch) -> FloatArray:
    hardware.trim()
    with watch.display.work(f"scoring {split}", len(prompts)) as work:
        return reader.score(prompts, work.moved)


def _base_scores(cfg: RunConfig, job: tokenized.TokenizedDataset, backbone: Any, watch: Watch) -> FloatArray:
    """Scores of the test rows by the base model, (n, c); the arms of a sweep share the rows, and so these."""
    train = cfg.train
    how = (train.score_tokens, train.matmul_precision, train.threads)
    key = f"{base.key(cfg.model, cfg.seed, cfg.method.quantization)} {how}"
    if key not in job.base_scores:
        reader = LabelScorer(backbone, job.renderer, train.score_tokens)
        job.base_scores[key] = _scored(reader, job.prompts("test"), "test with the base model", watch)
    return job.base_scores[key]
