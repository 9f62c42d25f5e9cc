"""Arbitrary bytes give a value or one of finsa's errors; `make fuzz` runs longer."""

from __future__ import annotations

import random
from collections.abc import Callable

import fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FAST = [fuzz.read_table, fuzz.read_stream, fuzz.write_prompt]


@pytest.mark.parametrize("target", FAST)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=300))
def test_any_bytes(target: Callable[[bytes], None], content: bytes) -> None:
    fuzz.attempt(target, content)


@pytest.mark.parametrize("target", FAST)
def test_corrupted_files(target: Callable[[bytes], None]) -> None:
    chance = random.Random(3)
    assert False in [fuzz.attempt(target, fuzz.spoilt(chance)) for _ in range(80)]  # and any other error would be one


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    words=st.lists(
        st.one_of(
            st.text(max_size=20),
            st.builds(
                "{}={}".format,
                st.sampled_from(["train.epochs", "method", "data.prompt", "+a", "~b"]),
                st.text(max_size=8),
            ),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_words(words: list[str]) -> None:
    fuzz.attempt(fuzz.give_words, "\n".join(words).encode("utf-8", "surrogatepass"))
