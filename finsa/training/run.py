"""A training run, top to bottom: load data, render rows, load the model, train, score, evaluate, write."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import numpy as np
import polars as pl
import torch

from finsa.config import RunConfig, TrainStage
from finsa.config.base import headline
from finsa.data import cache, few_shot, tokenized
from finsa.data.dataset import Dataset
from finsa.data.rows import Encoded
from finsa.data.tokenized import TokenizedDataset
from finsa.errors import DataError
from finsa.evaluation import run_results
from finsa.inference.scoring import FloatArray, LabelScorer, contextual_bias, scorer, thought_costs
from finsa.models import base, factory, hardware, tokenizers
from finsa.runs import files, processes, provenance, run_folder, trackers
from finsa.runs.run_folder import Result, RunFolder
from finsa.session import Session
from finsa.training import fit, memory_plan, objective, preferences, results
from finsa.training.watchdog import Watch


def run(cfg: RunConfig, rows: Dataset, session: Session) -> Result:
    """Train, select the checkpoint on the validation split, score the test split once, write the run folder.

    Args:
        cfg: of a language model; `preflight.require_trainable` has checked it.
        rows: of all splits.
        session: of the command.
    """
    stage = cfg.stage
    assert isinstance(stage, TrainStage)
    learns, world = cfg.method.learn != "nothing", processes.world_size()

    # Data: the rows of every split, and the renderer that turns them into prompts and training rows.
    data = tokenized.build(cfg, rows, tokenizers.load_tokenizer(cfg.model), session)

    # Memory: the micro-batch that fits, estimated from shapes.
    hardware.prepare(cfg.train)
    lengths = data.prompts("train" if learns else "test").lengths
    plan = memory_plan.make(cfg, data, lengths, world)
    if problem := memory_plan.verdict(plan, cfg, data, lengths, world):
        print(f"warning: about {plan.peak() / 2**30:.2f} GiB of memory are needed: {problem}", file=sys.stderr)

    with (
        run_folder.start(cfg, data.dataset.fingerprint, session) as folder,
        trackers.track(cfg, folder.path, session.group) as tracker,
        Watch(cfg.train, folder.path).watching() as watch,
    ):
        folder.note(memory_plan=plan.facts())
        if cfg.method.starts_from_run:
            path, start, _ = run_folder.read(str(cfg.method.init))
            folder.note(start={"run": str(path), "method": start.method.name, "seed": start.seed})
        cfg = cfg.model_copy(update={"train": plan.apply(cfg.train)})
        trains_base = cfg.method.learn == "all"
        if trains_base:
            session.base_models.clear()  # to free the memory of a base model that is still loaded
        with watch.display.work("loading the model", None):
            backbone = base.load_base(cfg.model, cfg.seed, cfg.method.quantization, None if trains_base else session)
        metrics: dict[str, Any] = {}
        log_probs: dict[str, FloatArray] = {}  # by split, (n, c)
        # The base model is scored after training, so that training starts sooner, unless training changes its weights.
        compares = learns and stage.compare_base
        base_changes = trains_base or cfg.train.strategy in ("fsdp", "deepspeed")
        try:
            if compares and base_changes:
                metrics["base"] = run_results.report(data, "test", _base_log_probs(cfg, data, backbone, watch)[0])

            # Pairs: the wrong label of each training row, for methods that learn from pairs.
            rejected = preferences.rejected_labels(cfg, data, backbone, folder, watch, session)

            # Model: the base model with an adapter, a classification head or neither; and which parameters are trained.
            model = factory.build(cfg, backbone, data.renderer)
            trainable, total = base.count_parameters(model)
            device = hardware.describe(base.dtype(cfg.model))
            folder.note(trainable_parameters=trainable, total_parameters=total, device=device)
            label_scorer = scorer(model, data.renderer, cfg.train.score_tokens, cfg)

            # Train, restore the best checkpoint, and save what was trained.
            if learns:
                record = results.recorder(folder, tracker, session)
                used = preferences.training_rows(cfg, data, rejected, label_scorer, watch, session)
                log_probs["validation"] = _train(cfg, data, used, model, label_scorer, record, folder, watch)
                metrics["validation"] = run_results.validation(data, log_probs["validation"])
                with processes.gathered_parameters(model):
                    if processes.is_main():
                        with files.staged(folder.path) as staging:
                            factory.save(cfg, model, staging, data.dataset.labels.names)
                            data.renderer.tokenizer.save_pretrained(staging / "tokenizer")

            # Score the test split: log-probabilities of the labels.
            started = time.monotonic()
            if learns or cfg.model.think == "open":  # thoughts are not shared with other runs
                log_probs["test"] = _score(label_scorer, data.prompts("test"), "test", watch)
                seconds = time.monotonic() - started
            else:
                log_probs["test"], seconds = _base_log_probs(cfg, data, backbone, watch)
            thoughts, costs = label_scorer.thoughts, thought_costs(label_scorer)
            if data.examples is not None:
                log_probs["test"] = _finish_few_shot(cfg, data, folder, label_scorer, log_probs["test"])
            folder.note(
                scoring_seconds=round(seconds, 3),
                prompt_tokens=round(float(data.prompts("test").lengths.mean()), 1),
                **costs,
            )
            factory.detach(model)
            if compares and not base_changes:
                metrics["base"] = run_results.report(data, "test", _base_log_probs(cfg, data, backbone, watch)[0])
        except BaseException:
            session.base_models.clear()  # the base may still have adapters or changed weights
            raise

        # Evaluate and write: metrics, calibration, predictions, ledger, model cards, figures and the page.
        results.calibrate(cfg, data, folder, metrics, log_probs)
        folder.note(scoring=label_scorer.rule)
        texts = None if thoughts is None else [[thought.text for thought in row] for row in thoughts]
        results.write(cfg, data, folder, tracker, metrics, log_probs["test"], thoughts=texts)
    return Result("train", folder.path, metrics, metrics.get("validation", {}).get(headline(data.task)))


def _train(
    cfg: RunConfig,
    data: tokenized.TokenizedDataset,
    rows: tokenized.TrainingRows,
    model: torch.nn.Module,
    label_scorer: LabelScorer,
    record: fit.Record,
    folder: RunFolder,
    watch: Watch,
) -> FloatArray:
    """Train the model, and return the log-probabilities of the validation rows at the best checkpoint, (n, c)."""
    held_out = data.prompts("validation")[: cfg.train.validation_rows]
    ids = data.dataset.splits["train"]["id"]
    validated: list[FloatArray] = []
    warned: list[bool] = []

    def validate(_: torch.nn.Module) -> dict[str, float]:
        validated.append(_score(label_scorer, held_out, "validation", watch))
        values = run_results.validation(data, validated[-1])
        if math.isnan(values[cfg.train.select_by]) and not warned and processes.is_main():
            warned.append(True)
            print(
                f"warning: train.select_by={cfg.train.select_by} has no value for these validation predictions, such "
                "as equal ones for all rows; the best checkpoint with a value is used, or the last one if none has it",
                file=sys.stderr,
            )
        return values

    if cfg.method.grpo is not None:
        from finsa.training import grpo  # imports trl's trainer, which no other method needs

        checkpoints, log = folder.path / "checkpoints", folder.log_file
        fitted = grpo.fit(cfg, data, model, validate, checkpoints, record, log, watch)
        folder.note(**fitted.facts())
        if fitted.best_validation is None:  # the best checkpoint is from before the training was resumed
            return _score(label_scorer, held_out, "validation", watch)
        return validated[fitted.best_validation]
    fitted = fit.fit(
        model=model,
        tokenizer=data.renderer.tokenizer,
        rows=rows,
        validate=validate,
        train=cfg.train,
        seed=cfg.seed,
        folder=folder.path / "checkpoints",
        record=record,
        objective=objective.build(cfg.method, data.renderer, data.class_counts(cfg), cfg.evaluation.costs),
        lr_ratio=cfg.method.adapter.lr_ratio if cfg.method.adapter else 1.0,
        log=folder.log_file,
        watch=watch,
        identify=lambda row: str(ids[rows.order[row]]),
    )
    folder.note(**fitted.facts())
    if fitted.best_validation is None:  # the best checkpoint is from before the training was resumed
        return _score(label_scorer, held_out, "validation", watch)
    return validated[fitted.best_validation]


def _score(label_scorer: LabelScorer, prompts: Encoded, split: str, watch: Watch) -> FloatArray:
    hardware.trim_heap()
    with watch.display.work(f"scoring {split}", len(prompts)) as work:
        return label_scorer.score(prompts, work.moved)


def _finish_few_shot(
    cfg: RunConfig, data: TokenizedDataset, folder: RunFolder, label_scorer: LabelScorer, log_probs: FloatArray
) -> FloatArray:
    """Write the examples of a few-shot run, and calibrate its log-probabilities if configured, (n, c)."""
    assert data.examples is not None
    folder.write_lines(few_shot.FILE, data.examples.lines())
    if not data.examples.settings.calibrate:
        return log_probs
    bias = contextual_bias(label_scorer, data.targets)
    folder.note(contextual_bias=bias.tolist())
    return log_probs - bias


def _base_log_probs(
    cfg: RunConfig, data: tokenized.TokenizedDataset, backbone: Any, watch: Watch
) -> tuple[FloatArray, float]:
    """Log-probabilities of the test rows by the base model, (n, c), and the seconds that scoring them took.

    Runs on the same rows share them: within a sweep through the data set, across commands through ``data.cache``.
    """
    train = cfg.train
    settings = (train.score_tokens, train.matmul_precision, train.threads)
    seed = cfg.seed if cfg.model.think == "open" else None  # of the thoughts
    key = f"{base.key(cfg.model, cfg.seed, cfg.method.quantization)} {settings} {seed}"
    if key not in data.base_scores:

        def build() -> cache.Arrays:
            started = time.monotonic()
            label_scorer = scorer(backbone, data.renderer, train.score_tokens, cfg)
            log_probs = _score(label_scorer, data.prompts("test"), "test with the base model", watch)
            return {"log_probs": log_probs, "seconds": np.array([time.monotonic() - started])}

        # Processes that score together cannot wait for each other at the lock of an entry.
        if data.cache and seed is None and data.examples is None and processes.world_size() == 1:
            rows = (
                cache.text_hash(pl.Series(data.texts("test"))),
                data.renderer.fingerprint(),
                *data.fingerprints().values(),
            )
            name = cache.key(
                "base scores", key, *rows, hardware.describe(base.dtype(cfg.model)), provenance.environment()
            )
            try:
                found = cache.arrays(cache.folder_of(data.cache, f"scores-{name}"), build)
            except DataError:  # the folder cannot be written: no reason to fail after training
                found = build()
        else:
            found = build()
        data.base_scores[key] = np.array(found["log_probs"]), float(found["seconds"][0])
    return data.base_scores[key]
