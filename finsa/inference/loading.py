"""The language model that a run's or an export's folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finsa.config import Model, MoeJointStage, RunConfig
from finsa.data.rows import Renderer
from finsa.models import base, factory
from finsa.session import Session


def model_of(
    cfg: RunConfig, path: Path, manifest: Mapping[str, Any], renderer: Renderer, merge: bool, session: Session | None
) -> Any:
    """Load base and what the run trained on it.

    Args:
        cfg: the run's configuration.
        path: the folder of the run or export.
        manifest: of an export; empty for a run.
        renderer: of its prompts.
        merge: put an unquantised adapter into the weights.
        session: whose base model is used, if it is the same.

    Raises:
        ModelError: where weights or files are missing or do not fit.
    """
    if manifest.get("format") == "merged":  # its weights have the adapter in them, and are of full precision
        whole = cfg.method.model_copy(update={"adapter": None, "quantization": "none"})
        cfg = cfg.model_copy(update={"method": whole})
    method = cfg.method
    # in float32 alone: an adapter that is rounded to bfloat16 is another one
    own = merge and method.quantization == "none" and method.adapter is not None
    own = own and base.dtype(cfg.model) == torch.float32 and not isinstance(cfg.stage, MoeJointStage)
    backbone: Any = base.load_base(weights_of(cfg.model, path), cfg.seed, method.quantization, None if own else session)
    if cfg.method.learn == "nothing":
        return backbone
    place = factory.adapter_folder(cfg, path)
    flat = manifest.get("format") == "adapter" and not (path / "adapters").is_dir()
    model = factory.restore(cfg, backbone, path if flat else place, renderer)
    return factory.merged(model) if own else model


def weights_of(model: Model, path: Path) -> Model:
    """The base to load: the run's own where the whole model was trained, the folder itself for a merged export."""
    for own in (path / "model", path):
        if (own / "config.json").is_file():
            return model.model_copy(update={"path": str(own), "weights": "pretrained"})
    return model
