"""What does it need: GLM-Z1-9B, and the memory plan against the measured peak."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu import row

from finsa.config import RunConfig
from finsa.inference.label_tree import LabelTree
from finsa.inference.scoring import LabelScorer, label_log_probs
from finsa.models import base, factory, hardware, quantization
from finsa.models import memory as plan
from finsa.training import objective
from finsa.training.batches import Collator
from gpu_parts.common import (
    OFF,
    PHRASES,
    TOKENS,
    WORDS,
    Part,
    Setting,
    configured,
    made_rows,
    moved,
    need_gpu,
    release,
    scored,
    stand_in,
    step,
    tokens_only,
    wake,
)

# The cells of the table in docs/performance.md: rows of a micro-batch, and whether layers are checkpointed.
Cells = tuple[tuple[int, bool], ...]
CELLS: Cells = tuple((rows, again) for again in (False, True) for rows in (1, 4, 16))
FITS = (0.95, 1.5)  # of estimated over measured memory: an estimate may be too large rather than too small
_GLM = ("model=glm9b",)
_SMALL_GLM = (
    *_GLM,
    *("model.architecture.vocab_size=4096", "model.architecture.hidden_size=64", "model.architecture.head_dim=16"),
    *("model.architecture.intermediate_size=128", "model.architecture.num_hidden_layers=2"),
    *(
        "model.architecture.num_attention_heads=4",
        "model.architecture.pad_token_id=0",
        "model.architecture.eos_token_id=1",
    ),
)


def glm9b(at: Setting) -> Iterator[Part]:
    """GLM-Z1-9B at its true shape with random weights: LoRA steps in bfloat16 and nf4, and scoring in both.

    Its weights are drawn on the GPU and quantized in memory; the small form is the same architecture with two layers.
    """
    import drawn

    cfg = configured(*(_SMALL_GLM if at.small else _GLM), "method=qlora", OFF)
    whole = drawn.on_device(cfg.model, torch.float32 if at.small else torch.bfloat16)
    bases = {"whole": whole}
    del whole
    scores: dict[str, Any] = {}
    yield "bfloat16, scoring", lambda: _glm_scores(at, bases["whole"], "unquantized", scores)
    yield "bfloat16, lora_response", lambda: _cells(at, "glm9b", "lora", bases["whole"])

    def quantize() -> Iterator[dict[str, Any]]:
        started = time.perf_counter()
        made: Any = base.quantize(bases.pop("whole"), "nf4").requires_grad_(False).eval()
        quantization.disable_cpu_repacking(made)
        hardware.synchronize()
        bases["nf4"], size = made, base.bytes_of(made) / 2**30
        _, total = base.count_parameters(made)
        text = f"{size:.2f} GiB of {total:,} parameters, quantized in {time.perf_counter() - started:.1f} s"
        expected = 9_400_279_040
        yield row("nf4, weights", text, None if at.small else total == expected, "" if at.small else f"{expected:,}")

    yield "nf4, weights", quantize
    yield "nf4, scoring", lambda: _glm_scores(at, bases["nf4"], "nf4", scores)
    yield "nf4, a LoRA step", lambda: _glm_step(at, cfg, bases["nf4"])
    yield "nf4, qlora", lambda: _cells(at, "glm9b", "qlora", bases["nf4"])


def _glm_scores(at: Setting, model: Any, name: str, scores: dict[str, Any]) -> Iterator[dict[str, Any]]:
    import inference

    prompts = inference.prompts(4 if at.small else 64, 0, 9, 36)
    scorer = LabelScorer(model, stand_in(PHRASES), 2048 if at.small else 8192)
    started = time.perf_counter()
    scores[name] = scorer.score(prompts)
    if not at.small:  # the first call chooses kernels
        started = time.perf_counter()
        scorer.score(prompts)
    rate = len(prompts) / (time.perf_counter() - started)
    peak = hardware.peak_memory() / 2**30
    finite = bool(np.isfinite(scores[name]).all())
    yield row(f"{name}, scoring", f"{rate:.1f} texts/s, peak {peak:.2f} GiB", finite, "finite", texts_per_second=rate)
    if name == "nf4" and "unquantized" in scores:
        yield from scored("nf4 beside unquantized", scores["nf4"], scores["unquantized"], None)


def _glm_step(at: Setting, cfg: RunConfig, stored: Any) -> Iterator[dict[str, Any]]:
    """A step in one batch and in two: the same loss, and gradients that are there and finite."""
    model = factory.build(cfg, stored, None).train()
    try:
        wake(model)
        rows, goal = tokens_only(made_rows(4, 12, 40 if at.small else 200)), objective.tokens()
        whole = step(goal, model, [Collator(0)(rows)])
        parts = step(goal, model, [Collator(0)(rows[:2]), Collator(0)(rows[2:])])
    finally:
        factory.detach(model)
    off, limit = abs(whole[0] - parts[0]) / whole[0], 1e-4 if at.small else 2e-2
    norm = float(torch.stack([one.norm() for one in whole[1].values()]).norm())
    ok = off <= limit and np.isfinite(norm) and norm > 0
    text = f"loss {whole[0]:.4f}, in two micro-batches off by {off:.1e}; gradient norm {norm:.3g}"
    yield row("nf4, a LoRA step", text, bool(ok), f"<= {limit:.0e}, norm > 0", loss=whole[0], norm=norm)


def _cells(at: Setting, model: str, arm: str, loaded: Any, cells: Cells = CELLS) -> Iterator[dict[str, Any]]:
    """Planned and measured peak of training steps of rows of 256 tokens, with seconds and MFU."""
    need_gpu(at)
    import memory_plan

    for rows, again in cells:
        name = f"{model}, {arm}, {rows} x {TOKENS} tokens{', checkpointing' if again else ''}"
        try:
            one = memory_plan.measure(model, arm, rows, TOKENS, "bfloat16", loaded, again)
        except torch.OutOfMemoryError as error:
            yield row(name, f"does not fit: {str(error).splitlines()[0][:120]}")
            release()
            continue
        finally:
            release()
        text = (
            f"{one['measured'] / 1e9:.1f} GB, planned {one['estimated'] / 1e9:.1f} GB ({one['ratio']:.2f}); "
            f"{one['seconds_per_step']:.3f} s per step"
        )
        limit, ok = f"{FITS[0]} to {FITS[1]}", FITS[0] <= one["ratio"] <= FITS[1]
        if one["micro_batch_halved"]:
            text = f"does not fit, so the micro-batch was halved; planned {one['estimated'] / 1e9:.1f} GB"
            limit, ok = "planned: no less than 0.9 of the card", one["estimated"] >= 0.9 * hardware.total_memory()
        yield row(name, text, ok, limit, **one)


def memory(at: Setting) -> Iterator[Part]:
    """The memory plan against the measured peak of real training steps, as in `memory_plan.py`."""
    few = ((4, False), (4, True))
    yield "qwen05b", lambda: _planned(at, "qwen05b", {"lora": CELLS, "lora, loss on all tokens": few, "full": few})
    yield "scoring", lambda: _planned_scoring(at)
    for model in ("r1_distill_1_5b", "qwen7b"):
        yield model, partial(_planned, at, model, {"lora": ((1, False), (16, False), (16, True))})


def _planned(at: Setting, model: str, arms: dict[str, Cells]) -> Iterator[dict[str, Any]]:
    need_gpu(at)
    import drawn

    loaded = drawn.on_device(configured(f"model={model}").model, torch.bfloat16)
    for arm, cells in arms.items():  # the last may change the weights
        yield from _cells(at, model, arm, loaded, cells)


def _planned_scoring(at: Setting) -> Iterator[dict[str, Any]]:
    need_gpu(at)
    import drawn

    cfg, tree = configured("model=qwen05b", "model.dtype=bfloat16", "method=zero_shot"), LabelTree.of(WORDS)
    ids, lengths = torch.zeros(64, TOKENS, dtype=torch.long), torch.full((64,), TOKENS)
    shapes = factory.on_meta(cfg, None)
    planned = plan.estimate_scoring(
        cfg, shapes, lambda: label_log_probs(shapes, ids.to("meta"), lengths.to("meta"), tree), optimizer=False
    ).total()
    model = drawn.on_device(cfg.model, torch.bfloat16)
    release()
    with torch.inference_mode():
        label_log_probs(model, moved({"ids": ids}, at.device)["ids"], lengths.to(at.device), tree)
    measured = hardware.peak_memory()
    ratio = planned / measured
    text = f"{measured / 1e9:.2f} GB, planned {planned / 1e9:.2f} GB ({ratio:.2f})"
    yield row(f"qwen05b, scoring of 64 x {TOKENS} tokens", text, FITS[0] <= ratio <= FITS[1], f"{FITS[0]} to {FITS[1]}")
