"""Compositions of conf/ that the tests of a process share: composing takes most of the time of checking a command."""

from __future__ import annotations

from functools import cache

from finsa.config import ROOT, RunConfig, catalogue, command_line, compose


@cache
def shared() -> compose.Compositions:
    """Those made so far."""
    return {}


@cache
def config(*overrides: str) -> RunConfig:
    """The configuration that a command has."""
    return compose.build(*compose.compose_values(overrides, (), shared()), overrides)


def check(*overrides: str, sweep: bool = True) -> list[RunConfig]:
    """Check a command; a test that changes a copy of conf/ composes anew each time."""
    compositions = shared() if catalogue.CONF == ROOT / "conf" else None
    return command_line.check(overrides, sweep, compositions=compositions)
