"""Compiled layers compute what plain ones do, and a model is as it was afterwards."""

from __future__ import annotations

import steps
import torch
from test_prefix import learnt, rows

from finsa.training import compiling
from finsa.training.collate import Collator
from finsa.training.objective import tokens


def test_compiled_layers_learn_the_same_and_can_be_undone() -> None:
    model, batch = steps.learner("tokens").train(), Collator(0)([dict(row) for row in rows("tokens")])
    loss, gradients = learnt(model, tokens(), [batch])
    compiled = compiling.layers(model)
    assert all(layer._compiled_call_impl is not None for layer in compiled)
    found, others = learnt(model, tokens(), [batch])
    compiling.undo(compiled)
    assert abs(found - loss) < 1e-5
    assert float((others - gradients).norm() / gradients.norm()) < 1e-5
    assert all(layer._compiled_call_impl is None for layer in compiled)
    torch.testing.assert_close(learnt(model, tokens(), [batch])[1], gradients)
