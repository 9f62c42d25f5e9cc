"""Fit a mixture: router and head first, experts frozen, then everything; each step leaves a mixture that loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from finsa.config import MoeJointStage, RunConfig, Train
from finsa.data.tokenized import TokenizedDataset
from finsa.evaluation import moe, run_results
from finsa.inference.scoring import FloatArray, scorer
from finsa.models.moe.experts import mean_head
from finsa.models.moe.mixture import MANIFEST, Mixture
from finsa.runs import files
from finsa.training import fit, objective
from finsa.training.fit import Fitted
from finsa.training.watchdog import Watch

INIT, WARMUP, JOINT = "moe_init", "router_warmup", "moe_joint"  # checkpoints, each a mixture
Record = Callable[[int, dict[str, float]], None]
Validated = tuple[dict[str, float], FloatArray]


def start(model: Mixture, stage: MoeJointStage, head: str) -> None:
    """Set the head to the mean of the experts' where the configuration says so."""
    if head == "classifier" and stage.head_init == "experts" and model.head is not None:
        model.head.load_state_dict(mean_head(model.adapters))


def learn(
    cfg: RunConfig, stage: MoeJointStage, model: Mixture, task: TokenizedDataset, watch: Watch, record: Record
) -> tuple[Fitted, Validated]:
    """Warm up and train; a warm-up that an interrupted run has finished is not repeated.

    Args:
        watch: of the run, in whose folder ``checkpoints/`` takes ``moe_init``, ``router_warmup`` and ``moe_joint``.
        record: takes log records; the joint stage's steps count on from those of the warm-up.

    Returns:
        What came of the joint stage, and the validation of its weights.
    """
    folder = watch.folder
    labels, places, log = task.dataset.labels.names, folder / "checkpoints", folder / "log.jsonl"
    if not (places / INIT / "mixture" / MANIFEST).is_file():
        _save(model, places / INIT, labels)
    if stage.warmup_steps and (places / WARMUP / "mixture" / MANIFEST).is_file():
        model.load(places / WARMUP)
    elif stage.warmup_steps:
        model.learn(experts=False)
        warm = warmup(cfg.train, stage)
        _fit(cfg, stage, model, task, warm, places / WARMUP, stage.balance_warmup, record, log, watch)
        _save(model, places / WARMUP, labels)

    def shifted(step: int, values: dict[str, float]) -> None:
        record(step + stage.warmup_steps, values)

    model.learn(experts=True)
    last = schedule(cfg.train, stage)
    fitted, seen = _fit(cfg, stage, model, task, last, places / JOINT, stage.balance_joint, shifted, log, watch)
    _save(model, places / JOINT, labels)
    known = fitted.best_validation
    return fitted, seen[known] if known is not None else validated(cfg, task, model, watch)


def _save(model: Mixture, place: Path, labels: Sequence[str]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    with files.staged(place) as temporary:  # ``mixture/``, which has the manifest, moves in last
        model.save(temporary, labels)


def warmup(train: Train, stage: MoeJointStage) -> Train:
    """The warm-up's schedule: the joint stage's learning rate, reached after a tenth of the steps, and one validation.

    The published warm-up raises the rate over all of its 500 steps, so that it is reached at the last one.
    """
    steps = stage.warmup_steps
    # an epoch has a step at least, so that the steps alone decide
    changed = {
        "max_steps": steps,
        "epochs": float(steps),
        "warmup": 0.1,
        "schedule": "constant",
        "validate_every": steps,
        "patience": None,
    }
    return train.model_copy(update=changed)


def schedule(train: Train, stage: MoeJointStage) -> Train:
    """The joint stage's schedule: the experts' own, with the epochs and the rate that the stage gives it."""
    epochs = stage.epochs or train.epochs
    return train.model_copy(update={"epochs": epochs, "learning_rate": train.learning_rate * stage.rate})


def _fit(
    cfg: RunConfig,
    stage: MoeJointStage,
    model: Mixture,
    task: TokenizedDataset,
    train: Train,
    place: Path,
    balance: str,
    record: Record,
    log: Path,
    watch: Watch,
) -> tuple[Fitted, list[Validated]]:
    rows, ids = task.training_rows(cfg, model.experts, balance), task.dataset.splits["train"]["id"]
    seen: list[Validated] = []

    def validate(_: torch.nn.Module) -> dict[str, float]:
        seen.append(validated(cfg, task, model, watch))
        return seen[-1][0]

    fitted = fit.fit(
        model=model,
        tokenizer=task.renderer.tokenizer,
        rows=rows,
        validate=validate,
        train=train,
        seed=cfg.seed,
        folder=place / "steps",
        record=record,
        objective=of(cfg, stage, model, task),
        lr_ratio=cfg.method.adapter.lr_ratio if cfg.method.adapter else 1.0,
        log=log,
        watch=watch,
        identify=lambda row: str(ids[rows.order[row]]),
    )
    return fitted, seen


def of(cfg: RunConfig, stage: MoeJointStage, model: Mixture, task: TokenizedDataset) -> objective.Objective:
    """The joint objective: the method's, the router's and the balance's."""
    own = objective.of(cfg.method, task.renderer, task.class_counts(cfg))
    return objective.joint(own, model, stage.domain_weight, stage.balance_weight)


@torch.no_grad()
def validated(cfg: RunConfig, task: TokenizedDataset, model: Mixture, watch: Watch) -> Validated:
    """Score the validation rows, routed as rows will be when scoring.

    Returns:
        The numbers that choose a checkpoint, with how often the router is right; and log-probabilities, (n, c).
    """
    reader = scorer(model, task.renderer, cfg.train.score_tokens)
    held = task.prompts("validation")[: cfg.train.validation_rows]
    with watch.display.work("scoring validation", len(held)) as work:
        log_probs = reader.score(held, work.moved)
    found = run_results.validation(task, log_probs)
    assert reader.gates is not None
    domains = task.dataset.splits["validation"]["domain"].to_list()[: len(log_probs)]
    accuracy = moe.analyze_gates(reader.gates, domains, model.experts)["accuracy"]
    return (found if accuracy is None else {**found, "routing_accuracy": accuracy}), log_probs
