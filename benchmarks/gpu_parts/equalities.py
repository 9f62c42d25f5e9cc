"""Is it right: correctness, precision and attention.

Letters: n rows, c classes.
"""

from __future__ import annotations

import copy
import inspect
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu import row
from torch.nn import functional

from finsa.config import MoeJointStage, RunConfig
from finsa.inference.generation import Generator
from finsa.inference.scoring import LabelScorer
from finsa.models import attention as attentions
from finsa.models import base, factory, quantization
from finsa.training import objective
from finsa.training.batches import Collator, Packer
from finsa.training.objective import labeled_loss
from gpu_parts.common import (
    IGNORE,
    LOSS,
    OFF,
    PHRASES,
    PREFIX,
    SCORE,
    WORDS,
    Part,
    Rows,
    Setting,
    configured,
    cosine,
    difference,
    equal,
    made_rows,
    moved,
    plain_scores,
    plain_step,
    release,
    scored,
    seconds_of,
    stand_in,
    step,
    tokens_only,
    wake,
)


def correctness(at: Setting) -> Iterator[Part]:
    """Losses, gradients, label scores and answers in float32 (TF32 is off) against the CPU; see the module's text."""
    reference, model = _pair(at)
    yield "a step on labeled tokens", lambda: _token_steps(at, reference, model)
    yield "label scores", lambda: _label_scores(at, reference, model)
    yield "generated answers", lambda: _answers(at, reference, model)
    for name, words in KINDS.items():
        yield name, partial(_kind, at, name, words)
    yield "mixture of experts", lambda: _mixture(at)


def _pair(at: Setting) -> tuple[Any, Any]:
    """The same model with an adapter in float32: on the CPU and on the device."""
    cfg = configured(f"model={at.model}", "model.dtype=float32", "method=lora_response", OFF)
    reference = factory.build(cfg, base.load_base(cfg.model, 0).cpu(), None)
    wake(reference)
    return reference.train(), copy.deepcopy(reference).to(at.device)


def _token_steps(at: Setting, reference: Any, model: Any) -> Iterator[dict[str, Any]]:
    number, longest, goal = (6, 40, objective.tokens()) if at.small else (8, 200, objective.tokens())
    rows, behind = (tokens_only(made_rows(number, 12, longest, prefix)) for prefix in (0, PREFIX))
    wanted = plain_step(reference, rows)
    yield from equal("padded", step(goal, model, [Collator(0)(rows)]), wanted)
    yield from equal("packed", step(goal, model, [Packer()(rows)]), wanted)
    halves = [Collator(0)(rows[::2]), Collator(0)(rows[1::2])]
    yield from equal("two micro-batches", step(goal, model, halves), wanted)
    yield from equal(
        "a shared prefix once", step(goal, model, [Collator(0, (), PREFIX)(behind)]), plain_step(reference, behind)
    )


def _label_scores(at: Setting, reference: Any, model: Any) -> Iterator[dict[str, Any]]:
    import inference

    number = 3 if at.small else 4
    heads = {"an instruction behind the text": (9, 36), "an instruction first, computed once": (44, 1)}
    for words, answers in {"labels of one token": WORDS, "labels of several tokens": PHRASES}.items():
        for name, (head, tail) in heads.items():
            prompts = inference.prompts(number, 0, head, tail)
            found = LabelScorer(model, stand_in(answers), 2048).score(prompts)
            wanted = plain_scores(reference.eval(), list(prompts), answers)
            reference.train()
            yield from scored(f"{words}, {name}", found, wanted, SCORE)


@torch.inference_mode()
def _plain_answer(model: Any, prompt: Sequence[int], most: int) -> list[int]:
    """Greedy tokens without a cache."""
    ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    for _ in range(most):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, len(prompt) :].tolist()


def _answers(at: Setting, reference: Any, model: Any) -> Iterator[dict[str, Any]]:
    import inference

    prompts, most = inference.prompts(3 if at.small else 4, 0, 9, 36), 3
    generator = Generator(model, stand_in(WORDS), 2048, most)
    found = [list(map(int, text.split())) for text in generator(prompts)]
    wanted = [_plain_answer(reference.eval(), prompt, most) for prompt in prompts]
    reference.train()
    ends = set(generator.settings.eos_token_id)
    until = [next((at for at, token in enumerate(one) if token in ends), most) for one in wanted]
    same = [one[:end] == other[:end] for one, other, end in zip(found, wanted, until, strict=True)]
    share = statistics.mean(same)
    yield row("generated answers, batched", f"{share:.0%} the same", all(same), "100 %", same=share)


# What learns and from what, at the embedded shape: rows in one batch on the device against one at a time on the CPU.
KINDS = {
    "loss on all tokens": ("method=lora", OFF),
    "DoRA": ("method=dora", OFF),
    "PiSSA": ("method=pissa", OFF),
    "full fine-tuning": ("method=full",),
    "choice among labels, focal, logit adjustment": (
        *("method=lora_label", OFF, "method.loss.name=focal", "method.loss.logit_adjustment=1.0"),
    ),
    "classification head": ("method=classifier", OFF, "method.classifier_dropout=0.0"),
}


def _kind(at: Setting, name: str, words: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    cfg = configured("model=tiny", "model.dtype=float32", *words)
    renderer = stand_in(PHRASES[:3])
    reference = factory.build(cfg, base.load_base(cfg.model, 0).cpu(), renderer).cpu()
    wake(reference)
    model, goal = copy.deepcopy(reference).to(at.device), objective.build(cfg.method, renderer, (5, 3, 2))
    yield from _batch_against_rows(name, goal, reference, model, Collator(0, goal.suffix), made_rows(6, 12, 30))


def _batch_against_rows(
    name: str, goal: objective.Objective, reference: Any, model: Any, collate: Collator, rows: Rows
) -> Iterator[dict[str, Any]]:
    """A batch on the device against its rows one at a time on the CPU."""
    wanted = step(goal, reference.train(), [collate([one]) for one in rows])
    yield from equal(name, step(goal, model.train(), [collate(rows)]), wanted)


def _mixture(at: Setting) -> Iterator[dict[str, Any]]:
    from peft import LoraConfig, get_peft_model

    from finsa.models.moe import experts
    from finsa.models.moe.mixture import Mixture

    cfg = configured("model=tiny", "model.dtype=float32", "stage=moe_joint", "stage.router.dropout=0.0")
    assert isinstance(cfg.stage, MoeJointStage)
    backbone = base.load_base(cfg.model, 0).cpu()
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / name for name in ("news", "forum")}
        for seed, place in enumerate(places.values()):
            torch.manual_seed(seed)
            config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
            single = get_peft_model(copy.deepcopy(backbone), config)
            wake(single)
            single.save_pretrained(str(place))
        reference = Mixture(backbone, experts.read(places), cfg.stage, None, 0.0, 0)
    reference.set_trainable(experts=True)
    rows = [{**one, "domain": number % 2} for number, one in enumerate(made_rows(6, 12, 30))]
    for one in rows:
        del one["target"]
    model = copy.deepcopy(reference).to(at.device)
    yield from _batch_against_rows("mixture of experts", objective.tokens(), reference, model, Collator(0), rows)


# Deviations from float32 that are still taken for rounding: of the loss (relative), and cosine of the gradients.
PRECISIONS = {"bfloat16": (2e-2, 0.98), "float16": (1e-2, 0.99), "int8": (5e-2, 0.9), "nf4": (1e-1, 0.6)}


def precision(at: Setting) -> Iterator[Part]:
    """The same weights in bfloat16, float16, int8 and nf4 against float32 on the same device, TF32 off.

    With random weights a label is ahead by little, so the share of equal labels is lower than with trained ones. nf4 is
    also compared with its weights written out in float32, where it has to agree to rounding.
    """
    cfg = configured(f"model={at.model}", "model.dtype=float32", "method=lora_response", OFF)
    import drawn

    exact = drawn.on_device(cfg.model, torch.float32)
    model = factory.build(cfg, copy.deepcopy(exact), None).train()
    wake(model)
    adapter = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    wanted = _measured(at, model)
    del model
    release()
    for name in PRECISIONS:
        yield name, partial(_precise, at, cfg, exact, adapter, wanted, name)
    yield "nf4 against its weights in float32", lambda: _written_out(at, cfg, exact, adapter)


def _measured(at: Setting, model: Any) -> tuple[float, dict[str, torch.Tensor], Any]:
    """Loss, gradients and label scores of some rows."""
    import inference

    rows = tokens_only(made_rows(6, 12, 40) if at.small else made_rows(16, 28, 224))
    loss, found = step(objective.tokens(), model.train(), [Collator(0)(rows)])
    scores = LabelScorer(model, stand_in(WORDS), 4096).score(inference.prompts(8 if at.small else 64, 0, 9, 36))
    return loss, found, scores


def _stored(exact: Any, name: str) -> Any:
    """The weights in a type, on the device."""
    if name in ("bfloat16", "float16"):
        return copy.deepcopy(exact).to(getattr(torch, name))
    products = torch.float16 if name == "int8" else torch.bfloat16  # LLM.int8 computes its outliers in float16
    made: Any = base.quantize(copy.deepcopy(exact).to(products), name).requires_grad_(False).eval()
    quantization.disable_cpu_repacking(made)
    return made


def _adapted(cfg: RunConfig, stored: Any, adapter: dict[str, torch.Tensor]) -> Any:
    """A base with the adapter whose values are given."""
    model = factory.build(cfg, stored, None).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(adapter[name])
    return model


def _precise(
    at: Setting, cfg: RunConfig, exact: Any, adapter: dict[str, torch.Tensor], wanted: Any, name: str
) -> Iterator[dict[str, Any]]:
    loss, found, scores = _measured(at, _adapted(cfg, _stored(exact, name), adapter))
    off, angle = abs(loss - wanted[0]) / wanted[0], cosine(found, wanted[1])
    most, least = PRECISIONS[name]
    yield row(
        f"loss: {name}",
        f"{loss:.4f}, float32 {wanted[0]:.4f}, off by {off:.1e}",
        off <= most,
        f"<= {most:.0e}",
        off=off,
    )
    text = f"off by {difference(found, wanted[1]):.1e}, cosine {angle:.4f}"
    yield row(f"gradients: {name}", text, angle >= least, f"cosine >= {least}", cosine=angle)
    yield from scored(name, scores, wanted[2], None)


def _written_out(at: Setting, cfg: RunConfig, exact: Any, adapter: dict[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
    import bitsandbytes

    stored: Any = base.quantize(exact, "nf4").requires_grad_(False).eval()
    quantization.disable_cpu_repacking(stored)
    written = copy.deepcopy(exact)
    with torch.no_grad():
        for name, module in stored.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                written.get_submodule(name).weight.copy_(weight)
    found, wanted = (_measured(at, _adapted(cfg, one, adapter)) for one in (stored, written))
    yield from equal("nf4 in float32 against its weights written out", found[:2], wanted[:2])
    yield from scored("nf4 in float32 against its weights written out", found[2], wanted[2], SCORE)


def attention(at: Setting) -> Iterator[Part]:
    """Kernels of attention and ways to put rows together: equal loss, and milliseconds forward and backward.

    Held equal: weights, LoRA on query and value, rows of very different lengths. "row by row" is what a CPU does with a
    line (finsa/models/attention.py), "varlen" torch's kernel for sequences of any length; finsa takes neither on
    a GPU.
    """
    import drawn

    for dtype in ("float32",) if at.small else ("float32", "bfloat16"):
        cfg = configured(f"model={at.model}", f"model.dtype={dtype}", "method=lora_response", OFF)
        model = factory.build(cfg, drawn.on_device(cfg.model, getattr(torch, dtype)), None).train()
        wake(model)
        rows = tokens_only(made_rows(6, 12, 40) if at.small else made_rows(16, 28, 224))
        known: dict[str, float] = {}
        for kernel in _kernels(at, dtype):
            for way, collate in _ways(kernel).items():
                yield (
                    f"{dtype}, {kernel}, {way}",
                    partial(_attended, at, model, rows, dtype, kernel, way, collate, known),
                )


def _kernels(at: Setting, dtype: str) -> list[str]:
    """What is installed, sdpa first, which the others are compared with."""
    from transformers.utils import import_utils

    found = ["sdpa", "eager", "row by row"]
    if not at.small and dtype != "float32":
        for name in ("flash_attention_2", "flash_attention_3"):
            there = getattr(import_utils, f"is_flash_attn_{name[-1]}_available", lambda: False)
            found += [name] if there() else []
        found.append("varlen")
    return found


def _ways(kernel: str) -> dict[str, Collator | Packer]:
    packed: dict[str, Collator | Packer] = {"packed": Packer()}
    if kernel in ("row by row", "varlen"):
        return packed
    return {"padded": Collator(0), **(packed if "flash" in kernel else {})}


def _attended(
    at: Setting,
    model: Any,
    rows: Rows,
    dtype: str,
    kernel: str,
    way: str,
    collate: Collator | Packer,
    known: dict[str, float],
) -> Iterator[dict[str, Any]]:
    net, batch = attentions.causal_model(model), moved(collate(rows), at.device)
    goal, count = objective.tokens(), float(sum(label != IGNORE for one in rows for label in one["labels"][1:]))
    net.set_attn_implementation("sdpa" if kernel in ("row by row", "varlen") else kernel)

    def loss() -> torch.Tensor:
        if kernel not in ("row by row", "varlen"):
            return goal.total(model, batch) / count
        given = {"read": batch["read"], "position_ids": batch["position_ids"]}
        apart = attentions.packed_rows if kernel == "row by row" else varlen
        with apart(model, batch["lengths"], batch["input_ids"].shape[1]):
            return labeled_loss(model, batch["input_ids"], batch["labels"], **given) / count

    def both() -> None:
        loss().backward()

    try:
        value = float(loss().detach())
        took = seconds_of(both, 1 if at.small else 10)
    finally:
        net.set_attn_implementation("sdpa")
        model.zero_grad()
    first = known.setdefault("loss", value)
    limit, off = LOSS if dtype == "float32" else 5e-3, abs(value - first) / first
    text = f"loss {value:.6f}, off by {off:.1e}; {1000 * took:.1f} ms"
    yield row(f"{dtype}, {kernel}, {way}", text, off <= limit, f"<= {limit:.0e}", loss=value, off=off, seconds=took)


class varlen:  # noqa: N801  # a context manager like `lines.apart`
    """Within, attention over a line is torch's kernel for sequences of any length: a trial, which finsa does not take.

    Args:
        model: whose rows make one line.
        rows: tokens of each row, (b,).
        width: tokens of the line.
    """

    NAME = "varlen_trial"

    def __init__(self, model: Any, rows: torch.Tensor, width: int) -> None:
        from torch.nn.attention.varlen import varlen_attn
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        assert int(rows.sum()) == width, "a line without a prefix"
        self.config = attentions.causal_model(model).config
        self.bounds = functional.pad(rows.cumsum(0), (1, 0)).to(torch.int32)
        self.longest, self.kernel = int(rows.max()), varlen_attn
        known = inspect.signature(varlen_attn).parameters
        self.causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        ALL_ATTENTION_FUNCTIONS.register(self.NAME, self.attend)

    def attend(self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **given: Any) -> Any:
        """Attention of a layer; (1, h, s, d) in, (1, s, h, d) out."""
        times = query.shape[1] // key.shape[1]
        q, k, v = (
            states.repeat_interleave(repeats, dim=1)[0].transpose(0, 1).contiguous()
            for states, repeats in ((query, 1), (key, times), (value, times))
        )
        scale = {} if "scale" not in inspect.signature(self.kernel).parameters else {"scale": given.get("scaling")}
        found = self.kernel(q, k, v, self.bounds, self.bounds, self.longest, self.longest, **self.causal, **scale)
        return found[None], None

    def __enter__(self) -> None:
        self.before, self.config._attn_implementation = self.config._attn_implementation, self.NAME

    def __exit__(self, *_: object) -> None:
        self.config._attn_implementation = self.before
