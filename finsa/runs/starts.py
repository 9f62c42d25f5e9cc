"""What training starts from: the finished run of ``method.init``, whether it fits, and which rows it has seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finsa.config import RunConfig, locate, migration
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
    if not method.starts_from_run or cfg.run is not None:
        return cfg
    assert method.adapter is not None
    if str(method.init).startswith("@"):
        if cfg.stage.name == "chain":
            return cfg
        raise _refused(f"{method.init} is a link of stage=chain; name a run, or a folder of runs")
    if method.init == "sweep":
        sweep = session.job.sweep_dir if session and session.job else None
        if sweep is None:
            raise _refused("sweep is for the jobs of a sweep; name a run, or a folder of runs")
        if cfg.stage.name != "train":
            return cfg
        path = _best(sweep, cfg)
    else:
        path = locate(str(method.init))
        if path.is_dir() and not (path / "run.json").is_file():
            path = _best(path, cfg)
    path, start, facts = run_folder.read(str(path))
    if start.stage.name != "train" or start.method.adapter is None:
        text = f"{path} has no single adapter (stage={start.stage.name}, method={start.method.name})"
        if start.method.baseline is not None or start.method.learn == "nothing":
            raise _refused(f"{text}; start from a run that trained one, such as method=lora_response")
        merged = f"stage=export run={path} format=merged output=<folder>; model.path=<folder> {KEY}=base"
        rows = " with pairs in data.columns.rejected" if method.preference else ""
        raise _refused(f"{text}. To start from all its weights{rows}: {merged}")
    if difference := _other_model(cfg, start, facts):
        raise _refused(f"{path} was trained on model={start.model.name}; here {difference}")
    for key in ("quantization", "head"):
        if getattr(method, key) != (used := getattr(start.method, key)):
            raise _refused(f"{path} was trained with {key}={used}; add method.{key}={used}")
    saved = adapter_folders.read(str(path))
    shape: dict[str, Any] = {"variant": saved.variant, "rank": saved.rank, "alpha": saved.alpha}
    shape["targets"] = start.method.adapter.targets
    given = {word.partition("=")[0].lstrip("+") for word in session.overrides} if session else set()
    for key, value in shape.items():
        if f"method.adapter.{key}" in given and getattr(method.adapter, key) != value:
            raise _refused(f"the adapter of {path} has {key}={value}; leave out method.adapter.{key}")
    adapter = method.adapter.model_copy(update={**shape, "init": str(saved.folder)})
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


def require_same_labels(cfg: RunConfig, data: Any) -> None:
    """Check that the starting run has the labels and the prompt of this run.

    Args:
        cfg: from `resolved`.
        data: the rows, a `finsa.data.dataset.Dataset`.

    Raises:
        ConfigError: otherwise.
    """
    path, start, facts = run_folder.read(str(cfg.method.init))
    words = dict(zip(data.labels.names, data.labels.words, strict=True))
    if list((facts.get("labels") or words).items()) != list(words.items()):
        raise _refused(f"{path} was trained on the labels {facts['labels']}, not {words}")
    if start.data.prompt != cfg.data.prompt:
        raise _refused(f"{path} was trained with data.prompt={json.dumps(start.data.prompt, ensure_ascii=False)}")


def require_unseen_test_rows(cfg: RunConfig, data: Any, load: Any) -> None:
    """Check that nothing that training starts from was trained on the test rows, at any number of steps back.

    Args:
        cfg: from `resolved`.
        data: the rows, a `finsa.data.dataset.Dataset`.
        load: `finsa.data.dataset.load`, to read the rows of earlier runs if they are others.

    Raises:
        ConfigError: otherwise, or if the rows of such a run cannot be read.
    """
    test = data.splits["test"]["text"].to_list()
    for path, start, facts in origins(cfg):
        if facts.get("data_fingerprint") != data.fingerprint:
            seen = {text for split in ("train", "validation") for text in _texts(path, start, split, load)}
            if leaked := sum(text in seen for text in test):
                raise _refused(
                    f"{leaked:,} of the {len(test):,} test texts are training or validation rows of {path}, so their "
                    "scores would be too good; use its data and data.split.seed"
                )


def require_unseen_training_rows(cfg: RunConfig, data: Any, load: Any) -> None:
    """Check that the model whose mistakes make pairs was not trained on the training rows.

    Args:
        cfg: of the base model that scores them, or that is trained on the other folds.
        data, load: see `require_unseen_test_rows`.

    Raises:
        ConfigError: otherwise.
    """
    train = data.splits["train"]["text"].to_list()
    for path, start, _ in origins(cfg):
        seen = set(_texts(path, start, "train", load))
        if known := sum(text in seen for text in train):
            raise _refused(
                f"{path}, which the scores would come from, was trained on {known:,} of the {len(train):,} training "
                "rows, so its mistakes on new rows cannot be found with them; start from a run of method=lora_response "
                "or lora_label, or give pairs in data.columns.rejected"
            )


def origins(cfg: RunConfig) -> Iterator[tuple[Path, RunConfig, dict[str, Any]]]:
    """The runs of ``method.init``, ``method.adapter.init`` and an exported ``model.path``, and what these started from.

    Folders that no longer exist, and models and adapters of other programs, are left out.

    Yields:
        The folder of a run or an export, the configuration of the run, and its ``run.json``.
    """
    records, adapter = list[Path](), cfg.method.adapter
    if cfg.method.starts_from_run and not pending(cfg):
        records.append(locate(str(cfg.method.init)) / "run.json")
    elif adapter is not None and adapter.init is not None and locate(adapter.init).exists():
        run = adapter_folders.run_of(adapter_folders.read(adapter.init).folder)
        records += [] if run is None else [run / "run.json"]
    if cfg.model.path is not None:
        records.append(locate(cfg.model.path) / run_folder.EXPORTED)
    for record in records:
        if record.is_file() and (file := record.parent / "config.yaml").is_file():
            start, facts = migration.read(file), json.loads(record.read_text(encoding="utf-8"))
            yield record.parent, start, facts
            yield from origins(start)


def _texts(path: Path, start: RunConfig, split: str, load: Any) -> list[str]:
    try:
        return list(load(start.data).splits[split]["text"].to_list())
    except FinsaError as error:
        text = f"the rows of {path} cannot be read, to check which of these rows it was trained on: {error}"
        raise _refused(text) from None


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

    Of ties the first. Runs that started from other runs are left out, and so are runs on other data, if there are any
    on these.
    """
    measure = headline(cfg.data.task)
    jobs = [json.loads(file.read_text(encoding="utf-8")).get("run") for file in sorted(folder.glob("*/job.json"))]
    places = dict.fromkeys(
        [*map(Path, filter(None, jobs)), *(file.parent for file in sorted(folder.rglob("run.json")))]
    )
    found = dict[Path, tuple[float, RunConfig]]()
    for place in places:
        try:
            facts = json.loads((place / "run.json").read_text(encoding="utf-8"))
            if (facts.get("status"), facts.get("stage")) != ("complete", "train"):
                continue
            path, start, facts = run_folder.read(str(place))
            report = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
        except (RunError, OSError, ValueError):
            continue  # damaged, or of another version
        alike = all(
            one == other
            for one, other in (
                (start.seed, cfg.seed),
                (start.model.name, cfg.model.name),
                (start.method.head, cfg.method.head),
                (start.method.quantization, cfg.method.quantization),
                ((start.data.prompt, start.data.labels), (cfg.data.prompt, cfg.data.labels)),
            )
        )
        adapter = start.method.adapter  # one that started from another run is not the first step of anything
        first = adapter is not None and adapter.init is None and not start.method.starts_from_run
        if alike and first and measure in report.get("validation", {}) and not _other_model(cfg, start, facts):
            found[path] = report["validation"][measure] * (-1 if measure in LOWER_IS_BETTER else 1), start
    # Scores on other rows say nothing about these.
    same = {path for path, (_, start) in found.items() if _rows_of(start) == _rows_of(cfg)}
    scores = {path: score for path, (score, _) in found.items() if path in same or not same}
    if not scores:
        in_sweep = cfg.method.init == "sweep"
        raise _refused(
            f"no finished run below {folder} has trained an adapter for model={cfg.model.name} on these labels and "
            f"this prompt with seed={cfg.seed}; train one with method=lora_response"
            + (", and start the others from it with per_method={dpo: {method.init: sweep}}" if in_sweep else "")
        )
    return max(scores, key=lambda path: scores[path])


def _rows_of(cfg: RunConfig) -> Any:
    """The settings that determine the rows."""
    return cfg.data.model_copy(update={"cache": None})


def _refused(text: str) -> ConfigError:
    return ConfigError([Problem(KEY, text)])
