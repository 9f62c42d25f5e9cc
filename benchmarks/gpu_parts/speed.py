"""How fast is it: the card, the training step, inference."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Iterator
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import torch
from gpu import row

from finsa.config import RunConfig
from finsa.models import base, hardware
from gpu_parts.common import (
    GRADIENT,
    LOSS,
    SCORE,
    Part,
    Setting,
    configured,
    need_gpu,
    reason,
    release,
    seconds_of,
)


def machine(at: Setting) -> Iterator[Part]:
    """What the card computes and moves, its clock while it does, and which packages are there."""
    yield "packages", _packages
    yield "matrix products", lambda: _products(at)
    yield "copies", lambda: _copies(at)
    yield "clock under load", lambda: _clock(at)


def _packages() -> Iterator[dict[str, Any]]:
    names, found = ("torch", "triton", "bitsandbytes", "flash_attn", "flash_attn_3", "kernels", "trl", "peft"), {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    yield row("packages", ", ".join(f"{name} {version}" for name, version in found.items()), **found)


def _products(at: Setting) -> Iterator[dict[str, Any]]:
    kinds = {"float32": torch.float32} if at.small else {"bfloat16": torch.bfloat16, "float16": torch.float16}
    kinds |= {"float32": torch.float32}
    for name, dtype in kinds.items():
        rate = hardware.matmul_rate.__wrapped__(dtype, 0.05 if at.small else 1.0) / 1e12
        yield row(f"matrix product, {name}", f"{rate:.2f} TFLOP/s", rate > 0, "> 0", tflops=rate)
    if not at.small:
        torch.set_float32_matmul_precision("high")
        try:
            rate = hardware.matmul_rate.__wrapped__(torch.float32, 1.0) / 1e12
        finally:
            torch.set_float32_matmul_precision("highest")
        yield row("matrix product, float32 as TF32 (train.matmul_precision=high)", f"{rate:.2f} TFLOP/s", tflops=rate)


def _copies(at: Setting) -> Iterator[dict[str, Any]]:
    size = 2**22 if at.small else 2**30
    one, two = (torch.ones(size, dtype=torch.uint8, device=at.device) for _ in range(2))
    rate = 2 * size / seconds_of(lambda: two.copy_(one), 5) / 1e9
    yield row("copy within the device, bytes read and written", f"{rate:.0f} GB/s", rate > 0, "> 0", gb_per_second=rate)
    need_gpu(at)
    host = torch.ones(2**28, dtype=torch.uint8).pin_memory()
    rate = 2**28 / seconds_of(lambda: two[: 2**28].copy_(host, non_blocking=True), 5) / 1e9
    yield row("copy from pinned memory", f"{rate:.1f} GB/s", gb_per_second=rate)


def _clock(at: Setting) -> Iterator[dict[str, Any]]:
    need_gpu(at)
    one = torch.randn(8192, 8192, dtype=torch.bfloat16, device=at.device)
    for _ in range(1500):  # about two seconds of an H100, queued
        torch.mm(one, one)
    words = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader"]
    told = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    hardware.synchronize()
    yield row("clock, power and temperature under load", told)


def training(at: Setting) -> Iterator[Part]:
    """The training step of `training_step.py` against trl and transformers; its text says what is held equal.

    On a GPU the clock runs over all steps but the first two, and stock trainers also get bfloat16 weights, which finsa
    takes by itself. The peak is what torch allocates.
    """
    yield "loss and gradients beside trl", lambda: _beside_trl(at)
    yield "training step", lambda: _training(at)


def _training_parts(at: Setting) -> tuple[RunConfig, Any, Any, Any]:
    import training_step

    from finsa.models import tokenizers

    cfg = training_step.composed(at.model, 4 if at.small else 16)
    vocabulary = base.architecture(cfg.model).vocab_size
    rows = training_step.examples(4 if at.small else 20 * 16, vocabulary)
    return cfg, tokenizers.load_tokenizer(cfg.model), rows, training_step


def _beside_trl(at: Setting) -> Iterator[dict[str, Any]]:
    cfg, tokenizer, rows, training_step = _training_parts(at)
    found = training_step.compare_gradients(cfg, tokenizer, rows[: cfg.train.batch_size])
    off = abs(found["loss_finsa"] - found["loss_trl"]) / found["loss_trl"]
    text = f"{found['loss_finsa']:.6f}, trl {found['loss_trl']:.6f}, off by {off:.1e}"
    yield row("loss of a batch beside trl, float32", text, off <= LOSS, f"<= {LOSS:.0e}", **found)
    off = found["gradient_relative_difference"]
    yield row("its gradients", f"off by {off:.1e}", off <= GRADIENT, f"<= {GRADIENT:.0e}", off=off)


def _training(at: Setting) -> Iterator[dict[str, Any]]:
    import stock

    cfg, tokenizer, rows, training_step = _training_parts(at)
    exact = cfg.model_copy(update={"model": cfg.model.model_copy(update={"dtype": "float32"})})
    half, plain = torch.bfloat16, {"bf16": False, "gradient_checkpointing": False}
    groups = {"train_sampling_strategy": "group_by_length", "length_column_name": "length"}
    side = cfg.model_copy(update={"train": cfg.train.model_copy(update={"packing": False})})
    arms: dict[str, Callable[[Any], float]] = {
        "trl SFTTrainer as it ships": lambda clock: stock.trl(cfg, tokenizer, rows, {}, clock=clock),
        "finsa as it ships": lambda clock: training_step.ours(cfg, tokenizer, rows, clock),
    }
    if not at.small:
        arms |= {
            "trl, float32, no checkpointing": lambda clock: stock.trl(cfg, tokenizer, rows, plain, clock=clock),
            "transformers Trainer, float32": lambda clock: stock.transformers(cfg, tokenizer, rows, clock=clock),
            "finsa, float32": lambda clock: training_step.ours(exact, tokenizer, rows, clock),
            "trl, bfloat16 weights, no checkpointing": lambda clock: stock.trl(
                cfg, tokenizer, rows, plain, half, clock
            ),
            "trl, bfloat16 weights, length groups": lambda clock: stock.trl(
                cfg, tokenizer, rows, plain | groups, half, clock
            ),
            "transformers Trainer, bfloat16 weights": lambda clock: stock.transformers(
                cfg, tokenizer, rows, half, clock
            ),
            "finsa, side by side": lambda clock: training_step.ours(side, tokenizer, rows, clock),
        }
    rates: dict[str, list[float]] = {name: [] for name in arms}
    first = next(iter(arms))
    for turn in range(1 if at.small else 2):
        for name, one_pass in arms.items():
            if turn and "float32" in name:  # slow, and no arm that anybody would choose
                continue
            if not at.small:
                release()
            clock = stock.Clock(0 if at.small else 2)
            try:
                one_pass(clock)
            except Exception as error:  # one trainer that fails leaves the others alone
                yield row(name, reason(error), ok=False)
                continue
            rates[name].append(clock.steps * cfg.train.batch_size / clock.seconds)
            rate, peak = statistics.median(rates[name]), hardware.peak_memory() / 2**30
            beside = f", {rate / statistics.median(rates[first]):.2f}x of the first" if rates[first] else ""
            text = f"{rate:.1f} samples/s{beside}, peak {peak:.2f} GiB"
            yield row(name, text, samples_per_second=rates[name], peak_gib=peak, turns=turn + 1)


def inference_speed(at: Setting) -> Iterator[Part]:
    """The label scorer of `inference.py` against transformers' generation, as published; texts per second."""
    yield "inference", lambda: _inference(at)


def _inference(at: Setting) -> Iterator[dict[str, Any]]:
    import drawn
    import inference

    cfg = configured(f"model={at.model}", "model.dtype=float32")
    model = drawn.on_device(cfg.model, torch.float32)
    given = SimpleNamespace(texts=2 if at.small else 32, threads=None, batch_tokens=2048 if at.small else 16384)
    renderer = inference.stand_in(model.config.vocab_size, ends=model.config.eos_token_id)
    arms = inference.make_arms(model, renderer, given, exported=False)
    scores, seconds = dict[str, Any](), dict[str, list[float]]()
    for name, arm in arms.items():
        scores[name] = arm()  # also the warm-up
        seconds |= inference.take_turns({name: arm}, 1 if at.small else 2)
        yield row(name, f"{given.texts / statistics.median(seconds[name]):.1f} texts/s")
    report = inference.summary(cfg.model.name, given, seconds, scores)
    for name, one in report["arms"].items():
        text = f"{one['texts_per_second']:.1f} texts/s, {one['ratio']:.2f}x of the first"
        if "same_argmax" not in one:
            yield row(name, text, **one)
            continue
        text += f", the same label {one['same_argmax']:.0%}, off by at most {one['largest_difference']:.1e}"
        exact = "fp32" in name
        ok = one["largest_difference"] <= SCORE and one["same_argmax"] == 1 if exact else None
        yield row(name, text, ok, f"<= {SCORE:.0e}, 100 %" if exact else "", **one)
