"""PEFT folders of other runs and programs: what they hold, and whether a method can start from them. No torch here."""

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
# What changes layers or base beyond B A x; an adapter that has any of it is not the one that a method describes.
BEYOND = (
    *("modules_to_save", "trainable_token_indices", "rank_pattern", "alpha_pattern", "layer_replication"),
    *("target_parameters", "alora_invocation_tokens", "use_qalora", "lora_bias", "megatron_config", "use_bdlora"),
    *("velora_config", "kasa_config", "monteclora_config", "arrow_config"),
)
# Ways to start A and B that do not change the base; the others (pissa, olora, corda, loftq) take something out of it.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Saved:
    """An adapter that a method can start from.

    Args:
        folder: the PEFT folder.
        variant: as ``method.adapter.variant`` calls it.
        rank, alpha: of its matrices.
        targets: last names of the adapted linear layers, sorted.
        base: the model it was trained on, as it says; None where it says nothing.
    """

    folder: Path
    variant: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    base: str | None


def read(written: str) -> Saved:
    """Read the adapter at a path.

    Args:
        written: a PEFT folder, or the folder of a run that has one.

    Raises:
        ConfigError: where there is none, or none that a method of finsa can start from.
    """
    folder = _folder(locate(written))
    values = read_json(folder / CONFIG)
    if values is None:
        raise _refused(f"{folder / CONFIG} is not valid JSON")
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise _refused(f"{folder} holds no weights ({' or '.join(WEIGHTS)}): {listed(folder)}")
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
    return Saved(folder, variant, rank, alpha, _targets(values, weights), str(base) if base else None)


def _refused(text: str) -> ConfigError:
    return ConfigError([Problem(KEY, text)])


def _folder(path: Path) -> Path:
    """The PEFT folder that a path means: itself, or the one adapter of a run."""
    if not path.exists():
        raise _refused(
            f"there is no folder {path}. It has to hold {CONFIG} and {WEIGHTS[0]}; an adapter of the hub is fetched by "
            "hf download <owner/name> --local-dir <folder>"
        )
    if path.is_file():
        raise _refused(f"{path} is a file; name its folder: {KEY}={path.parent}")
    if (path / CONFIG).is_file():
        return path
    found = sorted(each.parent for each in path.glob(f"adapters/*/{CONFIG}"))
    if len(found) == 1:
        return found[0]
    if found:
        raise _refused(f"{path} holds {len(found)} adapters; choose one of {', '.join(map(str, found))}")
    raise _refused(f"{path} holds no {CONFIG}, so it is no PEFT adapter: {listed(path)}")


def _require_plain(folder: Path, values: dict[str, Any]) -> None:
    more = [key for key in BEYOND if values.get(key)]
    more += ["bias"] if values.get("bias", "none") != "none" else []
    if more:
        raise _refused(
            f"{folder} has {more[0]}={values[more[0]]}, which method.adapter cannot describe; merge it into its base "
            "and start from the merged model"
        )
    start = values.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise _refused(
            f"{folder} was started with init_lora_weights={start}, which changes the weights of the base, so it does "
            "not fit the unchanged base; convert it to plain LoRA (in PEFT: path_initial_model_for_weight_conversion)"
        )


def _targets(values: dict[str, Any], weights: Path) -> tuple[str, ...]:
    """Last names of the adapted layers: as listed, or of a pattern those that the weights have; () where unknown."""
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
    """The targets of an adapter as module names of a model; None for a named set that its section does not list.

    A model with remote code may have other module names than the native stand-in that random weights are built from.
    """
    if isinstance(adapter.targets, tuple):
        return list(adapter.targets)
    if model.weights == "random" and model.architecture and model.architecture.get("lora_targets"):
        return list(model.architecture["lora_targets"][adapter.targets])
    return None if model.lora_targets is None else list(getattr(model.lora_targets, adapter.targets))


def problems(model: Model, adapter: Adapter) -> Iterator[Problem]:
    """Check that the adapter to start from is the one that the method describes."""
    assert adapter.init is not None
    try:
        saved = read(adapter.init)
    except ConfigError as error:
        yield from error.problems
        return
    targets = names(model, adapter)
    theirs: dict[str, Any] = {"variant": saved.variant, "rank": saved.rank, "alpha": f"{saved.alpha:g}"}
    own = {"variant": adapter.variant, "rank": adapter.rank, "alpha": f"{adapter.alpha:g}"}
    changed = [f"{key} {theirs[key]}, not {own[key]}" for key in own if own[key] != theirs[key]]
    change = [f"method.adapter.{key}={theirs[key]}" for key in own if own[key] != theirs[key]]
    if targets is not None and saved.targets and set(targets) != set(saved.targets):
        changed.append(f"targets {', '.join(saved.targets)}, not {', '.join(targets)}")
        change.append(f"'method.adapter.targets=[{','.join(saved.targets)}]'")
    if changed:
        yield Problem(KEY, f"the adapter in {saved.folder} has {'; '.join(changed)}. Add {' '.join(change)}")


def refusal(place: str, values: dict[str, Any], run: Path | None = None) -> str:
    """What to do about a PEFT adapter that is given for a model.

    Args:
        place: its folder, or its name on the hub.
        values: its ``adapter_config.json``.
        run: the run folder that it lies in; None: it is of another program.
    """
    base = values.get("base_model_name_or_path")
    kind = str(values.get("peft_type") or "of PEFT").replace("LORA", "LoRA")
    own = "model=<its base>" if not base else f"model.path={base}" if Path(base).is_dir() else catalogue.hub_model(base)
    merge = (
        'python -c "from peft import AutoPeftModelForCausalLM as M; '
        f"M.from_pretrained('{place}').merge_and_unload().save_pretrained('<folder>')\""
    )
    if run is not None:
        merge = f"python run.py stage=export run={run} format=merged output=<folder>"
    return (
        f"{place} is an adapter ({kind}{f', trained on {base}' if base else ''}), not a model. To train it further: "
        f"{own} {KEY}={place}. To start from the merged model: {merge}, then model.path=<folder>"
    )


def run_of(folder: Path) -> Path | None:
    """The run of finsa that wrote an adapter's folder; None where there is none."""
    run = folder.parent.parent
    return run if folder.parent.name == "adapters" and (run / "run.json").is_file() else None
