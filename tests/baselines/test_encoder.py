from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from labeled_texts import evaluate, ignore, texts
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from finsa import baselines
from finsa.baselines.encoder import Encoder, character_tokenizer
from finsa.config import RunConfig
from finsa.errors import ConfigError, ModelError
from finsa.runs import provenance

Compose = Callable[..., RunConfig]
ROWS, LABELS = texts(60)
HELD, HELD_LABELS = texts(30, seed=1)
NAMES = ["a", "b", "c"]
RANDOM = ("method=encoder", "method.baseline.weights=random", "method.baseline.learning_rate=2e-3")


def trained(cfg: RunConfig, classes: int = 3) -> tuple[Encoder, baselines.Fitted]:
    learner = baselines.build(cfg, NAMES[:classes])
    assert isinstance(learner, Encoder)
    labels, held = ([label % classes for label in some] for some in (LABELS, HELD_LABELS))
    return learner, learner.fit(ROWS, labels, HELD, evaluate(held), ignore)


def test_an_encoder_with_random_weights_learns_and_is_restored(config: Compose, tmp_path: Path) -> None:
    cfg = config(*RANDOM, "method.baseline.epochs=8", "method.baseline.batch_size=8", "method.baseline.patience=8")
    learner, fitted = trained(cfg)
    assert fitted.best == evaluate(HELD_LABELS)(learner.score(HELD))["macro_f1"] > 0.6
    assert fitted.steps == 64
    baselines.save(learner, NAMES, tmp_path)
    again = baselines.restore(cfg, NAMES, tmp_path)
    np.testing.assert_allclose(again.score(HELD), learner.score(HELD), atol=1e-6)


def test_the_saved_folder_loads_with_transformers(config: Compose, tmp_path: Path) -> None:
    """transformers alone gives the scores of the learner, one text at a time."""
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


def test_the_seed_determines_the_result(config: Compose) -> None:
    first, second = (trained(config(*RANDOM, "train.max_steps=3"))[0] for _ in range(2))
    np.testing.assert_array_equal(first.score(HELD), second.score(HELD))


def test_each_character_is_one_token() -> None:
    tokenizer = character_tokenizer(["大涨 AB", "跌"])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("ab 涨跌鱻")["input_ids"])
    assert tokens == ["[CLS]", "a", "b", "涨", "跌", "[UNK]", "[SEP]"]


def test_markup_in_a_text_is_text(config: Compose) -> None:
    learner, _ = trained(config(*RANDOM, "train.max_steps=1"))
    separator = learner.tokenizer.sep_token_id
    assert learner._encode(["涨[SEP]跌"])[0].count(separator) == 1


def test_long_texts_are_truncated_and_counted(config: Compose) -> None:
    learner, _ = trained(config(*RANDOM, "train.max_steps=1", "data.max_length=12"))
    long = "今天公司股票市场关于以及大涨"
    assert learner.count_truncated([long, long[:10], "涨"]) == 1
    np.testing.assert_allclose(learner.score([long]), learner.score([long[:10]]))


def test_an_unknown_architecture_is_refused(config: Compose) -> None:
    with pytest.raises(ConfigError, match="hidden_sise: unknown key. Did you mean 'hidden_size'"):
        trained(config(*RANDOM, "+method.baseline.architecture.hidden_sise=3"))
    with pytest.raises(ConfigError, match="transformers knows no 'brt'"):
        trained(config(*RANDOM, "method.baseline.architecture.model_type=brt"))


def test_a_missing_encoder_is_reported(config: Compose, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="method.baseline.path: no encoder at"):
        trained(config("method=encoder", f"method.baseline.path={tmp_path}"))
    with pytest.raises(ModelError, match="hf download yiyanghkust/finbert-tone-chinese --revision e91b1a3"):
        trained(config("method=finbert"))


# ------------------------------------------------------------------------------------------------ linear probe


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
def test_scores_of_a_linear_probe_are_those_of_scikit_learn(config: Compose, tmp_path: Path, pooling: str) -> None:
    folder = write_encoder(tmp_path / "encoder")
    words = ("method=linear_probe", f"method.baseline.path={folder}", f"method.baseline.pooling={pooling}")
    cfg = config(*words, "method.baseline.strengths=[10]")
    learner = baselines.build(cfg, ["a", "b", "c"])
    fitted = learner.fit(ROWS, LABELS, HELD, evaluate(HELD_LABELS), ignore)
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


def test_a_linear_probe_is_restored_and_checks_its_encoder(config: Compose, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "encoder")
    cfg = config("method=linear_probe", f"method.baseline.path={folder}")
    learner = baselines.build(cfg, ["a", "b", "c"])
    learner.fit(ROWS, LABELS, HELD, evaluate(HELD_LABELS), ignore)
    baselines.save(learner, ["a", "b", "c"], tmp_path)
    assert {file.name for file in (tmp_path / "baseline").iterdir()} == {"labels.json", "weights.npz"}
    again = baselines.restore(cfg, ["a", "b", "c"], tmp_path)
    np.testing.assert_array_equal(again.score(HELD), learner.score(HELD))
    write_encoder(folder, seed=1)
    with pytest.raises(ModelError, match="is not the one that this run was trained with"):
        baselines.restore(cfg, ["a", "b", "c"], tmp_path)


def test_the_encoder_of_a_linear_probe_is_part_of_the_runs_provenance(config: Compose, tmp_path: Path) -> None:
    """Otherwise a sweep would reuse finished jobs after the encoder was overwritten."""
    folder = write_encoder(tmp_path / "encoder")
    cfg = config("method=linear_probe", f"method.baseline.path={folder}")
    before = provenance.base_weights(cfg)["encoder"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(before)
    write_encoder(folder, seed=1)
    after = provenance.base_weights(cfg)["encoder"]
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}


def test_a_linear_probe_without_an_encoder_is_one_message(config: Compose, tmp_path: Path) -> None:
    cfg = config("method=linear_probe", f"method.baseline.path={tmp_path / 'nowhere'}")
    with pytest.raises(ModelError, match=r"method\.baseline\.path: no encoder at"):
        baselines.build(cfg, ["a", "b", "c"]).fit(ROWS, LABELS, HELD, evaluate(HELD_LABELS), ignore)
    with pytest.raises(ConfigError, match="a linear probe needs an encoder"):
        config("method=linear_probe", "method.baseline.hub_id=null")
