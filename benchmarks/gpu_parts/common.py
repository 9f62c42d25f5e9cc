"""What all sections use: a setting, rows, a step by finsa and by transformers alone, and rows of the table.

Letters: n rows, c classes.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from finsa.data.labels import LabelSpace
from finsa.runs.processes import QUIET

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

import numpy as np
import torch
from gpu import row
from torch.nn import functional

from finsa.config import RunConfig, compose
from finsa.data.rows import IGNORE
from finsa.models import hardware
from finsa.training import objective

Rows = list[dict[str, Any]]
Batch = dict[str, torch.Tensor]
Part = tuple[str, Callable[[], Iterable[dict[str, Any]]]]

ANSWER = 3  # learned tokens at the end of a row
TOKENS = 256  # of every row where memory is measured
PREFIX = 20  # tokens that rows begin with where they share some
WORDS = [(407,), (411,), (408,)]
PHRASES = [(407, 30), (411, 31), (411, 32, 33), (408,)]  # they branch, so a mask keeps them apart
OFF = "method.adapter.dropout=0.0"  # dropout would draw other masks
# Relative differences in float32: of a loss, of all gradients together, and absolute ones of log-probabilities.
LOSS, GRADIENT, SCORE = 1e-5, 1e-4, 1e-4


class GPUError(Exception):
    """Raised by parts that measure nothing without a GPU."""


@dataclass(frozen=True)
class Setting:
    """Where the sections run.

    Args:
        device: of what is tested.
        small: tiny shapes and few repeats.
        model: the shape that correctness and speed are measured at.
    """

    device: torch.device
    small: bool
    model: str


def reason(error: Exception) -> str:
    """An error in one line, with its place."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    first = (str(error).splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {first} ({Path(place.filename).name}:{place.lineno})"


def release() -> None:
    """Free what the last part has left, so that it does not count as the next one's."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def need_gpu(at: Setting) -> None:
    """Leave a part that needs a GPU where there is none."""
    if at.small:
        raise GPUError


def configured(*words: str) -> RunConfig:
    """A configuration with random weights."""
    given = [*words, "model.weights=random"]
    return compose.build(*compose.compose_values(given), given)


def made_rows(number: int, shortest: int, longest: int, prefix: int = 0) -> Rows:
    """Rows of random tokens with an answer, a class, and a place of their text; lengths are spread between two."""
    draw, shared, found = np.random.default_rng(0), np.random.default_rng(1).integers(10, 4000, prefix).tolist(), Rows()
    for count in range(number):
        length = shortest + round((longest - shortest) * count / max(number - 1, 1))
        ids = [*shared, *draw.integers(10, 4000, length).tolist()]
        labels = [IGNORE] * (len(ids) - ANSWER) + ids[-ANSWER:]
        found.append({"input_ids": ids, "labels": labels, "target": count % 3, "text_span": (2, len(ids) - ANSWER)})
    return found


def tokens_only(rows: Rows) -> Rows:
    """The rows as a loss on tokens has them."""
    return [{"input_ids": one["input_ids"], "labels": one["labels"]} for one in rows]


def moved(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device."""
    return {name: hardware.to_device(tensor, device) for name, tensor in batch.items()}


def stand_in(answers: Sequence[tuple[int, ...]]) -> Any:
    """What scorers and heads ask of a renderer."""
    spell = SimpleNamespace(
        decode=lambda ids: "", batch_decode=lambda found, **_: [" ".join(map(str, ids)) for ids in found]
    )
    names = tuple(map(str, answers))
    labels = LabelSpace(names, names)
    return SimpleNamespace(answers=list(answers), labels=labels, end=0, suffix=[], tokenizer=spell)


def wake(model: torch.nn.Module) -> None:
    """Make the adapters' B other than zero, which would hide the gradient of A."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draw))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by parameter, on the CPU in float64; they are taken off the model."""
    found = {name: p.grad.detach().cpu().double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def difference(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Relative difference of all gradients together.

    Raises:
        ValueError: where other parameters have gradients.
    """
    if set(found) != set(reference):
        raise ValueError(f"gradients of other parameters: {sorted(set(found) ^ set(reference))[:3]}")
    norm = torch.stack([one.norm() for one in reference.values()]).norm()
    return float(torch.stack([(found[name] - one).norm() for name, one in reference.items()]).norm() / norm)


def cosine(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Cosine between all gradients together."""
    names = sorted(reference)
    first, second = (torch.cat([values[name].flatten() for name in names]) for values in (found, reference))
    return float(functional.cosine_similarity(first, second, dim=0))


def plain_step(model: Any, rows: Rows) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss per labeled token and its gradients by transformers alone: one row at a time, logits at all positions."""
    total, count = 0.0, sum(label != IGNORE for one in rows for label in one["labels"][1:])
    device = next(model.parameters()).device
    for one in rows:
        ids, labels = (torch.tensor([one[name]], device=device) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORE, reduction="sum") / count
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


def step(goal: objective.Objective, model: Any, batches: Sequence[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step by finsa: micro-batches over the weights of all of them."""
    device = next(model.parameters()).device
    there = [moved(batch, device) for batch in batches]
    weight, total = sum(float(goal.weight(batch)) for batch in there), 0.0
    for batch in there:
        loss = goal.total(model, batch) / weight
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


@torch.inference_mode()
def plain_scores(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[tuple[int, ...]]) -> Any:
    """Log-probabilities of whole labels (n, c), one label of one prompt at a time."""
    device, scores = next(model.parameters()).device, np.zeros((len(prompts), len(answers)))
    for at, prompt in enumerate(prompts):
        read: dict[tuple[int, ...], torch.Tensor] = {}  # labels of one token need one pass for all of them
        for number, answer in enumerate(answers):
            if (before := answer[:-1]) not in read:
                ids = torch.tensor([[*prompt, *before]], device=device)
                read[before] = (
                    model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float().log_softmax(-1)
                )
            scores[at, number] = sum(float(read[before][place, token]) for place, token in enumerate(answer))
    return scores


def equal(name: str, found: tuple[float, Any], reference: tuple[float, Any]) -> Iterator[dict[str, Any]]:
    """Rows of a loss and its gradients beside the reference."""
    off = abs(found[0] - reference[0]) / abs(reference[0])
    text = f"{found[0]:.6f}, reference {reference[0]:.6f}, off by {off:.1e}"
    yield row(f"loss: {name}", text, off <= LOSS, f"<= {LOSS:.0e}", loss=found[0], reference=reference[0], off=off)
    off = difference(found[1], reference[1])
    yield row(f"gradients: {name}", f"off by {off:.1e}", off <= GRADIENT, f"<= {GRADIENT:.0e}", off=off)


def scored(name: str, found: Any, wanted: Any, limit: float | None) -> Iterator[dict[str, Any]]:
    """A row of scores (n, c) beside the reference; without a limit a measurement."""
    off, same = float(np.abs(found - wanted).max()), float((found.argmax(1) == wanted.argmax(1)).mean())
    ok = None if limit is None else bool(off <= limit and same == 1)
    text = f"off by at most {off:.1e}, the same label {same:.1%}"
    said = "" if limit is None else f"<= {limit:.0e}, 100 %"
    yield row(f"label scores: {name}", text, ok, said, off=off, same_label=same)


def seconds_of(action: Callable[[], object], repeats: int) -> float:
    """Median seconds of an action, after two that do not count."""
    found = []
    for count in range(repeats + 2):
        hardware.synchronize()
        started = time.perf_counter()
        action()
        hardware.synchronize()
        if count >= 2:
            found.append(time.perf_counter() - started)
    return statistics.median(found)
