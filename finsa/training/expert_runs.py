"""The runs that a mixture is made of: named, found by convention, or trained, and checked before a weight is loaded."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finsa.config import FOLDER_NAME, MoeJointStage, RunConfig, compose
from finsa.data import dataset
from finsa.data.tokenized import TokenizedDataset
from finsa.errors import ConfigError, DataError, Problem, RunError
from finsa.models import factory
from finsa.models.moe import experts
from finsa.runs import provenance, run_folder
from finsa.session import Session
from finsa.training import run_training

# What must be the same for an adapter to fit a base: weights, tokens, and what stands around a prompt.
BASE = ("hub_id", "revision", "weights", "path", "tokenizer", "prompt", "think")


@dataclass(frozen=True)
class Members:
    """What a mixture is made of and held against.

    Args:
        runs: run folder by expert, in the mixture's order.
        adapters: PEFT folder by expert.
        union: run folder of one adapter trained on all domains; None where it is not asked for.
    """

    runs: dict[str, Path]
    adapters: dict[str, Path]
    union: Path | None


def names(stage: MoeJointStage, data: dataset.Dataset) -> tuple[str, ...]:
    """The experts, in order: as named, or the domains of the training rows, the most frequent first.

    Raises:
        DataError: for rows of one domain or none.
        ConfigError: where experts are to be supervised by domains, and are others.
    """
    counts = data.splits["train"].drop_nulls("domain").group_by("domain").len().sort(["len", "domain"])
    domains = tuple(reversed(counts["domain"].to_list()))
    if stage.experts is None:
        if len(domains) < 2:
            said = f"are all of domain {domains[0]}" if domains else "have no domain"
            raise DataError(
                f"data: the training rows {said}, and a mixture needs two. Name the column that tells them with "
                "data.columns.domain=<column>, join tables as data=finnf_joint does, or name experts with stage.experts"
            )
        for domain in domains:
            if not re.match(FOLDER_NAME, domain):
                raise DataError(f"data: domain {domain!r} cannot be the name of an expert's folder; rename it")
        return domains
    if stage.domain_weight > 0 and set(stage.experts) != set(domains):
        text = (
            f"{', '.join(stage.experts)} are not the domains of the training rows ({', '.join(domains) or 'none'}). "
            "Name one expert per domain, or set stage.domain_weight=0 for experts that are no domains"
        )
        raise ConfigError([Problem("stage.experts", text)])
    return tuple(stage.experts)


def gather(
    cfg: RunConfig, stage: MoeJointStage, task: TokenizedDataset, tell: Callable[[str], None], session: Session
) -> Members:
    """Find every expert's run, or train it, and the union's where it is compared with.

    Args:
        cfg: of the mixture.
        task: its rows and prompt.
        tell: takes what is being done, a sentence at a time.

    Raises:
        ConfigError: for a missing expert that is not to be trained.
        RunError: for a named folder that is no run, or one whose base, prompt or labels are others.
        ModelError: for experts that differ in rank, alpha or targets.
    """
    named = stage.experts or dict.fromkeys(names(stage, task.dataset))
    known = {name: _known(cfg, name, place, session) for name, place in named.items()}
    lacking = [name for name, path in known.items() if path is None]
    if lacking and stage.missing == "error":
        commands = "\n".join(f"  {command(expert_config(cfg, name), session)}" for name in lacking)
        text = f"no finished run has trained {', '.join(lacking)}. Train with stage.missing=train, or by\n{commands}"
        raise ConfigError([Problem("stage.experts", text)])
    for name, path in known.items():
        if path is not None:
            _check(cfg, stage, task, name, path)
            tell(f"expert {name}: {path}")
    folders = {
        name: path or _train(expert_config(cfg, name), f"expert {name}", tell, cfg.resume, session)
        for name, path in known.items()
    }
    adapters = {name: _adapter(path) for name, path in folders.items()}
    found = experts.read(adapters)
    if cfg.method.head == "classifier" and stage.head_init == "experts":
        experts.check_heads(found, task.dataset.labels.names)
    union = None
    if stage.compare:
        wanted = expert_config(cfg, None)
        union = run_folder.finished(wanted, task.dataset.fingerprint)
        union = union or _train(wanted, "one adapter on all domains", tell, cfg.resume, session)
    return Members(folders, adapters, union)


def begun(cfg: RunConfig, stage: MoeJointStage, data: dataset.Dataset, session: Session) -> bool:
    """Whether an expert's own run was begun: what there is to go on with before the mixture itself has a run."""
    unnamed = [name for name, place in (stage.experts or dict.fromkeys(names(stage, data))).items() if place is None]
    wanted = [expert_config(cfg, name) for name in unnamed]
    pairs = zip(wanted, unnamed, strict=True)
    return any(_known(one, name, None, session) or run_folder.unfinished(one) for one, name in pairs)


def expert_config(cfg: RunConfig, domain: str | None) -> RunConfig:
    """The ordinary training run of one domain's expert, or of one adapter on all domains."""
    values, choices = compose.compose_values(["stage=train"])
    stage = compose.build(values, choices, ["stage=train"]).stage
    data = cfg.data.model_copy(update={"domain": domain})
    return cfg.model_copy(update={"stage": stage, "data": data, "resume": False})


def command(cfg: RunConfig, session: Session) -> str:
    """The command of a training run: this command's with another stage, or by the names of its choices."""
    words = [f"{group}={getattr(cfg, group).name}" for group in ("model", "method", "data", "train")]
    words += [f"seed={cfg.seed}", f"output_dir={cfg.output_dir}"]
    if session.job is not None and cfg.experiment is None:  # an experiment's own values would not go with stage=train
        skipped = ("stage=", "stage.", "resume=", "data.domain=")
        words = [text for text in session.overrides if not text.startswith(skipped)]
    domain = [f"data.domain={cfg.data.domain}"] if cfg.data.domain else []
    return shlex.join(["python", "run.py", *words, *domain])


def _known(cfg: RunConfig, name: str, place: str | None, session: Session) -> Path | None:
    if place is not None:
        return run_folder.read(place)[0]
    wanted = expert_config(cfg, name)
    try:
        fingerprint = dataset.load(wanted.data, session).fingerprint
    except DataError as error:
        text = f"expert {name} is named without a run folder, and none can be trained: {error}"
        raise ConfigError([Problem("stage.experts", text)]) from None
    return run_folder.finished(wanted, fingerprint)


def _train(cfg: RunConfig, what: str, tell: Callable[[str], None], resume: bool, session: Session) -> Path:
    before = run_folder.unfinished(cfg) if resume else None
    tell(
        f"{what}: no finished run of this configuration; training it as\n  {command(cfg, session)}"
        if before is None
        else f"{what}: going on with {before}"
    )
    result = run_training.run(cfg.model_copy(update={"resume": before is not None}), session.with_own_folders())
    assert result.run_dir is not None
    return result.run_dir


def _check(cfg: RunConfig, stage: MoeJointStage, task: TokenizedDataset, name: str, path: Path) -> None:
    """Check one expert's run against the mixture."""
    _, trained, facts = run_folder.read(str(path))
    provenance.require_weights(path, facts)
    if trained.method.adapter is None or trained.stage.name not in ("train", "pretrain"):
        raise RunError(
            f"expert {name}: {path} is a run of stage={trained.stage.name} with method={trained.method.name}, which "
            "leaves no adapter; name one of stage=train or stage=pretrain with an adapter"
        )
    if stage.domain_weight > 0 and trained.data.domain not in (None, name):
        raise RunError(f"expert {name}: {path} was trained on domain {trained.data.domain}; are experts swapped?")
    for key in BASE:
        own, theirs = getattr(cfg.model, key), getattr(trained.model, key)
        if own != theirs:
            raise RunError(
                f"expert {name}: {path} was trained on model={trained.model.name} (model.{key}={theirs}), the mixture "
                f"is of model={cfg.model.name} (model.{key}={own}). Choose one base for all"
            )
    for key, what, remedy in (
        ("template_fingerprint", "prompt or maximal length", "Train it with the same data.prompt and data.max_length"),
        ("label_fingerprint", "labels or label words", "Train it with the same data.labels"),
    ):
        theirs, own = facts.get(key), task.fingerprints()[key]
        if theirs is not None and theirs != own:
            raise RunError(f"expert {name}: {path} was trained with other {what} than the mixture's. {remedy}")


def _adapter(path: Path) -> Path:
    return factory.adapter_folder(run_folder.read(str(path))[1], path)


def facts(members: Members) -> dict[str, Any]:
    """What the run's record says of its parts."""
    return {
        "experts": {name: str(path) for name, path in members.runs.items()},
        "union": None if members.union is None else str(members.union),
    }
