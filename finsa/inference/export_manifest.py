"""Folders that stage=export writes: what they are, and what reads the formats that are no language model of torch.

A bundle holds the run's ``config.yaml`` and its ``run.json`` as ``exported_run.json``, so that it is read like the run,
and ``manifest.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finsa.config import MoeJointStage
from finsa.data.rows import Renderer
from finsa.errors import ModelError, RunError

if TYPE_CHECKING:
    from finsa.inference.predictor import Record

MANIFEST, RECEIPT = "manifest.json", "receipt.json"
RUNTIMES = ("onnx", "openvino", "classifier")  # formats with a reader of their own
PACKAGES = {
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("onnx", "onnxruntime", "onnxscript", "openvino"),
}
EXTRAS = {"onnx": "export", "openvino": "openvino"}


def manifest(folder: Path) -> dict[str, Any]:
    """An export's manifest; {} for a run's folder.

    Raises:
        RunError: where it is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = {"format": str(values["format"]), "tokenizer": str(values["tokenizer"]), **values}
    except OSError as error:
        raise RunError(f"run: {file} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError):
        raise RunError(f"run: {file} is damaged; export again") from None
    if not (folder / found["tokenizer"]).resolve().is_relative_to(folder.resolve()):
        raise RunError(f"run: {file} names files outside of its folder ({found['tokenizer']}); export again")
    return found


def title(values: Mapping[str, Any]) -> list[str]:
    """What a manifest adds to a model's name."""
    if not values:
        return []
    precision = values.get("precision")
    return [f"{values['format']} {precision}" if precision else str(values["format"])]


def require_packages(form: str, reason: str) -> None:
    """Tell which package is missing, before anything is loaded.

    Raises:
        ModelError: naming the extra that brings it.
    """
    missing = [name for name in PACKAGES.get(form, ()) if find_spec(name) is None]
    if missing:
        raise ModelError(f"{reason} needs {', '.join(missing)}: pip install 'finsa[{EXTRAS[form]}]'")


def refusal(record: Record, form: str, precision: str) -> str | None:
    """Why a run cannot be written in a format, as far as its configuration tells; None: it can."""
    method = record.cfg.method
    if record.manifest:
        return f"{record.path} is an export itself; name the run that it was made of"
    if method.baseline is not None:
        return f"method={method.name} is no language model; predict and serve read its run folder as it is"
    if isinstance(record.cfg.stage, MoeJointStage) and form not in ("adapter", "merged"):
        return (
            f"{form} holds one set of weights, and a mixture chooses among several for every text; format=adapter "
            "writes all experts with their router and a manifest, format=merged a model per expert, routed hard"
        )
    if isinstance(record.cfg.stage, MoeJointStage) and form == "merged" and record.cfg.stage.router.read == "layer":
        return (
            "its router reads an early layer of the base, and merged experts have changed theirs; choose format=adapter"
        )
    if form == "adapter" and method.adapter is None and method.head == "lm":
        return f"method={method.name} trains no adapter; choose format=merged"
    if form == "adapter" and method.learn == "all":
        return f"method={method.name} trains all weights; choose format=merged"
    if form == "classifier" and method.head == "classifier":
        return (
            "its head reads the mean over the text, a sequence-classification model the last token; choose format=onnx"
        )
    if precision != "fp32" and form == "openvino":
        return (
            f"OpenVINO keeps the weights of stage.precision={precision} in 32 bit: no smaller than fp32, slower; "
            "choose format=onnx, or leave stage.precision out"
        )
    if precision != "fp32" and form != "onnx":
        return f"stage.precision={precision} is of use to onnx only; leave it out"
    return None


def open_reader(
    folder: Path, values: dict[str, Any], renderer: Renderer, batch_tokens: int, threads: int | None
) -> Any:
    """What scores prompts with an export's file.

    Raises:
        ModelError: where a package or the file is missing or damaged.
    """
    require_packages(values["format"], f"run: {folder}")
    from finsa.inference.exported_runtimes import open_reader as opened

    return opened(folder, values, renderer, batch_tokens, threads)
