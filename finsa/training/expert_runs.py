"""The training runs of a mixture's experts: named, found by configuration, or trained; checked before weights load."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finsa.config import FOLDER_NAME, MoeJointStage, RunConfig, TrainStage, catalogue
from finsa.data import dataset
from finsa.data.tokenized import TokenizedDataset
from finsa.errors import ConfigError, DataError, Problem, RunError
from finsa.models import factory
from finsa.models.moe import experts
from finsa.runs import provenance, run_folder
from finsa.session import Session
from finsa.training import preflight, run

# Keys that must be equal for an adapter to fit a base model: weights, tokenizer, and the rendering of the prompt.
BASE = ("hub_id", "revision", "weights", "path", "tokenizer", "prompt", "think")


@dataclass(frozen=True)
class ExpertRuns:
    """The runs of a mixture's experts, and the run that it is compared with.

    Args:
        runs: run folder by expert, in the mixture's order.
        adapters: PEFT folder by expert.
        union: run folder of one adapter trained on all domains; None without a comparison.
    """

    runs: dict[str, Path]
    adapters: dict[str, Path]
    union: Path | None


def names(stage: MoeJointStage, data: dataset.Dataset) -> tuple[str, ...]:
    """The names of the experts, in order: as configured, or the domains of the training rows, most frequent first.

    Raises:
        DataError: for rows of a single domain, or without domains.
        ConfigError: if the router is supervised by domains, and the experts are not the domains.
    """
    counts = data.splits["train"].drop_nulls("domain").group_by("domain").len().sort(["len", "domain"])
    domains = tuple(reversed(counts["domain"].to_list()))
    if stage.experts is None:
        if len(domains) < 2:
            state = f"are all of domain {domains[0]}" if domains else "have no domain"
            raise DataError(
                f"data: the training rows {state}, and a mixture needs two. Name the column that holds it with "
                "data.columns.domain=<column>, join data sets as in data=finnf_joint, or name experts with "
                "stage.experts"
            )
        for domain in domains:
            if not re.match(FOLDER_NAME, domain):
                raise DataError(f"data: domain {domain!r} cannot be the name of an expert's folder; rename it")
        return domains
    if stage.domain_weight > 0 and set(stage.experts) != set(domains):
        text = (
            f"{', '.join(stage.experts)} are not the domains of the training rows ({', '.join(domains) or 'none'}). "
            "Name one expert per domain, or set stage.domain_weight=0 for experts that are not domains"
        )
        raise ConfigError([Problem("stage.experts", text)])
    return tuple(stage.experts)


def gather(
    cfg: RunConfig, stage: MoeJointStage, data: TokenizedDataset, report: Callable[[str], None], session: Session
) -> ExpertRuns:
    """Find or train the run of every expert, and of the single adapter that the mixture is compared with.

    Args:
        cfg: configuration of the mixture.
        data: its rows and prompt.
        report: receives a message per run.

    Raises:
        ConfigError: for a missing expert, if missing ones are not trained.
        RunError: for a folder that is not a run, or a run with a different base model, prompt or labels.
        ModelError: for experts that differ in rank, alpha or targets.
    """
    named = stage.experts or dict.fromkeys(names(stage, data.dataset))
    existing = {name: _existing(cfg, name, place, session) for name, place in named.items()}
    missing = [name for name, path in existing.items() if path is None]
    if missing and stage.missing == "error":
        commands = "\n".join(f"  {command(expert_config(cfg, name), session)}" for name in missing)
        text = f"no finished run has trained {', '.join(missing)}. Train with stage.missing=train, or by\n{commands}"
        raise ConfigError([Problem("stage.experts", text)])
    for name, path in existing.items():
        if path is not None:
            _check(cfg, stage, data, name, path)
            report(f"expert {name}: {path}")
    runs = {
        name: path or _train(expert_config(cfg, name), f"expert {name}", report, cfg.resume, session)
        for name, path in existing.items()
    }
    adapters = {name: factory.adapter_folder(run_folder.read(str(path))[1], path) for name, path in runs.items()}
    read = experts.read(adapters)
    if cfg.method.head == "classifier" and stage.head_init == "experts":
        experts.check_heads(read, data.dataset.labels.names)
    union = None
    if stage.compare:
        wanted = expert_config(cfg, None)
        union = run_folder.finished(wanted, data.dataset.fingerprint)
        union = union or _train(wanted, "one adapter on all domains", report, cfg.resume, session)
    return ExpertRuns(runs, adapters, union)


def begun(cfg: RunConfig, stage: MoeJointStage, data: dataset.Dataset, session: Session) -> bool:
    """Whether the run of an expert was started, so that it can be resumed before the mixture itself has a run."""
    unnamed = [name for name, place in (stage.experts or dict.fromkeys(names(stage, data))).items() if place is None]
    return any(
        _existing(cfg, name, None, session) or run_folder.unfinished(expert_config(cfg, name)) for name in unnamed
    )


def expert_config(cfg: RunConfig, domain: str | None) -> RunConfig:
    """The configuration of the expert of a domain, or of one adapter on all domains."""
    stage = TrainStage.model_validate(catalogue.read(catalogue.file_of("stage", "train")))
    data = cfg.data.model_copy(update={"domain": domain})
    return cfg.model_copy(update={"stage": stage, "data": data, "resume": False})


def command(cfg: RunConfig, session: Session) -> str:
    """The command of a training run: this command with stage=train, or the names of its choices."""
    words = [f"{group}={getattr(cfg, group).name}" for group in ("model", "method", "data", "train")]
    words += [f"seed={cfg.seed}", f"output_dir={cfg.output_dir}"]
    if session.job is not None and cfg.experiment is None:  # an experiment's values do not fit stage=train
        skipped = ("stage=", "stage.", "resume=", "data.domain=")
        words = [text for text in session.overrides if not text.startswith(skipped)]
    domain = [f"data.domain={cfg.data.domain}"] if cfg.data.domain else []
    return shlex.join(["python", "run.py", *words, *domain])


def _existing(cfg: RunConfig, name: str, place: str | None, session: Session) -> Path | None:
    """The named run of an expert, or a finished run of its configuration; None if it must be trained."""
    if place is not None:
        return run_folder.read(place)[0]
    wanted = expert_config(cfg, name)
    try:
        fingerprint = dataset.load(wanted.data, session).fingerprint
    except DataError as error:
        text = f"expert {name} has no run folder and cannot be trained: {error}"
        raise ConfigError([Problem("stage.experts", text)]) from None
    return run_folder.finished(wanted, fingerprint)


def _train(cfg: RunConfig, title: str, report: Callable[[str], None], resume: bool, session: Session) -> Path:
    unfinished = run_folder.unfinished(cfg) if resume else None
    if unfinished is None:
        report(f"{title}: no finished run of this configuration; training it as\n  {command(cfg, session)}")
    else:
        report(f"{title}: resuming {unfinished}")
    data = dataset.load(cfg.data, session)
    preflight.require_trainable(cfg, data, session)
    result = run.run(cfg.model_copy(update={"resume": unfinished is not None}), data, session.with_own_folders())
    assert result.run_dir is not None
    return result.run_dir


def _check(cfg: RunConfig, stage: MoeJointStage, data: TokenizedDataset, name: str, path: Path) -> None:
    """Check that the run of one expert fits the mixture."""
    _, trained, facts = run_folder.read(str(path))
    provenance.require_weights(path, facts)
    if trained.method.adapter is None or trained.stage.name not in ("train", "pretrain"):
        raise RunError(
            f"expert {name}: {path} is a run of stage={trained.stage.name} with method={trained.method.name}, which "
            "has no adapter; name a run of stage=train or stage=pretrain with an adapter"
        )
    if stage.domain_weight > 0 and trained.data.domain not in (None, name):
        raise RunError(f"expert {name}: {path} was trained on domain {trained.data.domain}; are experts swapped?")
    for key in BASE:
        ours, theirs = getattr(cfg.model, key), getattr(trained.model, key)
        if ours != theirs:
            raise RunError(
                f"expert {name}: {path} was trained on model={trained.model.name} (model.{key}={theirs}), but the "
                f"mixture uses model={cfg.model.name} (model.{key}={ours}). Use the same base model for all"
            )
    for key, what, fix in (
        ("template_fingerprint", "prompt or max_length", "Train it with the same data.prompt and data.max_length"),
        ("label_fingerprint", "set of labels", "Train it with the same data.labels"),
    ):
        theirs, ours = facts.get(key), data.fingerprints()[key]
        if theirs is not None and theirs != ours:
            raise RunError(f"expert {name}: {path} was trained with a different {what} than the mixture. {fix}")
