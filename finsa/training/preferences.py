"""What preference and reward methods learn from, besides the labels: pairs, and the scores of the starting model.

A pair is the true label of a training row and a wrong one. A model makes few mistakes on its own training rows, so
scores are computed out of fold: each fold is scored by a model that is trained, like the starting one, on the others.
Validation and test rows are never in a pair.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from finsa.config import RunConfig
from finsa.data import splits
from finsa.data.rows import IntArray
from finsa.data.tokenized import TokenizedDataset, TrainingRows
from finsa.errors import DataError
from finsa.evaluation import run_results
from finsa.inference.scoring import FloatArray, LabelScorer, scorer
from finsa.models import base, factory, hardware
from finsa.runs import files, processes, run_folder
from finsa.runs.run_folder import RunFolder
from finsa.session import Session
from finsa.training import fit, objective
from finsa.training.watchdog import Watch

FILE = "pairs.jsonl"
# Settings that the models of the folds have from the run itself, not from the starting run: how the work is done, and
# which checkpoint is the best.
FROM_RUN = ("threads", "strategy", "gradient_checkpointing", "score_tokens", "validation_rows", "select_by")


def rejected_labels(
    cfg: RunConfig, data: TokenizedDataset, backbone: Any, folder: RunFolder, watch: Watch, session: Session
) -> IntArray | None:
    """Find the wrong label of each training row's pair, and write the pairs into the run folder.

    Args:
        cfg: of a run whose method may learn from pairs.
        data: its rows.
        backbone: the base model, which has no adapter before and after this.
        folder: of the run; out-of-fold scores are kept there until all folds are scored.
        watch: of the run.
        session: jobs with the same starting run share the scores.

    Returns:
        (n,), with -1 for rows that are not used; None if the method learns from no pairs.

    Raises:
        DataError: if fewer rows are used than a step has.
    """
    settings, gold = cfg.method.preference, np.asarray(data.gold("train"))
    if settings is None:
        return None
    rows, names = data.dataset.splits["train"], data.dataset.labels.names
    if (folder.path / FILE).is_file():  # the run is resumed
        numbers = {name: number for number, name in enumerate(names)}
        pairs = files.json_lines(folder.path / FILE)
        return np.array([numbers[pair["rejected"]] if pair["used"] else -1 for pair in pairs])
    if rows["rejected"].null_count() == 0:
        rejected, predicted, source = rows["rejected"].to_numpy(), None, f"column {cfg.data.columns.rejected}"
    else:
        if cfg.method.starts_from_run:
            key: tuple[object, ...] = (str(cfg.method.init), data.dataset.fingerprint, cfg.seed)
            key += (*data.fingerprints().values(), cfg.evaluation, cfg.train.micro_batch_size)
            key += (*(getattr(cfg.train, name) for name in FROM_RUN), settings.folds)
            if key not in session.start_scores:
                session.start_scores[key] = out_of_fold(cfg, settings.folds, data, backbone, folder, watch)
            log_probs, source = session.start_scores[key], f"scores of {settings.folds} models, each on rows new to it"
        else:
            label_scorer = LabelScorer(backbone, data.renderer, cfg.train.score_tokens)
            log_probs, source = _scored(label_scorer, data, watch, "training rows"), "scores of the base model"
        wrong = log_probs.copy()
        wrong[np.arange(len(gold)), gold] = -np.inf
        rejected, predicted = wrong.argmax(axis=1), log_probs.argmax(axis=1)
    facts: dict[str, Any] = {"rows": len(gold), "source": source}
    lines: list[dict[str, Any]] = [
        {"id": row, "chosen": names[chosen], "rejected": names[other], "used": True}
        for row, chosen, other in zip(rows["id"], gold, rejected, strict=True)
    ]
    shown = ""
    if predicted is not None:
        mistakes = predicted != gold
        facts |= {"mistakes": int(mistakes.sum()), "share_of_mistakes": round(float(mistakes.mean()), 4)}
        shown = f", {facts['mistakes']:,} of them mistakes ({mistakes.mean():.1%})"
        for line, mistake in zip(lines, mistakes.tolist(), strict=True):
            line |= {"mistake": mistake, "used": mistake or not settings.mistakes_only}
        if settings.mistakes_only:
            rejected = np.where(mistakes, rejected, -1)
            facts["rows"] = facts["mistakes"]
    if processes.is_main():
        print(f"  pairs: {len(gold):,} training rows{shown}; wrong labels from {source}", flush=True)
    if facts["rows"] < cfg.train.batch_size:
        raise DataError(
            f"method.preference.mistakes_only: the starting model makes {facts['rows']:,} mistakes in {len(gold):,} "
            f"rows, fewer than a step has (train.batch_size={cfg.train.batch_size}); leave it out"
        )
    folder.write_lines(FILE, lines)
    folder.note(pairs=facts)
    if processes.is_main():
        shutil.rmtree(folder.path / "folds", ignore_errors=True)
    return np.asarray(rejected)


def out_of_fold(
    cfg: RunConfig, folds: int, data: TokenizedDataset, backbone: Any, folder: RunFolder, watch: Watch
) -> FloatArray:
    """Log-probabilities of the training rows by models trained, like the starting run, on other rows, (n, c).

    Rows of the same text are in the same fold, and each fold has the classes in the same proportions.
    """
    start = run_folder.read(str(cfg.method.init))[1]
    from_this_run = list(FROM_RUN)
    if start.train.batch_size % cfg.train.micro_batch_size == 0:
        from_this_run.append("micro_batch_size")
    train = start.train.model_copy(update={name: getattr(cfg.train, name) for name in from_this_run})
    like_start = cfg.model_copy(update={"method": start.method, "train": train})
    gold, texts = data.gold("train"), data.dataset.splits["train"]["text"].rank("dense").to_numpy()
    parts = splits.folds(gold, texts, folds, cfg.seed)
    held_out = data.prompts("validation")[: train.validation_rows]
    scores = np.zeros((len(gold), len(data.dataset.labels)))
    for number, left_out in enumerate(parts, start=1):
        place = folder.path / "folds" / str(number)
        if (place / "scores.npy").is_file():
            scores[left_out] = np.load(place / "scores.npy")
            continue
        print(f"  fold {number} of {folds}: training on the other folds", flush=True)
        model = factory.build(like_start, backbone, data.renderer)
        label_scorer, others = scorer(model, data.renderer, train.score_tokens), set(range(len(gold))) - set(left_out)
        rows = data.training_rows(like_start)
        rows = replace(rows, order=[row for row in rows.order if row in others])

        def validate(_: torch.nn.Module, label_scorer: LabelScorer = label_scorer) -> dict[str, float]:
            return run_results.validation(data, label_scorer.score(held_out))

        fit.fit(
            model=model,
            tokenizer=data.renderer.tokenizer,
            rows=rows,
            validate=validate,
            train=train,
            seed=cfg.seed,
            folder=place / "checkpoints",
            record=lambda step, values: None,
            objective=objective.build(start.method, data.renderer, data.class_counts(like_start), None),
            lr_ratio=start.method.adapter.lr_ratio if start.method.adapter else 1.0,
            watch=watch,
        )
        prompts = data.prompts("train")
        scores[left_out] = label_scorer.score([prompts[row] for row in left_out])
        factory.detach(model)
        if processes.is_main():
            np.save(place / "scores.npy", scores[left_out])
            shutil.rmtree(place / "checkpoints", ignore_errors=True)
    return scores


def training_rows(
    cfg: RunConfig,
    data: TokenizedDataset,
    rejected: IntArray | None,
    label_scorer: LabelScorer,
    watch: Watch,
    session: Session,
) -> TrainingRows:
    """The rows to train on, with their pairs and their scores by the starting model, if the method uses them.

    Args:
        rejected: from `rejected_labels`.
        label_scorer: of the model before training.
        session: jobs with the same starting run share its scores.
    """
    rows, pairs, reward = data.training_rows(cfg), cfg.method.preference, cfg.method.reward
    if rejected is not None:
        rows = replace(rows, rejected=rejected, order=[row for row in rows.order if rejected[row] >= 0])
    if (pairs and pairs.compares) or (reward and reward.beta > 0):
        key: tuple[object, ...] = (str(cfg.method.init), data.dataset.fingerprint, *data.fingerprints().values())
        key += (base.key(cfg.model, cfg.seed, cfg.method.quantization), cfg.train.score_tokens)
        if key not in session.start_scores:
            scored = _scored(label_scorer, data, watch, "training rows with the starting model")
            session.start_scores[key] = scored
        rows = replace(rows, reference=session.start_scores[key])
    return rows


def _scored(label_scorer: LabelScorer, data: TokenizedDataset, watch: Watch, what: str) -> FloatArray:
    hardware.trim_heap()
    prompts = data.prompts("train")
    with watch.display.work(f"scoring {what}", len(prompts)) as work:
        return label_scorer.score(prompts, work.moved)
