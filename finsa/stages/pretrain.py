"""Causal pre-training on documents: corpus, tokenizer, blocks, model, trainer, model folder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finsa import runs, tracking
from finsa.config import PretrainStage, RunConfig
from finsa.data import documents
from finsa.data.rows import Row
from finsa.errors import DataError
from finsa.modeling import base, hardware, tokenizers
from finsa.runs import Result, RunFolder
from finsa.training import fit
from finsa.training.collate import Collator
from finsa.training.loss import labelled_loss


def run(cfg: RunConfig) -> Result:
    """Pre-train a model, from random weights or onwards from its own; ``output`` takes a copy of the result."""
    assert cfg.data.corpus is not None
    assert isinstance(cfg.stage, PretrainStage)
    corpus, found = cfg.data.corpus, documents.load(cfg.data, cfg.stage.heldout)
    own = corpus.vocabulary
    tokenizer = tokenizers.train(found.learn, own) if own else tokenizers.load_tokenizer(cfg.model)
    rows, watched = (documents.blocks(part, tokenizer, corpus.block) for part in (found.learn, found.held))
    if not rows or not watched:
        raise DataError(
            f"data.corpus: {len(rows)} blocks of {corpus.block} tokens to learn from and {len(watched)} held out; both "
            "need one or more. Give more documents, or a smaller data.corpus.block"
        )
    hardware.prepare(cfg.train)
    with runs.start(cfg) as folder, tracking.track(cfg, folder.path, runs.sweep_name()) as tracker:
        model = base.load_base(cfg.model, cfg.seed, keep=False).float().requires_grad_(True)
        folder.write_json("ledger.json", found.ledger.as_dict({}))
        print(f"{len(found.learn):,} documents, {len(rows):,} blocks of {corpus.block} tokens", flush=True)
        print(f"read {found.ledger.read.total():,}: {found.ledger.told({})}")

        def record(step: int, values: dict[str, float]) -> None:
            folder.log(step, values)
            tracker.log(step, values)

        fitted = fit.fit(
            model=model,
            tokenizer=tokenizer,
            rows=rows,
            validate=lambda trained: {"loss": heldout_loss(trained, watched)},
            train=cfg.train,
            seed=cfg.seed,
            folder=folder.path / "checkpoints",
            record=record,
        )
        model.to(torch.bfloat16).save_pretrained(folder.path / "model")
        tokenizer.save_pretrained(folder.path / "model")
        metrics = _metrics(model, watched, folder)
        folder.note(**fitted.facts(), **metrics)
        folder.write_json("metrics.json", metrics)
        tracker.summary(metrics)
        shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)
    if cfg.output is not None:
        _publish(folder, Path(cfg.output).absolute())
    print(f"held-out loss {metrics['heldout_loss']:.4f} per token\nrun folder: {folder.path}")
    return Result("pretrain", folder.path, metrics, -metrics["heldout_loss"])


def _metrics(model: Any, watched: Sequence[Row], folder: RunFolder) -> dict[str, Any]:
    """The loss of what was saved: bfloat16 weights, computed in float32."""
    weights = folder.path / "model" / "model.safetensors"
    return {
        "heldout_loss": heldout_loss(model.float(), watched),
        "heldout_blocks": len(watched),
        "parameters": base.count_parameters(model)[1],
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "weights_bytes": weights.stat().st_size,
    }


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, rows: Sequence[Row], batch: int = 16) -> float:
    """Mean negative log-likelihood per token of held-out blocks, in nats."""
    model.eval()
    collate, device = Collator(0), next(model.parameters()).device
    loss, tokens = 0.0, 0
    for start in range(0, len(rows), batch):
        inputs = collate([dict(row) for row in rows[start : start + batch]])
        loss += float(labelled_loss(model, inputs["input_ids"].to(device), inputs["labels"].to(device)))
        tokens += int((inputs["labels"] != -100).sum())
    model.train()
    return loss / tokens


def _publish(folder: RunFolder, output: Path) -> None:
    """Copy model, tokenizer, log and record to where they are kept."""
    output.mkdir(parents=True, exist_ok=True)
    for file in [*(folder.path / "model").iterdir(), folder.path / "log.jsonl", folder.path / "config.yaml"]:
        shutil.copyfile(file, output / file.name)  # contents only: safetensors are written for their owner alone
    kept = {key: value for key, value in folder.facts.items() if key not in ("pid", "machine", "error")}
    RunFolder(output, {}).write_json("run.json", kept)
