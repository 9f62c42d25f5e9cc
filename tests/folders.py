"""Folders of finished runs, with random answers instead of a model's."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from finsa.config import RunConfig
from finsa.evaluation import metrics
from finsa.runs import provenance
from finsa.runs.run_folder import RunFolder

LABELS = ("利空", "中性", "利好")


def answers(gold: Any, right: float, seed: int, classes: int = len(LABELS)) -> Any:
    """Predictions, (n,), of which about the given share is correct."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(len(gold)) < right, gold, rng.integers(0, classes, len(gold)))


def write_run(
    path: Path, cfg: RunConfig, gold: Any, predicted: Any, labels: tuple[str, ...] = LABELS, **facts: Any
) -> Path:
    """Write a finished run's folder.

    Args:
        cfg: its configuration.
        gold, predicted: classes of the test rows, (n,).
        facts: additional or changed entries of ``run.json``.

    Returns:
        The folder.
    """
    path.mkdir(parents=True)
    folder = RunFolder(path, dict(_provenance()))
    folder.write_text("config.yaml", yaml.safe_dump(cfg.model_dump(mode="json"), allow_unicode=True, sort_keys=False))
    rng = np.random.default_rng(cfg.seed)
    shares = 0.2 * rng.dirichlet(np.ones(len(labels)), len(gold)) + 0.8 * np.eye(len(labels))[predicted]
    folder.write_lines(
        "predictions.jsonl",
        (
            {
                "id": f"r{row}",
                "text": f"第{row}条新闻",
                "gold": labels[gold[row]],
                "label": labels[predicted[row]],
                "probs": {name: round(float(share), 6) for name, share in zip(labels, shares[row], strict=True)},
            }
            for row in range(len(gold))
        ),
    )
    folder.write_json("metrics.json", {"test": metrics.report(gold.tolist(), predicted.tolist(), labels)})
    counts = {name: int((gold == place).sum()) for place, name in enumerate(labels)}
    folder.write_json("ledger.json", {"splits": {"train": counts, "validation": counts, "test": counts}})
    cost = {} if cfg.method.learn == "nothing" else _train(path, rng)
    own = {
        "status": "complete",
        "stage": "train",
        "wall_seconds": 70.0,
        "total_parameters": 1000,
        "seed": cfg.seed,
        "data_fingerprint": "f00d",
        "pid": 1,
        "peak_memory_bytes": 2**30,
    }
    folder.note(**{**own, **cost, **facts})
    return path


def _train(path: Path, rng: Any) -> dict[str, Any]:
    """Write a log: ten steps a second from second 1000 on, 40 of them, the best validation at step 200."""
    records: list[dict[str, Any]] = []
    for step in range(10, 410, 10):
        records.append({"step": step, "time": 1000 + step / 10, "loss": 3 / step + 0.01 * rng.random()})
        if step % 100 == 0:
            score = 0.7 - abs(step - 200) / 1000
            records.append({"step": step, "time": 1000 + step / 10, "eval_macro_f1": score, "eval_loss": 1 - score})
    records.append({"step": 400, "time": 1040.5, "train_runtime": 40.5})
    (path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return {"rows_per_second": 160.0, "training_seconds": 41.0, "trainable_parameters": 28_672}


@cache
def _provenance() -> tuple[tuple[str, Any], ...]:
    from finsa.config import compose

    values, choices = compose.compose_values([])
    return tuple(provenance.of(compose.build(values, choices, [])).items())
