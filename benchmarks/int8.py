"""int8 inference on a CPU at the Qwen2.5-0.5B shape (random weights): against float32, bf16 and other packages.

Texts and prompts are those of benchmarks/inference.py, labels have one token. Arms take turns in one process, in
batches and one text at a time; a ratio is of medians, against float32 as stage=predict runs it: the faster of batches
of 512 and 1024 tokens. All int8 arms have weights with a scale per output. With --others also: torch.ao's dynamic
quantization, torchao (if installed), and ONNX Runtime's quantize_dynamic as in stage=export (fewer layers, for memory).

    python benchmarks/int8.py                         # 24 layers
    python benchmarks/int8.py --others --layers 6     # with the other packages
    python benchmarks/int8.py --quick                 # the embedded default's shape, no result file
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse
import copy
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import inference
import kept
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from finsa.config import compose
from finsa.evaluation import metrics
from finsa.inference import export, graphs
from finsa.inference.scoring import LabelScorer
from finsa.models import base, hardware, int8


def main() -> None:
    """Measure, show, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the embedded default's shape")
    parser.add_argument("--others", action="store_true", help="also other packages")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    words = [f"model={'tiny' if given.quick else 'qwen05b'}", "model.weights=random"]
    if not given.quick:
        words.append(f"model.architecture.num_hidden_layers={given.layers}")
    cfg = compose.build(*compose.compose_values(words), words)
    train = cfg.train.model_copy(update={"threads": given.threads})
    hardware.prepare(train)
    model = base.load_base(cfg.model.model_copy(update={"dtype": "float32"}), 0)
    renderer = inference.stand_in(model.config.vocab_size, ends=0)
    rows = inference.prompts(given.texts, 0, inference.HEAD, inference.TAIL)
    arms = make_arms(model, renderer, given)
    alone = [rows[number : number + 1] for number in range(max(2, given.texts // 4))]
    report: dict[str, Any] = {
        "model": f"{cfg.model.name}, {model.config.num_hidden_layers} layers, random weights",
        "threads": given.threads,
        "texts": given.texts,
    }
    for mode in ("batches", "one text at a time"):
        seconds, scores = measure(arms, rows if mode == "batches" else alone, mode == "batches", given.turns, train)
        report[mode] = summary(seconds, scores)
        show(report, mode)
    if not given.quick:
        kept.write("int8_packages" if given.others else f"int8_{given.threads}", report)


def make_arms(model: Any, renderer: Any, given: Any) -> dict[str, tuple[Any, bool]]:
    """Scorers by name, and whether they are finsa's int8, which sets the precision of what is left of float32."""
    arms: dict[str, tuple[Any, bool]] = {
        f"float32, {size}": (LabelScorer(model, renderer, size), False) for size in (512, 1024)
    }
    if base._computes_bf16():
        half = copy.deepcopy(model).to(torch.bfloat16)
        arms |= {f"bf16, {size}": (LabelScorer(half, renderer, size), False) for size in (512, 1024)}
    ours = copy.deepcopy(model)
    int8.quantize(ours)
    arms[f"int8 (model.inference), {int8.BATCH_TOKENS}"] = LabelScorer(ours, renderer, int8.BATCH_TOKENS), True
    if not given.others:
        return arms
    warnings.simplefilter("ignore")
    plain = {name for name, part in model.named_modules() if type(part) is torch.nn.Linear and name != "lm_head"}
    config = torch.ao.quantization.per_channel_dynamic_qconfig
    dynamic = torch.ao.quantization.quantize_dynamic(
        copy.deepcopy(model), dict.fromkeys(plain, config), dtype=torch.qint8
    )
    arms["torch.ao dynamic, 512"] = LabelScorer(dynamic, renderer, 512), False
    if find_spec("torchao") is not None:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        changed = copy.deepcopy(model)
        quantize_(changed, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda part, name: name in plain)
        arms["torchao, 512"] = LabelScorer(changed, renderer, 512), False
    with tempfile.TemporaryDirectory() as folder:
        export.write_onnx(model, renderer, 1.0, Path(folder), "int8")
        graph = graphs.open_graph(Path(folder), given.threads)
    # a scale per batch: stage=predict scores one text at a time, so that texts do not affect each other
    arms["onnxruntime, 512"] = graphs.GraphScorer(graph, renderer, 512, False), False
    return arms


def measure(
    arms: dict[str, tuple[Any, bool]], rows: Any, together: bool, turns: int, train: Any
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, Any]]:
    """Wall and CPU seconds of each arm per turn, and its scores (n, c)."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    scores: dict[str, Any] = {}
    for turn in range(turns + 1):
        for name, (scorer, ours) in arms.items():
            hardware.prepare(train)
            if ours:
                int8.prefer_fused_attention()
            call: Callable[[], Any] = (
                (lambda s=scorer: s.score(rows))
                if together
                else (lambda s=scorer: np.concatenate([s.score(row) for row in rows]))
            )
            wall, cpu = time.perf_counter(), time.process_time()
            scores[name] = call()
            if turn:  # the first is the warm-up
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return seconds, scores


def summary(seconds: dict[str, list[tuple[float, float]]], scores: dict[str, Any]) -> dict[str, Any]:
    """Ratios of medians against the fastest float32 arm, and agreement with it."""
    medians = {
        name: [statistics.median(values) for values in zip(*turns, strict=True)] for name, turns in seconds.items()
    }
    first = min((name for name in medians if name.startswith("float32")), key=lambda name: medians[name][0])
    probs = {name: metrics.probabilities(values) for name, values in scores.items()}
    return {
        name: {
            "wall_seconds": round(wall, 3),
            "cpu_seconds": round(cpu, 3),
            "wall_ratio": round(medians[first][0] / wall, 2),
            "cpu_ratio": round(medians[first][1] / cpu, 2),
            "same_label": float((probs[name].argmax(1) == probs[first].argmax(1)).mean()),
            "largest_difference": round(float(np.abs(probs[name] - probs[first]).max()), 4),
        }
        for name, (wall, cpu) in medians.items()
    }


def show(report: Any, mode: str) -> None:
    """Print the table."""
    table = Table(title=f"{report['model']}, {report['threads']} threads, {mode}", title_justify="left")
    for name in ("arm", "wall s", "CPU s", "wall ratio", "CPU ratio", "same label", "largest difference"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for name, values in report[mode].items():
        cells = (
            f"{values[key]:.2f}" for key in ("wall_seconds", "cpu_seconds", "wall_ratio", "cpu_ratio", "same_label")
        )
        table.add_row(name, *cells, f"{values['largest_difference']:.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
