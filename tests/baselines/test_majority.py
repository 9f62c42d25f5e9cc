from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from finsa import baselines
from finsa.baselines import Majority
from finsa.config import RunConfig
from finsa.data import sampling
from finsa.errors import ModelError

LABELS = [0, 2, 2, 0, 2, 2]


def fitted(labels: list[int], classes: int = 3) -> Majority:
    learner = Majority(classes)
    learner.fit(["x"] * len(labels), labels, ["y"], lambda scores: {"macro_f1": 0.0}, lambda step, values: None)
    return learner


def test_probabilities_are_the_shares_of_the_classes() -> None:
    scores = fitted(LABELS).score(["a", "b"])
    assert scores.shape == (2, 3)
    np.testing.assert_allclose(np.exp(scores), [[2 / 6, 0, 4 / 6]] * 2, atol=1e-12)
    assert np.isfinite(scores).all()


def test_balanced_rows_make_equal_shares(config: Callable[..., RunConfig]) -> None:
    method = config("method=majority", "method.balance=downsample").method
    order = sampling.choose([0, 1, 2, 2, 1, 2], method, 42)
    shares = np.exp(fitted([[0, 1, 2, 2, 1, 2][row] for row in order]).score(["a"]))
    np.testing.assert_allclose(shares, [[1 / 3] * 3])


def test_it_is_restored(tmp_path: Path, config: Callable[..., RunConfig]) -> None:
    learner = fitted(LABELS)
    baselines.save(learner, ["a", "b", "c"], tmp_path)
    again = baselines.restore(config("method=majority"), ["a", "b", "c"], tmp_path)
    np.testing.assert_array_equal(again.score(["x"]), learner.score(["x"]))


def test_rows_of_other_classes_are_refused(tmp_path: Path, config: Callable[..., RunConfig]) -> None:
    baselines.save(fitted(LABELS), ["a", "b", "c"], tmp_path)
    with pytest.raises(ModelError, match="are a, b, c; these rows have c, b, a"):
        baselines.restore(config("method=majority"), ["c", "b", "a"], tmp_path)


def test_a_missing_file_is_reported(tmp_path: Path, config: Callable[..., RunConfig]) -> None:
    baselines.save(fitted(LABELS), ["a", "b", "c"], tmp_path)
    (tmp_path / "baseline" / "shares.json").unlink()
    with pytest.raises(ModelError, match="is incomplete or damaged"):
        baselines.restore(config("method=majority"), ["a", "b", "c"], tmp_path)
