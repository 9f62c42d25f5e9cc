"""Training of a mixture of experts, top to bottom: collect experts, warm up the router, train jointly, score, compare.

Each part of the training saves a complete mixture: ``moe_init``, ``router_warmup`` and ``moe_joint``.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finsa.config import MoeJointStage, RunConfig, Train
from finsa.data import dataset, tokenized
from finsa.data.tokenized import TokenizedDataset
from finsa.evaluation import finished_runs, moe, run_results
from finsa.evaluation.moe import MIXTURE, UNION
from finsa.inference.scoring import FloatArray, LabelScorer, scorer
from finsa.models import base, factory, hardware, tokenizers
from finsa.models.moe.experts import mean_head
from finsa.models.moe.mixture import MANIFEST, Mixture
from finsa.runs import files, run_folder, trackers
from finsa.runs.run_folder import Result, RunFolder
from finsa.session import Session
from finsa.training import expert_runs, fit, objective, results
from finsa.training.fit import Fitted, Record
from finsa.training.watchdog import Watch

INIT, WARMUP, JOINT = "moe_init", "router_warmup", "moe_joint"  # checkpoints, each a mixture
Classes = NDArray[np.int64]
Validation = tuple[dict[str, float], FloatArray]  # metrics, and log-probabilities (n, c)


def run(cfg: RunConfig, session: Session) -> Result:
    """Find or train the experts, build and train the mixture, score the test split once, write the run folder.

    Args:
        cfg: of a mixture; `preflight.require_trainable` has checked it.
        session: of the command.
    """
    stage = cfg.stage
    assert isinstance(stage, MoeJointStage)
    loaded = dataset.load(cfg.data, session)
    expert_runs.names(stage, loaded)
    data = tokenized.build(cfg, loaded, tokenizers.load_tokenizer(cfg.model), session)
    hardware.prepare(cfg.train)
    resuming = _resuming(cfg, stage, data, session)
    parts = expert_runs.gather(cfg, stage, data, lambda text: print(text, flush=True), session)
    with (
        run_folder.start(cfg.model_copy(update={"resume": resuming}), data.dataset.fingerprint, session) as folder,
        trackers.track(cfg, folder.path, session.group) as tracker,
        Watch(cfg.train, folder.path).watching() as watch,
    ):
        folder.note(
            experts={name: str(path) for name, path in parts.runs.items()},
            union=None if parts.union is None else str(parts.union),
        )
        with watch.display.work("loading the model", None):
            backbone = base.load_base(cfg.model, cfg.seed, cfg.method.quantization, session)
        answers: dict[str, Classes] = {}  # predicted classes of the test rows, (n,), by model
        try:
            model = factory.build_mixture(cfg, stage, backbone, parts.adapters, data.renderer)
            if cfg.method.head == "classifier" and stage.head_init == "experts" and model.head is not None:
                model.head.load_state_dict(mean_head(model.adapters))
            alone = _answers_of_experts(cfg, data, model, watch) if stage.compare else {}

            model.set_trainable(experts=True)
            trainable, total = base.count_parameters(model)
            device = hardware.describe(base.dtype(cfg.model))
            folder.note(trainable_parameters=trainable, total_parameters=total, device=device)
            record = results.recorder(folder, tracker, session)
            fitted, (validation, held_out) = train(cfg, stage, model, data, watch, record)
            with files.staged(folder.path) as staging:
                model.save(staging, data.dataset.labels.names)
                data.renderer.tokenizer.save_pretrained(staging / "tokenizer")

            reader = scorer(model, data.renderer, cfg.train.score_tokens)
            started = time.monotonic()
            log_probs = _score(reader, data, "test", watch)
            folder.note(scoring_seconds=round(time.monotonic() - started, 3))
            gates = reader.gates
            assert gates is not None
            if stage.compare:
                answers[MIXTURE] = log_probs.argmax(axis=1)
                for routing in sorted({"soft", "hard"} - {model.stage.routing}):
                    with model.routed(routing):
                        answers[f"{MIXTURE}, {routing} routing"] = _answers(
                            cfg, data, model, f"{routing} routing", watch
                        )
        except BaseException:
            session.base_models.clear()  # the base may still have experts
            raise

        domains = data.dataset.splits["test"]["domain"].to_list()
        metrics: dict[str, Any] = {
            "validation": validation,
            "test": {},
            "router": moe.analyze_gates(gates, domains, model.experts),
        }
        results.calibrate(cfg, data, folder, metrics, {"validation": held_out, "test": log_probs})
        if stage.compare:
            answers |= moe.expert_answers(alone, domains)
            if parts.union is not None:
                answers[UNION] = finished_runs.load([parts.union])[0][0].predicted  # its test rows are the mixture's
            metrics["mixture"] = _compare(data, answers, domains, folder)
        folder.note(**fitted.facts(), scoring=reader.rule)
        results.write(cfg, data, folder, tracker, metrics, log_probs, gates, model.experts)
        factory.detach(model)
        for table in moe.tables("this mixture", metrics):
            table.show()
        for warning in metrics["router"]["warnings"]:
            print(f"warning: {warning}")
    return Result("moe_joint", folder.path, metrics, metrics["validation"]["macro_f1"])


def _resuming(cfg: RunConfig, stage: MoeJointStage, data: TokenizedDataset, session: Session) -> bool:
    """Whether the run of the mixture is resumed; with ``resume=true``, possibly only its experts have been started.

    Raises:
        RunError: if there is nothing to resume.
    """
    if not cfg.resume or run_folder.unfinished(cfg) is not None:
        return cfg.resume
    finished = run_folder.finished(cfg, data.dataset.fingerprint)
    if finished is not None or not expert_runs.begun(cfg, stage, data.dataset, session):
        run_folder.to_resume(cfg, None, session)
    return False


# ------------------------------------------------------------------------------------------------ training


def train(
    cfg: RunConfig, stage: MoeJointStage, model: Mixture, data: TokenizedDataset, watch: Watch, record: Record
) -> tuple[Fitted, Validation]:
    """Train router and head, then everything; a warm-up that was finished before an interruption is not repeated.

    Args:
        watch: of the run; ``checkpoints/`` in its folder gets ``moe_init``, ``router_warmup`` and ``moe_joint``.
        record: receives log records; the steps of joint training continue those of the warm-up.

    Returns:
        The result of joint training, and the validation of its weights.
    """
    places, labels = watch.folder / "checkpoints", data.dataset.labels.names

    def save(name: str) -> None:
        (places / name).mkdir(parents=True, exist_ok=True)
        with files.staged(places / name) as staging:  # ``mixture/``, which contains the manifest, is moved last
            model.save(staging, labels)

    if not (places / INIT / "mixture" / MANIFEST).is_file():
        save(INIT)
    if stage.warmup_steps and (places / WARMUP / "mixture" / MANIFEST).is_file():
        model.load(places / WARMUP)
    elif stage.warmup_steps:
        model.set_trainable(experts=False)
        _fit(cfg, stage, model, data, warmup_schedule(cfg.train, stage), WARMUP, stage.balance_warmup, record, watch)
        save(WARMUP)

    def shifted(step: int, values: dict[str, float]) -> None:
        record(step + stage.warmup_steps, values)

    model.set_trainable(experts=True)
    schedule = joint_schedule(cfg.train, stage)
    fitted, validations = _fit(cfg, stage, model, data, schedule, JOINT, stage.balance_joint, shifted, watch)
    save(JOINT)
    if fitted.best_validation is None:  # the best checkpoint is from before the training was resumed
        return fitted, validate(cfg, data, model, watch)
    return fitted, validations[fitted.best_validation]


def warmup_schedule(train: Train, stage: MoeJointStage) -> Train:
    """The schedule of the warm-up: the learning rate is reached after a tenth of the steps; one validation.

    The published warm-up raises the rate over all of its 500 steps, so that it is reached at the last one.
    """
    changes = {
        "max_steps": stage.warmup_steps,
        "epochs": float(stage.warmup_steps),  # an epoch has at least one step, so max_steps determines the length
        "warmup": 0.1,
        "schedule": "constant",
        "validate_every": stage.warmup_steps,
        "patience": None,
    }
    return train.model_copy(update=changes)


def joint_schedule(train: Train, stage: MoeJointStage) -> Train:
    """The schedule of joint training: that of the experts, with the epochs and learning rate of the stage."""
    changes = {"epochs": stage.epochs or train.epochs, "learning_rate": train.learning_rate * stage.rate}
    return train.model_copy(update=changes)


def _fit(
    cfg: RunConfig,
    stage: MoeJointStage,
    model: Mixture,
    data: TokenizedDataset,
    train: Train,
    name: str,
    balance: str,
    record: Record,
    watch: Watch,
) -> tuple[Fitted, list[Validation]]:
    rows, ids = data.training_rows(cfg, model.experts, balance), data.dataset.splits["train"]["id"]
    task = objective.build(cfg.method, data.renderer, data.class_counts(cfg))
    validations: list[Validation] = []

    def metrics(_: torch.nn.Module) -> dict[str, float]:
        validations.append(validate(cfg, data, model, watch))
        return validations[-1][0]

    fitted = fit.fit(
        model=model,
        tokenizer=data.renderer.tokenizer,
        rows=rows,
        validate=metrics,
        train=train,
        seed=cfg.seed,
        folder=watch.folder / "checkpoints" / name / "steps",
        record=record,
        objective=objective.joint(task, model, stage.domain_weight, stage.balance_weight),
        lr_ratio=cfg.method.adapter.lr_ratio if cfg.method.adapter else 1.0,
        log=watch.folder / "log.jsonl",
        watch=watch,
        identify=lambda row: str(ids[rows.order[row]]),
    )
    return fitted, validations


@torch.no_grad()
def validate(cfg: RunConfig, data: TokenizedDataset, model: Mixture, watch: Watch) -> Validation:
    """Score the validation rows with the configured routing.

    Returns:
        The metrics that choose a checkpoint, with the router's accuracy; and log-probabilities, (n, c).
    """
    reader = scorer(model, data.renderer, cfg.train.score_tokens)
    held_out = data.prompts("validation")[: cfg.train.validation_rows]
    with watch.display.work("scoring validation", len(held_out)) as work:
        log_probs = reader.score(held_out, work.moved)
    metrics = run_results.validation(data, log_probs)
    assert reader.gates is not None
    domains = data.dataset.splits["validation"]["domain"].to_list()[: len(log_probs)]
    accuracy = moe.analyze_gates(reader.gates, domains, model.experts)["accuracy"]
    return (metrics if accuracy is None else {**metrics, "routing_accuracy": accuracy}), log_probs


# ------------------------------------------------------------------------------------------------ comparison


def _score(reader: LabelScorer, data: TokenizedDataset, title: str, watch: Watch) -> FloatArray:
    prompts = data.prompts("test")
    with watch.display.work(f"scoring {title}", len(prompts)) as work:
        return reader.score(prompts, work.moved)


def _answers(cfg: RunConfig, data: TokenizedDataset, model: Mixture, title: str, watch: Watch) -> Classes:
    reader = scorer(model, data.renderer, cfg.train.score_tokens)
    return _score(reader, data, f"test with {title}", watch).argmax(axis=1)


def _answers_of_experts(cfg: RunConfig, data: TokenizedDataset, model: Mixture, watch: Watch) -> dict[str, Classes]:
    """Predictions of each expert for all test rows, before joint training changes it."""
    answers = {}
    for number, name in enumerate(model.experts):
        with model.using_expert(number):
            answers[name] = _answers(cfg, data, model, f"expert {name}", watch)
    return answers


def _compare(
    data: TokenizedDataset, answers: dict[str, Classes], domains: list[str | None], folder: RunFolder
) -> list[dict[str, Any]]:
    """Compare predictions row by row, and write them to ``comparison.jsonl``."""
    names, gold = data.dataset.labels.names, np.array(data.gold("test"))
    lines = (
        {
            "id": identity,
            "domain": domains[row],
            "gold": names[gold[row]],
            "answers": {name: names[classes[row]] for name, classes in answers.items()},
        }
        for row, identity in enumerate(data.dataset.splits["test"]["id"].to_list())
    )
    folder.write_lines("comparison.jsonl", lines)
    return moe.compare(answers, gold, domains, names)
