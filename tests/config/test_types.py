"""The types of the configuration: strict, frozen, closed, and the rules that join fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import compositions
import pytest
from pydantic import ValidationError

from finsa.config import Axis, BehaviorRule, PublishedRow, RunConfig, Section, compose, demonstration, locate
from finsa.config.published import Published, PublishedRows
from finsa.config.stages import AnswerRule
from finsa.errors import ConfigError

Configure = Callable[..., RunConfig]


def _subclasses(section: type[Section]) -> Iterator[type[Section]]:
    for kind in section.__subclasses__():
        yield kind
        yield from _subclasses(kind)


SECTIONS = list(_subclasses(Section))


def _changed(cfg: RunConfig, **changes: Any) -> dict[str, Any]:
    """A configuration's values with some set by path (``train__epochs``)."""
    values = cfg.model_dump(mode="json")
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = values
        for section in sections:
            place = place[section]
        place[key] = value
    return values


def _refusal(cfg: RunConfig, **changes: Any) -> str:
    """The validation error for a configuration with these changes."""
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate_json(json.dumps(_changed(cfg, **changes)))
    return str(caught.value)


def test_all_sections_are_found() -> None:
    assert len(SECTIONS) >= 54


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_section_is_frozen_strict_and_closed(section: type[Section]) -> None:
    assert {key: section.model_config[key] for key in ("frozen", "strict", "extra", "allow_inf_nan")} == {
        "frozen": True,
        "strict": True,
        "extra": "forbid",
        "allow_inf_nan": False,
    }
    assert section.__doc__


def test_no_field_has_a_default() -> None:
    """Values are only in conf/: a key missing in a file is an error, not a second default.

    Published tables are no settings: values missing in their source are omitted. An axis of a search is one of two
    kinds, and states what its kind has. So does a rule that changes texts or reads answers.
    """
    exempt = (Published, PublishedRow, PublishedRows, Axis, AnswerRule, BehaviorRule)
    settings = [one for one in SECTIONS if one not in exempt]
    assert [
        (s.__name__, name) for s in settings for name, field in s.model_fields.items() if not field.is_required()
    ] == []


def test_round_trip(config: Configure) -> None:
    cfg = config("model=glm9b", "method=lora_expert", "data=generated")
    assert RunConfig.model_validate_json(cfg.model_dump_json()) == cfg


def test_frozen(config: Configure) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config().train.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "3"}, "valid integer"),
        ({"seed": True}, "valid integer"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"resume": "yes"}, "valid boolean"),
        ({"train__epochs": "3"}, "valid number"),
        ({"train__epochs": 0}, "greater than 0"),
        ({"train__batch_size": 1.5}, "valid integer"),
        ({"train__learning_rate": float("nan")}, "finite number"),
        ({"train__learning_rate": float("inf")}, "finite number"),
        ({"train__schedule": "cosin"}, "'cosine', 'linear' or 'constant'"),
        ({"train__lr": 1.0}, "Extra inputs are not permitted"),
        ({"data__labels": [[1], 2]}, "valid string"),
        ({"data__max_length": 7}, "greater than or equal to 8"),
        ({"data__split__test": 0.5}, "less than 0.5"),
        ({"data__split__validation": 0}, "greater than 0"),
        ({"method__adapter__dropout": 1.0}, "less than 1"),
        ({"method__adapter__rank": 0}, "greater than 0"),
        ({"method__adapter__variant": "lora_plus"}, "'lora', 'dora', 'rslora' or 'pissa'"),
        ({"method__adapter__lr_ratio": 0}, "greater than 0"),
        ({"method__loss__beta": 1.0}, "less than 1"),
        ({"method__loss__gamma": -1}, "greater than or equal to 0"),
        ({"model__name": "a/b"}, "match pattern"),
        ({"stage__name": "trian"}, "does not match any of the expected tags"),
    ],
)
def test_wrong_value(config: Configure, change: dict[str, Any], message: str) -> None:
    assert message in _refusal(config(), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model__path": None},
            "weights=pretrained needs path (a local folder) or hub_id; or set model.weights=random",
        ),
        ({"model__think": "closed"}, "think=closed needs prompt=chat"),
        ({"model__architecture": {}}, "architecture needs a model_type"),
        ({"method__adapter": None}, "learn=adapter needs an adapter section"),
        ({"method__learn": "all"}, "learn=all does not use an adapter; set method.adapter=null"),
        ({"method__learn": "nothing"}, "learn=nothing does not use an adapter"),
        (
            {"method__learn": "all", "method__adapter": None, "method__quantization": "nf4"},
            "quantization=nf4 freezes the base model, so learn=all cannot train it: choose method=qlora",
        ),
        (
            {"method__quantization": "int8", "method__adapter__variant": "pissa"},
            "adapter.variant=pissa decomposes weights in full precision; set method.quantization=none",
        ),
        (
            {"method__learn": "nothing", "method__adapter": None, "method__loss__name": "focal"},
            "learn=nothing trains nothing, so loss.name=focal has no effect",
        ),
        (
            {"method__learn": "nothing", "method__adapter": None, "method__loss__class_weights": "inverse"},
            "learn=nothing trains nothing, so loss.class_weights=inverse has no effect",
        ),
        ({"method__loss__name": "focal"}, "loss.name=focal compares the K labels of a row; set method.loss_on=label"),
        ({"method__loss__smoothing": 0.1}, "loss.smoothing=0.1 compares the K labels of a row"),
        ({"method__loss__logit_adjustment": 1.0}, "loss.logit_adjustment=1.0 compares the K labels of a row"),
        ({"method__head": "classifier"}, "head=classifier predicts labels and no other token"),
        (
            {
                "method__head": "classifier",
                "method__loss_on": "label",
                "method__learn": "nothing",
                "method__adapter": None,
            },
            "head=classifier must be trained: set method.learn=head to train the head alone",
        ),
        ({"method__learn": "head", "method__adapter": None}, "learn=head needs method.head=classifier"),
        (
            {"method__classifier_init": "label_words"},
            "classifier_init and classifier_dropout need method.head=classifier",
        ),
        ({"train__batch_size": 17}, "cannot be divided into micro-batches of about micro_batch_size 16"),
        ({"train__warmup": 1.5}, "neither a fraction below 1 nor a whole number of steps"),
        ({"data__labels": ["a"]}, "needs at least two labels"),
        ({"data__labels": ["a", "a"]}, "different from each other"),
        ({"data__labels": ["a", " "]}, "not empty"),
        ({"data__labels": {"x": "a", "y": "a"}}, "different from each other"),
        ({"data__prompt": "no place"}, "needs {text} exactly once"),
        ({"data__prompt": "{text} {text}"}, "needs {text} exactly once"),
        ({"data__prompt": "{text} {other}"}, "no other {field}"),
        ({"data__prompt": "{text} {"}, "not a valid template"),
        ({"stage": {"name": "pretrain", "heldout": 0.1}}, "choose data=tiny_corpus or experiment=tiny_base"),
        ({"stage": {"name": "generate"}}, "stage=generate needs data=generated and output=<folder>"),
    ],
)
def test_rule_that_joins_fields(config: Configure, change: dict[str, Any], message: str) -> None:
    assert message in _refusal(config(), **change)


@pytest.mark.parametrize(
    "change",
    [
        {"model__weights": "random", "model__path": None},
        {"train__warmup": 0},
        {"train__warmup": 0.99},
        {"train__warmup": 1},
        {"train__warmup": 500},
        {"train__batch_size": 8, "train__micro_batch_size": 8},
        {"data__prompt": "{{json}} {text}"},
        {"data__max_length": 8},
        {"data__labels": None},
        {"data__labels": {"x": "a", "y": "b"}},
        {"method__adapter__targets": ["q_proj"]},
        {"method__loss__class_weights": "effective"},  # of rows, so it works on tokens as well
        {"method__loss_on": "label", "method__loss__name": "focal", "method__loss__gamma": 0},
        {"method__loss_on": "label", "method__head": "classifier", "method__learn": "head", "method__adapter": None},
    ],
)
def test_values_at_the_edge_are_allowed(config: Configure, change: dict[str, Any]) -> None:
    RunConfig.model_validate_json(json.dumps(_changed(config(), **change)))


def test_whole_numbers_count_as_numbers(config: Configure) -> None:
    assert config("train.epochs=3", "train.learning_rate=1").train.learning_rate == 1.0


def test_locate_prefers_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate("conf") == tmp_path / "conf"


def test_locate_falls_back_to_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("data/sample") == project / "data" / "sample"


def test_locate_returns_the_working_directory_path_if_nothing_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("no/such") == tmp_path / "no" / "such"
    assert locate(tmp_path / "absolute") == tmp_path / "absolute"


@pytest.mark.parametrize(
    ("words", "title"),
    [
        (("data=sample",), "sample"),
        (("data=table", "data.files=posts/my_posts.csv"), "my_posts"),
        (("data=table", "data.files='数据/帖子 2024.xlsx'"), "帖子_2024"),
        (("data=table", "data.files=fpb/train.csv"), "fpb"),
        (("data=table", "data.files=posts/*.csv"), "posts"),
        (("data=table", "data.files=[a/one.csv,a/two.csv]"), "one"),
        (("data=alpaca", "data.files=questions"), "questions"),
        (("data=hub", "data.hub.id=owner/bank-77"), "bank-77"),
        (("data=table",), "table"),
        (("data=table", "data.files=a.csv", "data.name=mine"), "mine"),
    ],
)
def test_a_data_set_is_called_by_its_file(config: Configure, words: tuple[str, ...], title: str) -> None:
    assert config(*words).data.title == title


def test_runs_of_the_embedded_default_are_called_a_demonstration(config: Configure) -> None:
    def said(*words: str) -> str | None:
        return demonstration(config(*words).model_dump())

    assert (
        said() == "A demonstration: a tiny embedded model on generated rows. The scores say nothing about real texts."
    )
    assert (
        said("method=tfidf_lr") == "A demonstration: the rows are generated. The scores say nothing about real texts."
    )
    own = ("data=table", "data.files=x.csv")
    assert said(*own) == "A demonstration: the embedded model is too small for real use."
    assert said(*own, "model=qwen05b") is None
    assert said(*own, "method=tfidf_lr") is None


def test_method_settings_of_an_experiment_apply_unless_the_command_sets_them() -> None:
    def composed(*words: str, **per_method: Any) -> RunConfig:
        values, chosen = compose.compose_values(words, (), compositions.shared())
        return compose.build(values | ({"per_method": per_method} if per_method else {}), chosen, words)

    assert composed("experiment=aidf_real", "method=lora").train.learning_rate == 1e-2
    assert composed("experiment=aidf_real", "method=lora_response").train.learning_rate == 3e-3
    assert composed("experiment=aidf_real", "method=lora", "train.learning_rate=1e-4").train.learning_rate == 1e-4
    assert composed("experiment=aidf_real", "method=lora").per_method is None
    for settings, message in (
        ({"train.learning_rat": 1.0}, "train.learning_rat: unknown key. Did you mean 'train.learning_rate'"),
        ({"train.learning_rate": "x"}, "train.learning_rate: input should be a valid number"),
        ({"seed.x": 1}, r"per_method.lora: seed.x is not a key; seed is not a section"),
    ):
        with pytest.raises(ConfigError, match=message):
            composed("method=lora", lora=settings)


def test_line_breaks_in_a_prompt_on_the_command_line() -> None:
    """A shell passes a backslash and an n; in a file, YAML decides."""
    written = "data.prompt='甲：{text}\\n\\t情感：'"
    assert compositions.config(written).data.prompt == "甲：{text}\n\t情感："
    values, files = compose.compose_values([written])
    assert compose.build(values, files, []).data.prompt == "甲：{text}\\n\\t情感："
    assert compose.build(values, files, ["seed=1", "data.name=x"]).data.prompt == "甲：{text}\\n\\t情感："
    sets = ("data=table", "data.task=multi_label", "data.labels=[a,b]", "method=lora_label")
    answers = compositions.config(*sets, "++data.answers=['\\n{label}：是','\\n{label}：否']").data.answers
    assert answers == ("\n{label}：是", "\n{label}：否")
    parts = compositions.config("data=finnf_joint", "data.parts.news.prompt='{text}\\n'").data.parts
    assert parts is not None
    assert parts["news"].prompt == "{text}\n"
