from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from labeled_texts import evaluate, ignore, texts

from finsa import baselines
from finsa.baselines import neural
from finsa.baselines.neural import FromScratch
from finsa.config import RunConfig, TextCnn
from finsa.errors import FinsaError

Compose = Callable[..., RunConfig]
ROWS, LABELS = texts(60)
HELD, HELD_LABELS = texts(30, seed=1)
NAMES = ["a", "b", "c"]
SMALL = ("embedding=32", "epochs=16", "learning_rate=1e-2", "batch_size=8", "patience=16", "min_rows=1")
KINDS = {
    "textcnn": ("method=textcnn", "method.baseline.filters=16"),
    "bilstm": ("method=bilstm", "method.baseline.hidden=16"),
    "bilstm mean": ("method=bilstm", "method.baseline.hidden=16", "method.baseline.pooling=mean"),
}


def configured(config: Compose, kind: str, *words: str) -> RunConfig:
    return config(*KINDS[kind], *(f"method.baseline.{word}" for word in SMALL), *words)


def trained(cfg: RunConfig, record: baselines.Record = ignore) -> tuple[FromScratch, baselines.Fitted]:
    learner = baselines.build(cfg, NAMES)
    assert isinstance(learner, FromScratch)
    return learner, learner.fit(ROWS, LABELS, HELD, evaluate(HELD_LABELS), record)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_a_tiny_data_set_and_is_restored(config: Compose, tmp_path: Path, kind: str) -> None:
    cfg = configured(config, kind)
    learner, fitted = trained(cfg)
    assert (learner.score(ROWS).argmax(axis=1) == LABELS).all()
    assert fitted.best == evaluate(HELD_LABELS)(learner.score(HELD))["macro_f1"] > 0.8
    assert fitted.parameters == sum(p.numel() for p in learner.network.parameters())
    baselines.save(learner, NAMES, tmp_path)
    again = baselines.restore(cfg, NAMES, tmp_path)
    np.testing.assert_array_equal(again.score(HELD), learner.score(HELD))
    np.testing.assert_allclose(np.exp(again.score(HELD)).sum(axis=1), 1)


@pytest.mark.parametrize("kind", ["textcnn", "bilstm"])
def test_the_seed_determines_the_result(config: Compose, kind: str) -> None:
    short = ("method.baseline.epochs=2",)
    first, _ = trained(configured(config, kind, *short))
    torch.rand(3)  # whatever ran before
    second, _ = trained(configured(config, kind, *short))
    other, _ = trained(configured(config, kind, *short, "seed=7"))
    np.testing.assert_array_equal(first.score(HELD), second.score(HELD))
    assert not np.array_equal(first.score(HELD), other.score(HELD))


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_does_not_depend_on_the_other_rows(config: Compose, kind: str) -> None:
    learner, _ = trained(configured(config, kind, "method.baseline.epochs=1"))
    mixed = ["涨", "大涨盈利", "今天股票市场大跌" * 6]
    together = learner.score(mixed)
    np.testing.assert_allclose(together, np.concatenate([learner.score([text]) for text in mixed]), atol=1e-5)


def test_units(config: Compose) -> None:
    text = "ABc涨12.5% EPS\n"
    words, characters, model = (
        FromScratch(section, cfg, 3)._units(text)  # type: ignore[arg-type]
        for cfg in (config("method=textcnn", f"method.baseline.units={units}") for units in UNITS)
        for section in [cfg.method.baseline]
    )
    assert words == ["abc", "涨", "1", "2", ".", "5", "%", "eps"]
    assert characters == list(text)
    assert all(unit.isdigit() for unit in model)


UNITS = ("words", "characters", "model")


def test_model_tokens_are_restored(config: Compose, tmp_path: Path) -> None:
    cfg = configured(config, "textcnn", "method.baseline.units=model", "method.baseline.epochs=1")
    learner, _ = trained(cfg)
    baselines.save(learner, NAMES, tmp_path)
    np.testing.assert_array_equal(baselines.restore(cfg, NAMES, tmp_path).score(HELD), learner.score(HELD))


def test_only_training_rows_define_the_vocabulary(config: Compose) -> None:
    learner, _ = trained(configured(config, "textcnn", "method.baseline.epochs=1"))
    assert set(learner.numbers) == {unit for text in ROWS for unit in learner._units(text)}
    np.testing.assert_array_equal(learner.score(["鱻"]), learner.score(["龘"]))
    assert learner.score([" "]).shape == (1, 3)


def test_long_texts_are_truncated_and_counted(config: Compose) -> None:
    learner, _ = trained(configured(config, "textcnn", "method.baseline.epochs=1", "data.max_length=12"))
    long = "今天公司股票市场关于以及大涨"
    assert learner.count_truncated([long, long[:12], "涨"]) == 1
    np.testing.assert_allclose(learner.score([long]), learner.score([long[:12]]))


def test_the_best_epoch_is_kept_and_patience_stops_training(config: Compose) -> None:
    seen: list[float] = []
    cfg = configured(config, "textcnn", "method.baseline.epochs=40", "method.baseline.patience=3")
    learner, fitted = trained(cfg, lambda step, values: seen.append(values["eval_macro_f1"]))
    best = seen.index(max(seen))
    assert len(seen) == best + 1 + 3 < 40
    assert fitted.best == max(seen) == evaluate(HELD_LABELS)(learner.score(HELD))["macro_f1"]
    assert fitted.steps == len(seen) * -(-len(ROWS) // 8)
    assert fitted.rows == len(seen) * len(ROWS)


def test_max_steps_stops_training(config: Compose) -> None:
    _, fitted = trained(configured(config, "bilstm", "train.max_steps=3"))
    assert fitted.steps == 3


def test_every_row_is_read_once_per_epoch() -> None:
    rows = [[1] * length for length in (5, 1, 9, 2, 2, 7, 3)]
    epoch = neural._epoch(rows, 2, neural.random.Random(0))
    assert sorted(row for batch in epoch for row in batch) == list(range(7))
    assert sorted(map(len, epoch)) == [1, 2, 2, 2]


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    rates = [neural._rate(step, 10, 0.2) for step in range(11)]
    assert rates == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    assert neural._rate(0, 10, 0.0) == 1


# ------------------------------------------------------------------------------------------------ training loop

UNIT_ROWS, CLASSES = [[2 + row % 3] * (1 + row % 4) for row in range(12)], [row % 3 for row in range(12)]
BAD = 9  # a unit


class Odd(torch.nn.Module):
    """A network whose loss, or only its gradient, is not finite if a row has the bad unit."""

    def __init__(self, loss: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loss, self.table = loss, torch.nn.Embedding(10, 3)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits: the mean of the units' embeddings."""
        found = self.table(ids).sum(1) / lengths[:, None]
        bad = (ids == BAD).any(1, keepdim=True)
        if self.loss:
            return torch.where(bad, float("nan"), found)
        if found.requires_grad:
            found.register_hook(lambda gradient: torch.where(bad, float("inf"), gradient))
        return found


def fit_units(config: Callable[..., RunConfig], network: Odd, rows: list[list[int]]) -> None:
    words = ("method=textcnn", "method.baseline.batch_size=4", "method.baseline.epochs=2", "train.score_tokens=512")
    cfg = config(*words)
    section = cfg.method.baseline
    assert isinstance(section, TextCnn)
    values = {"loss": 0.0, "macro_f1": 0.5}
    neural.fit(network, rows, CLASSES, UNIT_ROWS, lambda scores: values, ignore, section, cfg)


@pytest.mark.parametrize("loss", [True, False])
def test_a_non_finite_step_is_reported_with_its_rows(config: Callable[..., RunConfig], loss: bool) -> None:
    network, rows = Odd(loss), [*UNIT_ROWS]
    rows[7] = [2, BAD]
    with pytest.raises(FinsaError, match=r"step [123] is infinite or NaN. Rows: 7 \(1 of 4; .*learning_rate"):
        fit_units(config, network, rows)
    assert torch.isfinite(network.table.weight).all()


def test_finite_rows_update_the_weights(config: Callable[..., RunConfig]) -> None:
    network = Odd(True)
    before = network.table.weight.detach().clone()
    fit_units(config, network, UNIT_ROWS)
    after = network.table.weight.detach()
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)
