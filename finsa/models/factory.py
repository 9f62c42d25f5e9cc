"""A base with what a method puts on it, an adapter, a head or nothing: built, saved, restored, taken off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from finsa.config import Method, MoeJointStage, RunConfig
from finsa.data.rows import Renderer
from finsa.models import adapters, base
from finsa.models.classifier import Classifier, causal, labels_of
from finsa.models.moe import experts, mixture, stacking
from finsa.models.moe.mixture import Mixture
from finsa.runs import adapter_folders


def build(cfg: RunConfig, backbone: Any, renderer: Renderer | None) -> torch.nn.Module:
    """Put on a base what the method trains, with the parameters that learn marked.

    Args:
        cfg: its method says what; its seed makes the start, unless the method starts from a saved adapter.
        backbone: a frozen causal language model.
        renderer: knows the labels, for a classification head; without one None is enough.
    """
    method = cfg.method
    if method.learn == "all":
        backbone.requires_grad_(True)
    elif method.adapter is not None:
        backbone = adapters.attach(backbone, cfg.model, method.adapter, cfg.seed)
    if method.head == "lm":
        return backbone  # type: ignore[no-any-return]
    assert renderer is not None
    model = _headed(method, backbone, renderer, cfg.seed)
    if method.classifier_init == "label_words":
        model.start_from_words(renderer.answers)
    elif (head := _saved_head(method, renderer)) is not None and backbone.device.type != "meta":
        model.restore(head)
    return model


def _saved_head(method: Method, renderer: Renderer) -> Path | None:
    """The folder of the adapter to start from, where it has a classification head of these very classes."""
    if method.adapter is None or method.adapter.init is None:
        return None
    folder = adapter_folders.read(method.adapter.init).folder
    return folder if labels_of(folder) == renderer.labels.names else None


def on_meta(cfg: RunConfig, renderer: Renderer | None) -> torch.nn.Module:
    """Build on shapes what `build` makes of a base: no memory, module names of the architecture's own."""
    model = cfg.model.model_copy(update={"weights": "random"})
    method = cfg.method.model_copy(update={"classifier_init": "random"})
    native = cfg.model_copy(update={"model": model, "method": method})
    return build(native, base.on_meta(cfg.model).requires_grad_(False), renderer)


def _headed(method: Method, backbone: Any, renderer: Renderer, seed: int) -> Classifier:
    model, body = Classifier(backbone, len(renderer.labels), method.classifier_dropout, seed), causal(backbone)
    if body.get_output_embeddings().weight is not body.get_input_embeddings().weight:
        body.get_output_embeddings().requires_grad_(False)  # not read, so it would never get a gradient
    return model


def save(cfg: RunConfig, model: Any, folder: Path, labels: tuple[str, ...]) -> None:
    """Write what was trained into a run folder."""
    backbone = model.backbone if isinstance(model, Classifier) else model
    if cfg.method.learn == "all":
        backbone.save_pretrained(folder / "model")
    elif isinstance(backbone, PeftModel):
        adapters.save(backbone, adapter_folder(cfg, folder))
    if isinstance(model, Classifier):
        model.save(adapter_folder(cfg, folder), labels)


def restore(cfg: RunConfig, backbone: Any, place: Path, renderer: Renderer) -> torch.nn.Module:
    """Put on a base what a run has trained, for scoring.

    Args:
        cfg: the run's configuration.
        backbone: the base, or the run's own where the whole model was trained.
        place: the folder of the run's adapter and head, or of its mixture.
        renderer: the run's.

    Raises:
        ModelError: where something is missing or does not fit.
    """
    if isinstance(cfg.stage, MoeJointStage):
        return _mixture(cfg, cfg.stage, backbone, place, renderer)
    if cfg.method.adapter is not None:
        backbone = adapters.load(backbone, place)
    if cfg.method.head == "lm":
        return backbone  # type: ignore[no-any-return]
    model = _headed(cfg.method, backbone, renderer, cfg.seed)
    model.restore(place)
    return model.requires_grad_(False).eval()


def merged(model: torch.nn.Module) -> torch.nn.Module:
    """Merge a restored model's adapter into its base permanently; a model without an adapter is not changed."""
    backbone = model.backbone if isinstance(model, Classifier) else model
    if not isinstance(backbone, PeftModel):
        return model
    whole: Any = backbone.merge_and_unload()
    if not isinstance(model, Classifier):
        return whole.eval()  # type: ignore[no-any-return]
    model.backbone = whole
    return model


def release(model: torch.nn.Module) -> None:
    """Take everything off again, leaving the base as it was: jobs of a sweep share it."""
    backbone = model.backbone if isinstance(model, Classifier | Mixture) else model
    if isinstance(model, Mixture):
        stacking.detach(backbone, model.paths)
        return
    net = causal(backbone)  # also of a head alone, which leaves nothing to take off
    if isinstance(backbone, PeftModel):
        adapters.detach(backbone)
    adapters.stop_checkpointing(net)


def mix(cfg: RunConfig, stage: MoeJointStage, backbone: Any, folders: dict[str, Path], renderer: Renderer) -> Mixture:
    """Build a mixture of experts with a fresh router, and with a head where the method has one.

    Args:
        folders: PEFT folder by expert, in the mixture's order.

    Raises:
        ModelError: where the experts do not go together, or not with the base.
    """
    found = experts.read(folders)
    classes = len(renderer.labels) if cfg.method.head == "classifier" else None
    return Mixture(backbone, found, stage, classes, cfg.method.classifier_dropout, cfg.seed)


def _mixture(cfg: RunConfig, stage: MoeJointStage, backbone: Any, place: Path, renderer: Renderer) -> Mixture:
    folders = {name: place / "adapters" / name for name in mixture.names(place)}
    model = mix(cfg, stage, backbone, folders, renderer)
    model.load(place)
    return model.requires_grad_(False).eval()


def adapter_folder(cfg: RunConfig, folder: Path) -> Path:
    """Where a run keeps its adapter and head; of a mixture, the folder that holds ``adapters/`` and ``mixture/``."""
    if isinstance(cfg.stage, MoeJointStage):
        return folder
    return folder / "adapters" / (cfg.data.domain or "default")
