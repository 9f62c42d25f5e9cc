"""PEFT folders of other runs and programs: their contents, and whether a method can start from them; without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finsa.config import Adapter, Model, catalogue, locate
from finsa.errors import ConfigError, Problem
from finsa.runs.weight_files import fault, listed, read_json, safetensors_header

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
KEY = "method.adapter.init"
# PEFT options that change layers or base model beyond the update B A x, which a method cannot describe.
UNSUPPORTED = (
    *("modules_to_save", "trainable_token_indices", "rank_pattern", "alpha_pattern", "layer_replication"),
    *("target_parameters", "alora_invocation_tokens", "use_qalora", "lora_bias", "megatron_config", "use_bdlora"),
    *("velora_config", "kasa_config", "monteclora_config", "arrow_config"),
)
# Initializations of A and B that keep the base model; the others (pissa, olora, corda, loftq) change its weights.
KEEPING_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter that a method can start from.

    Args:
        folder: the PEFT folder.
        variant: a value of ``method.adapter.variant``.
        rank, alpha: of its matrices.
        targets: last parts of the names of the adapted linear layers, sorted.
        base: the model it was trained on, according to its configuration; None if that does not name one.
    """

    folder: Path
    variant: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    base: str | None


def read(written: str) -> SavedAdapter:
    """Read the configuration of the adapter at a path.

    Args:
        written: a PEFT folder, or a run folder that contains one.

    Raises:
        ConfigError: if there is none, or none that a method can start from.
    """
    folder = _folder(locate(written))
    values = read_json(folder / CONFIG)
    if values is None:
        raise _refused(f"{folder / CONFIG} is not valid JSON")
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise _refused(f"{folder} contains no weights ({' or '.join(WEIGHTS)}): {listed(folder)}")
    wrong = fault(weights)
    if wrong is not None:
        raise _refused(wrong)
    if str(values.get("peft_type")) != "LORA":
        raise _refused(
            f"{folder} is a PEFT adapter of type {values.get('peft_type')}; only LoRA adapters can be trained"
        )
    _require_plain(folder, values)
    try:
        rank, alpha = int(values["r"]), float(values["lora_alpha"])
    except (LookupError, TypeError, ValueError):
        raise _refused(f"{folder / CONFIG} has no rank (r) or no lora_alpha") from None
    variant = "dora" if values.get("use_dora") else "rslora" if values.get("use_rslora") else "lora"
    base = values.get("base_model_name_or_path")
    return SavedAdapter(folder, variant, rank, alpha, _targets(values, weights), str(base) if base else None)


def _refused(text: str) -> ConfigError:
    return ConfigError([Problem(KEY, text)])


def _folder(path: Path) -> Path:
    """The PEFT folder at a path: the folder itself, or the only adapter of a run."""
    if not path.exists():
        raise _refused(
            f"there is no folder {path}. It must contain {CONFIG} and {WEIGHTS[0]}; to download an adapter from the "
            "hub: hf download <owner/name> --local-dir <folder>"
        )
    if path.is_file():
        raise _refused(f"{path} is a file; name its folder: {KEY}={path.parent}")
    if (path / CONFIG).is_file():
        return path
    found = sorted(each.parent for each in path.glob(f"adapters/*/{CONFIG}"))
    if len(found) == 1:
        return found[0]
    if found:
        raise _refused(f"{path} contains {len(found)} adapters; choose one of {', '.join(map(str, found))}")
    raise _refused(f"{path} contains no {CONFIG}, so it is not a PEFT adapter: {listed(path)}")


def _require_plain(folder: Path, values: dict[str, Any]) -> None:
    more = [key for key in UNSUPPORTED if values.get(key)]
    more += ["bias"] if values.get("bias", "none") != "none" else []
    if more:
        raise _refused(
            f"{folder} has {more[0]}={values[more[0]]}, which method.adapter does not support; merge it into its base "
            "model and start from the merged model"
        )
    start = values.get("init_lora_weights", True)
    if start not in KEEPING_BASE:
        raise _refused(
            f"{folder} was initialized with init_lora_weights={start}, which changes the base model, so it does not "
            "fit the unchanged one; convert it to plain LoRA (in PEFT: path_initial_model_for_weight_conversion)"
        )


def _targets(values: dict[str, Any], weights: Path) -> tuple[str, ...]:
    """Last parts of the names of the adapted layers, from the list or, for a pattern, the weights; () if unknown."""
    named = values.get("target_modules")
    if isinstance(named, list):
        return tuple(sorted({str(name).rpartition(".")[2] for name in named}))
    header = safetensors_header(weights) if weights.suffix == ".safetensors" else None
    keys = header[1] if header else {}
    ends = (".lora_A.weight", ".lora_A.default.weight")
    return tuple(
        sorted({key.removesuffix(end).rpartition(".")[2] for key in keys for end in ends if key.endswith(end)})
    )


def names(model: Model, adapter: Adapter) -> list[str] | None:
    """The targets of an adapter as module names of a model; None for a named set that the model does not define.

    With random weights, the native architecture is built, whose module names may differ from those of remote code.
    """
    if isinstance(adapter.targets, tuple):
        return list(adapter.targets)
    if model.weights == "random" and model.architecture and model.architecture.get("lora_targets"):
        return list(model.architecture["lora_targets"][adapter.targets])
    return None if model.lora_targets is None else list(getattr(model.lora_targets, adapter.targets))


def problems(model: Model, adapter: Adapter) -> Iterator[Problem]:
    """Check that the adapter to start from agrees with the settings of the method."""
    assert adapter.init is not None
    try:
        saved = read(adapter.init)
    except ConfigError as error:
        yield from error.problems
        return
    targets = names(model, adapter)
    actual: dict[str, Any] = {"variant": saved.variant, "rank": saved.rank, "alpha": f"{saved.alpha:g}"}
    wanted = {"variant": adapter.variant, "rank": adapter.rank, "alpha": f"{adapter.alpha:g}"}
    differences = [f"{key} {actual[key]}, not {wanted[key]}" for key in wanted if wanted[key] != actual[key]]
    overrides = [f"method.adapter.{key}={actual[key]}" for key in wanted if wanted[key] != actual[key]]
    if targets is not None and saved.targets and set(targets) != set(saved.targets):
        differences.append(f"targets {', '.join(saved.targets)}, not {', '.join(targets)}")
        overrides.append(f"'method.adapter.targets=[{','.join(saved.targets)}]'")
    if differences:
        yield Problem(KEY, f"the adapter in {saved.folder} has {'; '.join(differences)}. Add {' '.join(overrides)}")


def refusal(place: str, values: dict[str, Any], run: Path | None = None) -> str:
    """The message for a PEFT adapter that is given in place of a model.

    Args:
        place: its folder, or its name on the hub.
        values: its ``adapter_config.json``.
        run: the run folder that contains it; None if another program wrote it.
    """
    base = values.get("base_model_name_or_path")
    kind = str(values.get("peft_type") or "of PEFT").replace("LORA", "LoRA")
    model = f"model.path={base}" if base and Path(base).is_dir() else catalogue.hub_model(base) if base else ""
    merge = (
        'python -c "from peft import AutoPeftModelForCausalLM as M; '
        f"M.from_pretrained('{place}').merge_and_unload().save_pretrained('<folder>')\""
    )
    if run is not None:
        merge = f"python run.py stage=export run={run} format=merged output=<folder>"
    return (
        f"{place} is an adapter ({kind}{f', trained on {base}' if base else ''}), not a model. To train it further: "
        f"{model or 'model=<its base>'} {KEY}={place}. To start from the merged model: {merge}, then "
        "model.path=<folder>"
    )


def run_of(folder: Path) -> Path | None:
    """The run folder that contains an adapter's folder; None if there is none."""
    run = folder.parent.parent
    return run if folder.parent.name == "adapters" and (run / "run.json").is_file() else None
