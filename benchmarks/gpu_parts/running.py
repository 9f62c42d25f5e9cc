"""What a run does on a device where a CPU does otherwise, and whole runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu import row

from finsa.config import RunConfig
from finsa.errors import FinsaError
from finsa.models import base, factory
from gpu_parts.common import (
    OFF,
    ROOT,
    TOKENS,
    Part,
    Rows,
    Setting,
    configured,
    difference,
    made_rows,
    need_gpu,
    release,
    tokens_only,
)


def behavior(at: Setting) -> Iterator[Part]:
    """What a training run does on a device where a CPU does otherwise: waits, stops, recovers, resumes."""
    yield "waits of the host", lambda: _waits(at)
    yield "a loss that is no number", lambda: _not_finite(at)
    yield "resumed", lambda: _resumed(at)
    yield "out of memory", lambda: _scarce(at)


def _fit(cfg: RunConfig, rows: Rows, folder: Path, model: Any = None, **further: Any) -> tuple[Any, Any, list[float]]:
    """Train; returns the model, what came of it, and the losses that were logged."""
    from transformers import AutoTokenizer

    from finsa.training import fit

    losses: list[float] = []
    model = model or factory.build(cfg, base.load_base(cfg.model, 0), None)
    fitted = fit.fit(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(ROOT / "data" / "tiny"),
        rows=rows,  # type: ignore[arg-type]
        validate=lambda _: {"loss": 0.0, "macro_f1": time.monotonic()},  # the last weights are the best
        train=cfg.train,
        seed=0,
        folder=folder,
        record=lambda _, values: losses.append(values["loss"]) if "loss" in values else None,
        **further,
    )
    return model, fitted, losses


def _steps(model: str, method: str, *words: str) -> RunConfig:
    plain = {"train.patience": "null", "train.log_every": "1", "train.warmup": "0", "train.epochs": "1"}
    plain |= dict(word.split("=", 1) for word in words)
    return configured(f"model={model}", f"method={method}", *(f"{key}={value}" for key, value in plain.items()))


def _waits(at: Setting) -> Iterator[dict[str, Any]]:
    """How often the host waits for the device in a step that logs nothing."""
    need_gpu(at)
    from transformers import TrainerCallback

    class Watched(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (3, 7):  # four steps, and what lies between them
                torch.cuda.set_sync_debug_mode("warn" if state.global_step == 3 else "default")

    words = ("train.batch_size=16", "train.micro_batch_size=8", "train.max_steps=8", "train.log_every=100")
    cfg = _steps(at.model, "lora_response", *words)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _fit(cfg, tokens_only(made_rows(128, 28, 224)), Path(folder), callbacks=[Watched()])
    places = [f"{Path(one.filename).name}:{one.lineno}" for one in told if "synchroniz" in str(one.message)]
    shown = ", ".join(sorted(set(places))[:5]) or "nowhere"
    text = f"{len(places) / 4:.1f} per step of two micro-batches ({shown})"
    yield row("waits of the host for the device", text, waits=len(places) / 4, places=places[:40])


def _not_finite(at: Setting) -> Iterator[dict[str, Any]]:
    """A row whose loss is infinite ends the training, is named, and has not touched a weight."""
    rows = [{**one, "weight": 1.0} for one in tokens_only(made_rows(24, 12, 30))]
    rows[5]["weight"] = float("inf")
    cfg = _steps("tiny", "lora_response", "train.batch_size=4", "train.micro_batch_size=4", "train.log_every=3")
    model, text, ok = factory.build(cfg, base.load_base(cfg.model, 0), None), "no error", False
    with tempfile.TemporaryDirectory() as folder:
        try:
            _fit(cfg, rows, Path(folder), model)
        except FinsaError as error:
            text = str(error).splitlines()[0][:120]
            ok = "Rows: 5 (1 of 4" in str(error)
    ok = ok and all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad)
    yield row("a loss that is no number", text, ok, "row 5 is named, weights stay finite")


def _resumed(at: Setting) -> Iterator[dict[str, Any]]:
    """Steps 3 and 4 from a checkpoint, dropout included, against four steps without a break."""
    words = ("train.batch_size=4", "train.micro_batch_size=2", "train.validate_every=2", "train.keep_checkpoints=5")
    cfg = _steps("tiny", "lora_response", "model.dtype=float32", *words)
    rows, weights = tokens_only(made_rows(16, 12, 30)), []
    with tempfile.TemporaryDirectory() as folder:
        whole, rest = Path(folder) / "whole" / "checkpoints", Path(folder) / "rest" / "checkpoints"
        for place in (whole, rest):
            model, fitted, _ = _fit(cfg, rows, place)
            weights.append({name: p.detach().cpu().double() for name, p in model.named_parameters() if p.requires_grad})
            if place == whole:
                shutil.copytree(whole / "checkpoint-2", rest / "checkpoint-2")
    off = difference(weights[1], weights[0])
    text = f"weights off by {off:.1e} after {fitted.steps} steps"
    yield row("resumed from a checkpoint", text, off <= 1e-5, "<= 1e-05", off=off)


def _scarce(at: Setting) -> Iterator[dict[str, Any]]:
    """With less memory than a step needs, the micro-batch is halved and the step is the same."""
    need_gpu(at)
    words = (OFF, "model.dtype=float32", "train.batch_size=16", "train.max_steps=2")
    peaks, losses, rows = {}, {}, tokens_only(made_rows(32, TOKENS, TOKENS))
    total = torch.cuda.get_device_properties(at.device).total_memory
    for name, size in (("16 rows", 16), ("8 rows", 8), ("16 rows, too little memory", 16)):
        release()
        if "little" in name:
            torch.cuda.set_per_process_memory_fraction((peaks["16 rows"] + peaks["8 rows"]) / 2 / total)
        try:
            with tempfile.TemporaryDirectory() as folder:
                cfg = _steps(at.model, "lora", *words, f"train.micro_batch_size={size}")
                model, fitted, losses[name] = _fit(cfg, rows, Path(folder))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        peaks[name] = torch.cuda.max_memory_reserved()
        del model
    off = max(abs(a - b) / a for a, b in zip(losses["16 rows"], losses["16 rows, too little memory"], strict=True))
    halved = fitted.batching["micro_batch_halved"]
    text = f"halved to {fitted.batching.get('micro_batch_size')} rows, losses off by {off:.1e}"
    yield row(
        "out of memory", text if halved else "nothing was halved", halved and off <= 1e-4, "halved, <= 1e-04", off=off
    )


METHODS = ("lora_response", "qlora", "lora_8bit", "pissa", "full", "classifier", "textcnn")


def runs(at: Setting) -> Iterator[Part]:
    """``python run.py`` on the device, start to end: a few steps of every kind of method, and an experts' mixture."""
    yield "methods", partial(_runs, at, ["-m", f"method={','.join(METHODS)}"], len(METHODS))
    yield (
        "mixture of experts",
        partial(_runs, at, ["stage=moe_joint", "stage.warmup_steps=2", "stage.compare=false"], 1),
    )


def _runs(at: Setting, words: list[str], least: int) -> Iterator[dict[str, Any]]:
    need_gpu(at)
    with tempfile.TemporaryDirectory() as place, (Path(place) / "log").open("w+") as log:
        command = [sys.executable, "run.py", *words, "train=smoke", "tracking=none", f"output_dir={place}/out"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        found: dict[Path, bool] = {}
        running = True
        while running:
            running = process.poll() is None
            time.sleep(0.5)
            for file in sorted(Path(place).rglob("run.json")):
                facts = json.loads(file.read_text(encoding="utf-8"))
                if file in found or facts.get("status") == "running":
                    continue
                found[file] = facts.get("status") == "complete"
                name = f"run {file.parent.name}: {facts.get('stage')}, {_method(file.parent)}"
                yield row(name, _outcome(file.parent, facts), found[file], "complete")
        log.seek(0)
        last = [line for line in log.read().splitlines() if line.strip()][-2:]
    ok = process.returncode == 0 and sum(found.values()) >= least
    text = f"exit code {process.returncode}, {sum(found.values())} of at least {least} runs"
    yield row(
        f"python run.py {' '.join(words)}", text if ok else f"{text}: {' / '.join(last)[:300]}", ok, "exit code 0"
    )


def _method(folder: Path) -> str:
    """The method of a run, by the configuration in its folder."""
    from omegaconf import OmegaConf

    return str(OmegaConf.load(folder / "config.yaml").method.name)


def _outcome(folder: Path, facts: dict[str, Any]) -> str:
    if facts.get("status") != "complete":
        return f"{facts.get('status')}: {str(facts.get('error')).splitlines()[0][:200]}"
    score = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["test"]["macro_f1"]
    return f"macro-F1 {score:.4f}, {facts['wall_seconds']:.1f} s, {facts.get('device')}"
