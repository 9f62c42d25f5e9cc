"""Loading the weights of a run or an export into a scorer.

Letters: n prompts, b rows of a batch, s tokens, c classes, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from finsa.config import Model, MoeJointStage
from finsa.data.rows import Encoded, Renderer
from finsa.errors import ModelError
from finsa.inference.graphs import shared
from finsa.inference.label_tree import scored_answers
from finsa.inference.scoring import scorer
from finsa.models import base, factory, int8
from finsa.models.batches import batches, padded
from finsa.models.classifier import HEAD_FILE, Classifier, load_weights, text_mean
from finsa.models.moe import mixture
from finsa.models.moe.mixture import ROUTER_FILE, Router
from finsa.runs import processes
from finsa.runs.progress import Moved, ignored
from finsa.session import Session

if TYPE_CHECKING:
    from finsa.inference.predictor import Record

FloatArray = NDArray[np.float64]
EXPERTS = "experts"  # folder of a hard-routed export


def open_scorer(
    record: Record, renderer: Renderer, batch_tokens: int, threads: int | None, merge: bool, session: Session | None
) -> tuple[Any, torch.nn.Module | None]:
    """Load the weights of a run or export of a language model.

    Args:
        record: of the folder.
        renderer: of its prompts.
        batch_tokens: maximum number of padded tokens per batch.
        threads: number of threads; None: the default of torch.
        merge: merge an unquantized adapter into the weights.
        session: its base model is reused if it is the same.

    Returns:
        The scorer, and the torch model that the caller must release, if any.

    Raises:
        ModelError: if weights or files are missing or do not match.
    """
    if record.format == "classifier":
        # exports of older versions have the temperature only in the manifest
        applied = float(record.manifest["temperature"]) if record.manifest.get("temperature_applied") else 1.0
        return PipelineScorer(record.path, batch_tokens, applied, scored_answers(renderer)[1]), None
    if record.format == "merged" and isinstance(record.cfg.stage, MoeJointStage):
        return _hard_routed(record, renderer, batch_tokens), None
    if record.cfg.model.inference == "int8":
        int8.require_cpu()
        merge, session = True, None  # the layers will be replaced
    model = _load_model(record, renderer, merge, session)
    return scorer(model, renderer, batch_tokens, record.cfg), model


# ------------------------------------------------------------------------------------------------ torch


def _load_model(record: Record, renderer: Renderer, merge: bool, session: Session | None) -> Any:
    """Load the base model and what the run trained on it."""
    cfg, path = record.cfg, record.path
    if record.format == "merged":  # the adapter is merged into its weights, which have full precision
        whole = cfg.method.model_copy(update={"adapter": None, "quantization": "none"})
        cfg = cfg.model_copy(update={"method": whole})
    method = cfg.method
    # only in float32: rounding a merged adapter to bfloat16 changes predictions
    merge = merge and method.quantization == "none" and method.adapter is not None
    merge = merge and base.dtype(cfg.model) == torch.float32 and not isinstance(cfg.stage, MoeJointStage)
    shared = None if merge else session  # merging changes the base model
    backbone: Any = base.load_base(weights_of(cfg.model, path), cfg.seed, method.quantization, shared)
    if method.learn == "nothing":
        return backbone
    flat = record.format == "adapter" and not (path / "adapters").is_dir()
    model = factory.restore(cfg, backbone, path if flat else factory.adapter_folder(cfg, path), renderer)
    return factory.merge(model) if merge else model


def weights_of(model: Model, path: Path) -> Model:
    """The base to load: the run's weights if the whole model was trained, the folder itself for a merged export."""
    for folder in (path / "model", path):
        if (folder / "config.json").is_file():
            return model.model_copy(update={"path": str(folder), "weights": "pretrained"})
    return model


def _hard_routed(record: Record, renderer: Renderer, batch_tokens: int) -> HardRoutedScorer:
    cfg, folder = record.cfg, record.path
    stage = cfg.stage
    assert isinstance(stage, MoeJointStage)
    names, models = mixture.expert_names(folder), []
    for name in names:
        place = folder / EXPERTS / name
        if not (place / "config.json").is_file():
            raise ModelError(f"expert {name}: there is no model in {place}; export again")
        section = cfg.model.model_copy(update={"path": str(place), "weights": "pretrained"})
        model: Any = base.load_base(section, cfg.seed)
        if cfg.method.head == "classifier":
            model = Classifier(model, len(renderer.labels), 0.0, cfg.seed)
            load_weights(model.head, folder / "mixture" / HEAD_FILE)
        models.append(model.requires_grad_(False).eval())
    router = Router(models[0].config.hidden_size, stage.router.hidden, len(names), stage.router.dropout).eval()
    load_weights(router, folder / "mixture" / ROUTER_FILE)
    return HardRoutedScorer(names, models, router.to(next(models[0].parameters()).device), renderer, batch_tokens)


class HardRoutedScorer:
    """Scores each prompt with the most probable expert according to the router.

    A text costs one forward pass of a plain model and the mean of its embeddings. If the run uses soft routing, the
    predictions differ; the receipt of the export reports by how much.

    Args:
        experts: names, (E,).
        models: a causal language model or classifier for each.
        router: over the mean of a text's embeddings.
        renderer: of the prompts.
        batch_tokens: maximum number of padded tokens per batch.

    Attributes:
        gates: of the last scored prompts, one-hot, (n, E).
    """

    def __init__(
        self, experts: Sequence[str], models: Sequence[Any], router: Router, renderer: Renderer, batch_tokens: int
    ) -> None:
        self.experts, self.router, self.renderer, self.batch_tokens = tuple(experts), router, renderer, batch_tokens
        self.scorers = [scorer(model, renderer, batch_tokens) for model in models]
        self.rule = self.scorers[0].rule
        self.embed = getattr(models[0], "backbone", models[0]).get_input_embeddings()  # the same for all experts
        self.gates: FloatArray | None = None

    def score(self, prompts: Encoded, moved: Moved = ignored) -> FloatArray:
        """Score prompts in order: (n, c)."""
        routes = self._route(prompts)
        log_probs = np.empty((len(prompts), len(self.renderer.answers)))
        for number, expert in enumerate(self.scorers):
            rows = np.flatnonzero(routes == number).tolist()
            if rows:
                log_probs[rows] = expert.score([prompts[row] for row in rows], moved)
        self.gates = np.eye(len(self.experts))[routes]
        return log_probs

    @torch.inference_mode()
    def _route(self, prompts: Encoded) -> NDArray[np.int64]:
        """Index of the most probable expert for each prompt, (n,)."""
        routes = np.empty(len(prompts), dtype=np.int64)
        device = self.embed.weight.device
        for rows in batches([len(prompt) for prompt in prompts], self.batch_tokens):
            part = [prompts[row] for row in rows]
            spans = torch.tensor([self.renderer.text_span(prompt) for prompt in part], device=device)
            logits = self.router(text_mean(self.embed(padded(part).to(device)), spans))
            routes[rows] = logits.argmax(dim=1).cpu().numpy()
        return routes


# ------------------------------------------------------------------------------------------------ exports


class PipelineScorer:
    """Scores texts with an exported sequence classifier, whose tokenizer adds the prompt.

    Args:
        folder: of the export.
        batch_tokens: maximum number of padded tokens per batch.
        temperature: by which its score head is already divided.
        rule: name of the scoring rule.
    """

    def __init__(self, folder: Path, batch_tokens: int, temperature: float, rule: str) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        self.batch_tokens, self.temperature, self.rule = batch_tokens, temperature, rule

    @torch.inference_mode()
    def score(self, texts: Sequence[str], moved: Moved = ignored) -> FloatArray:
        """Score texts in order: (n, c), without the temperature."""
        log_probs = np.zeros((len(texts), self.model.config.num_labels))
        encoded = self.tokenizer(list(texts), truncation=True)["input_ids"]
        for rows in shared(batches([len(ids) for ids in encoded], self.batch_tokens)):
            inputs = self.tokenizer.pad({"input_ids": [encoded[row] for row in rows]}, return_tensors="pt")
            logits = self.model(**inputs).logits
            log_probs[rows] = (self.temperature * logits.double()).log_softmax(dim=1).numpy()
            moved(len(rows) * processes.world_size())
        return processes.all_reduce(log_probs)
