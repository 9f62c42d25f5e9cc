"""The finished run that training starts from (``method.init``): which one it is, and whether it fits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finsa.config import RunConfig, locate
from finsa.config.base import LOWER_IS_BETTER, headline
from finsa.errors import ConfigError, FinsaError, Problem, RunError
from finsa.runs import adapter_folders, provenance, run_folder
from finsa.session import Session

KEY = "method.init"


def resolved(cfg: RunConfig, session: Session | None) -> RunConfig:
    """Name the run that ``method.init`` refers to, and take the shape of the adapter from it.

    Args:
        cfg: the configuration.
        session: knows the sweep that the job belongs to.

    Raises:
        ConfigError: if there is no such run, or it does not fit the model or the method.
        RunError: for a run that is not complete.
    """
    method = cfg.method
    if not method.starts_from_run or cfg.run is not None or (pending(cfg) and cfg.stage.name != "train"):
        return cfg
    assert method.adapter is not None
    if method.init == "sweep":
        sweep = session.job.sweep_dir if session and session.job else None
        if sweep is None:
            raise _refused("sweep is for the jobs of a sweep; name a run, or a folder of runs")
        path = _best(sweep, cfg)
    else:
        path = locate(str(method.init))
        if path.is_dir() and not (path / "run.json").is_file():
            path = _best(path, cfg)
    path, start, facts = run_folder.read(str(path))
    if start.stage.name != "train" or start.method.adapter is None:
        raise _refused(
            f"{path} has no single adapter (stage={start.stage.name}, method={start.method.name}). To start from all "
            f"its weights: stage=export run={path} format=merged output=<folder>; model.path=<folder> {KEY}=base"
        )
    if difference := _other_model(cfg, start, facts):
        raise _refused(f"{path} was trained on model={start.model.name}; here {difference}")
    for key in ("quantization", "head"):
        if getattr(method, key) != (used := getattr(start.method, key)):
            raise _refused(f"{path} was trained with {key}={used}; add method.{key}={used}")
    saved = adapter_folders.read(str(path))
    shape = {"variant": saved.variant, "rank": saved.rank, "alpha": saved.alpha, "init": str(saved.folder)}
    adapter = method.adapter.model_copy(update={**shape, "targets": start.method.adapter.targets})
    return cfg.model_copy(update={"method": method.model_copy(update={"init": str(path), "adapter": adapter})})


def pending(cfg: RunConfig) -> bool:
    """Whether the run that training starts from may not exist yet: of a sweep, or an earlier link of a chain."""
    return cfg.method.init is not None and (cfg.method.init == "sweep" or cfg.method.init.startswith("@"))


def problems(cfg: RunConfig) -> Iterator[Problem]:
    """Check ``method.init`` before a command starts; the jobs of a sweep may not have run yet."""
    if pending(cfg):
        return
    try:
        resolved(cfg, None)
    except ConfigError as error:
        yield from error.problems
    except RunError as error:
        yield Problem(KEY, str(error).removeprefix("run: "))


def require_same_rows(cfg: RunConfig, data: Any, load: Any) -> None:
    """Check that the starting run has the labels and the prompt of this run, and was not trained on its test rows.

    Args:
        cfg: from `resolved`.
        data: the rows, a `finsa.data.dataset.Dataset`.
        load: `finsa.data.dataset.load`, to read the rows of the starting run if they are others.

    Raises:
        ConfigError: otherwise.
    """
    path, start, facts = run_folder.read(str(cfg.method.init))
    words = dict(zip(data.labels.names, data.labels.words, strict=True))
    if list((facts.get("labels") or words).items()) != list(words.items()):
        raise _refused(f"{path} was trained on the labels {facts['labels']}, not {words}")
    if start.data.prompt != cfg.data.prompt:
        raise _refused(f"{path} was trained with data.prompt={json.dumps(start.data.prompt, ensure_ascii=False)}")
    if facts.get("data_fingerprint") == data.fingerprint:
        return
    try:
        theirs = load(start.data)
    except FinsaError as error:
        text = f"the rows of {path} cannot be read, to check that it was not trained on the test rows: {error}"
        raise _refused(text) from None
    seen = {text for split in ("train", "validation") for text in theirs.splits[split]["text"].to_list()}
    test = data.splits["test"]["text"].to_list()
    leaked = sum(text in seen for text in test)
    if leaked:
        raise _refused(
            f"{leaked:,} of the {len(test):,} test texts are training or validation rows of {path}, so their scores "
            "would be too good; use its data and data.split.seed"
        )


def _other_model(cfg: RunConfig, start: RunConfig, facts: dict[str, Any]) -> str:
    """The difference between the model of a run and the one of this configuration; empty if they are the same."""
    for key in ("weights", "prompt", "think"):
        if getattr(cfg.model, key) != getattr(start.model, key):
            return f"model.{key} is {getattr(cfg.model, key)}, not {getattr(start.model, key)}"
    if cfg.model.weights == "random":
        same = (cfg.seed, cfg.model.architecture) == (start.seed, start.model.architecture)
        return "" if same else "seed or architecture give other random weights"
    recorded = {role: files for role, files in facts.get("base_weights", {}).items() if role in ("model", "tokenizer")}
    changes = run_folder.other_weights({**facts, "base_weights": recorded}, provenance.base_weights(cfg))
    return f"the weights differ: {changes[0]}" if changes else ""


def _best(folder: Path, cfg: RunConfig) -> Path:
    """The finished run below a folder, of this seed, model, prompt and labels, with the best validation score.

    Of ties the first. Runs that started from other runs are left out.
    """
    measure = headline(cfg.data.task)
    jobs = [json.loads(file.read_text(encoding="utf-8")).get("run") for file in sorted(folder.glob("*/job.json"))]
    places = dict.fromkeys(
        [*map(Path, filter(None, jobs)), *(file.parent for file in sorted(folder.rglob("run.json")))]
    )
    scores = dict[Path, float]()
    for place in places:
        try:
            path, start, _ = run_folder.read(str(place))
            report = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
        except (RunError, OSError, ValueError):
            continue  # not finished, or not a run of this kind
        alike = all(
            one == other
            for one, other in (
                (start.stage.name, "train"),
                (start.seed, cfg.seed),
                (start.model.name, cfg.model.name),
                (start.method.head, cfg.method.head),
                ((start.data.prompt, start.data.labels), (cfg.data.prompt, cfg.data.labels)),
            )
        )
        adapter = start.method.adapter  # one that started from another run is not the first step of anything
        first = adapter is not None and adapter.init is None and not start.method.starts_from_run
        if alike and first and measure in report.get("validation", {}):
            scores[path] = report["validation"][measure] * (-1 if measure in LOWER_IS_BETTER else 1)
    if not scores:
        raise _refused(
            f"no finished run below {folder} has trained an adapter for model={cfg.model.name} on these labels and "
            f"this prompt with seed={cfg.seed}; train one with method=lora_response"
        )
    return max(scores, key=lambda path: scores[path])


def _refused(text: str) -> ConfigError:
    return ConfigError([Problem(KEY, text)])
