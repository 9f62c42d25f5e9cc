"""The trained model of a method: a base model with an adapter, a head, both, or a mixture of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from finsa.config import Method, MoeJointStage, RunConfig
from finsa.data.rows import Renderer
from finsa.models import adapters, base, dropout
from finsa.models.classifier import HEAD_FILE, Classifier, labels_of, load_weights, save_head, unwrap_peft
from finsa.models.moe import experts, mixture, stacking
from finsa.models.moe.mixture import Mixture
from finsa.runs import adapter_folders


def build(cfg: RunConfig, backbone: Any, renderer: Renderer | None) -> torch.nn.Module:
    """Add to a base model what the method trains, and mark the trainable parameters.

    Args:
        cfg: the configuration; its seed initializes the weights, unless the method starts from a saved adapter.
        backbone: a frozen causal language model.
        renderer: provides the labels of a classification head; may be None without one.
    """
    method = cfg.method
    if method.learn == "all":
        backbone.requires_grad_(True)
    elif method.adapter is not None:
        backbone = adapters.attach(backbone, cfg.model, method.adapter, cfg.seed)
        dropout.make_sparse(backbone)
    if method.head == "lm":
        return backbone  # type: ignore[no-any-return]
    assert renderer is not None
    model = _add_head(method, backbone, renderer, cfg.seed)
    if method.classifier_init == "label_words":
        model.init_from_label_words(renderer.answers)
    elif method.adapter is not None and method.adapter.init is not None and backbone.device.type != "meta":
        # The saved adapter may come with a head of the same classes.
        folder = adapter_folders.read(method.adapter.init).folder
        if labels_of(folder) == renderer.labels.names:
            load_weights(model.head, folder / HEAD_FILE)
    return model


def on_meta(cfg: RunConfig, renderer: Renderer | None) -> torch.nn.Module:
    """Build the model of `build` on the meta device, without memory; module names are those of transformers."""
    model = cfg.model.model_copy(update={"weights": "random"})
    method = cfg.method.model_copy(update={"classifier_init": "random"})
    native = cfg.model_copy(update={"model": model, "method": method})
    return build(native, base.on_meta(cfg.model).requires_grad_(False), renderer)


def _add_head(method: Method, backbone: Any, renderer: Renderer, seed: int) -> Classifier:
    model, body = Classifier(backbone, renderer.labels.outputs, method.classifier_dropout, seed), unwrap_peft(backbone)
    if body.get_output_embeddings().weight is not body.get_input_embeddings().weight:
        body.get_output_embeddings().requires_grad_(False)  # unused, so it would never get a gradient
    return model


def save(cfg: RunConfig, model: Any, folder: Path, labels: tuple[str, ...]) -> None:
    """Write the trained weights into a run folder."""
    backbone = model.backbone if isinstance(model, Classifier) else model
    if cfg.method.learn == "all":
        backbone.save_pretrained(folder / "model")
    elif isinstance(backbone, PeftModel):
        adapters.save(backbone, adapter_folder(cfg, folder))
    if isinstance(model, Classifier):
        save_head(model.head, adapter_folder(cfg, folder), labels)


def restore(cfg: RunConfig, backbone: Any, folder: Path, renderer: Renderer) -> torch.nn.Module:
    """Add to a base model what a run has trained, for scoring.

    Args:
        cfg: the configuration of the run.
        backbone: the base model, or the run's model if all of it was trained.
        folder: the folder of the run's adapter and head, or of its mixture.
        renderer: the renderer of the run.

    Raises:
        ModelError: if files are missing or do not fit.
    """
    if isinstance(cfg.stage, MoeJointStage):
        folders = {name: folder / "adapters" / name for name in mixture.expert_names(folder)}
        model: Any = build_mixture(cfg, cfg.stage, backbone, folders, renderer)
        model.load(folder)
        return model.requires_grad_(False).eval()  # type: ignore[no-any-return]
    if cfg.method.adapter is not None:
        backbone = adapters.load(backbone, folder)
    if cfg.method.head == "lm":
        return backbone  # type: ignore[no-any-return]
    model = _add_head(cfg.method, backbone, renderer, cfg.seed)
    load_weights(model.head, folder / HEAD_FILE)
    return model.requires_grad_(False).eval()  # type: ignore[no-any-return]


def merge(model: torch.nn.Module) -> torch.nn.Module:
    """Merge a restored model's adapter into its base model permanently; other models are returned unchanged."""
    backbone = model.backbone if isinstance(model, Classifier) else model
    if not isinstance(backbone, PeftModel):
        return model
    whole: Any = backbone.merge_and_unload()
    if not isinstance(model, Classifier):
        return whole.eval()  # type: ignore[no-any-return]
    model.backbone = whole
    return model


def detach(model: torch.nn.Module) -> None:
    """Remove adapters and experts, and leave the base model as it was: the jobs of a sweep share it."""
    if isinstance(model, Mixture):
        stacking.detach(model.backbone, model.paths)
        return
    backbone = model.backbone if isinstance(model, Classifier) else model
    net = unwrap_peft(backbone)
    if isinstance(backbone, PeftModel):
        adapters.detach(backbone)
    adapters.stop_checkpointing(net)


def build_mixture(
    cfg: RunConfig, stage: MoeJointStage, backbone: Any, folders: dict[str, Path], renderer: Renderer
) -> Mixture:
    """Build a mixture of experts with an untrained router, and with a classification head if the method has one.

    Args:
        cfg: the configuration.
        stage: the configuration of the mixture.
        backbone: a frozen causal language model.
        folders: PEFT folder by expert, in the order of the mixture.
        renderer: provides the labels.

    Raises:
        ModelError: if the experts do not match each other or the base model.
    """
    classes = len(renderer.labels) if cfg.method.head == "classifier" else None
    return Mixture(backbone, experts.read(folders), stage, classes, cfg.method.classifier_dropout, cfg.seed)


def adapter_folder(cfg: RunConfig, folder: Path) -> Path:
    """The folder of a run's adapter and head; for a mixture, the one that contains ``adapters/`` and ``mixture/``."""
    if isinstance(cfg.stage, MoeJointStage):
        return folder
    return folder / "adapters" / (cfg.data.domain or "default")
