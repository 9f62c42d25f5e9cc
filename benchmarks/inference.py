"""Labels for texts at the Qwen2.5-0.5B shape (random weights): the published way against finsa's scorer.

The published way generates five tokens for one text at a time, in float32. Texts are random tokens with lengths as of
Chinese headlines (log-normal, median 90, at most 224) in a prompt of AIDF's size: 9 tokens before the text, 36 behind.
"instruction first" puts the same tokens before the text, where all prompts share them. Arms take turns in one process;
a ratio is of medians. bf16 is left out where the machine only emulates it.

    python benchmarks/inference.py            # the Qwen2.5-0.5B shape, minutes
    python benchmarks/inference.py --quick    # the embedded default's shape, no result file
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse
import copy
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kept
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from finsa.config import compose
from finsa.data.labels import LabelSpace
from finsa.data.rows import Encoded
from finsa.inference import export, graphs
from finsa.inference.generation import Generator
from finsa.inference.scoring import LabelScorer
from finsa.models import base

HEAD, TAIL, ANSWER_TOKENS = 9, 36, 5
Arm = Callable[[], Any]  # gives scores (n, c), or None where an arm generates


def main() -> None:
    """Measure, show, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the embedded default's shape")
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch-tokens", type=int, default=2048, help="most padded tokens of a batch")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    words = [f"model={'tiny' if given.quick else 'qwen05b'}", "model.weights=random"]
    cfg = compose.build(*compose.compose_values(words), words)
    model = base.load_base(cfg.model.model_copy(update={"dtype": "float32"}), 0)
    renderer = stand_in(model.config.vocab_size, ends=model.config.eos_token_id)
    arms = make_arms(model, renderer, given, exported=not torch.cuda.is_available())
    scores = {name: arm() for name, arm in arms.items()}  # also the warm-up
    seconds = take_turns(arms, given.turns)
    report = summary(cfg.model.name, given, seconds, scores)
    show(report)
    if not given.quick:
        kept.write("inference", report)


def stand_in(vocabulary: int, ends: Any) -> Any:
    """What scorers ask of a renderer, with labels of one token as positive, neutral and negative are."""
    return SimpleNamespace(
        answers=[(31587,), (59568,), (42224,)] if vocabulary > 60_000 else [(407,), (411,), (408,)],
        labels=LabelSpace(("positive", "neutral", "negative"), ("positive", "neutral", "negative")),
        end=ends if isinstance(ends, int) else 0,
        encode=lambda texts: prompts(len(texts), 1, HEAD, TAIL),
        suffix=[],
        tokenizer=SimpleNamespace(decode=lambda ids: "", batch_decode=lambda ids, **_: [""] * len(ids)),
    )


def prompts(n: int, seed: int, head: int, tail: int, vocabulary: int = 4000) -> Encoded:
    """Prompts of random tokens; the same texts whatever stands around them."""
    rng = random.Random(seed)
    around = [rng.randrange(3, vocabulary) for _ in range(HEAD + TAIL)]
    lengths = [max(16, min(224, round(math.exp(rng.gauss(math.log(90), 0.45))))) for _ in range(n)]
    tokens = np.array([rng.randrange(3, vocabulary) for _ in range(sum(lengths))], np.int32)
    return Encoded(around[:head], around[head : head + tail], tokens, np.cumsum(lengths), np.zeros(n, np.int64))


def make_arms(model: Any, renderer: Any, given: Any, exported: bool) -> dict[str, Arm]:
    """The arms, each a function over all texts.

    Args:
        model: in float32.
        renderer: a stand-in.
        given: its ``texts``, ``threads`` and ``batch_tokens``.
        exported: whether graphs are among them; their kernels are the CPU's.
    """
    rows = prompts(given.texts, 0, HEAD, TAIL)
    shared = prompts(given.texts, 0, HEAD + TAIL - 1, 1)
    scorer = LabelScorer(model, renderer, given.batch_tokens)
    together = Generator(model, renderer, given.batch_tokens, ANSWER_TOKENS)
    arms: dict[str, Arm] = {
        "generate, one text at a time, fp32 (published)": lambda: [together(rows[n : n + 1]) for n in range(len(rows))],
        "generate, batched, fp32": lambda: together(rows),
        "score, one text at a time, fp32": lambda: np.concatenate([scorer.score([row]) for row in rows]),
        "score, token-budget batches, fp32": lambda: scorer.score(rows),
        "score, instruction first, plain, fp32": lambda: scorer.score([list(row) for row in shared]),
        "score, instruction first, shared once, fp32": lambda: scorer.score(shared),
    }
    if base._computes_bf16():
        half = copy.deepcopy(model).to(torch.bfloat16)
        answers = Generator(half, renderer, given.batch_tokens, ANSWER_TOKENS)
        scores = LabelScorer(half, renderer, given.batch_tokens)
        arms |= {
            "generate, one text at a time, bf16": lambda: [answers(rows[n : n + 1]) for n in range(len(rows))],
            "generate, batched, bf16": lambda: answers(rows),
            "score, token-budget batches, bf16": lambda: scores.score(rows),
            "score, instruction first, shared once, bf16": lambda: scores.score(shared),
        }
    for precision in ("fp32", "int8") if exported else ():
        with tempfile.TemporaryDirectory() as folder:
            export.write_onnx(model, renderer, 1.0, Path(folder), precision)
            graph = graphs.open_graph(Path(folder), given.threads)
        most = 1 if precision == "int8" else given.batch_tokens  # as `loading` opens an export
        reader = graphs.GraphScorer(graph, renderer, most, False)
        arms[f"onnx {precision}{', one text at a time' if precision == 'int8' else ''}"] = lambda r=reader: r.score(
            rows
        )
    return arms


def take_turns(arms: dict[str, Arm], turns: int) -> dict[str, list[float]]:
    """Seconds of each arm, which take turns so that a busy moment hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(turns):
        for name, arm in arms.items():
            started = time.perf_counter()
            arm()  # ends with numbers on the host, so nothing is left to wait for
            seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(model: str, given: Any, seconds: dict[str, list[float]], scores: dict[str, Any]) -> Any:
    """Ratios of medians against the published way, and agreement with unbatched fp32 scoring of the same prompts."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    alone, plain = scores["score, one text at a time, fp32"], scores["score, instruction first, plain, fp32"]
    told = {}
    for name, median in medians.items():
        told[name] = {"texts_per_second": round(given.texts / median, 3), "ratio": round(first / median, 2)}
        if not name.startswith("generate"):
            wanted = plain if "instruction first" in name else alone
            told[name]["same_argmax"] = float((wanted.argmax(1) == scores[name].argmax(1)).mean())
            told[name]["largest_difference"] = float(np.abs(wanted - scores[name]).max())
    return {
        "model": f"{model}, random weights",
        "threads": given.threads,
        "bf16": "computed" if base._computes_bf16() else "emulated by this machine, so left out",
        "texts": given.texts,
        "turns": len(next(iter(seconds.values()))),
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "arms": told,
    }


def show(report: Any) -> None:
    """Print the table."""
    table = Table(title=f"{report['model']}, {report['texts']} texts", title_justify="left", title_style="bold")
    for name in ("arm", "texts/s", "ratio", "same argmax", "largest difference"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for name, values in report["arms"].items():
        agreed = f"{values['same_argmax']:.1%}" if "same_argmax" in values else ""
        largest = f"{values['largest_difference']:.2g}" if "largest_difference" in values else ""
        table.add_row(name, f"{values['texts_per_second']:.2f}", f"{values['ratio']:.2f}x", agreed, largest)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
