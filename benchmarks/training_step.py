"""Training speed against stock trl, as ratios in one run.

    python benchmarks/training_step.py            the true Qwen2.5-0.5B shape, random weights (minutes)
    python benchmarks/training_step.py --quick    the embedded shape, to see that it runs

Held equal in all arms: architecture and weights, LoRA (rank 8 on query and value, alpha 16), token ids, labels (a
two-token answer and the end token; the arms named so learn all tokens), batch size, optimizer and learning rate. The
lengths are drawn between the quantiles of Chinese headlines with the AIDF instruction; in the arms named so 100
shared tokens stand before them. Arms take turns; medians over the turns. Where bf16 is only emulated, trl as it ships
has one turn. The floor is what the operations of these rows (no padding, head at the labels only, no gradient for
frozen weights) take at the rate of a large matrix product, the median of those measured before and after each pass;
an arm's share is the floor over its seconds. The peak memory of an arm is the largest resident size of a process of its
own that makes one pass.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finsa.runs.processes import QUIET

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

import kept
import stock
import torch

from finsa.config import RunConfig, compose
from finsa.data.rows import IGNORE, Row
from finsa.evaluation import tables
from finsa.models import base, flops, hardware, tokenizers
from finsa.training import fit
from finsa.training.objective import labeled_loss

ANSWER = 3  # two answer tokens and the end token
# Tokens of a prompt, by tenths: mean 103, 90th percentile 171, at most 224.
QUANTILES = (28, 47, 60, 72, 84, 96, 110, 126, 146, 171, 224)
PREFIX = 100
STOCK = "transformers Trainer, float32, completion-only labels"
FLOOR = "the floor: operations over the machine's matmul rate"
SHIPS = "trl SFTTrainer as it ships (bf16 autocast, checkpointing)"
CHECKPOINTED = "trl SFTTrainer, float32, checkpointing"
PLAIN = "trl SFTTrainer, float32, no checkpointing"
OWN = "finsa as it ships"


@dataclass(frozen=True)
class Taken:
    """A pass: seconds of its steps, and the operations per second of a matrix product just then."""

    seconds: float
    rate: float


def main(argv: list[str] | None = None) -> None:
    """Run the arms, print the table, write ``results/training_step.json``."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--quick", action="store_true", help="the embedded shape instead of 0.5B; no memory, nothing is written"
    )
    options.add_argument("--rows", type=int, default=8, help="examples per pass")
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--memory", action="store_true", help="the peak memory of all arms, not of four")
    options.add_argument("--arm", help="make one pass of one arm and print the peak memory of the process")
    given = options.parse_args(argv)
    cfg = composed("tiny" if given.quick else "qwen05b", given.batch)
    hardware.prepare(cfg.train)
    tokenizer = tokenizers.load_tokenizer(cfg.model)
    vocabulary = base.architecture(cfg.model).vocab_size
    rows, behind = examples(given.rows, vocabulary), examples(given.rows, vocabulary, PREFIX)
    passes = arms(cfg, tokenizer, rows, behind)
    if given.arm is not None:
        passes[given.arm]()
        print(peak())
        return
    equal = compare_gradients(cfg, tokenizer, rows[: given.batch])
    emulated = [] if base.dtype(cfg.model) == torch.bfloat16 else [SHIPS]
    taken = take_turns(passes, given.turns, emulated, probe(cfg, given.quick))
    of = () if given.quick else tuple(taken) if given.memory else (STOCK, CHECKPOINTED, PLAIN, OWN)
    memory = {name: peak_of(name, argv) if name in of else None for name in taken}
    report = summary(cfg, rows, taken, equal, memory)
    show(report)
    if not given.quick:
        kept.write("training_step", report)


def composed(model: str, batch: int) -> RunConfig:
    """The configuration of finsa's own arm."""
    overrides = [f"model={model}", "model.weights=random", "method=lora_response", "method.adapter.dropout=0.0"]
    overrides += [
        f"train.batch_size={batch}",
        f"train.micro_batch_size={batch}",
        "train.epochs=1",
        "train.log_every=100",
    ]
    overrides += ["train.warmup=0.0", "train.schedule=constant", "train.learning_rate=1e-4", "train.patience=null"]
    values, choices = compose.compose_values(overrides)
    return compose.build(values, choices, overrides)


def examples(n: int, vocabulary: int, prefix: int = 0) -> list[Row]:
    """Rows of random tokens; lengths drawn between the quantiles, behind `prefix` tokens that all share."""
    rng, last = random.Random(0), min(vocabulary, 100_000)
    shared = [rng.randrange(3, last) for _ in range(prefix)]
    rows = []
    for _ in range(n):
        part, at = math.modf(rng.random() * (len(QUANTILES) - 1))
        length = round(QUANTILES[int(at)] * (1 - part) + QUANTILES[int(at) + 1] * part) + ANSWER
        ids = [*shared, *(rng.randrange(3, last) for _ in range(length))]
        rows.append(Row(input_ids=ids, labels=[IGNORE] * (len(ids) - ANSWER) + ids[-ANSWER:]))
    return rows


def arms(cfg: RunConfig, tokenizer: Any, rows: list[Row], behind: list[Row]) -> dict[str, Callable[[], float]]:
    """The arms, each a function that makes one pass and returns the seconds of its steps.

    Args:
        behind: the rows of the last three arms, behind a long common prefix.
    """
    plain = {"bf16": False, "gradient_checkpointing": False}

    def trl(**settings: Any) -> Callable[[], float]:
        return lambda: stock.trl(cfg, tokenizer, rows, settings)

    def finsa(rows: list[Row], **settings: Any) -> Callable[[], float]:
        changed = cfg.model_copy(update={"train": cfg.train.model_copy(update=settings)})
        return lambda: ours(changed, tokenizer, rows)

    best = {"train_sampling_strategy": "group_by_length", "length_column_name": "length"}
    return {
        STOCK: lambda: stock.transformers(cfg, tokenizer, rows),
        SHIPS: trl(),
        CHECKPOINTED: trl(bf16=False, gradient_checkpointing=True),
        PLAIN: trl(**plain),
        "trl SFTTrainer, float32, all tokens": trl(**plain, completion_only_loss=False),
        "trl SFTTrainer, float32, packing": trl(**plain, packing=True, max_length=256),
        "trl SFTTrainer, float32, length groups": trl(**plain, **best),
        OWN: finsa(rows),
        "finsa, side by side": finsa(rows, packing=False),
        "finsa, packed": finsa(rows, packing=True),
        f"finsa, {PREFIX} shared tokens, each row by itself": finsa(behind, shared_prefix=False, packing=False),
        f"finsa, {PREFIX} shared tokens, each row by itself, packed": finsa(behind, shared_prefix=False, packing=True),
        f"finsa, {PREFIX} shared tokens, once per micro-batch": finsa(behind, shared_prefix=True),
    }


def ours(cfg: RunConfig, tokenizer: Any, rows: list[Row], clock: stock.Clock | None = None) -> float:
    """One pass of finsa's trainer, on the type that `model.dtype` resolves to here."""
    clock = clock or stock.Clock()
    with tempfile.TemporaryDirectory() as folder:
        fit.fit(
            model=stock.adapted(cfg, base.dtype(cfg.model)),
            tokenizer=tokenizer,
            rows=rows,
            validate=lambda _: {"loss": 0.0, "macro_f1": 0.0},
            train=cfg.train,
            seed=0,
            folder=Path(folder),
            record=lambda step, values: None,
            callbacks=[clock],
        )
    return clock.seconds


def operations(cfg: RunConfig, rows: list[Row]) -> float:
    """What a pass cannot do without."""
    lengths = [len(row["input_ids"]) for row in rows]
    costs = flops.estimate(stock.adapted(cfg, base.dtype(cfg.model)))
    return costs.total(sum(lengths), sum(n * n for n in lengths), ANSWER * len(rows), len(rows))


def compare_gradients(cfg: RunConfig, tokenizer: Any, rows: list[Row]) -> dict[str, float]:
    """Loss and gradients of one batch in float32: finsa's against trl's. Relative differences."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = stock.trl_trainer(cfg, tokenizer, rows, {"bf16": False, "gradient_checkpointing": False}, folder)
        batch = next(iter(trainer.get_train_dataloader()))
        model = trainer.model.train()
        with torch.no_grad():  # a fresh adapter's B is zero, which would hide the gradient of A
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
        theirs = trainer.compute_loss(model, dict(batch))
        reference = gradients(model, theirs)
        labeled = (batch["labels"][:, 1:] != IGNORE).sum()
        mine = labeled_loss(model, batch["input_ids"], batch["labels"]) / labeled
        found = gradients(model, mine)
    norm = torch.stack([g.norm() for g in reference.values()]).norm()
    difference = torch.stack([(found[name] - g).norm() for name, g in reference.items()]).norm()
    return {
        "loss_trl": theirs.item(),
        "loss_finsa": mine.item(),
        "gradient_relative_difference": float(difference / norm),
    }


def peak_of(arm: str, argv: Sequence[str] | None) -> int:
    """Bytes of the largest resident size of a fresh process that makes one pass of an arm."""
    words = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--arm", arm]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def peak() -> int:
    """The most memory of this process, in bytes: resident, or on a GPU what torch has allocated there."""
    return hardware.peak_memory()


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a loss, by parameter."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def take_turns(
    passes: dict[str, Callable[[], float]], turns: int, once: Sequence[str], rate: Callable[[], float]
) -> dict[str, list[Taken]]:
    """Run every arm once per turn; those named in the first turn only."""
    taken: dict[str, list[Taken]] = {name: [] for name in passes}
    for turn in range(turns):
        for name, one_pass in passes.items():
            if turn and name in once:
                continue
            before, seconds = rate(), one_pass()
            taken[name].append(Taken(seconds, (before + rate()) / 2))
            rated = f"{seconds:6.1f} s, a matrix product at {taken[name][-1].rate / 1e9:.0f} GFLOP/s"
            print(f"turn {turn + 1}/{turns}  {rated}  {name}", flush=True)
    return taken


def probe(cfg: RunConfig, quick: bool) -> Callable[[], float]:
    """Asks for the rate of a matrix product as it is just then."""
    return partial(hardware.matmul_rate.__wrapped__, base.dtype(cfg.model), 0.05 if quick else 1.0)


def summary(
    cfg: RunConfig,
    rows: list[Row],
    taken: dict[str, list[Taken]],
    equal: dict[str, float],
    memory: dict[str, int | None],
) -> dict[str, Any]:
    """Everything that is reported, with machine, versions and commit."""
    by_itself = f"finsa, {PREFIX} shared tokens, each row by itself"  # its rows are longer than those of other arms
    seconds = {name: statistics.median(t.seconds for t in of) for name, of in taken.items()}
    usual = statistics.median(t.rate for of in taken.values() for t in of)
    least = operations(cfg, rows) / usual
    arms = {
        name: {
            "seconds": [round(t.seconds, 2) for t in of],
            "matmul_gflops": [round(t.rate / 1e9, 1) for t in of],
            "samples_per_second": round(len(rows) / seconds[name], 3),
            "ratio": round(seconds[by_itself if "shared tokens" in name else STOCK] / seconds[name], 2),
            "share_of_matmul_rate": None if "shared tokens" in name else round(least / seconds[name], 3),
            "peak_memory_bytes": memory[name],
        }
        for name, of in taken.items()
    }
    arms[FLOOR] = {
        "seconds": [round(least, 2)],
        "matmul_gflops": [round(usual / 1e9, 1)],
        "samples_per_second": round(len(rows) / least, 3),
        "ratio": round(seconds[STOCK] / least, 2),
        "share_of_matmul_rate": 1.0,
        "peak_memory_bytes": None,
    }
    return {
        "title": "training step",
        "held_equal": "weights, LoRA r 8 on query and value, token ids, batch size, optimizer, learning rate",
        "model": cfg.model.name,
        "rows": len(rows),
        "batch": cfg.train.micro_batch_size,
        "mean_tokens": round(statistics.mean(len(row["input_ids"]) for row in rows), 1),
        "device": hardware.describe(base.dtype(cfg.model)),
        "arms": arms,
        "float32_equality": equal,
    }


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    values = {
        name: f"{arm['samples_per_second']:8.3f} samples/s   {arm['ratio']:.2f}x   {_share(arm)}   {_size(arm)}   "
        f"{arm['seconds']} s"
        for name, arm in report["arms"].items()
    }
    equal = report["float32_equality"]
    values["float32, one batch"] = (
        f"loss {equal['loss_finsa']:.6f} (trl {equal['loss_trl']:.6f}), "
        f"gradients differ by {equal['gradient_relative_difference']:.1e} (relative)"
    )
    head = (
        f"{report['model']} shape, random weights, {report['rows']} rows of {report['mean_tokens']} tokens on average"
    )
    tables.show_plan(f"{head}, batch {report['batch']}, {report['device']}", values)


def _share(arm: dict[str, Any]) -> str:
    share = arm["share_of_matmul_rate"]
    return " " * 4 if share is None else f"{share:4.0%}"


def _size(arm: dict[str, Any]) -> str:
    memory = arm["peak_memory_bytes"]
    return "memory not measured" if memory is None else f"{memory / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
