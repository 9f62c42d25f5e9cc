"""A hard-routed bundle of a mixture: one merged model per expert, and the router that chooses among them for each text.

The models are ordinary folders of transformers, so that any server takes them; a text costs one plain model's pass and
the mean of its embeddings. Where the run mixes softly, the answers are another model's: the receipt says how far.

Letters: n prompts, E experts, c classes, b rows of a batch, s tokens, d hidden width.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finsa.config import Model, MoeJointStage, RunConfig
from finsa.data.rows import Encoded, Renderer
from finsa.errors import ModelError
from finsa.inference.scoring import scorer
from finsa.models import adapters, base
from finsa.models.batches import batches, padded
from finsa.models.classifier import Classifier, load_head, text_mean
from finsa.models.moe import mixture
from finsa.models.moe.routing import Router, load_router
from finsa.runs.progress import Moved, ignored

FloatArray = NDArray[np.float64]
EXPERTS = "experts"


def write(cfg: RunConfig, weights: Model, run: Path, folder: Path) -> None:
    """Write each expert's merged model, and the router with its manifest.

    Args:
        cfg: the run's configuration.
        weights: names the base that the experts were trained on.
        run: the run's folder.
        folder: gets ``experts/<name>/`` and ``mixture/``.
    """
    for name in mixture.names(run):
        backbone: Any = base.load_base(weights, cfg.seed, quantization=cfg.method.quantization)
        if cfg.method.quantization != "none":
            backbone = backbone.dequantize()
        adapters.load(backbone, run / "adapters" / name).merge_and_unload().save_pretrained(folder / EXPERTS / name)
    shutil.copytree(run / "mixture", folder / "mixture")
    manifest = folder / "mixture" / mixture.MANIFEST
    values = {**json.loads(manifest.read_text(encoding="utf-8")), "routing": "hard"}
    manifest.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def open_reader(cfg: RunConfig, folder: Path, renderer: Renderer, batch_tokens: int) -> RoutedReader:
    """Load a bundle.

    Raises:
        ModelError: where something is missing or does not fit.
    """
    stage = cfg.stage
    assert isinstance(stage, MoeJointStage)
    names, models = mixture.names(folder), []
    for name in names:
        place = folder / EXPERTS / name
        if not (place / "config.json").is_file():
            raise ModelError(f"expert {name}: there is no model in {place}; export again")
        section = cfg.model.model_copy(update={"path": str(place), "weights": "pretrained"})
        model: Any = base.load_base(section, cfg.seed)
        if cfg.method.head == "classifier":
            model = Classifier(model, len(renderer.labels), 0.0, cfg.seed)
            load_head(model.head, folder / "mixture")
        models.append(model.requires_grad_(False).eval())
    width = models[0].config.hidden_size
    router = Router(width, stage.router.hidden, len(names), stage.router.dropout).eval()
    load_router(router, folder / "mixture" / mixture.FILE)
    return RoutedReader(names, models, router.to(next(models[0].parameters()).device), renderer, batch_tokens)


class RoutedReader:
    """Scores prompts with the expert that the router finds likeliest for each.

    Args:
        experts: names, (E,).
        models: a causal language model or classifier for each.
        router: over the mean of a text's embeddings.
        renderer: made the prompts.
        batch_tokens: most padded tokens of a batch.

    Attributes:
        gates: of the prompts scored last, one-hot, (n, E).
    """

    def __init__(
        self, experts: Sequence[str], models: Sequence[Any], router: Router, renderer: Renderer, batch_tokens: int
    ) -> None:
        self.experts, self.router, self.renderer, self.batch_tokens = tuple(experts), router, renderer, batch_tokens
        self.readers = [scorer(model, renderer, batch_tokens) for model in models]
        self.rule = self.readers[0].rule
        self.embed = getattr(models[0], "backbone", models[0]).get_input_embeddings()  # no expert changes them
        self.gates: FloatArray | None = None

    def score(self, prompts: Encoded, moved: Moved = ignored) -> FloatArray:
        """Score prompts, in their order: (n, c)."""
        chosen = self._chosen(prompts)
        scores = np.empty((len(prompts), len(self.renderer.answers)))
        for number, reader in enumerate(self.readers):
            rows = np.flatnonzero(chosen == number).tolist()
            if rows:
                scores[rows] = reader.score([prompts[row] for row in rows], moved)
        self.gates = np.eye(len(self.experts))[chosen]
        return scores

    @torch.inference_mode()
    def _chosen(self, prompts: Encoded) -> NDArray[np.int64]:
        """The likeliest expert of each prompt, (n,)."""
        chosen = np.empty(len(prompts), dtype=np.int64)
        device = self.embed.weight.device
        for rows in batches([len(prompt) for prompt in prompts], self.batch_tokens):
            own = [prompts[row] for row in rows]
            spans = torch.tensor([self.renderer.text_span(prompt) for prompt in own], device=device)
            logits = self.router(text_mean(self.embed(padded(own).to(device)), spans))
            chosen[rows] = logits.argmax(dim=1).cpu().numpy()
        return chosen
