"""Untrusted files and commands run no code, read no secrets and cannot escape their folder."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest
import yaml
from few import FEW

from finsa import cli
from finsa.config import ROOT, USED_BY, RunConfig, catalogue, command_line, safety
from finsa.errors import ConfigError, RunError
from finsa.runs import nested
from finsa.serving.batching import Batcher, ModelFailedError
from finsa.serving.middleware import Metrics
from finsa.session import Session

Compose = Callable[..., RunConfig]
EVIL = "builtins.exec"


def _code(*words: str) -> tuple[int, bool]:
    reached: list[bool] = []
    return cli.guard(lambda: reached.append(True), ["run.py", *words], Session()), bool(reached)


# ------------------------------------------------------------------------------------------------ code


@pytest.mark.parametrize(
    "word",
    [
        f"+hydra.callbacks.evil._target_={EVIL}",
        f"+hydra.callbacks.evil={{_target_:{EVIL}}}",
        f"hydra.launcher._target_={EVIL}",
        f"hydra.sweeper._target_={EVIL}",
        f"+model.architecture._target_={EVIL}",
        f"+train.deepspeed._target_={EVIL}",
        "hydra.callbacks.remember._target_=finsa.sweeps.RememberMore",
        "--experimental-rerun=job.pickle",
        "--experimental=job.pickle",
        "--config-path=elsewhere",
        "-cp=elsewhere",
        "--config-name=other",
    ],
)
def test_a_command_that_names_code_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _code(word) == (2, False)
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "word",
    [
        "data.files=/x/my_target_posts.csv",
        "data.files=[/_target_/a.csv]",
        "text={_target_: a}",
        "output_dir=a._target_",
    ],
)
def test_only_a_key_names_code(word: str) -> None:
    safety.require_plain_command([command_line.quote(word)])


@pytest.mark.parametrize(
    "value", ["{a: {_target_: b}}", "[{_target_: b}]", "{_target_: b},1", "choice({_target_: b},1)"]
)
def test_a_key_within_a_value_names_code(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _code("--cfg", "job", f"+hydra.callbacks={value}") == (2, False)
    assert capsys.readouterr().err == (
        "error: hydra.callbacks: names code to run; a command only sets values  [command line]\n"
    )


@pytest.mark.parametrize("flag", [(), ("--cfg", "job"), ("--info", "config")])
def test_flags_that_print_run_no_code(flag: tuple[str, ...]) -> None:
    assert _code(*flag, f"+hydra.callbacks.evil._target_={EVIL}") == (2, False)


@pytest.mark.parametrize(
    "content",
    [
        f"# @package _global_\nhydra: {{callbacks: {{evil: {{_target_: {EVIL}}}}}}}\n",
        f"# @package _global_\nmodel: {{architecture: {{_target_: {EVIL}}}}}\n",
        f"# @package _global_\nhydra: {{job_logging: {{handlers: {{evil: {{(): {EVIL}}}}}}}}}\n",
    ],
)
def test_an_experiment_file_that_names_code_is_refused(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(catalogue.CONF, tmp_path / "conf")
    (tmp_path / "conf" / "experiment" / "evil.yaml").write_text(content, encoding="utf-8")
    monkeypatch.setattr(catalogue, "CONF", tmp_path / "conf")
    with pytest.raises(ConfigError, match=r"names code to run, 'builtins\.exec'"):
        command_line.check(["experiment=evil"])


def test_a_folder_of_files_that_names_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.yaml").write_text("defaults: [default, _self_]\nname: mine\n", encoding="utf-8")
    safety.require_no_code_below(tmp_path)
    (tmp_path / "evil.yaml").write_text(f"a: [{{b: {{_target_: {EVIL}}}}}]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"a\.0\.b\._target_: names code .* \[.*evil\.yaml\]"):
        safety.require_no_code_below(tmp_path)
    assert _code("--config-dir", str(tmp_path)) == (2, False)


@pytest.mark.parametrize("name", ["joblib", "submitit_local", "submitit_slurm", "basic"])
def test_hydras_launchers_are_accepted(name: str) -> None:
    command_line.check([f"hydra/launcher={name}", "seed=1,2"])


@pytest.mark.parametrize("resolver", ["oc.env:HOME", "oc.env:WANDB_API_KEY,none", "oc.decode:'[1]'", "oc.select:seed"])
def test_a_value_cannot_use_a_resolver(resolver: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command_line.check([f"tracking.project=${{{resolver}}}"])
    (problem,) = caught.value.problems
    assert problem.path == "tracking.project"
    assert "is not allowed in a configuration" in problem.text


def test_other_keys_may_still_be_referenced(config: Compose) -> None:
    assert config("train.warmup=${data.split.test}").train.warmup == config().data.split.test


def test_nothing_is_unpickled() -> None:
    """Neither by finsa nor by the trainer when it resumes."""
    from transformers import trainer

    for file in (ROOT / "finsa").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if file.name != "ray_data.py":  # the processes of a Ray cluster send each other objects, by Ray as well
            assert "import pickle" not in text, file
        assert "joblib.load" not in text, file
        assert "allow_pickle=True" not in text, file
        assert "torch.load(" not in text, file
    text = Path(str(trainer.__file__)).read_text(encoding="utf-8")
    loads = text.count("torch.load(")
    assert loads > 0
    assert text.count("weights_only=True") >= loads
    assert "weights_only=False" not in text


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_malicious_checkpoint_does_not_execute(name: str, config: Compose, tmp_path: Path, tokenizer: Any) -> None:
    """A fit that resumes from a manipulated checkpoint."""
    import torch
    from base_models import small

    from finsa.training import fit

    schedule = config("train.batch_size=8", "train.micro_batch_size=8", "train.epochs=2", "train.patience=null").train

    def learn() -> None:
        rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]} for _ in range(16)]
        model = small().requires_grad_(True)
        fit.fit(
            model=model,
            tokenizer=tokenizer,
            rows=rows,  # type: ignore[arg-type]
            validate=lambda _: {"loss": 1.0, "macro_f1": 0.5},
            train=schedule,
            seed=1,
            folder=tmp_path / "checkpoints",
            record=lambda step, values: None,
        )

    learn()
    kept = sorted((tmp_path / "checkpoints").glob("checkpoint-*"))
    for folder in kept:
        torch.save(Bomb(tmp_path / "gone_off"), folder / name)
        (folder / f"{name}.plain").write_bytes(pickle.dumps(Bomb(tmp_path / "gone_off")))
    with contextlib.suppress(Exception):  # a refusal or a fit: either is right, as long as nothing goes off
        learn()
    assert not (tmp_path / "gone_off").exists()


# ------------------------------------------------------------------------------------------------ foreign code


def test_remote_code_is_off_by_default(config: Compose) -> None:
    for name in catalogue.choices_of("model"):
        words = ["model.path=somewhere"] if name == "local" else []
        assert config(f"model={name}", *words).model.trust_remote_code is False


@pytest.fixture(scope="module")
def hostile(trained: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose record names a model that ships code, and allows it; the code creates a file `ran` here."""
    place = tmp_path_factory.mktemp("hostile")
    shutil.copytree(ROOT / "data" / "tiny", place / "model")
    settings = json.loads((place / "model" / "config.json").read_text(encoding="utf-8"))
    settings["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (place / "model" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    code = (  # a separate class: transformers marks the one that it loads, for the rest of the process
        f"from transformers import Qwen2ForCausalLM\n\nclass Evil(Qwen2ForCausalLM):\n    pass\n\n"
        f"open({str(place / 'ran')!r}, 'w').close()\n"
    )
    (place / "model" / "modeling_evil.py").write_text(code, encoding="utf-8")
    run = Path(shutil.copytree(trained("lora_response"), place / "runs" / "run"))
    values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    values["model"] |= {"trust_remote_code": True, "path": str(place / "model")}
    (run / "config.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return run


# How each stage that reads a run's record names it; {0} is the run's folder, {1} the one above.
READS_A_RUN = {
    "evaluate": ["stage=evaluate", "run={0}"],
    "predict": ["stage=predict", "run={0}", "text='利好'"],
    "export": ["stage=export", "run={0}", "format=merged", "output={2}/export"],
    "push": ["stage=push", "run={0}", "stage.repo=my-org/my-model", "stage.dry_run=true"],
    "rerun": ["stage=rerun", "run={0}"],
    "behave": ["stage=behave", "run={0}"],
    "serve": ["stage=serve", "run={0}", "port=0"],
    "serve latest": ["stage=serve", "run=latest", "port=0", "output_dir={1}"],
    "chain": ["stage=chain", "stage.links={{a: {{stage: evaluate, run: '{0}'}}}}"],
    "moe_joint": ["stage=moe_joint", "stage.experts={{a: '{0}', b: '{0}'}}", "stage.domain_weight=0"],
}


@pytest.mark.parametrize("words", READS_A_RUN.values(), ids=READS_A_RUN)
def test_no_stage_runs_code_that_a_run_folder_allows(
    words: list[str], hostile: Path, config: Compose, tmp_path: Path
) -> None:
    named = [word.format(hostile, hostile.parent, tmp_path) for word in words]
    folder = [f"output_dir={tmp_path}"] * (not any("output_dir" in word for word in named))
    cfg = config(*named, *folder, FEW, "tracking=none", "train=smoke", "train.max_steps=1")
    told = f"^run: {hostile} has model.trust_remote_code=true, so its model ships Python code that would be run"
    with pytest.raises(RunError, match=told):
        nested.run(cfg, Session())
    assert not (hostile.parents[1] / "ran").exists()
    assert not (tmp_path / "export").exists()


def test_every_stage_that_takes_a_run_is_tested() -> None:
    assert {words[0].removeprefix("stage=") for words in READS_A_RUN.values()} >= set(USED_BY["run"])


def test_a_report_of_a_hostile_run_runs_nothing(hostile: Path, config: Compose, tmp_path: Path) -> None:
    assert nested.run(config("stage=report", f"runs={hostile}", f"output={tmp_path}"), Session()).metrics
    assert not (hostile.parents[1] / "ran").exists()


def test_a_command_can_allow_code_of_a_run(hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["stage=rerun", f"run={hostile}", f"output_dir={tmp_path}", "tracking=none"]
    assert _command(*words) == 2
    assert capsys.readouterr().err.endswith(
        "If you trust whoever made the folder, add model.trust_remote_code=true to the command\n"
    )
    assert not (hostile.parents[1] / "ran").exists()
    assert list(tmp_path.iterdir()) == []
    words = ["stage=predict", f"run={hostile}", "text=利好", f"output_dir={tmp_path}", "model.trust_remote_code=true"]
    assert _command(*words) == 0
    (hostile.parents[1] / "ran").unlink()


def _command(*words: str) -> int:
    """Run a command in this process; its exit code."""
    from finsa import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["run.py", *words])
        return cli.run()


@pytest.mark.parametrize(
    ("group", "content"),
    [
        ("model", "defaults: [tiny, _self_]\nname: evil\ntrust_remote_code: true\n"),
        ("experiment", "# @package _global_\nexperiment: evil\nmodel: {trust_remote_code: true}\n"),
        ("experiment", "# @package _global_\nexperiment: evil\nsweep: {model.trust_remote_code: [true]}\n"),
        (
            "experiment",
            "# @package _global_\nexperiment: evil\nhydra: {sweeper: {params: {+model.trust_remote_code: true}}}\n",
        ),
        ("experiment", "# @package _global_\nexperiment: evil\nsweep: {model: [tiny]}\n"),
    ],
    ids=["model", "experiment", "sweep", "sweeper", "harmless"],
)
def test_a_file_alone_cannot_allow_code_that_ships_with_weights(
    group: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(catalogue.CONF, tmp_path / "conf")
    (tmp_path / "conf" / group / "evil.yaml").write_text(content, encoding="utf-8")
    monkeypatch.setattr(catalogue, "CONF", tmp_path / "conf")
    words = command_line.expand([f"{group}=evil"])
    if "trust" not in content:
        command_line.check([word for word in words if word != "-m"])
        return
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code: .*on the command line|to the command"):
        command_line.check([word for word in words if word != "-m"])
    if "sweep" not in content:
        command_line.check([*words, "model.trust_remote_code=true"])


def test_a_chain_cannot_allow_code_for_its_links(config: Compose) -> None:
    from finsa.stages import chain

    cfg = config("stage=chain", "stage.links={a: {stage: train, model: {trust_remote_code: true}}}")
    with pytest.raises(ConfigError, match=r"^stage\.links\.a\.model\.trust_remote_code: true runs Python code"):
        chain.configure(cfg, "a", {}, Session())


# ------------------------------------------------------------------------------------------------ path traversal


@pytest.mark.parametrize("domain", ["../../etc", "a/b", "..", ".hidden", "a\\b", "/etc", "a\x00b"])
def test_a_domain_cannot_be_a_path(domain: str, config: Compose) -> None:
    with pytest.raises(ConfigError, match=r"data\.domain"):
        command_line.check([f"data.domain='{domain}'" if "\x00" not in domain else "data.domain='a\x01b'"])


@pytest.mark.parametrize("group", ["model", "method", "data", "train"])
def test_names_that_form_a_run_folder_cannot_be_paths(group: str) -> None:
    with pytest.raises(ConfigError, match=rf"{group}\.name"):
        command_line.check([f"{group}.name=../../etc"])


def test_a_manifest_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    from finsa.inference import predictor

    (tmp_path / "manifest.json").write_text(json.dumps({"format": "onnx", "tokenizer": "../../other"}))
    with pytest.raises(RunError, match="refers to files outside its folder"):
        predictor.read_manifest(tmp_path)


# ------------------------------------------------------------------------------------------------ secrets


SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_PlantedTokenThatMustNotBeSeen",
    "FINSA_TOKEN": "planted-bearer-token-of-the-service",
    "OPENAI_API_KEY": "sk-planted-key-of-the-endpoint",
    "MY_DB_PASSWORD": "planted-password-of-a-database",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-of-the-cloud",
}


def _run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **SECRETS, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    return commands.run(*words, folder=folder, environment=environment)


def test_secrets_are_written_nowhere(tmp_path: Path) -> None:
    """A run with an offline tracker; all its files and output are searched."""
    short = ["train=smoke", "train.max_steps=2", "stage.compare_base=false", "tracking.mode=offline"]
    done = _run(tmp_path, "method=majority", FEW, *short, "output_dir=out")
    assert done.returncode == 0, done.stderr
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any("wandb" in str(file) for file in files)
    assert any(file.name == "run.json" for file in files)
    for content in [*(file.read_bytes() for file in files), done.stdout.encode(), done.stderr.encode()]:
        for name, value in SECRETS.items():
            assert value.encode() not in content, name


def test_an_error_does_not_repeat_a_secret(tmp_path: Path) -> None:
    """A key given in the wrong place is not repeated."""
    for word in (
        f"train.epochs={SECRETS['OPENAI_API_KEY']}",
        f"stage={SECRETS['FINSA_TOKEN']}",
        f"run={SECRETS['HF_TOKEN']}",
    ):
        done = _run(tmp_path, word)
        assert done.returncode == 2
        assert not any(value in done.stderr + done.stdout for value in SECRETS.values())
        assert "***" in done.stderr or "run is not used by" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [[], ["--debug"]])
def test_a_traceback_repeats_no_secret(flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("FINSA_DEBUG", "0")  # which --debug sets for good
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    error, code = (RunError, 2) if flags else (ValueError, 1)

    def main() -> None:
        raise error(f"cannot send {SECRETS['HF_TOKEN']}")

    assert cli.guard(main, ["run.py", *flags], Session()) == code
    told = capsys.readouterr().err
    assert re.match(rf"(?s)Traceback \(.*\n(finsa.errors.)?{error.__name__}: cannot send \*\*\*\n", told)
    assert SECRETS["HF_TOKEN"] not in told


def test_the_log_of_a_service_repeats_no_secret(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    batcher = Batcher(lambda _: int(SECRETS["HF_TOKEN"]), 4, 0, 8, Metrics())  # type: ignore[arg-type, return-value]
    batcher.start()
    with contextlib.closing(batcher), pytest.raises(ModelFailedError):
        asyncio.run(batcher.answer(["a"]))
    assert "ValueError: invalid literal for int() with base 10: '***'" in caplog.text
    assert SECRETS["HF_TOKEN"] not in caplog.text


def test_short_values_are_not_treated_as_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setenv("SOME_KEY", "long-enough-to-be-one")
    assert safety.masked("true long-enough-to-be-one") == "true ***"
