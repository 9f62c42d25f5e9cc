"""The loop of the baselines that are networks stops before a step would spoil their weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from labelled_texts import ignore

from finsa.baselines import training_loop
from finsa.config import RunConfig, TextCnn
from finsa.errors import FinsaError

ROWS, LABELS = [[2 + row % 3] * (1 + row % 4) for row in range(12)], [row % 3 for row in range(12)]
BAD = 9  # a unit


class Odd(torch.nn.Module):
    """A network whose loss, or whose gradient alone, is no number where a row has the bad unit."""

    def __init__(self, loss: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loss, self.table = loss, torch.nn.Embedding(10, 3)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits, the mean of the units' rows."""
        found = self.table(ids).sum(1) / lengths[:, None]
        bad = (ids == BAD).any(1, keepdim=True)
        if self.loss:
            return torch.where(bad, float("nan"), found)
        if found.requires_grad:
            found.register_hook(lambda gradient: torch.where(bad, float("inf"), gradient))
        return found


def fitted(config: Callable[..., RunConfig], network: Odd, rows: list[list[int]]) -> None:
    words = ("method=textcnn", "method.baseline.batch_size=4", "method.baseline.epochs=2", "train.score_tokens=512")
    cfg = config(*words)
    section = cfg.method.baseline
    assert isinstance(section, TextCnn)
    values = {"loss": 0.0, "macro_f1": 0.5}
    training_loop.fit(network, rows, LABELS, ROWS, lambda scores: values, ignore, section, 0, cfg.train)


@pytest.mark.parametrize("loss", [True, False])
def test_a_step_that_is_no_number_ends_with_its_rows(config: Callable[..., RunConfig], loss: bool) -> None:
    network, rows = Odd(loss), [*ROWS]
    rows[7] = [2, BAD]
    with pytest.raises(FinsaError, match=r"step [123] is infinite or no number. Rows: 7 \(1 of 4; .*learning_rate"):
        fitted(config, network, rows)
    assert torch.isfinite(network.table.weight).all()


def test_other_rows_are_learnt(config: Callable[..., RunConfig]) -> None:
    network = Odd(True)
    before = network.table.weight.detach().clone()
    fitted(config, network, ROWS)
    after = network.table.weight.detach()
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)
