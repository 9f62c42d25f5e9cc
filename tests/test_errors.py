"""Messages name the nearest choice; every error of the project has exit code 2."""

from __future__ import annotations

import pytest

from finsa.errors import (
    ConfigError,
    DataError,
    FinsaError,
    ModelError,
    Problem,
    RunError,
    nearest,
    suggest,
)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("lroa", "lora"),
        ("LORA", "lora"),
        ("lora_respons", "lora_response"),
        ("zeroshot", "zero_shot"),
        ("xyz", None),
        ("", None),
    ],
)
def test_nearest(written: str, meant: str | None) -> None:
    assert nearest(written, ["zero_shot", "lora_response", "lora"]) == meant


def test_nearest_returns_the_original_spelling() -> None:
    assert nearest("TEXT", ["Text", "label"]) == "Text"


def test_nearest_of_nothing() -> None:
    assert nearest("lora", []) is None


def test_suggest_names_only_the_closest_choice() -> None:
    assert suggest("lroa", ["zero_shot", "lora"]) == "Did you mean 'lora'?"


def test_suggest_lists_all_in_order_if_none_is_close() -> None:
    assert suggest("xyz", iter(["b", "a", "b"])) == "Choose from: a, b."


def test_suggest_shortens_a_long_list() -> None:
    assert suggest("xyz", [f"k{n:02d}" for n in range(20)], show=3) == "Choose from: k00, k01, k02, … (20 in all)."


def test_suggest_does_not_shorten_a_list_that_fits() -> None:
    assert suggest("xyz", ["k1", "k2", "k3"], show=3) == "Choose from: k1, k2, k3."


def test_suggest_is_empty_without_choices() -> None:
    assert suggest("xyz", []) == ""


def test_problem_shows_path_text_and_origin() -> None:
    assert str(Problem("train.epochs", "is missing", "conf/train/default.yaml")) == (
        "train.epochs: is missing  [conf/train/default.yaml]"
    )
    assert str(Problem("train.epochs", "is missing")) == "train.epochs: is missing"


def test_config_error_keeps_every_problem() -> None:
    problems = [Problem("a", "one"), Problem("b", "two", "command line")]
    error = ConfigError(iter(problems))
    assert error.problems == problems
    assert str(error) == "a: one\nb: two  [command line]"


@pytest.mark.parametrize("error", [FinsaError("x"), DataError("x"), ModelError("x"), RunError("x"), ConfigError([])])
def test_every_error_has_exit_code_2(error: FinsaError) -> None:
    assert isinstance(error, FinsaError)
    assert error.exit_code == 2
