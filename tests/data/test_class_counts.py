"""Rows per class of the rows that are used: what class weights and logit adjustment start from."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from finsa.config import RunConfig
from finsa.data import sampling
from finsa.errors import ConfigError

Configure = Callable[..., RunConfig]
NAMES = ("利空", "中性", "利好")


def test_only_rows_that_are_used_count_and_repeated_ones_as_often(config: Configure) -> None:
    gold = [0, 0, 1, 2, 2]
    assert sampling.class_counts(gold, [0, 2, 2, 3], NAMES, config().method.loss) == [1, 2, 1]


@pytest.mark.parametrize("method", ["lora_class_weight", "lora_adaptive_balanced", "lora_logit_adjustment"])
def test_a_class_without_rows_is_named_where_its_share_is_needed(config: Configure, method: str) -> None:
    with pytest.raises(ConfigError, match=r"method\.loss: weighs classes by their training rows, and 中性 has none"):
        sampling.class_counts([0, 2], [0, 1], NAMES, config(f"method={method}").method.loss)
    assert sampling.class_counts([0, 2], [0, 1], NAMES, config("method=lora_focal").method.loss) == [1, 0, 1]


def test_the_published_weights_are_inert(config: Configure) -> None:
    """FinSA-MoE's beta of 0.99 saturates: weights of news 1.0000, of forum within 1e-4 of 1."""
    beta = config("method=lora_adaptive_balanced").method.loss.beta
    forum = sampling.class_weights([3854, 889, 3532], "effective", beta)
    assert forum == pytest.approx([0.99996, 1.00009, 0.99996], abs=6e-6)
    assert sampling.class_weights([215_034, 635_353, 775_905], "effective", beta) == pytest.approx([1, 1, 1], abs=1e-9)
    assert sampling.class_weights([3854, 889, 3532], "effective", 0.9999) == pytest.approx(
        [0.514, 1.933, 0.553], abs=1e-3
    )
