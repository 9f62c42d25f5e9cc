"""Rows per class of the rows that are used: what class weights and logit adjustment start from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from finsa.config import RunConfig
from finsa.data import dataset, sampling, tokenized
from finsa.errors import ConfigError

Configure = Callable[..., RunConfig]
NAMES = ("利空", "中性", "利好")


def test_only_rows_that_are_used_count_and_repeated_ones_as_often(config: Configure) -> None:
    gold = [0, 0, 1, 2, 2]
    assert sampling.class_counts(gold, [0, 2, 2, 3], NAMES, config().method.loss) == [1, 2, 1]


@pytest.mark.parametrize("method", ["lora_class_weight", "lora_adaptive_balanced", "lora_logit_adjustment"])
def test_a_class_without_rows_is_named_if_its_share_is_needed(config: Configure, method: str) -> None:
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


@pytest.mark.parametrize("balance", ["none", "downsample", "oversample"])
def test_inverse_weights_give_every_class_the_same_share_of_the_loss(
    config: Configure, tokenizer: Any, balance: str
) -> None:
    """Weights are those of the rows that are used, so that after balancing they are all the same."""
    job = tokenized.build(config(), dataset.load(config("data.cache=null").data), tokenizer)
    cfg = config("method=lora_class_weight", f"method.balance={balance}", "method.rows_per_class=1200")
    rows, shares = job.training_rows(cfg), Counter[int]()
    for place, number in enumerate(job.training_order(cfg)):
        shares[job.gold("train")[number]] += rows[place]["weight"]  # type: ignore[assignment]
    assert len(shares) == 3
    assert list(shares.values()) == pytest.approx([len(rows) / 3 if balance != "none" else shares[0]] * 3)
    weights = {rows[place]["weight"] for place in range(len(rows))}
    assert len(weights) == (3 if balance == "none" else 1)
    assert sum(weights) / len(weights) == pytest.approx(1)


def test_rows_contain_only_what_the_objective_reads(config: Configure, tokenizer: Any) -> None:
    job = tokenized.build(config(), dataset.load(config("data.cache=null").data), tokenizer)
    prompt, gold, renderer = job.prompts("train")[0], job.gold("train")[0], job.renderer
    (label,) = job.training_rows(config("method=lora_label"))[:1]
    (text,) = job.training_rows(config("method=classifier"))[:1]
    assert label == {"input_ids": prompt, "labels": [-100] * len(prompt), "target": gold}
    assert text["input_ids"] + renderer.suffix == prompt
    assert (text["target"], text["text_span"]) == (gold, (len(renderer.prefix), len(prompt) - len(renderer.suffix)))
