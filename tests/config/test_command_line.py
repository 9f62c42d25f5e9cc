"""Wrong commands: every problem at once, with its path, its origin and the nearest name, quickly and in one message."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from compositions import check

from finsa.config import AugmentStage, ChainStage, RunConfig, catalogue, command_line, compose
from finsa.errors import ConfigError, Problem

Configure = Callable[..., RunConfig]


def _refused(*overrides: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        check(*overrides)
    return caught.value.problems


def _only(*overrides: str) -> Problem:
    problems = _refused(*overrides)
    assert len(problems) == 1, problems
    return problems[0]


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/ that a test may change."""
    copy = tmp_path / "conf"
    shutil.copytree(catalogue.CONF, copy)
    monkeypatch.setattr(catalogue, "CONF", copy)
    return copy


def _write(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


# ------------------------------------------------------------------------------------------------ valid commands


@pytest.mark.parametrize(
    "command",
    [
        "",
        "-m method=zero_shot,lora,lora_downsample,lora_response,lora_response_downsample",
        "experiment=tiny_base output=data/tiny",
        "train.epochs=1,2 seed=1,2",
        "train.epochs=range(1,3)",
        "train.learning_rate=interval(0.001,0.01)",
        "method=choice(lora,lora_response)",
        "++train.epochs=3",
        "++model.architecture.head_dim=64",
        "run=null model=tiny",
        "run=some/folder stage=evaluate",
        "hydra.sweep.dir=mine",
    ],
)
def test_right_command_passes(command: str) -> None:
    check(*[word for word in command.split() if not word.startswith("-")])


@pytest.mark.parametrize("sweep", ["tracking=glob(*)", "method=glob(lora_l*)", "train=glob(*,exclude=[finllm*])"])
def test_glob_sweep_passes(sweep: str) -> None:
    check(sweep)


def test_optional_key_of_an_architecture_may_be_added() -> None:
    """An architecture accepts any key; one missing in the file can only be set with a +."""
    check("+model.architecture.head_dim=64")


@pytest.mark.parametrize(("override", "epochs"), [("train.epochs=7", 7), ("train=smoke", 1)])
def test_command_line_beats_experiment(config: Configure, override: str, epochs: int) -> None:
    cfg = config("experiment=tiny_base", override)
    assert (cfg.experiment, cfg.stage.name, cfg.train.epochs) == ("tiny_base", "pretrain", epochs)


def test_command_line_choice_beats_the_choice_of_an_experiment(config: Configure) -> None:
    assert config("experiment=tiny_base").method.name == "full"
    assert config("experiment=tiny_base", "method=lora").method == config("method=lora").method
    assert config("method=lora", "experiment=tiny_base").method == config("method=lora").method
    assert config("experiment=tiny_base", "model.weights=pretrained").model.weights == "pretrained"


# ------------------------------------------------------------------------------------------------ errors


WRONG_NAMES = [
    ("train.epochs", "train.epochs", "is not of the form key=value; write train.epochs=<value>"),
    ("method=lroa", "method", "there is no 'lroa'. Did you mean 'lora'?"),
    ("method=LORA", "method", "there is no 'LORA'. Did you mean 'lora'?"),
    ("model=qwen0.5b", "model", "Did you mean 'qwen05b'?"),
    ("data=xyz", "data", "Choose from: aidf_news, alpaca, aspects, finfe,"),
    ("experiment=tinybase", "experiment", "Did you mean 'tiny_base'?"),
    ("model=data/tiny", "model", "there is no 'data/tiny'. For a model in a folder: model=local model.path=data/tiny"),
    ("model=/no/where", "model", "there is no '/no/where'. For a folder: model=local model.path=/no/where"),
    ("model=Qwen/Qwen2.5-0.5B", "model", "For a model of the hub: model=qwen05b. For a folder: model=local"),
    ("model=some/model", "model", "For a model of the hub: model=local model.hub_id=some/model. For a folder:"),
    ("model.weights=data/tiny", "model.weights", "Choose from: pretrained, random. A folder goes into model.path"),
    ("method=data/tiny", "method", "To train an adapter further: method.adapter.init=data/tiny"),
    ("data=data/sample", "data", "there is no 'data/sample'. For files of your own: data=table data.files=data/sample"),
    ("method=null", "method", "there is no 'null'"),
    ("method=[lora,lora_response]", "method", "there is no '[lora,lora_response]'"),
    ("method=choice(lora,full_)", "method", "there is no 'full_'. Did you mean 'full'?"),
    ("data.split={ruel: random}", "data.split.ruel", "unknown key. Did you mean 'data.split.rule'?"),
    ("data.split.rows={trian: 5}", "data.split.rows.trian", "unknown key. Did you mean 'data.split.rows.train'?"),
    ("train.compile=true", "train.compile", "was removed, because it had no benefit; leave it out"),
    ("train.lerning_rate=1", "train.lerning_rate", "unknown key. Did you mean 'train.learning_rate'?"),
    ("method.adapter.rnk=4", "method.adapter.rnk", "unknown key. Did you mean 'method.adapter.rank'?"),
    ("trian.epochs=1", "trian.epochs", "unknown key. Did you mean 'train'?"),
    ("learning_rate=1", "learning_rate", "unknown key. Did you mean 'train.learning_rate'?"),
    ("epochs=1", "epochs", "unknown key. Did you mean 'train.epochs'?"),
    ("foo=1", "foo", "unknown key. Choose from: behavior, data, evaluation,"),
    ("train.epochs.x=1", "train.epochs.x", "unknown key"),
    ("+train.epohcs=1", "train.epohcs", "unknown key. Did you mean 'train.epochs'?"),
    ("++train.warmpu=1", "train.warmpu", "unknown key. Did you mean 'train.warmup'?"),
    ("+train.epochs=3", "train.epochs", "already exists; write train.epochs=3 without the +"),
    ("+method=lora", "method", "is chosen without a +: write method=lora"),
    ("~train.epochs", "~train.epochs", "nothing can be removed; set a value instead, such as train.epochs=null"),
    ("~method", "~method", "nothing can be removed"),
    ("~data.hub.splits", "~data.hub.splits", "nothing can be removed"),
    ("~data.hub.splits.validation", "~data.hub.splits.validation", "there is no such entry to remove"),
]
WRONG_VALUES = [
    ("train.epochs=abc", "train.epochs", 'input should be a valid number, not "abc" (text)'),
    ("train.warmup='3'", "train.warmup", 'input should be a valid number, not "3" (text)'),
    ("train.weight_decay=", "train.weight_decay", 'input should be a valid number, not "" (text)'),
    ("train.max_grad_norm=null", "train.max_grad_norm", "input should be a valid number, not null"),
    ("seed=1.5", "seed", "input should be a valid integer, not 1.5 (a number)"),
    ("train.log_every=true", "train.log_every", "input should be a valid integer, not true (true or false)"),
    ("resume=1", "resume", "input should be a valid boolean, not 1 (a whole number)"),
    ("train.threads=-1", "train.threads", "input should be greater than 0, not -1 (a whole number)"),
    ("train.learning_rate=nan", "train.learning_rate", "input should be a finite number"),
    ("train.schedule=cosin", "train.schedule", "there is no 'cosin'. Did you mean 'cosine'?"),
    ("data.split.test=0.6", "data.split.test", "input should be less than 0.5, not 0.6 (a number)"),
    ("data.prompt=hello", "data.prompt", "needs {text} exactly once"),
    ("data.labels=[a]", "data.labels", "needs at least two labels"),
]


def test_wrong_names() -> None:
    for override, path, text in WRONG_NAMES:
        problem = _only(override)
        assert problem.path == path
        assert text in problem.text
        assert problem.origin == "command line"


def test_wrong_name_alone_is_one_problem() -> None:
    assert str(_only("method=lroa")) == "method: there is no 'lroa'. Did you mean 'lora'?  [command line]"


def test_wrong_values() -> None:
    found = {problem.path: problem for problem in _refused(*[override for override, _, _ in WRONG_VALUES])}
    assert set(found) == {path for _, path, _ in WRONG_VALUES}
    for _, path, text in WRONG_VALUES:
        assert text in found[path].text
        assert found[path].origin == "command line"


@pytest.mark.parametrize(
    ("override", "path", "text"),
    [
        ("train.batch_size=17", "train", "micro_batch_size 16; the nearest that can are 16 and 18"),
        ("model.think=closed", "model", "set model.think=none or model.prompt=chat"),
        ("method.adapter=null", "method", "learn=adapter needs an adapter section"),
    ],
)
def test_incompatible_values(override: str, path: str, text: str) -> None:
    problem = _only(override)
    assert problem.path == path
    assert text in problem.text
    assert problem.origin == "command line"


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("stage.split=test", "stage.split"),
        ("data.generator.rows=5", "data.generator"),
        ("model.architecture.head_dim=64", "model.architecture.head_dim"),
        ("train.epochs=${nope}", "nope"),
        ("hydra.foo=1", "hydra.foo"),
        ("stage=pretrain", "choose data=tiny_corpus or experiment=tiny_base"),
        ("stage=generate", "needs data=generated and output=<folder>"),
        ("", "not of the form key=value"),
    ],
)
def test_errors_of_hydra_are_one_problem(override: str, text: str) -> None:
    assert text in str(_only(override))


@pytest.mark.parametrize("override", ["stage.split=test", "model.architecture.head_dim=64", "hydra.foo=1"])
def test_a_key_of_another_choice_is_not_attributed_to_null(override: str) -> None:
    """None of these sections is null; each just lacks the key."""
    assert "is null" not in _only(override).text


@pytest.mark.parametrize(
    "override", ["data.labels=[利空,中性,利好]", "data.files=数据/表.csv", "data.prompt=情感：{text}"]
)
def test_chinese_needs_no_quotes_or_the_message_requests_them(override: str) -> None:
    """Hydra's grammar allows Chinese only in quotes; the message must not blame the key=value syntax."""
    try:
        check(override)
    except ConfigError as error:
        assert "quote" in str(error)  # noqa: PT017 - either outcome is right


def test_experiment_null_is_accepted_or_refused_in_one_message() -> None:
    try:
        check("experiment=null")
    except ConfigError as error:
        assert [problem.path for problem in error.problems] == ["experiment"]  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize(
    ("override", "path"),
    [("data.labels=[a,[b]]", "data.labels"), ("method.adapter.targets=foo", "method.adapter.targets")],
)
def test_field_of_two_types_does_not_contradict_itself(override: str, path: str) -> None:
    """If a list is valid, only the given entries are wrong; if a word is valid, only the given word is."""
    problems = _refused(override)
    assert all(problem.path.startswith(path) for problem in problems)
    assert not any("should be an object" in problem.text or "valid array" in problem.text for problem in problems)


def test_a_stage_with_the_name_of_a_key_of_another_is_not_part_of_the_path() -> None:
    """`train` is a stage, and a key of two others."""
    problem = _only("stage.compare_base=maybe")
    assert (problem.path, problem.origin) == ("stage.compare_base", "command line")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.shared_prefix=atuo", "there is no 'atuo'. Did you mean 'auto'?"),
        ("train.packing=ture", "there is no 'ture'. Did you mean 'true'?"),
        (
            "stage=export stage.difference=atuo run=x format=onnx",
            "there is no 'atuo'. Did you mean 'auto'? A number is also allowed",
        ),
    ],
)
def test_a_word_among_other_kinds_of_values_is_suggested(override: str, text: str) -> None:
    (problem,) = _refused(*override.split())
    assert problem.text == text


MAPS = [
    ("{利好: 正面, 中性: 平, 利空: 负面}", {"利好": "正面", "中性": "平", "利空": "负面"}),
    ("{利好:正面,利空:负面}", {"利好": "正面", "利空": "负面"}),
    ("{'利好': '正面', \"利空\": \"负面\"}", {"利好": "正面", "利空": "负面"}),
    ("{利好：正面，利空：负面}", {"利好": "正面", "利空": "负面"}),
    ("{利好：正面, 利空: 负面}", {"利好": "正面", "利空": "负面"}),
    ("{利 好: 很 正面, 利空（看空）: 负面，偏空}", {"利 好": "很 正面", "利空（看空）": "负面，偏空"}),
    ("{\"it's\": '正：面, 好', 利空: a}", {"it's": "正：面, 好", "利空": "a"}),
    ("{positive: up, negative: down}", {"positive": "up", "negative": "down"}),
    ("[利 空，中性、利好]", ("利 空", "中性", "利好")),
]


@pytest.mark.parametrize(("written", "meant"), MAPS, ids=[written for written, _ in MAPS])
@pytest.mark.parametrize("choice", ["data=sample", "data=openfindata_intent"])
def test_a_map_of_user_defined_words_needs_no_quotes(written: str, meant: object, choice: str) -> None:
    """In place of a list or of another map, with any quoting; Hydra's grammar does not accept Chinese keys at all."""
    words = [command_line.quote(word) for word in (choice, f"data.labels={written}")]
    assert [command_line.quote(word) for word in words] == words
    (cfg,) = check(*words)
    assert cfg.data.labels == meant


def test_maps_in_a_sweep_become_jobs() -> None:
    word = command_line.quote("data.labels={利好: 正, 利空: 负},{利好: 多, 利空: 空}")
    jobs = check(word)
    assert [job.data.labels for job in jobs] == [{"利好": "正", "利空": "负"}, {"利好": "多", "利空": "空"}]
    assert command_line.quote("data.labels=choice([利好,利空],[正,负])") == "data.labels='[利好,利空]','[正,负]'"


def test_nested_maps_also_accept_chinese(config: Configure) -> None:
    stage = config(
        "stage=augment", "output=x", command_line.quote("stage.synonyms.words={涨: [升, 上升], 跌：[降]}")
    ).stage
    assert isinstance(stage, AugmentStage)
    assert stage.synonyms is not None
    assert stage.synonyms.words == {"涨": ("升", "上升"), "跌": ("降",)}
    links = "stage.links={one: {stage: train, data: {labels: {利好: 正, 利空: 负}}}}"
    stage = config("stage=chain", command_line.quote(links)).stage
    assert isinstance(stage, ChainStage)
    assert stage.links == {"one": {"stage": "train", "data": {"labels": {"利好": "正", "利空": "负"}}}}
    columns = config("data=table", command_line.quote("data.columns={text: 正文 一, label: 标签}")).data.columns
    assert (columns.text, columns.label, columns.id) == ("正文 一", "标签", "id")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.labels={利好: 正面, 利空}",
            "data.labels: '利空' is not an entry of a map; write {key: value, key: value}",
        ),
        ("data.labels={利好: 正面, 利好: 负面}", "data.labels: the key 利好 is given twice"),
        (
            "+data.label_map.看空=利空",
            '+data.label_map.看空: keys of your own are written as a map: "data.label_map={看空: 利空}"',
        ),
        ("data.labels＝[利空,利好]", "data.labels＝[利空,利好]: has a full-width ＝; write data.labels=[利空,利好]"),
        (
            "data.prompt={text} is: a",
            "data.prompt: the value cannot be parsed; put it in quotes: \"data.prompt='{text} is: a'\"",
        ),
    ],
)
def test_the_message_shows_how_to_quote_an_unparsable_value(override: str, message: str) -> None:
    assert str(_only(override)) == f"{message}  [command line]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epochs 3", "--epochs: is not a flag of finsa; values are set by key: write train.epochs=3"),
        ("--train.epochs=3", "--train.epochs: is not a flag of finsa; values are set by key: write train.epochs=3"),
        ("--batch-size 8", "--batch-size: is not a flag of finsa; values are set by key: write train.batch_size=8"),
        ("--lr=1e-4", "--lr: is not a flag of finsa; values are set by key: write train.learning_rate=1e-4"),
        ("--method lora", "--method: is not a flag of finsa; values are set by key: write method=lora"),
        ("-seed 3", "-seed: is not a flag of finsa; values are set by key: write seed=3"),
        ("--multirunn seed=1,2", "--multirunn: is not a flag of finsa. Did you mean '--multirun'?"),
        ("-x", "-x: is not a flag of finsa. python run.py --help lists all flags"),
        ("-m=seed=1,2", "-m=seed=1,2: takes no value; write -m seed=1,2"),
        ("help", "help: is not of the form key=value; write --help"),
        ("check", "check: is not of the form key=value; write stage=check"),
        ("chekc", "chekc: is not of the form key=value; write stage=check"),
        ("method lora", "method: is not of the form key=value; write method=lora"),
        ("method = lora", "method: is not of the form key=value; write method=lora"),
        ("method:lora", "method:lora: is not of the form key=value; write method=lora"),
        (
            "stage=predict run=x text=two words",
            "words: is not of the form key=value; a value with spaces needs quotes, as in text='two words'",
        ),
    ],
)
def test_arguments_in_the_style_of_other_programs_are_translated(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command_line.require_words(words.split())
    assert str(caught.value) == f"{message}  [command line]"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=lora,full", "method: lora,full is more than one value; for a sweep, write -m method=lora,full"),
        (
            "data.files=a,b",
            "data.files: a,b is more than one value; for a sweep, write -m data.files=a,b; "
            'for a list, "data.files=[a,b]"',
        ),
        (
            "run=a,b",
            "run: a,b is more than one value; for a sweep, write -m run=a,b; for one text with a comma, \"run='a,b'\"",
        ),
    ],
)
def test_several_values_without_the_multirun_flag(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(override, sweep=False)
    assert str(caught.value) == f"{message}  [command line]"


@pytest.mark.parametrize(
    ("override", "use"),
    [
        ("hydra.run.dir=x", "run folders are created below output_dir: write output_dir=x"),
        ("hydra.sweep.subdir=x", "jobs are numbered in the folder of the sweep, hydra.sweep.dir=x"),
        ("hydra.job.name=x", "only hydra.sweep.dir and the keys of Hydra's launcher and sweeper are used"),
        ("hydra/job_logging=default", "only hydra.sweep.dir and the keys of Hydra's launcher and sweeper are"),
    ],
)
def test_hydras_keys_without_an_effect_are_refused(override: str, use: str) -> None:
    assert _only(override).text.startswith(f"has no effect here; {use}")


def test_a_micro_batch_divides_its_batch(config: Configure) -> None:
    sizes = [(8, 16), (24, 16), (16, 5), (99999, 16), (1, 16), (64, 16)]
    found = [config(f"train.batch_size={batch}", f"train.micro_batch_size={most}").train for batch, most in sizes]
    assert [train.micro_batch_size for train in found] == [8, 12, 4, 9, 1, 16]
    assert all(train.batch_size % train.micro_batch_size == 0 for train in found)


def test_a_key_is_given_once() -> None:
    for words in (("seed=1", "seed=2"), ("seed=1", "seed=1")):
        assert str(_only(*words)) == f"seed: is given twice, {words[0]} and {words[1]}; keep one  [command line]"


def test_adapter_without_a_target_is_refused() -> None:
    assert _only("method.adapter.targets=[]").path == "method.adapter.targets"


def test_all_problems_at_once() -> None:
    problems = _refused(
        "method=lroa", "foo.bar=1", "+train.epoch=1", "~seed", "train.batch_size=x", "data.max_length=1"
    )
    assert [problem.path for problem in problems] == [
        "method",
        "foo.bar",
        "train.epoch",
        "~seed",
        "data.max_length",
        "train.batch_size",
    ]
    assert {problem.origin for problem in problems} == {"command line"}


def test_sweep_with_one_bad_value_names_it_once() -> None:
    assert str(_only("seed=1,2", "train.epochs=1,-2")) == (
        "train.epochs: input should be greater than 0, not -2 (a whole number)  [command line]"
    )
    assert _only("method=lora,lroa").text == "there is no 'lroa'. Did you mean 'lora'?"


def test_jobs_that_differ_only_in_values_share_a_composition() -> None:
    """They have the values that Hydra composes for each of them; it composes other kinds of overrides itself."""
    sweep = [("method=lora", "seed=1"), ("method=lora", "seed=2"), ("method=full", "seed=3", "output_dir=of_${seed}")]
    quoted = command_line.quote("data.labels={利好: 正, 利空: 负}")
    others = [
        ("seed=4", quoted, "data.columns={text: t}", "train.epochs=null"),
        ("++seed=5",),
        ("train.log_every=${seed}",),
    ]
    compositions: compose.Compositions = {}
    for job in (*sweep, *others):
        assert compose.compose_values(job, (), compositions) == compose.compose_values(job)
    assert [choices for _, _, choices in compositions] == [("method=lora",), ("method=full",), ()]
    command_line.check(["method=lora,full", "seed=1,2,3"], compositions=compositions)
    assert len(compositions) == 3


def test_what_is_wrong_is_reported_as_hydra_reports_it_with_shared_compositions() -> None:
    compositions: compose.Compositions = {}
    for words in (
        ["foo=1"],
        ["model.architecture.x=1"],
        ["method={_target_: a}"],
        ["seed=${oc.env:HOME}"],
        ["train=x"],
    ):
        with pytest.raises(ConfigError) as shared:
            compose.compose_values(words, (), compositions)
        with pytest.raises(ConfigError) as alone:
            compose.compose_values(words)
        assert shared.value.problems == alone.value.problems


def test_a_sweep_whose_jobs_fail_only_in_combination() -> None:
    """batch_size=32 fits both, 35 fits only one of the two: the pair is found."""
    assert (
        "batch_size 35 cannot be divided into micro-batches of about micro_batch_size 32"
        in _only("train.batch_size=32,35", "train.micro_batch_size=7,32").text
    )


@pytest.mark.parametrize("other", ["model=tiny", "method=lora", "seed=3", "experiment=tiny_base", "method.loss_on=all"])
def test_a_run_folder_defines_its_model_method_and_seed(other: str) -> None:
    problem = _only("stage=evaluate", "run=some/folder", other)
    assert problem == Problem(
        other.split("=")[0], "comes from the run folder that run=<folder> names; leave it out", "command line"
    )


# ------------------------------------------------------------------------------------------------ origins


def test_origin_is_the_file_that_set_the_value(conf: Path) -> None:
    _write(conf / "config.yaml", "seed: 42", "seed: -1")
    _write(conf / "train" / "default.yaml", "weight_decay: 0.0", "weight_decay: -0.5")
    _write(conf / "train" / "aidf.yaml", "epochs: 5", "epochs: many")
    _write(conf / "method" / "lora.yaml", "rank: 8", "rank: 0")
    _write(conf / "data" / "table.yaml", "on_unknown_label: error", "on_unknown_label: erorr")
    found = _refused("train=aidf", "method=lora_response_downsample", "data=finnf_forum", "data.max_length=2")
    assert sorted(map(str, found)) == [
        "data.max_length: input should be greater than or equal to 8, not 2 (a whole number)  [command line]",
        "data.on_unknown_label: there is no 'erorr'. Did you mean 'error'?  [conf/data/table.yaml]",
        "method.adapter.rank: input should be greater than 0, not 0 (a whole number)  [conf/method/lora.yaml]",
        "seed: input should be greater than or equal to 0, not -1 (a whole number)  [conf/config.yaml]",
        'train.epochs: input should be a valid number, not "many" (text)  [conf/train/aidf.yaml]',
        "train.weight_decay: input should be greater than or equal to 0, not -0.5 (a number)"
        "  [conf/train/default.yaml]",
    ]


def test_origin_of_an_experiments_value(conf: Path) -> None:
    _write(conf / "experiment" / "tiny_base.yaml", "weights: random", "weights: randon")
    assert str(_only("experiment=tiny_base")) == (
        "model.weights: there is no 'randon'. Did you mean 'random'?  [conf/experiment/tiny_base.yaml]"
    )


def test_command_line_repairs_a_wrong_file(conf: Path) -> None:
    _write(conf / "train" / "default.yaml", "weight_decay: 0.0", "weight_decay: -0.5")
    check("train.weight_decay=0")


def test_misspelt_and_missing_key_of_a_file(conf: Path) -> None:
    _write(conf / "train" / "default.yaml", "weight_decay: 0.0", "weigth_decay: 0.0")
    missing, unknown = _refused()
    assert (missing.path, missing.text) == ("train.weight_decay", "is missing")
    assert str(unknown) == (
        "train.weigth_decay: unknown key. Did you mean 'train.weight_decay'?  [conf/train/default.yaml]"
    )


def test_new_file_of_a_group_is_a_choice(conf: Path) -> None:
    (conf / "train" / "mine.yaml").write_text("defaults: [default, _self_]\nname: mine\nepochs: -4\n", encoding="utf-8")
    assert str(_only("train=mine")).endswith("not -4 (a whole number)  [conf/train/mine.yaml]")
    assert "Did you mean 'mine'?" in _only("train=mime").text


def test_parent_that_does_not_exist(conf: Path) -> None:
    _write(conf / "method" / "lora_response.yaml", "[lora, _self_]", "[lroa, _self_]")
    assert "Could not load 'method/lroa'" in _only("method=lora_response").text


def test_broken_yaml_is_one_message(conf: Path) -> None:
    _write(conf / "train" / "default.yaml", "weight_decay: 0.0", "weight_decay: [")
    assert "default.yaml" in str(_only())


# ------------------------------------------------------------------------------------------------ the real command


def _command(project: Path, folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8"}
    environment.pop("FINSA_DEBUG", None)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(project / "run.py"), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    return done, time.perf_counter() - start


def test_a_wrong_choice_is_reported_quickly_and_writes_nothing(project: Path, tmp_path: Path) -> None:
    done, seconds = _command(project, tmp_path, "method=lroa")
    if seconds >= 4:  # once more: another process may have held the machine
        done, seconds = _command(project, tmp_path, "method=lroa")
    print(f"reported after {seconds:.2f} s (target: 2 s on a quiet machine)")
    assert done.stderr == "error: method: there is no 'lroa'. Did you mean 'lora'?  [command line]\n"
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert seconds < 4


def test_several_problems_are_one_list(project: Path, tmp_path: Path) -> None:
    done, _ = _command(project, tmp_path, "-m", "method=lora,lroa", "train.epochs=-1")
    assert done.stderr.splitlines() == [
        "error: 2 problems",
        "  method: there is no 'lroa'. Did you mean 'lora'?  [command line]",
        "  train.epochs: input should be greater than 0, not -1 (a whole number)  [command line]",
    ]
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])


def test_a_missing_file_is_reported_before_anything_is_written(project: Path, tmp_path: Path) -> None:
    done, _ = _command(project, tmp_path, "data=table", "data.files=nowhere.csv")
    assert done.stderr.startswith("error: data.files: no such file or folder: ")
    assert "Traceback" not in done.stderr
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])


def test_debug_shows_the_traceback_too(project: Path, tmp_path: Path) -> None:
    done, _ = _command(project, tmp_path, "method=lroa", "--debug")
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.endswith("error: method: there is no 'lroa'. Did you mean 'lora'?  [command line]\n")
    assert done.returncode == 2


def test_checking_imports_nothing_heavy(project: Path) -> None:
    code = (
        "import sys; from finsa import cli; from finsa.config import command_line;"
        "command_line.check(['method=lora,zero_shot']);"
        "print(sorted({'torch', 'transformers', 'peft', 'trl', 'datasets', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("words", "expanded"),
    [
        (["method=lora"], ["method=lora"]),
        (["experiment=tiny_base"], ["experiment=tiny_base"]),
        (["experiment=nothing"], ["experiment=nothing"]),
        (
            ["experiment=aidf_lora_v1", "model=tiny"],
            ["-m", "experiment=aidf_lora_v1", "model=tiny", "method=lora_response,aidf_lora_v1"],
        ),
        (
            ["-m", "experiment=aidf_lora_v1", "seed=1,2"],
            ["-m", "experiment=aidf_lora_v1", "seed=1,2", "method=lora_response,aidf_lora_v1"],
        ),
        (["experiment=aidf_lora_v1", "method=lora"], ["experiment=aidf_lora_v1", "method=lora"]),
        (
            ["experiment=openfindata_intent", "model=tiny"],
            ["-m", "experiment=openfindata_intent", "model=tiny", "method=zero_shot,lora_all"],
        ),
        (["stage=report", "experiment=aidf_lora_v1"], ["stage=report", "experiment=aidf_lora_v1"]),
    ],
)
def test_an_experiment_adds_its_sweep(words: list[str], expanded: list[str]) -> None:
    assert command_line.expand(words) == expanded


@pytest.mark.parametrize(
    ("words", "deferred"),
    [
        (
            ["-m", "method=encoder,finbert", "method.baseline.learning_rate=1e-4", "train.epochs=3", "seed=1,2"],
            [
                "-m",
                "method=encoder,finbert",
                "method.baseline.learning_rate=choice(1e-4)",
                "train.epochs=3",
                "seed=1,2",
            ],
        ),
        (
            ["-m", "method=encoder", "method.baseline.epochs=3,4"],
            ["-m", "method=encoder", "method.baseline.epochs=3,4"],
        ),
        (["-m", "data=fpb,tfns", "data.files='a b'"], ["-m", "data=fpb,tfns", "data.files='a b'"]),
        (["-m", "data=fpb,tfns", "data.domain=null"], ["-m", "data=fpb,tfns", "data.domain=null"]),
        (
            ["-m", "method=encoder,finbert", "method.baseline.path=models/e5"],
            ["-m", "method=encoder,finbert", "method.baseline.path=choice(models/e5)"],
        ),
        (
            ["-m", "method=textcnn,bilstm", "method.baseline.widths=[2,3]"],
            ["-m", "method=textcnn,bilstm", "method.baseline.widths=choice([2,3])"],
        ),
        (["-m", "train.epochs=1,2"], ["-m", "train.epochs=1,2"]),
    ],
)
def test_values_below_a_swept_group_are_set_in_its_jobs(words: list[str], deferred: list[str]) -> None:
    assert command_line.defer_to_jobs(words) == deferred


def test_the_message_for_a_missing_launcher_names_the_extra() -> None:
    with pytest.raises(
        ConfigError, match=r"hydra/launcher: 'cloud' is not installed, only basic.*pip install 'finsa\[la"
    ):
        check("method=lora,full", "hydra/launcher=cloud")


@pytest.mark.parametrize(
    "text", ["涨停, 'A' \\${seed} {b}", "it's", "\\", "ends so\\'", "${seed} 100%", "two\nlines", "[a, b]", "='", "123"]
)
def test_a_text_may_contain_any_characters(text: str) -> None:
    words = ["stage=predict", "run=somewhere", command_line.quote(f"text={text}")]
    assert command_line.quote(words[-1]) == words[-1], "a quoted word does not change"
    (cfg,) = check(*words)
    assert cfg.text == text


@pytest.mark.parametrize("stage", ["predict input=a.csv output=b.csv", "export format=onnx"])
def test_settings_defined_by_the_run_cannot_be_set(stage: str) -> None:
    words = [*f"stage={stage}".split(), "run=somewhere", "data.max_length=64"]
    with pytest.raises(ConfigError, match=r"data\.max_length: comes from the run folder"):
        check(*words)


def test_predict_names_the_key_of_the_input_files_column() -> None:
    problem = _only("stage=predict", "run=somewhere", "input=a.csv", "output=b.csv", "data.columns.text=正文")
    assert str(problem) == (
        "data.columns.text: comes from the run; for the input file, write stage.text_column='正文'  [command line]"
    )
