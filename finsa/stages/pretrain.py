"""Causal pre-training on documents: corpus, tokenizer, blocks, model or adapter, training, held-out loss, folder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finsa.config import PretrainStage, RunConfig
from finsa.data import documents
from finsa.data.rows import IGNORE, Row
from finsa.errors import ConfigError, DataError, Problem
from finsa.evaluation import run_results
from finsa.models import adapters, base, factory, hardware, tokenizers
from finsa.runs import files, run_folder, trackers
from finsa.runs.progress import Moved, ignored
from finsa.runs.run_folder import Result, RunFolder
from finsa.session import Session
from finsa.training import fit, results
from finsa.training.batches import Collator
from finsa.training.objective import labeled_loss
from finsa.training.watchdog import Watch


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Pre-train a model, from random weights or from pretrained ones, or an adapter; ``output`` takes a copy."""
    session = session or Session()
    corpus, adapter = cfg.data.corpus, cfg.method.adapter
    assert corpus is not None
    assert isinstance(cfg.stage, PretrainStage)
    _require_fitting(cfg)
    loaded = documents.load(cfg.data, cfg.stage.heldout)
    if corpus.vocabulary:
        tokenizer = tokenizers.train(loaded.learn, corpus.vocabulary)
    else:
        tokenizer = tokenizers.load_tokenizer(cfg.model)
    rows, held_out = (documents.blocks(part, tokenizer, corpus.block) for part in (loaded.learn, loaded.held))
    if not rows or not held_out:
        raise DataError(
            f"data.corpus: {len(rows)} blocks of {corpus.block} tokens to train on and {len(held_out)} held out; both "
            "need one or more. Give more documents, or a smaller data.corpus.block"
        )
    held_out = held_out[: cfg.train.validation_rows]
    hardware.prepare(cfg.train)
    with (
        run_folder.start(cfg, None, session) as folder,
        trackers.track(cfg, folder.path, session.group) as tracker,
        Watch(cfg.train, folder.path).watching() as watch,
    ):
        if adapter is None:
            model = base.load_base(cfg.model, cfg.seed).float().requires_grad_(True)
        else:
            frozen = base.load_base(cfg.model, cfg.seed, quantization=cfg.method.quantization)
            model = adapters.attach(frozen, cfg.model, adapter, cfg.seed)
        folder.write_json("ledger.json", loaded.ledger.as_dict({}))
        print(f"{len(loaded.learn):,} documents, {len(rows):,} blocks of {corpus.block} tokens", flush=True)
        print(f"read {loaded.ledger.read.total():,}: {loaded.ledger.summary({})}")

        def loss(trained: torch.nn.Module) -> float:
            with watch.display.work("held-out documents", len(held_out)) as work:
                return heldout_loss(trained, held_out, moved=work.moved)

        fitted = fit.fit(
            model=model,
            tokenizer=tokenizer,
            rows=rows,
            validate=lambda trained: {"loss": loss(trained)},
            train=cfg.train,
            seed=cfg.seed,
            folder=folder.path / "checkpoints",
            record=results.recorder(folder, tracker, session),
            lr_ratio=adapter.lr_ratio if adapter else 1.0,
            log=folder.log_file,
            watch=watch,
        )
        metrics: dict[str, Any]
        if adapter is None:
            with files.staged(folder.path) as staging:
                model.to(torch.bfloat16).save_pretrained(staging / "model")
                tokenizer.save_pretrained(staging / "model")
            weights = folder.path / "model" / "model.safetensors"
            metrics = {
                "heldout_loss": loss(model.float()),  # of what was saved: bfloat16 weights, computed in float32
                "heldout_blocks": len(held_out),
                "parameters": base.count_parameters(model)[1],
                "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
                "weights_bytes": weights.stat().st_size,
            }
        else:
            assert fitted.best is not None
            with files.staged(folder.path) as staging:
                adapters.save(model, factory.adapter_folder(cfg, staging))
            trainable, total = base.count_parameters(model)
            folder.note(trainable_parameters=trainable, total_parameters=total)
            metrics = {"heldout_loss": fitted.best, "heldout_blocks": len(held_out), "parameters": trainable}
            adapters.detach(model)
        folder.note(**fitted.facts(), **metrics)
        folder.write_json("metrics.json", metrics)
        run_results.write_page(cfg, folder, f"pre-training of {cfg.model.name}", None)
        tracker.summary(run_results.flat(metrics))
    files.remove(folder.path / "checkpoints")  # now that the run is complete; until then a resumed run needs them
    if cfg.output is not None:
        _publish(folder, Path(cfg.output).absolute())
    print(f"held-out loss {metrics['heldout_loss']:.4f} per token\nrun folder: {folder.path}")
    return Result("pretrain", folder.path, metrics, -metrics["heldout_loss"])


def _require_fitting(cfg: RunConfig) -> None:
    """Check that method and schedule suit documents.

    Raises:
        ConfigError: naming the value and how to fix it.
    """
    method, corpus = cfg.method, cfg.data.corpus
    if method.learn not in ("all", "adapter") or method.head != "lm":
        text = f"pre-training trains the model or an adapter, not {method.head} with learn={method.learn}; method=full"
        raise ConfigError([Problem("method", text)])
    if method.adapter is not None and corpus is not None and corpus.vocabulary is not None:
        text = "a new tokenizer needs a new model: set method=full, or data.corpus.vocabulary=null"
        raise ConfigError([Problem("data.corpus.vocabulary", text)])
    if method.adapter is not None and cfg.output is not None:
        raise ConfigError([Problem("output", "takes a model; an adapter stays in its run folder, leave it out")])
    if cfg.train.select_by != "loss":
        text = f"documents have no {cfg.train.select_by}; set train.select_by=loss, or choose train=pretrain"
        raise ConfigError([Problem("train.select_by", text)])


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, rows: Sequence[Row], batch: int = 16, moved: Moved = ignored) -> float:
    """Mean negative log-likelihood per token of held-out blocks, in nats.

    Args:
        moved: called after each batch with its number of rows.
    """
    model.eval()
    collate, device = Collator(0), next(model.parameters()).device
    loss, tokens = 0.0, 0
    for start in range(0, len(rows), batch):
        inputs = collate([dict(row) for row in rows[start : start + batch]])
        loss += float(labeled_loss(model, inputs["input_ids"].to(device), inputs["labels"].to(device)))
        tokens += int((inputs["labels"] != IGNORE).sum())
        moved(len(rows[start : start + batch]))
    model.train()
    return loss / tokens


def _publish(folder: RunFolder, output: Path) -> None:
    """Copy model, tokenizer, log and record to the output folder."""
    output.mkdir(parents=True, exist_ok=True)
    for file in [*(folder.path / "model").iterdir(), folder.path / "log.jsonl", folder.path / "config.yaml"]:
        shutil.copyfile(file, output / file.name)  # without its mode: safetensors writes files for the owner alone
    kept = {key: value for key, value in folder.facts.items() if key not in ("pid", "machine", "error")}
    RunFolder(output, {}).write_json("run.json", kept)
