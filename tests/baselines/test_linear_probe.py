"""The linear probe against scikit-learn on embeddings made one text at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_texts import ignore, judge, texts
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from finsa import baselines
from finsa.baselines.encoder import character_tokenizer
from finsa.config import RunConfig
from finsa.errors import ConfigError, ModelError
from finsa.runs import provenance

Compose = Callable[..., RunConfig]
ROWS, LABELS = texts(60)
HELD, HELD_LABELS = texts(30, seed=1)


def write_encoder(folder: Path, seed: int = 0) -> Path:
    """A small BERT with random weights, and a tokenizer of the rows' characters."""
    torch.manual_seed(seed)
    tokenizer = character_tokenizer([*ROWS, "query: 利润同比增长 profit rose by 12 %"])
    shape = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(shape, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_scores_are_those_of_scikit_learn(config: Compose, tmp_path: Path, pooling: str) -> None:
    folder = write_encoder(tmp_path / "encoder")
    words = ("method=linear_probe", f"method.baseline.path={folder}", f"method.baseline.pooling={pooling}")
    cfg = config(*words, "method.baseline.strengths=[10]")
    learner = baselines.build(cfg, ["a", "b", "c"])
    fitted = learner.fit(ROWS, LABELS, HELD, judge(HELD_LABELS), ignore)
    assert fitted.parameters == 3 * 64 + 3
    assert fitted.chosen["strength"] == 10

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()

    def embedded(text: str) -> np.ndarray:
        with torch.inference_mode():
            states = model(**tokenizer("query: " + text, return_tensors="pt")).last_hidden_state[0]
        vector = (states[0] if pooling == "first" else states.mean(0)).numpy()
        return vector / np.linalg.norm(vector)

    linear = LogisticRegression(C=10, max_iter=1000).fit(np.stack([embedded(text) for text in ROWS]), LABELS)
    expected = linear.predict_log_proba(np.stack([embedded(text) for text in HELD]))
    np.testing.assert_allclose(learner.score(HELD), expected, atol=1e-3)


def test_a_run_comes_back_and_knows_its_encoder(config: Compose, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "encoder")
    cfg = config("method=linear_probe", f"method.baseline.path={folder}")
    learner = baselines.build(cfg, ["a", "b", "c"])
    learner.fit(ROWS, LABELS, HELD, judge(HELD_LABELS), ignore)
    baselines.save(learner, ["a", "b", "c"], tmp_path)
    assert {file.name for file in (tmp_path / "baseline").iterdir()} == {"labels.json", "weights.npz"}
    again = baselines.restore(cfg, ["a", "b", "c"], tmp_path)
    np.testing.assert_array_equal(again.score(HELD), learner.score(HELD))
    write_encoder(folder, seed=1)
    with pytest.raises(ModelError, match="is not the one that this run was trained with"):
        baselines.restore(cfg, ["a", "b", "c"], tmp_path)


def test_its_encoder_counts_as_where_a_run_starts_from(config: Compose, tmp_path: Path) -> None:
    """Else a sweep would reuse finished jobs after the encoder was overwritten."""
    folder = write_encoder(tmp_path / "encoder")
    cfg = config("method=linear_probe", f"method.baseline.path={folder}")
    before = provenance.base_weights(cfg)["encoder"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(before)
    write_encoder(folder, seed=1)
    after = provenance.base_weights(cfg)["encoder"]
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}


def test_an_encoder_that_is_not_there_is_one_message(config: Compose, tmp_path: Path) -> None:
    cfg = config("method=linear_probe", f"method.baseline.path={tmp_path / 'nowhere'}")
    with pytest.raises(ModelError, match=r"method\.baseline\.path: no encoder at"):
        baselines.build(cfg, ["a", "b", "c"]).fit(ROWS, LABELS, HELD, judge(HELD_LABELS), ignore)
    with pytest.raises(ConfigError, match="a linear probe needs an encoder"):
        config("method=linear_probe", "method.baseline.hub_id=null")
