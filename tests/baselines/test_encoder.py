from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_texts import ignore, judge, texts
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from finsa import baselines
from finsa.baselines.encoder import Encoder, character_tokenizer
from finsa.config import RunConfig
from finsa.errors import ConfigError, ModelError

Compose = Callable[..., RunConfig]
ROWS, LABELS = texts(60)
HELD, HELD_LABELS = texts(30, seed=1)
NAMES = ["a", "b", "c"]
RANDOM = ("method=encoder", "method.baseline.weights=random", "method.baseline.learning_rate=2e-3")


def trained(cfg: RunConfig, classes: int = 3) -> tuple[Encoder, baselines.Fitted]:
    learner = baselines.build(cfg, NAMES[:classes])
    assert isinstance(learner, Encoder)
    labels, held = ([label % classes for label in some] for some in (LABELS, HELD_LABELS))
    return learner, learner.fit(ROWS, labels, HELD, judge(held), ignore)


def test_random_weights_learn_and_come_back_equal(config: Compose, tmp_path: Path) -> None:
    cfg = config(*RANDOM, "method.baseline.epochs=8", "method.baseline.batch_size=8", "method.baseline.patience=8")
    learner, fitted = trained(cfg)
    assert fitted.best == judge(HELD_LABELS)(learner.score(HELD))["macro_f1"] > 0.6
    assert fitted.steps == 64
    baselines.save(learner, NAMES, tmp_path)
    again = baselines.restore(cfg, NAMES, tmp_path)
    np.testing.assert_allclose(again.score(HELD), learner.score(HELD), atol=1e-6)


def test_the_saved_folder_is_an_ordinary_one(config: Compose, tmp_path: Path) -> None:
    """What transformers makes of the folder by itself, one text at a time, is what the scorer says."""
    learner, _ = trained(config(*RANDOM, "train.max_steps=2"))
    baselines.save(learner, NAMES, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "baseline")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "baseline").eval()
    with torch.inference_mode():
        alone = [model(**tokenizer(text, return_tensors="pt")).logits.log_softmax(dim=1)[0].numpy() for text in HELD]
    np.testing.assert_allclose(learner.score(HELD), alone, atol=1e-5)


def test_a_folder_of_other_classes_starts_with_a_fresh_head(config: Compose, tmp_path: Path) -> None:
    first, _ = trained(config(*RANDOM, "train.max_steps=2"))
    baselines.save(first, NAMES, tmp_path)
    cfg = config(
        "method=encoder", f"method.baseline.path={tmp_path / 'baseline'}", "method.baseline.learning_rate=1e-9"
    )
    cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"max_steps": 1})})
    second, _ = trained(cfg, classes=2)
    assert second.score(HELD).shape == (len(HELD), 2)
    third, _ = trained(cfg)
    head, other = (learner.network.model.classifier.weight for learner in (first, third))  # type: ignore[union-attr]
    body, same = (learner.network.model.base_model for learner in (first, third))  # type: ignore[union-attr]
    assert not torch.allclose(head, other)
    for kept, loaded in zip(body.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(kept, loaded, atol=1e-6, rtol=0)


def test_the_seed_decides(config: Compose) -> None:
    first, second = (trained(config(*RANDOM, "train.max_steps=3"))[0] for _ in range(2))
    np.testing.assert_array_equal(first.score(HELD), second.score(HELD))


def test_one_token_a_character() -> None:
    tokenizer = character_tokenizer(["大涨 AB", "跌"])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("ab 涨跌鱻")["input_ids"])
    assert tokens == ["[CLS]", "a", "b", "涨", "跌", "[UNK]", "[SEP]"]


def test_markup_in_a_text_is_text(config: Compose) -> None:
    learner, _ = trained(config(*RANDOM, "train.max_steps=1"))
    separator = learner.tokenizer.sep_token_id
    assert learner._encode(["涨[SEP]跌"])[0].count(separator) == 1


def test_what_is_too_long_is_counted_and_not_read(config: Compose) -> None:
    learner, _ = trained(config(*RANDOM, "train.max_steps=1", "data.max_length=12"))
    long = "今天公司股票市场关于以及大涨"
    assert learner.cut([long, long[:10], "涨"]) == 1
    np.testing.assert_allclose(learner.score([long]), learner.score([long[:10]]))


def test_an_architecture_that_does_not_exist(config: Compose) -> None:
    with pytest.raises(ConfigError, match="hidden_sise: unknown key. Did you mean 'hidden_size'"):
        trained(config(*RANDOM, "+method.baseline.architecture.hidden_sise=3"))
    with pytest.raises(ConfigError, match="transformers knows no 'brt'"):
        trained(config(*RANDOM, "method.baseline.architecture.model_type=brt"))


def test_an_encoder_that_is_not_there(config: Compose, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="method.baseline.path: no encoder at"):
        trained(config("method=encoder", f"method.baseline.path={tmp_path}"))
    with pytest.raises(ModelError, match="hf download yiyanghkust/finbert-tone-chinese --revision e91b1a3"):
        trained(config("method=finbert"))
