"""Check the paths that a configuration gives for models, tokenizers and adapters, without importing torch.

`classify` says what is at a path, `problems` checks every such path of a configuration. Both take milliseconds, so that
a wrong path is reported before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from finsa.config import Encoder, LinearProbe, Model, RunConfig, catalogue, locate
from finsa.data import hub
from finsa.errors import ConfigError, Problem, nearest
from finsa.models import gguf
from finsa.runs import adapter_folders, starts
from finsa.runs.weight_files import fault, listed, read_json

Kind = Literal["model", "adapter", "run", "export", "folder", "file", "nothing"]

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Files that contain a vocabulary; tokenizer_config.json does not.
VOCABULARY = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json", "tokenization_*.py")
# Suffixes of model classes without a language modeling head.
HEADLESS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
# Stages that load the model of the configuration, unless a run is given.
USERS = ("train", "check", "evaluate", "search", "moe_joint", "pretrain", "inspect")


def classify(path: Path) -> Kind:
    """Say what is at a path, by the files in it.

    Returns:
        ``model``: a folder with a ``config.json``; ``adapter``: a PEFT folder; ``run`` or ``export``: folders of finsa;
        ``folder``: any other folder; ``file``, such as a GGUF file; ``nothing``.
    """
    if path.is_file():
        return "file"
    if not path.exists():
        return "nothing"
    if (path / adapter_folders.CONFIG).is_file():  # transformers loads the adapter even next to a whole model
        return "adapter"
    manifest = read_json(path / "manifest.json") or {}
    if (path / CONFIG).is_file() and manifest.get("format") not in ("onnx", "openvino", "classifier"):
        return "model"
    if (path / "manifest.json").is_file() and (path / "exported_run.json").is_file():
        return "export"
    return "run" if (path / "run.json").is_file() else "folder"


def problems(cfg: RunConfig) -> Iterator[Problem]:
    """Check the paths that a stage would load from; a stage that starts from a run or loads no model has none."""
    if cfg.run is not None or cfg.stage.name not in USERS:
        return
    if cfg.models is not None and not locate(cfg.models).is_dir():
        text = f"no such folder: {locate(cfg.models)}; python run.py stage=weights creates it"
        yield Problem("models", text)
    baseline = cfg.method.baseline
    if isinstance(baseline, Encoder | LinearProbe):
        if baseline.path is not None and getattr(baseline, "weights", "pretrained") == "pretrained":
            yield from _encoder_problems(baseline.path)
    elif baseline is None:
        yield from model_problems(cfg.model)
        if cfg.method.adapter is not None and cfg.method.adapter.init is not None:
            yield from adapter_folders.problems(cfg.model, cfg.method.adapter)
        if cfg.method.starts_from_run:
            yield from starts.problems(cfg)
    elif getattr(baseline, "units", None) == "model":
        yield from model_problems(cfg.model)


def require(jobs: Iterable[RunConfig]) -> None:
    """Raise the `problems` of all jobs of a command, each problem once.

    Raises:
        ConfigError: with all of them.
    """
    raise_any(problem for cfg in jobs for problem in problems(cfg))


def raise_any(found: Iterable[Problem]) -> None:
    """Raise problems as one error, if there are any.

    Raises:
        ConfigError: with each problem once.
    """
    unique = dict.fromkeys(found)
    if unique:
        raise ConfigError(unique)


def model_problems(model: Model) -> Iterator[Problem]:
    """Check ``model.path`` and ``model.tokenizer``."""
    found = list(weights_problems(model))
    yield from found
    if model.tokenizer is not None or not found:  # one problem per key
        yield from tokenizer_problems(model)


def weights_problems(model: Model) -> Iterator[Problem]:
    """Check that ``model.path`` contains all weights of a language model."""
    if model.weights == "pretrained" and model.path is not None:
        path = locate(model.path)
        text = _not_a_model(model, path) or (_not_loadable(path) if path.is_dir() else None)
        if text is not None:
            yield Problem("model.path", text)


def tokenizer_problems(model: Model) -> Iterator[Problem]:
    """Check that ``model.tokenizer``, or else ``model.path``, contains a tokenizer."""
    if model.tokenizer is not None:
        path, text = locate(model.tokenizer), None
        if path.is_file():
            text = f"{path} is a file; name its folder: model.tokenizer={path.parent}"
        elif path.exists():
            text = _no_tokenizer(path) and f"{path} contains no tokenizer: {listed(path)}"
        elif not catalogue.REPOSITORY.fullmatch(model.tokenizer):
            text = f"there is no folder {path}, and it cannot be the name of a repository on the hub"
        if text is not None:
            yield Problem("model.tokenizer", text)
    elif model.weights == "pretrained" and model.path is not None:
        path = locate(model.path)
        text = _not_a_model(model, path) or (_no_tokenizer(path) if path.is_dir() else None)
        if text is not None:
            yield Problem("model.path", text)


def require_no_adapter(source: str, revision: str | None, local: bool) -> None:
    """Refuse a repository on the hub that contains an adapter; local folders have been checked already.

    Args:
        source: name of the repository, or a local folder.
        revision: commit, tag or branch.
        local: whether to read the cache only.

    Raises:
        ConfigError: if it contains an adapter.
        OSError: if the repository cannot be read.
    """
    if Path(source).is_absolute():
        return
    find = hub.cached if local else hub.fetch
    file = find(source, adapter_folders.CONFIG, revision)
    if file is not None:
        raise ConfigError([Problem("model.hub_id", adapter_folders.refusal(source, read_json(file) or {}))])


def _not_a_model(model: Model, path: Path) -> str | None:
    """Why a path is not a model, and what was probably meant; None if it is one."""
    kind = classify(path)
    if kind == "model" or (kind == "file" and gguf.has_magic(path)):
        return None
    if kind == "nothing":
        return _missing(model, path)
    if kind == "file":
        if path.suffix == gguf.SUFFIX:
            return f"{path} is not a GGUF file: it does not begin with GGUF"
        if (path.parent / CONFIG).is_file():
            return f"{path} is a file; name its folder: model.path={path.parent}"
        return f"{path} is a file; name a folder that contains {CONFIG}, weights and a tokenizer"
    if kind == "adapter":
        values = read_json(path / adapter_folders.CONFIG) or {}
        return adapter_folders.refusal(str(path), values, adapter_folders.run_of(path))
    if kind == "export":
        form = (read_json(path / "manifest.json") or {}).get("format")
        return f"{path} is an export with format={form}, which cannot be trained; export the run with format=merged"
    if kind == "run":
        if (path / "model" / CONFIG).is_file():
            tokenizer = "" if _no_tokenizer(path / "model") is None else f" model.tokenizer={path / 'tokenizer'}"
            return f"{path} is a run folder; its model is model.path={path / 'model'}{tokenizer}"
        if (path / "adapters").is_dir():
            return (
                f"{path} is a run folder that contains an adapter. To train the adapter further: "
                f"method.adapter.init={path}, with the model of that run. To merge it: python run.py stage=export "
                f"run={path} format=merged output=<folder>, then model.path=<folder>"
            )
        return f"{path} is a run folder without a model that could be trained"
    for inner in sorted(each for each in path.iterdir() if each.is_dir()):
        if classify(inner) in ("model", "adapter"):
            return f"{path} contains no {CONFIG}; did you mean model.path={inner}?"
    snapshots = sorted((path / "snapshots").glob(f"*/{CONFIG}"))
    if snapshots:
        return f"{path} is a folder of the hub's cache; its model is model.path={snapshots[-1].parent}"
    return f"{path} contains no {CONFIG}, so it is not a model: {listed(path)}"


def _missing(model: Model, path: Path) -> str:
    text = f"there is no file or folder {path}"
    if model.path == "data/tiny":
        return f"{text}. Rebuild the embedded base: python run.py experiment=tiny_base output=data/tiny"
    parent = path.parent
    near = nearest(path.name, [each.name for each in parent.iterdir()]) if parent.is_dir() else None
    if near:
        return f"{text}. Did you mean '{parent / near}'?"
    written = str(model.path)
    if catalogue.REPOSITORY.fullmatch(written) and "/" in written:
        return f"{text}. If it is a model of the hub: {catalogue.hub_model(written)}"
    return f"{text}. It must contain {CONFIG}, weights and a tokenizer"


def _not_loadable(path: Path) -> str | None:
    """Why a folder with a ``config.json`` cannot be loaded as a language model; None if it can."""
    values = read_json(path / CONFIG)
    if values is None:
        return f"{path / CONFIG} is not valid JSON"
    if "model_type" not in values:
        return f"{path / CONFIG} names no model_type, so transformers cannot read it"
    headless = [name for name in values.get("architectures") or () if str(name).endswith(HEADLESS)]
    if headless:
        return f"{path} contains a {headless[0]}, which has no language modeling head and so cannot answer in words"
    return _weights_fault(path)


def _weights_fault(path: Path) -> str | None:
    found = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if found is None:
        return f"{path} contains no weights ({' or '.join(WEIGHTS[::2])}): {listed(path)}"
    files = [found]
    if found.suffix == ".json":
        index = (read_json(found) or {}).get("weight_map")
        if not isinstance(index, dict) or not index:
            return f"{found} is damaged: it names no shards"
        files = [path / name for name in sorted(set(index.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        return f"{path} lacks {len(missing)} of {len(files)} shards that {found.name} names: {', '.join(missing[:3])}"
    return next((text for text in map(fault, files) if text is not None), None)


def _no_tokenizer(path: Path) -> str | None:
    if any(next(path.glob(pattern), None) for pattern in VOCABULARY):
        return None
    return f"{path} contains no tokenizer; copy its files there, or name it with model.tokenizer=<folder or hub id>"


def _encoder_problems(written: str) -> Iterator[Problem]:
    path, key = locate(written), "method.baseline.path"
    kind = classify(path)
    if kind == "nothing":
        yield Problem(key, f"there is no folder {path}")
    elif kind == "file":
        yield Problem(key, f"{path} is a file; name its folder: {key}={path.parent}")
    elif kind == "adapter":
        yield Problem(key, f"{path} is a PEFT adapter; merge it into its base first, and name the merged folder")
    elif not (path / CONFIG).is_file():
        yield Problem(key, f"{path} contains no {CONFIG}: {listed(path)}")
    else:
        text = _weights_fault(path) or (_no_tokenizer(path) and f"{path} contains no tokenizer")
        if text:
            yield Problem(key, text)
