"""One optimizer step of eight rows on a small model, and its gradients; run as a script, it is one of several ranks."""

from __future__ import annotations

import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import compositions
import torch
from base_models import small, write_experts
from transformers import TrainerCallback

from finsa.config import Adapter, MoeJointStage, RunConfig, compose
from finsa.data.rows import IGNORE, Row
from finsa.inference.label_tree import LabelTree
from finsa.models import adapters
from finsa.models.classifier import Classifier
from finsa.models.moe import experts
from finsa.models.moe.mixture import Mixture
from finsa.training import fit
from finsa.training.objective import Objective, choice, classifier_logits, joint, label_word_log_probs, tokens

LORA = Adapter(variant="lora", rank=4, alpha=8, dropout=0.0, targets=("q_proj", "v_proj"), lr_ratio=1.0, init=None)
TREE = LabelTree.of([(7, 3), (7, 4), (9,)])
COUNTS = (5, 2, 1)
KINDS = ("tokens", "weighted tokens", "label", "classifier")
MIXTURE = "mixture"  # its balance, which depends on the micro-batch, is left out


class Gradients(TrainerCallback):  # type: ignore[misc]
    """Keeps the gradients of the step."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Copy them."""
        self.kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rows(kind: str) -> list[Row]:
    """Eight rows of different lengths, answers and weights."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(8):
        ids = torch.randint(10, 50, (4 + number,), generator=generator).tolist()
        row = Row(input_ids=ids, labels=[IGNORE] * (3 + number % 2) + ids[3 + number % 2 :])
        if kind != "tokens":
            row["weight"] = 0.25 * (1 + number)
        if kind in ("label", "classifier"):
            row["target"] = number % 3
        if kind in ("classifier", MIXTURE):
            row["text_span"] = (1, len(ids))
        if kind == MIXTURE:
            row["domain"] = number % 3 - 1
        made.append(row)
    return made


def objective(kind: str, model: Any = None) -> Objective:
    """The objective of a kind; choices with focal loss, smoothing and logit adjustment at once."""
    if kind == MIXTURE:
        return joint(tokens(), model, 1.5, 0.0)
    if "tokens" in kind:
        return tokens()
    values = {"name": "focal", "gamma": 2.0, "smoothing": 0.1, "beta": 0.9, "logit_adjustment": 1.0}
    loss = compositions.config("method=lora_label").method.loss.model_copy(update=values)
    if kind == "classifier":
        return choice(classifier_logits, loss, COUNTS)
    return choice(label_word_log_probs(TREE), loss, COUNTS, TREE.tokens)


def learner(kind: str) -> torch.nn.Module:
    """A small model with an adapter whose B is not zero, so that A has a gradient too."""
    if kind == MIXTURE:
        return mixture()
    model = adapters.attach(small(), configuration("model.weights=random").model, LORA, seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Classifier(model, 3, 0.0, seed=0) if kind == "classifier" else model


def mixture() -> Mixture:
    """A mixture of two experts without router dropout."""
    stage = configuration("stage=moe_joint", "stage.router.dropout=0.0").stage
    assert isinstance(stage, MoeJointStage)
    with tempfile.TemporaryDirectory() as folder:
        model = Mixture(small(), experts.read(write_experts(Path(folder), number=2)), stage, None, 0.0, seed=0)
    model.set_trainable(experts=True)
    return model


@cache
def configuration(*overrides: str) -> RunConfig:
    """Compose and check a configuration; once, because composing takes longer than a step."""
    return compose.build(*compose.compose_values(overrides), overrides)


def step(kind: str, micro: int, tokenizer: Any, *further: str) -> tuple[dict[str, torch.Tensor], float]:
    """Make one step of the eight rows in micro-batches.

    Returns:
        Gradients by parameter, and the loss that is logged.
    """
    overrides = ["train.batch_size=8", f"train.micro_batch_size={micro}", "train.max_steps=1", "train.patience=null"]
    overrides += ["train.log_every=1", "train.max_grad_norm=1e9", "train.warmup=0", *further]
    seen, losses = Gradients(), []
    model = learner(kind)
    with tempfile.TemporaryDirectory() as folder:
        fit.fit(
            model=model,
            tokenizer=tokenizer,
            rows=rows(kind),
            validate=lambda _: {"loss": 1.0, "macro_f1": 0.5},
            train=configuration(*overrides).train,
            seed=3,
            folder=Path(folder),
            record=lambda _, values: losses.append(values["loss"]) if "loss" in values else None,
            callbacks=[seen],
            objective=objective(kind, model),
        )
    return seen.kept, losses[0]


def main() -> None:
    """Run one rank: ``python steps.py <micro-batch> <file> <kinds>``; the launcher's variables determine which."""
    from transformers import AutoTokenizer

    from finsa.config import ROOT

    micro, file, *kinds = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    torch.save({kind: step(kind, int(micro), tokenizer) for kind in kinds}, file)


if __name__ == "__main__":
    main()
