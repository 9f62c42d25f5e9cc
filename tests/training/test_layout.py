"""A shared prefix and packed rows have the loss and the gradients of separate rows."""

from __future__ import annotations

import random
import traceback
from typing import Any

import numpy as np
import pytest
import steps
import torch
from base_models import EXTRA, small
from compositions import config
from torch.utils._python_dispatch import TorchDispatchMode

from finsa.config import Train
from finsa.data.rows import IGNORE, Row
from finsa.errors import ConfigError
from finsa.models import flops
from finsa.training import layout
from finsa.training.batches import Collator, Packer, Step, StepSplitter
from finsa.training.objective import Objective, tokens
from tests.models.test_attention import convolutions

HEAD = [11, 12, 13, 14, 15, 16, 17]
KINDS = ("tokens", "weighted tokens", "all tokens", "label", "classifier")


def settings(*overrides: str) -> Train:
    return config(*overrides).train


def rows(kind: str) -> list[Row]:
    """The step's rows after a common prefix; with a loss on all tokens, the prefix has loss too."""
    made = []
    for row in steps.rows("weighted tokens" if kind == "all tokens" else kind):
        labels = [IGNORE] * len(HEAD) + row["labels"]
        if kind == "all tokens":
            labels = [IGNORE, *HEAD[1:], *row["input_ids"]]
        longer = Row({**row, "input_ids": [*HEAD, *row["input_ids"]], "labels": labels})
        if "text_span" in row:
            longer["text_span"] = (len(HEAD) + 1, len(longer["input_ids"]))
        made.append(longer)
    return made


def common(made: list[Row]) -> layout.CommonPrefix:
    found = layout.CommonPrefix()
    found.add(made[:3])
    found.add(made[3:])
    return found


def learned(model: Any, objective: Objective, batches: list[dict[str, torch.Tensor]]) -> tuple[float, torch.Tensor]:
    """The step's mean loss, and its gradients in one vector."""
    model.zero_grad()
    weight = sum(objective.weight(batch) for batch in batches)
    loss = torch.stack([objective.total(model, batch) for batch in batches]).sum() / weight
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(found: tuple[float, torch.Tensor], plain: tuple[float, torch.Tensor], within: float = 1e-5) -> None:
    assert found[0] == pytest.approx(plain[0], rel=within)
    assert float((found[1] - plain[1]).norm() / plain[1].norm()) < within


def separate(model: Any, objective: Objective, made: list[Row]) -> tuple[float, torch.Tensor]:
    collate = Collator(0, objective.suffix)
    return learned(model, objective, [collate([dict(row)]) for row in made])


@pytest.mark.parametrize("rows_each", [3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_prefix_changes_neither_loss_nor_gradients(kind: str, rows_each: int) -> None:
    made, name = rows(kind), "tokens" if kind == "all tokens" else kind
    model, objective = steps.learner(name).train(), steps.objective(name)
    shared = layout.plan_prefix(common(made), model, settings("train.shared_prefix=true"))
    assert shared.used >= len(HEAD) - 1, shared
    split = StepSplitter(Collator(0, objective.suffix, shared.used), rows_each)
    batches = split(Step([dict(row) for row in made]))
    assert all(batch["prefix"].tolist() == HEAD[: shared.used] for batch in batches)
    assert ("prefix_labels" in batches[0]) == (kind == "all tokens")
    assert_same(learned(model, objective, batches), separate(model, objective, made))


@pytest.mark.parametrize("model_type", [*EXTRA, "gemma3_text"])
def test_every_weight_gets_the_same_gradient_with_and_without_a_shared_prefix(model_type: str) -> None:
    window = {"sliding_window": 32} if model_type == "gemma3_text" else {}
    made, model = rows("all tokens"), small(model_type, **window).requires_grad_(True).train()
    batch = Collator(0, (), 6)([dict(row) for row in made])
    assert_same(learned(model, tokens(), [batch]), separate(model, tokens(), made))


def test_a_shared_prefix_in_bfloat16_is_within_its_rounding() -> None:
    made, model = rows("tokens"), small().to(torch.bfloat16).requires_grad_(True).train()
    batch = Collator(0, (), 6)([dict(row) for row in made])
    exact = separate(small().requires_grad_(True), tokens(), made)
    found = learned(model, tokens(), [batch])
    assert_same((found[0], found[1].float()), exact, within=1e-2)


@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize("kind", ["tokens", "weighted tokens", "all tokens"])
def test_packed_rows_do_not_see_each_other(kind: str, shared: int) -> None:
    made, model = rows(kind), small().requires_grad_(True).train()
    batch = Packer(shared)([dict(row) for row in made])
    assert batch["input_ids"].shape == (1, shared + sum(len(row["input_ids"]) - shared for row in made))
    assert_same(learned(model, tokens(), [batch]), separate(model, tokens(), made))


def test_the_shared_prefix_ends_before_the_first_difference_and_before_a_text_that_is_read() -> None:
    assert common(rows("tokens")).tokens == len(HEAD) - 1
    same = [Row(input_ids=[5, 6, 7], labels=[IGNORE, 6, 7])] * 4
    assert common(same).tokens == 2
    read = [Row(input_ids=[5, 6, 7], labels=[IGNORE] * 3, text_span=(1, 3))] * 4
    assert common(read).tokens == 1
    assert common([*same, Row(input_ids=[5, 6, 7], labels=[IGNORE, IGNORE, 7])]).tokens == 0


def test_auto_requires_enough_prefix_tokens_and_a_large_share() -> None:
    model = small()

    def planned(head: int, text: int, *overrides: str) -> layout.Prefix:
        made = [Row(input_ids=[3] * head + [4 + number] * text, labels=[IGNORE] * (head + text)) for number in range(8)]
        return layout.plan_prefix(common(made), model, settings(*overrides))

    assert planned(100, 50).used == 99
    assert planned(100, 500).used == 0
    assert planned(8, 2).used == 0
    assert planned(100, 50, "train.micro_batch_size=1").used == 0
    assert planned(100, 50, "train.shared_prefix=false").used == 0
    refused = planned(100, 50, "train.shared_prefix=true", "train.gradient_checkpointing=true")
    assert (refused.used, refused.reason) == (0, "gradient checkpointing stores no keys and values")
    assert planned(100, 50, "train.packing=true").used == 99
    flash = small()
    flash.config._attn_implementation = "flash_attention_2"
    assert "flash-attention" in str(layout.prefix_obstacle(flash, settings("train.packing=true"), 150))


def test_a_mixture_does_not_share_a_prefix() -> None:
    assert "mixture" in str(layout.prefix_obstacle(steps.mixture(), settings(), 100))


@pytest.mark.parametrize(("window", "suffix", "used"), [(150, 0, 99), (149, 0, 0), (150, 1, 0), (151, 1, 99)])
def test_rows_share_a_prefix_if_they_fit_into_the_sliding_window(window: int, suffix: int, used: int) -> None:
    made = [Row(input_ids=[3] * 100 + [4 + number] * 50, labels=[IGNORE] * 150) for number in range(8)]
    model = small("gemma3_text", sliding_window=window)
    assert layout.plan_prefix(common(made), model, settings(), suffix).used == used


class NoAnswers(TorchDispatchMode):
    """Refuses operations that synchronize the host with a device.

    Except for the check in transformers, once per forward pass, whether a batch without a mask is packed: the only way
    round it is a mask, and with a mask attention is slower.
    """

    waits = ("_local_scalar_dense", "nonzero", "equal", "item", "masked_select", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation that returns nothing to the host."""
        name = func._schema.name.removeprefix("aten::")
        masks = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in self.waits or masks:
            asking = {frame.name for frame in traceback.extract_stack()}
            assert "find_packed_sequence_indices" in asking, f"the step waits for {func}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_synchronizes_with_the_device(kind: str, shared: int) -> None:
    name = "tokens" if kind == "all tokens" else kind
    model, objective = steps.learner(name).train(), steps.objective(name)
    batch = Collator(0, objective.suffix, shared)([dict(row) for row in rows(kind)])
    with NoAnswers():
        objective.total(model, batch).backward()


def test_no_packed_step_synchronizes_with_the_device() -> None:
    model = steps.learner("tokens").train()
    batch = Packer()([dict(row) for row in rows("weighted tokens")])
    with NoAnswers():
        tokens().total(model, batch).backward()
    with NoAnswers(), pytest.raises(AssertionError, match="waits"):
        batch["labels"][batch["labels"] != IGNORE]  # what the guard is there for


def planned_packing(
    lengths: list[int], *further: str, prefix: int = 0, packable: bool = True, model: Any = None
) -> layout.Packing:
    train = settings("train.batch_size=8", "train.micro_batch_size=8", *further)
    splitter = StepSplitter(Collator(0, (), prefix), train.micro_batch_size)
    return layout.plan_packing(np.asarray(lengths), model or small(), train, splitter, prefix, packable)


UNLIKE = [5, 60] * 4


def test_only_rows_of_different_lengths_are_packed() -> None:
    assert planned_packing(UNLIKE).used
    assert not planned_packing([60] * 8).used
    draw = random.Random(0)
    many = [draw.randint(5, 60) for _ in range(4000)]
    assert not planned_packing(many).used  # drawn in groups of similar length
    assert planned_packing(many, "train.group_by_length=false").used


@pytest.mark.parametrize("prefix", [0, 16])
def test_the_gain_of_packing_is_a_ratio_of_operations(prefix: int) -> None:
    """Computed independently, from the real tensors of both."""
    lengths = [20, 100, 30, 80, 50, 60, 70, 120]
    rows: list[dict[str, Any]] = [{"input_ids": [5] * n, "labels": [-100] * n} for n in lengths]
    costs = flops.estimate(small())
    before = costs.position * prefix + costs.pair * prefix * prefix / 2
    b, width = Collator(0, (), prefix)(rows)["input_ids"].shape
    seen = prefix + (1.0 if prefix else 0.5) * width
    side = before + costs.position * b * width + costs.pair * b * width * seen
    own = Packer(prefix)(rows)["lengths"].tolist()
    pairs = sum(n * (prefix + (n if prefix else n / 2)) for n in own)
    found = planned_packing(lengths, "train.packing=true", prefix=prefix)
    assert found.saves == pytest.approx(side / (before + costs.position * sum(own) + costs.pair * pairs), abs=1e-3)


def test_an_explicit_packing_setting_overrides_auto() -> None:
    assert planned_packing([60] * 8, "train.packing=true").used
    refused = planned_packing(UNLIKE, "train.packing=false")
    assert (refused.used, refused.reason) == (False, "train.packing=false")
    assert not planned_packing(UNLIKE, packable=False).used
    with pytest.raises(ConfigError, match="train.packing: only a loss on tokens supports packed rows"):
        planned_packing(UNLIKE, "train.packing=true", packable=False)


def test_rows_are_packed_if_attention_is_computed_row_by_row() -> None:
    longer = [length + 16 for length in UNLIKE]
    assert planned_packing(longer, prefix=16).used
    ways: list[tuple[Any, tuple[str, ...]]] = [
        (small(attention="eager"), ()),
        (small(), ("train.gradient_checkpointing=true",)),
    ]
    for model, words in ways:
        refused = planned_packing(longer, *words, prefix=16, model=model)
        assert (refused.used, refused.saves) == (False, None)
        assert "row by row" in refused.reason
        with pytest.raises(ConfigError, match="train.packing: attention must be computed row by row"):
            planned_packing(longer, "train.packing=true", *words, model=model)


def test_flash_attention_packs_if_requested() -> None:
    model = small()
    model.config._attn_implementation = "flash_attention_2"
    assert planned_packing(UNLIKE, "train.packing=true", model=model).used
    assert not planned_packing(UNLIKE, model=model).used


def test_no_layer_may_keep_a_state_across_packed_rows() -> None:
    """The state of a convolution would carry over from row to row."""
    assert not planned_packing(UNLIKE, model=convolutions()).used
    with pytest.raises(ConfigError, match="the model has layers without full attention"):
        planned_packing(UNLIKE, "train.packing=true", model=convolutions())
