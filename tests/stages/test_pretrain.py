"""The recipe of the embedded base, shortened, and the committed result against what its record claims."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from finsa.config import ROOT, RunConfig
from finsa.data import documents
from finsa.models import base, tokenizers
from finsa.stages import pretrain

Compose = Callable[..., RunConfig]
TINY = ROOT / "data" / "tiny"


@pytest.fixture(scope="module")
def corpus(config: Compose) -> documents.Documents:
    """The documents that the committed base was trained on, and those that were held out."""
    cfg = config("experiment=tiny_base")
    return documents.load(cfg.data, cfg.stage.heldout)  # type: ignore[union-attr]


def test_a_shortened_recipe_learns(config: Compose, tmp_path: Path) -> None:
    cfg = config(
        "experiment=tiny_base",
        "data.corpus.documents=1500",
        "data.corpus.block=64",
        "train.max_steps=15",
        "train.validation_rows=5",
        "train.log_every=5",
        f"output_dir={tmp_path}/runs",
        f"output={tmp_path}/kept",
    )
    result = pretrain.run(cfg)
    assert result.run_dir is not None
    assert {"index.html", "training_curves.png"} <= {file.name for file in result.run_dir.iterdir()}
    knows_nothing = math.log(6144)
    assert result.metrics["heldout_loss"] < knows_nothing - 1.5
    model = base.load_base(config(f"model.path={tmp_path}/kept").model, 0)
    tokenizer = tokenizers.load_tokenizer(config(f"model.path={tmp_path}/kept").model)
    assert cfg.data.corpus is not None
    held = documents.load(cfg.data, cfg.stage.heldout).held  # type: ignore[union-attr]
    blocks = documents.blocks(held, tokenizer, 64)
    assert result.metrics["heldout_blocks"] == 5 < len(blocks)
    assert abs(pretrain.heldout_loss(model.float(), blocks[:5]) - result.metrics["heldout_loss"]) < 1e-3


def test_the_committed_base_matches_its_record(config: Compose) -> None:
    record = json.loads((TINY / "run.json").read_text(encoding="utf-8"))
    weights = TINY / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == record["weights_sha256"]
    assert weights.stat().st_size == record["weights_bytes"] <= 8 * 2**20
    model = base.load_base(config().model, 0)
    assert base.count_parameters(model)[1] == record["parameters"] == 3_739_904


def test_the_committed_base_has_the_loss_its_log_claims(config: Compose, corpus: documents.Documents) -> None:
    record = json.loads((TINY / "run.json").read_text(encoding="utf-8"))
    cfg = config("experiment=tiny_base")
    assert cfg.data.corpus is not None
    tokenizer = tokenizers.load_tokenizer(config().model)
    blocks = documents.blocks(corpus.held, tokenizer, cfg.data.corpus.block)
    model = base.load_base(config("model.dtype=float32").model, 0)
    assert len(blocks) == record["heldout_blocks"]
    assert abs(pretrain.heldout_loss(model, blocks) - record["heldout_loss"]) < 2e-3
    log = [json.loads(line) for line in (TINY / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line["eval_loss"] for line in log if "eval_loss" in line][-1]
    assert abs(last - record["heldout_loss"]) < 0.01


def test_the_base_never_saw_a_held_out_text(config: Compose, corpus: documents.Documents) -> None:
    protected = documents.protected(config("experiment=tiny_base").data)
    assert len(protected) == 1192
    everything = pl.Series(corpus.learn + corpus.held)
    assert everything.str.contains_any([everything[7][3:20]]).any()
    assert not everything.str.contains_any(protected).any()
