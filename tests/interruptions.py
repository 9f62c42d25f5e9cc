"""Interrupted commands, as Ctrl-C leaves them."""

from __future__ import annotations

from typing import Any

import pytest

from finsa.config import RunConfig
from finsa.inference import predictor
from finsa.stages import predict


def after_two_chunks(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predict a file, and interrupt the prediction at the third chunk."""
    real, calls = predictor.Predictor.__call__, []

    def breaks(self: Any, texts: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, texts, **options)

    with monkeypatch.context() as patched:
        patched.setattr(predictor.Predictor, "__call__", breaks)
        with pytest.raises(KeyboardInterrupt):
            predict.run(cfg)
