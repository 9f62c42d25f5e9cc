"""Causal pre-training on documents: corpus, tokenizer, blocks, model or adapter, trainer, folder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finsa.config import PretrainStage, RunConfig
from finsa.data import documents
from finsa.data.rows import Row
from finsa.errors import ConfigError, DataError, Problem
from finsa.evaluation import run_results
from finsa.models import adapters, base, factory, hardware, tokenizers
from finsa.runs import files, run_folder, trackers
from finsa.runs.progress import Moved, ignored
from finsa.runs.run_folder import Result, RunFolder
from finsa.session import Session
from finsa.training import fit, results
from finsa.training.collate import Collator
from finsa.training.loss import labelled_loss
from finsa.training.watchdog import Watch


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Pre-train a model, from random weights or onwards from its own, or an adapter; ``output`` takes a copy."""
    session = session or Session()
    assert cfg.data.corpus is not None
    assert isinstance(cfg.stage, PretrainStage)
    _require_fitting(cfg)
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
    with (
        run_folder.start(cfg, None, session) as folder,
        trackers.track(cfg, folder.path, session.group) as tracker,
        Watch(cfg.train, folder.path).watching() as watch,
    ):
        model = _model(cfg)
        folder.write_json("ledger.json", found.ledger.as_dict({}))
        print(f"{len(found.learn):,} documents, {len(rows):,} blocks of {corpus.block} tokens", flush=True)
        print(f"read {found.ledger.read.total():,}: {found.ledger.summary({})}")

        loss = partial(_shown_loss, watch, watched)
        fitted = fit.fit(
            model=model,
            tokenizer=tokenizer,
            rows=rows,
            validate=lambda trained: {"loss": loss(trained)},
            train=cfg.train,
            seed=cfg.seed,
            folder=folder.path / "checkpoints",
            record=results.recorder(folder, tracker, session),
            lr_ratio=cfg.method.adapter.lr_ratio if cfg.method.adapter else 1.0,
            log=folder.log_file,
            watch=watch,
        )
        if cfg.method.adapter is None:
            with files.staged(folder.path) as place:
                model.to(torch.bfloat16).save_pretrained(place / "model")
                tokenizer.save_pretrained(place / "model")
            metrics = _metrics(model, loss, len(watched), folder)
        else:
            assert fitted.best is not None
            metrics = _adapted(cfg, model, fitted.best, len(watched), folder)
        folder.note(**fitted.facts(), **metrics)
        folder.write_json("metrics.json", metrics)
        run_results.write_page(cfg, folder, f"pre-training of {cfg.model.name}", None)
        tracker.summary(metrics)
    files.remove(folder.path / "checkpoints")  # once the run is complete: until then a kill may need them
    if cfg.output is not None:
        _publish(folder, Path(cfg.output).absolute())
    print(f"held-out loss {metrics['heldout_loss']:.4f} per token\nrun folder: {folder.path}")
    return Result("pretrain", folder.path, metrics, -metrics["heldout_loss"])


def _require_fitting(cfg: RunConfig) -> None:
    """Refuse what would not learn, or not what the documents are for.

    Raises:
        ConfigError: naming the value and the remedy.
    """
    method, corpus = cfg.method, cfg.data.corpus
    if method.learn not in ("all", "adapter") or method.head != "lm":
        text = f"pre-training learns the model or an adapter, not {method.head} with learn={method.learn}; method=full"
        raise ConfigError([Problem("method", text)])
    if method.adapter is not None and corpus is not None and corpus.vocabulary is not None:
        text = "a tokenizer of its own needs a model of its own: set method=full, or data.corpus.vocabulary=null"
        raise ConfigError([Problem("data.corpus.vocabulary", text)])
    if method.adapter is not None and cfg.output is not None:
        raise ConfigError([Problem("output", "takes a model; an adapter stays in its run folder, leave it out")])
    if cfg.train.select_by != "loss":
        text = f"documents have no {cfg.train.select_by}; set train.select_by=loss, or choose train=pretrain"
        raise ConfigError([Problem("train.select_by", text)])


def _model(cfg: RunConfig) -> Any:
    """What learns: the whole model in float32, or an adapter on the frozen base."""
    if cfg.method.adapter is None:
        return base.load_base(cfg.model, cfg.seed).float().requires_grad_(True)
    frozen = base.load_base(cfg.model, cfg.seed, quantization=cfg.method.quantization)
    return adapters.attach(frozen, cfg.model, cfg.method.adapter, cfg.seed)


def _adapted(cfg: RunConfig, model: Any, loss: float, blocks: int, folder: RunFolder) -> dict[str, Any]:
    """Save an adapter where a training run has it, and give the base back; `loss` is that of its validation."""
    with files.staged(folder.path) as place:
        adapters.save(model, factory.adapter_folder(cfg, place))
    trainable, total = base.count_parameters(model)
    folder.note(trainable_parameters=trainable, total_parameters=total)
    metrics = {"heldout_loss": loss, "heldout_blocks": blocks, "parameters": trainable}
    adapters.detach(model)
    return metrics


def _metrics(model: Any, loss: Callable[[torch.nn.Module], float], blocks: int, folder: RunFolder) -> dict[str, Any]:
    """The loss of what was saved: bfloat16 weights, computed in float32."""
    weights = folder.path / "model" / "model.safetensors"
    return {
        "heldout_loss": loss(model.float()),
        "heldout_blocks": blocks,
        "parameters": base.count_parameters(model)[1],
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "weights_bytes": weights.stat().st_size,
    }


def _shown_loss(watch: Watch, rows: Sequence[Row], model: torch.nn.Module) -> float:
    with watch.display.work("held-out documents", len(rows)) as work:
        return heldout_loss(model, rows, moved=work.moved)


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, rows: Sequence[Row], batch: int = 16, moved: Moved = ignored) -> float:
    """Mean negative log-likelihood per token of held-out blocks, in nats; `moved` is told how many more are read."""
    model.eval()
    collate, device = Collator(0), next(model.parameters()).device
    loss, tokens = 0.0, 0
    for start in range(0, len(rows), batch):
        inputs = collate([dict(row) for row in rows[start : start + batch]])
        loss += float(labelled_loss(model, inputs["input_ids"].to(device), inputs["labels"].to(device)))
        tokens += int((inputs["labels"] != -100).sum())
        moved(len(rows[start : start + batch]))
    model.train()
    return loss / tokens


def _publish(folder: RunFolder, output: Path) -> None:
    """Copy model, tokenizer, log and record to where they are kept."""
    output.mkdir(parents=True, exist_ok=True)
    for file in [*(folder.path / "model").iterdir(), folder.path / "log.jsonl", folder.path / "config.yaml"]:
        shutil.copyfile(file, output / file.name)  # contents only: safetensors are written for their owner alone
    kept = {key: value for key, value in folder.facts.items() if key not in ("pid", "machine", "error")}
    RunFolder(output, {}).write_json("run.json", kept)
