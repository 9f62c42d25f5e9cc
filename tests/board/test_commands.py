"""Commands of the board: the same checks and messages as in a shell, within the folders of the board."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from finsa import cli
from finsa.board import commands, runs
from finsa.board.commands import Scope
from finsa.config import RunConfig
from finsa.errors import ConfigError

Compose = Callable[..., RunConfig]
WRONG = [
    "train.epochz=2",
    "method=lroa",
    "train.epochs=many seed=-1",
    "seed=1,2",
    "method=lora method=dora",
    "stage=predict",
    "model.path=data/sample",
    "seed",
    "data.labels={利好: a",
]


@pytest.fixture
def scope(config: Compose, tmp_path: Path) -> Scope:
    (tmp_path / "more").mkdir()
    cfg = config("stage=board", f"output_dir={tmp_path / 'out'}", f"stage.folders=[{tmp_path / 'more'}]")
    return Scope.of(cfg, cfg.stage, [])  # type: ignore[arg-type]


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_command_has_the_message_of_the_shell(scope: Scope, text: str) -> None:
    words = commands.words({}, text, scope)
    with pytest.raises(ConfigError) as in_shell:
        cli.prepare(list(words))
    with pytest.raises(ConfigError) as in_board:
        commands.check(words, scope)
    assert commands.problems(in_board.value) == list(map(str, in_shell.value.problems))


def test_choices_and_overrides_are_the_command_and_its_configuration(scope: Scope, config: Compose) -> None:
    choices = commands.defaults() | {"method": "tfidf_lr", "train": "smoke"}
    words = commands.words(choices, "seed=3\ndata.prompt='判断：{text}'", scope)
    out = scope.output_dir
    expected = [f"output_dir={out}", "method=tfidf_lr", "train=smoke", "seed=3", "data.prompt=判断：{text}"]
    assert words == expected
    in_shell = f"python run.py output_dir={out} method=tfidf_lr train=smoke seed=3 'data.prompt=判断：{{text}}'"
    assert commands.in_shell(words).replace('"', "'") == in_shell
    jobs = commands.check(words, scope)
    composed = config("method=tfidf_lr", "train=smoke", "seed=3", f"output_dir={out}", "data.prompt='判断：{text}'")
    assert jobs == [composed]
    assert RunConfig.model_validate_json(composed.model_dump_json()) == composed
    assert yaml.safe_load(commands.as_yaml(jobs)) == composed.model_dump(mode="json")
    assert len(commands.check(commands.words({}, "-m seed=1,2,3", scope), scope)) == 3


OUTSIDE = [
    ("data.files=/etc/passwd", "data.files"),
    ("data.files=[data/sample,/etc]", "data.files"),
    ("data.files=.ssh/*", "data.files"),
    ("data.files=data/../../secret", "data.files"),
    ("data=aspects data.files=~/x", "data.files"),
    ("output_dir=/tmp/elsewhere", "output_dir"),
    ("stage=evaluate run=/somewhere", "run"),
    ("stage=report runs=[outputs/a,../b]", "runs"),
    ("models=/work", "models"),
    ("model.tokenizer=/etc", "model.tokenizer"),
    ("method=dpo method.init=/some/run", "method.init"),
    ("hydra.sweep.dir=/tmp", "hydra.sweep.dir"),
    ("hydra/launcher=basic", "hydra/launcher"),
    ("per_method.lora={data.files: /etc}", "per_method.lora"),
    ("--config-dir=/tmp", "--config-dir"),
    ("--cfg job", "--cfg"),
    ("data.name=${hydra.job.num}", "data.name"),
    ("model.trust_remote_code=true", "model.trust_remote_code"),
    ("stage=board", "stage"),
    ("stage=serve run=latest", "stage"),
    ("stage=chain 'stage.links={a: {stage: serve, port: 1}}'", "stage.links.a.stage"),
    ("stage=chain 'stage.links={a: {stage: {name: board}}}'", "stage.links.a.stage"),
    ("stage=chain 'stage.links={a: {model: {trust_remote_code: true}}}'", "stage.links"),
    ("stage=search 'stage.space=[{key: model.trust_remote_code, values: [true]}]'", "stage.space"),
    ("model.path=/etc", "model.path"),
]


@pytest.mark.parametrize(("text", "key"), OUTSIDE)
def test_a_command_cannot_lead_out_of_the_folders_of_the_board(scope: Scope, text: str, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        commands.check(commands.words({}, text, scope), scope)
    assert key in [problem.path for problem in refused.value.problems], refused.value
    assert "contains" not in str(refused.value)  # no list of the files of another folder


def test_a_link_in_an_allowed_folder_leads_nowhere_else(scope: Scope, tmp_path: Path) -> None:
    (tmp_path / "more" / "rows").mkdir()
    (tmp_path / "more" / "link").symlink_to("/etc")
    commands.check(commands.words({}, f"data.files={tmp_path / 'more' / 'rows'}", scope), scope)
    with pytest.raises(ConfigError, match="outside of the folders of the board"):
        commands.check(commands.words({}, f"data.files={tmp_path / 'more' / 'link'}", scope), scope)
    commands.check(commands.words({}, "model=local model.hub_id=owner/name", scope), scope)  # no folder


def test_only_stages_that_resume_are_resumed() -> None:
    assert commands.resuming(["method=lora", "resume=true"]) == ["method=lora", "resume=true"]
    assert commands.resuming(["-m", "seed=1,2"]) == ["-m", "seed=1,2"]
    assert commands.resuming(["stage=report", "runs=x"]) is None
    assert commands.of_plan(["stage=train", "stage.compare_base=false", "method=lora"]) == [
        "method=lora",
        "stage=check",
    ]


def test_runs_are_found_by_the_name_in_the_list_only(tmp_path: Path, trained: Callable[..., Path]) -> None:
    folder = trained("lora_response")
    output = folder.parent
    entry = runs.find(output, folder.name)
    assert entry is not None
    assert (entry.folder, entry.status) == (folder, "complete")
    assert entry.score is not None
    assert entry.score[2] <= entry.score[1] <= entry.score[3]
    made = runs.progress(entry)
    assert made is not None
    assert (made.step, made.total, made.left) == (40, 40, None)
    for name in ("", "..", f"../{output.name}/{folder.name}", str(folder), f"{folder.name}/../{folder.name}"):
        assert runs.find(output, name) is None
