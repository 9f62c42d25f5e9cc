"""The classification head: pooling, initialization from the label words, and its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from base_models import EXTRA, small

from finsa.errors import ModelError
from finsa.models.classifier import HEAD_FILE, Classifier, load_weights, save_head

IDS = torch.tensor([[5, 6, 7, 8, 9, 0, 0], [11, 12, 13, 14, 15, 16, 17], [3, 4, 0, 0, 0, 0, 0]])
SPANS = torch.tensor([[1, 4], [2, 7], [2, 2]])  # the last row has no text
ANSWERS = [(7, 3), (8,), (9, 4, 5)]


@pytest.mark.parametrize("model_type", EXTRA)
def test_the_pooled_state_is_the_mean_over_the_text(model_type: str) -> None:
    base = small(model_type)
    with torch.no_grad():
        pooled = Classifier(base, 3, 0.0, seed=0).pooled(IDS, SPANS)
        for row, (start, end) in enumerate(SPANS.tolist()[:2]):
            alone = base(input_ids=IDS[[row], :end], output_hidden_states=True).hidden_states[-1][0, start:end]
            torch.testing.assert_close(pooled[row], alone.mean(0), rtol=1e-4, atol=1e-5)
    assert pooled[2].abs().sum() == 0


@pytest.mark.parametrize("model_type", EXTRA)
def test_a_head_of_label_words_gives_the_lm_heads_logits_at_the_pooled_state(model_type: str) -> None:
    base = small(model_type)
    model = Classifier(base, 3, dropout=0.3, seed=0).eval()
    model.init_from_label_words(ANSWERS)
    with torch.no_grad():
        found = model(IDS, SPANS)
        words = base.get_output_embeddings()(model.pooled(IDS, SPANS))
    expected = torch.stack([words[:, list(answer)].mean(1) for answer in ANSWERS], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_saved_head_is_restored_and_one_of_other_classes_is_refused(tmp_path: Path) -> None:
    model = Classifier(small(), 3, 0.0, seed=0).eval()
    save_head(model.head, tmp_path, ["a", "b", "c"])
    other = Classifier(small(), 3, 0.0, seed=1).eval()
    load_weights(other.head, tmp_path / HEAD_FILE)
    with torch.no_grad():
        assert torch.equal(model(IDS, SPANS), other(IDS, SPANS))
    with pytest.raises(ModelError, match="classifier.safetensors cannot be loaded: .*shape"):
        load_weights(Classifier(small(), 4, 0.0, seed=0).head, tmp_path / HEAD_FILE)
    (tmp_path / HEAD_FILE).unlink()
    with pytest.raises(ModelError, match="classifier.safetensors cannot be loaded"):
        load_weights(other.head, tmp_path / HEAD_FILE)


def test_the_seed_determines_the_initial_weights() -> None:
    one, same, two = (Classifier(small(), 3, 0.0, seed=seed).head.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, two)


def test_a_checkpoint_contains_only_trainable_parameters() -> None:
    assert set(Classifier(small().requires_grad_(False), 3, 0.0, seed=0).trainable_state()) == {
        "head.weight",
        "head.bias",
    }
