"""When rows are packed: the choice follows the operations that the steps take."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from tests.modeling.test_masks import convolutions

from finsa.config import Train, compose
from finsa.errors import ConfigError
from finsa.models import flops
from finsa.training import packing
from finsa.training.batching import Cutter
from finsa.training.collate import Collator, Packer
from tests.models import small


def settings(*further: str) -> Train:
    overrides = ["train.batch_size=8", "train.micro_batch_size=8", *further]
    values, choices = compose.compose_values(overrides)
    return compose.build(values, choices, overrides).train


def planned(
    lengths: list[int], *further: str, prefix: int = 0, packs: bool = True, attention: str = "sdpa"
) -> packing.Packing:
    train = settings(*further)
    cut = Cutter(Collator(0, (), prefix), train.micro_batch_size, train.batch_tokens)
    return packing.plan(np.asarray(lengths), small(attention=attention), train, cut, packs)


UNLIKE = [5, 60] * 4


def test_rows_of_unlike_lengths_are_packed_and_rows_of_like_lengths_are_not() -> None:
    assert planned(UNLIKE).used
    assert not planned([60] * 8).used
    draw = random.Random(0)
    many = [draw.randint(5, 60) for _ in range(4000)]
    assert not planned(many).used  # drawn in groups of like lengths
    assert planned(many, "train.group_by_length=false").used


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("prefix", [0, 16])
def test_what_packs_save_is_a_ratio_of_the_operations_of_the_batches(prefix: int, masks: bool) -> None:
    """The other way: the real tensors of both; with masks, for every line there is."""
    if masks and prefix:
        return
    lengths = [20, 100, 30, 80, 50, 60, 70, 120]
    rows: list[dict[str, Any]] = [{"input_ids": [5] * n, "labels": [-100] * n} for n in lengths]
    costs, way = flops.of(small()), ("train.packing=true",)
    before = costs.position * prefix + costs.pair * prefix * prefix / 2

    def operations(collate: Collator | Packer, seen: float) -> float:
        """Of lines that are all seen, or causally."""
        lines, width = collate(rows)["input_ids"].shape
        return before + costs.position * lines * width + costs.pair * lines * width * (prefix + seen * width)

    side = operations(Collator(0, (), prefix), 1.0 if prefix else 0.5)
    if masks:
        found = planned(lengths, *way, attention="eager")
        packed = {line: operations(Packer(0, line), 1.0) for line in packing.LINES}
        assert found.line is not None
        assert packed[found.line] == min(packed.values()) < max(packed.values())
        assert found.saves == pytest.approx(side / packed[found.line], abs=1e-3)
        return
    found = planned(lengths, *way, prefix=prefix)
    assert found.line is None
    own = Packer(0, None, prefix)(rows)["lengths"].tolist()
    pairs = sum(n * (prefix + (n if prefix else n / 2)) for n in own)
    assert found.saves == pytest.approx(side / (before + costs.position * sum(own) + costs.pair * pairs), abs=1e-3)


def test_the_user_has_the_last_word_where_packs_are_defined() -> None:
    assert planned([60] * 8, "train.packing=true").used
    refused = planned(UNLIKE, "train.packing=false")
    assert (refused.used, refused.line, refused.reason) == (False, None, "train.packing=false")
    assert not planned(UNLIKE, packs=False).used
    with pytest.raises(ConfigError, match="train.packing: packs are of a loss on tokens"):
        planned(UNLIKE, "train.packing=true", packs=False)


def test_a_prefix_goes_before_packs_that_need_masks_and_with_those_that_do_not() -> None:
    longer = [length + 16 for length in UNLIKE]
    found = planned(longer, prefix=16)
    assert (found.used, found.line) == (True, None)
    for refused in (
        planned(longer, prefix=16, attention="eager"),
        planned(longer, "train.compile=true", prefix=16),
        planned(longer, "train.gradient_checkpointing=true", prefix=16),
    ):
        assert not refused.used
        assert "prefix of 16" in refused.reason


def test_no_layer_may_look_past_the_mask_of_a_pack() -> None:
    """The state of a convolution goes on from row to row."""
    train, model = settings(), convolutions()
    cut = Cutter(Collator(0), train.micro_batch_size)
    assert not packing.plan(np.asarray(UNLIKE), model, train, cut, packs=True).used
    with pytest.raises(ConfigError, match="layers keep something other"):
        packing.plan(np.asarray(UNLIKE), model, settings("train.packing=true"), cut, packs=True)
