"""What a mixture of experts costs, against one adapter and against the published control flow, as ratios in one run.

    python benchmarks/mixture.py            the true Qwen2.5-0.5B shape, random weights (minutes)
    python benchmarks/mixture.py --quick    the embedded shape, to see that it runs

Held equal: architecture and weights, rank 16 on query, value, output and MLP projections, token ids, loss on the
answer, batch. A training step is forward and backward; inference scores three label words after each prompt. Published:
a pass without gradients for the router, then a pass per expert with PEFT's `set_adapter`, whose flags are put
back so that every expert learns, and the experts' last states mixed. PEFT's X-LoRA mixes per token and layer, after a
pass of its own that finds the gates; its experts are set to learn as well. Arms take turns; medians over the turns,
of CPU seconds where there is no GPU.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finsa.runs.processes import QUIET

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

import kept
import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from torch.nn import functional

from finsa.config import MoeJointStage, RunConfig, compose
from finsa.evaluation import tables
from finsa.inference.label_tree import LabelTree
from finsa.inference.scoring import label_log_probs
from finsa.models import base, hardware
from finsa.models.moe import experts
from finsa.models.moe.mixture import Mixture
from finsa.training.objective import labeled_loss

RANK, ANSWER = 16, 3
LAYERS = "model.architecture.num_hidden_layers"
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SINGLE, PUBLISHED, XLORA = "one adapter", "published flow, 2 experts", "PEFT X-LoRA, 2 experts"
TREE = LabelTree.of([(7,), (8,), (9,)])


def main() -> None:
    """Run the arms, print the table, write ``results/mixture.json``."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="the embedded shape instead of 0.5B; nothing is written")
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--tokens", type=int, default=96, help="per row")
    options.add_argument("--turns", type=int, default=5)
    options.add_argument(
        "--layers", type=int, default=24, help="of the shape; with fewer, the output projection dilutes the ratios"
    )
    given = options.parse_args()
    cfg = composed(*(["model=tiny"] if given.quick else ["model=qwen05b", f"{LAYERS}={given.layers}"]))
    hardware.prepare(cfg.train)
    batch = rows(given.batch, given.tokens, base.architecture(cfg.model).vocab_size)
    arms = build(cfg)
    report = {
        "model": cfg.model.name,
        "layers": base.architecture(cfg.model).num_hidden_layers,
        "batch": given.batch,
        "tokens": given.tokens,
        "rank": RANK,
    }
    report |= {"device": hardware.describe(base.dtype(cfg.model)), "parts": {}}
    for part, action in {"training step": step, "inference": score}.items():
        work = {name: lambda arm=arm, action=action: action(arm, batch) for name, arm in arms.items()}
        report["parts"][part] = ratios(take_turns(work, given.turns, part))
    show(report)
    if not given.quick:
        kept.write("mixture_gpu" if torch.cuda.is_available() else "mixture", report)


def composed(*model: str) -> RunConfig:
    """The configuration of the mixtures."""
    overrides = [*model, "model.weights=random", "stage=moe_joint"]
    values, choices = compose.compose_values(overrides)
    return compose.build(values, choices, overrides)


def rows(number: int, tokens: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """A batch of random tokens: a prompt of eight, the text, an answer of three."""
    torch.manual_seed(0)
    ids = torch.randint(10, min(vocabulary, 50_000), (number, tokens + ANSWER))
    labels = torch.full_like(ids, -100)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    batch = {"ids": ids, "labels": labels, "span": torch.tensor([[8, tokens - 4]] * number)}
    return {name: value.to(base.device()) for name, value in batch.items()}


Arm = tuple[torch.nn.Module, Callable[..., Any]]


def build(cfg: RunConfig) -> dict[str, Arm]:
    """The arms: a model, and how it is called."""
    stage = cfg.stage
    assert isinstance(stage, MoeJointStage)
    made: dict[str, Arm] = {}
    with tempfile.TemporaryDirectory() as place:
        single = adapted(fresh(cfg), ["default"])
        folders = {}
        for name in ("a", "b", "c"):
            folders[name] = Path(place) / name
            single.save_pretrained(str(folders[name]))
        made[SINGLE] = (single, lambda model, span, **inputs: model(**inputs))
        for number in (2, 3):
            found = experts.read(dict(list(folders.items())[:number]))
            model = Mixture(fresh(cfg), found, stage, None, 0.0, 0)
            model.set_trainable(experts=True)
            made[f"mixture of {number}"] = (model, lambda model, span, **inputs: model(text_span=span, **inputs))
        output = stage.model_copy(update={"mix": "output"})
        model = Mixture(fresh(cfg), experts.read({name: folders[name] for name in "ab"}), output, None, 0.0, 0)
        model.set_trainable(experts=True)
        made["mixture of 2, mix: output"] = (model, lambda model, span, **inputs: model(text_span=span, **inputs))
        made[XLORA] = (xlora(fresh(cfg), folders), lambda model, span, **inputs: model(**inputs))
    made[PUBLISHED] = (Published(adapted(fresh(cfg), ["news", "forum"])), lambda model, span, **inputs: model(**inputs))
    return made


_kept: list[Any] = []


def fresh(cfg: RunConfig) -> Any:
    """The base; weights are shared between the arms, so that five of them fit."""
    if not _kept:
        _kept.append(base.load_base(cfg.model, 0))
    return copy.deepcopy(_kept[0], {id(p): p for p in _kept[0].parameters()})


def adapted(model: Any, names: list[str]) -> Any:
    """PEFT adapters; B is not zero, so that every gradient is computed."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return wrapped


def xlora(model: Any, folders: dict[str, Path]) -> Any:
    """PEFT's own mixture of two saved adapters; both learn, and so does its classifier."""
    model.config.use_cache = False
    named = {str(number): str(folders[name]) for number, name in enumerate("ab")}
    size = model.config.hidden_size
    return get_peft_model(
        model, XLoraConfig(task_type="CAUSAL_LM", hidden_size=size, adapters=named, use_trainable_adapters=True)
    )


class Published(torch.nn.Module):
    """Router pass, one pass per expert, last states mixed: three backbone passes for two experts."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone, self.names = backbone, ("news", "forum")
        self.router = torch.nn.Linear(backbone.config.hidden_size, 2).to(base.device())

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, use_cache: bool) -> Any:
        """Logits at the wanted positions."""
        body, head = self.backbone.get_base_model().model, self.backbone.get_base_model().lm_head
        with torch.no_grad():
            first = body(input_ids=input_ids, use_cache=False).last_hidden_state[:, 0]
        gates = self.router(first.float()).softmax(dim=1)
        if not self.training:
            gates = functional.one_hot(gates.argmax(dim=1), 2).float()
        states = 0
        for number, name in enumerate(self.names):
            self.backbone.set_adapter(name)
            for key, parameter in self.backbone.named_parameters():
                if "lora_" in key:
                    parameter.requires_grad_(True)
            hidden = body(input_ids=input_ids, use_cache=False).last_hidden_state
            states = states + gates[:, number, None, None].to(hidden.dtype) * hidden
        kept = states[logits_to_keep] if logits_to_keep.dtype == torch.bool else _gathered(states, logits_to_keep)
        return type("Output", (), {"logits": head(kept)})()


def _gathered(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return states.gather(1, places[:, :, None].expand(-1, -1, states.shape[2]))


class _Called(torch.nn.Module):
    """Gives an arm's model the text's place where it wants it."""

    def __init__(self, arm: Arm, span: torch.Tensor) -> None:
        super().__init__()
        self.model, self.call, self.span = arm[0], arm[1], span

    def forward(self, **inputs: Any) -> Any:
        """Call it."""
        return self.call(self.model, self.span, **inputs)


def step(arm: Arm, batch: dict[str, torch.Tensor]) -> None:
    """Forward and backward of a batch."""
    arm[0].train()
    labeled_loss(_Called(arm, batch["span"]), batch["ids"], batch["labels"]).backward()
    for parameter in arm[0].parameters():
        parameter.grad = None


@torch.inference_mode()
def score(arm: Arm, batch: dict[str, torch.Tensor]) -> None:
    """Score the label words after the prompts of a batch."""
    arm[0].eval()
    ids = batch["ids"][:, :-ANSWER]
    lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
    label_log_probs(_Called(arm, batch["span"]), ids, lengths, TREE)


def clock() -> float:
    """Seconds: of the wall on a GPU; of this process on a CPU, which it shares with others."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def take_turns(work: dict[str, Callable[[], None]], turns: int, part: str) -> dict[str, list[float]]:
    """Run every arm once per turn, after one round that is not measured."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(turns + 1):
        for name, action in work.items():
            repeats = 10 if torch.cuda.is_available() else 1
            started = clock()
            for _ in range(repeats):
                action()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append((clock() - started) / repeats)
        print(f"{part}: turn {turn} of {turns}", flush=True)
    return seconds


def ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Seconds of every arm; medians of the turns' ratios, in which a slow moment of the machine cancels."""
    return {
        name: {
            "seconds": [round(value, 4) for value in values],
            "of_one_adapter": round(_median_ratio(values, seconds[SINGLE]), 3),
            "of_published": round(_median_ratio(values, seconds[PUBLISHED]), 3),
        }
        for name, values in seconds.items()
    }


def _median_ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def show(report: dict[str, Any]) -> None:
    """Print a table per part."""
    head = f"{report['model']} shape, {report['layers']} layers, {report['batch']} rows of {report['tokens']} tokens"
    for part, arms in report["parts"].items():
        values = {
            name: f"{statistics.median(arm['seconds']):8.3f} s   {arm['of_one_adapter']:.2f}x of one adapter   "
            f"{1 / arm['of_published']:.2f}x as fast as published"
            for name, arm in arms.items()
        }
        tables.show_plan(f"{part}: {head}, {report['device']}", values)


if __name__ == "__main__":
    main()
