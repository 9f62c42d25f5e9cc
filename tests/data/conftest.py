"""Tests of the data package do not use the project's cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from finsa.config import RunConfig


@pytest.fixture(scope="session")
def config(config: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """Compose a configuration without a cache, unless an override names one."""
    return lambda *overrides: config("data.cache=null", *overrides)
