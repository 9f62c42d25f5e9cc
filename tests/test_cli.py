"""The command as a user types it: messages, exit codes, no leftover files."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest

from finsa import cli
from finsa.config import ROOT, catalogue, command_line
from finsa.errors import ConfigError
from finsa.session import Session


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return commands.run(*words, folder=folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["stage=moe_joint", "stage.missing=error"],
            "no finished run has trained news, forum. Train with stage.missing",
        ),
        (["stage=moe_joint", "data.columns.domain=null"], "the training rows have no domain, and a mixture needs two"),
        (["stage=moe_joint", "method=zero_shot"], "stage=moe_joint mixes adapters, and method=zero_shot has none"),
        (["stage=chain"], "stage.links: names no stage"),
        (["model=glm9b", "method=lora_expert", "data=finnf_news"], "data=finnf_news is the news part of FinNF"),
        (["data=table"], "data.files: data=table needs files"),
        (["data=table", "data.files=nowhere.csv"], "no such file or folder"),
        (["data.labels=[利空,利好]"], "1,343 rows have an unknown label: '中性' (1,343 rows); known are 利空, 利好"),
        (["data.columns.text=txt"], "has no column 'txt'; it has id, text, label, domain. Did you mean"),
        (["stage=evaluate", "run=nowhere"], "is not a run folder"),
        (["method=lroa"], "there is no 'lroa'. Did you mean 'lora'?"),
        (["train.batch_size=100000", "train.micro_batch_size=10"], "is more than the 3608 training rows"),
        (["data.max_length=10"], "10 leaves no room for text"),
    ],
)
def test_user_errors_are_one_message(tmp_path: Path, words: list[str], message: str) -> None:
    done = command(tmp_path, *words, "tracking=none")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_multirun_flag_may_be_anywhere(tmp_path: Path) -> None:
    words = ["stage=check", "-m", "method=zero_shot,lora", "tracking=none", f"output_dir={tmp_path}"]
    done = command(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trainable of") == 2


def test_flags_with_a_value_may_be_between_overrides(tmp_path: Path) -> None:
    done = command(tmp_path, "method=lora", "--cfg", "job", "seed=7")
    assert done.returncode == 0
    assert "\nseed: 7\n" in done.stdout
    assert "\n  name: lora\n" in done.stdout


def test_debug_shows_the_traceback_too(tmp_path: Path) -> None:
    done = command(tmp_path, "method=lroa", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "Did you mean 'lora'?" in done.stderr


def test_help_lists_the_groups(tmp_path: Path) -> None:
    done = command(tmp_path, "--help")
    assert done.returncode == 0
    assert all(group in done.stdout for group in catalogue.groups())
    whole = [
        "import sys; sys.argv[1:] = ['--help']",
        "from finsa import cli, session",
        "cli.hydra_main(session.Session())()",
    ]
    by_hydra = subprocess.run([sys.executable, "-c", "\n".join(whole)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.rstrip() == by_hydra.stdout.rstrip()


def test_help_shows_commands_that_pass_the_check_and_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['run.py', '--help']\nfrom finsa.cli import run\ntry:\n    run()\n"
        "except SystemExit:\n    pass\nprint(sorted({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    shown = [
        re.split(r"  +", line.strip())[0] for line in done.stdout.splitlines() if line.startswith("  python run.py")
    ]
    assert len(shown) == 11
    for line in shown:
        words = shlex.split(re.sub(r"<[^<>]*>", "placeholder", line))[2:]
        command_line.check([word for word in words if not word.startswith("-")])
    assert max(len(line) for line in done.stdout.splitlines() if ": " not in line) <= 110


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_completion_in_a_real_bash() -> None:
    """Install it as documented, then let bash complete partial commands."""
    offered = {
        "python run.py method=lora_resp": {"method=lora_response", "method=lora_response_downsample"},
        "python run.py stage=im": {"stage=import"},
        "python run.py train.ep": {"train.epochs="},
    }
    script = f"""
        export PATH={Path(sys.executable).parent}:$PATH
        cd {ROOT}
        eval "$(python run.py --shell-completion install=bash)"
        complete -p python
        for COMP_LINE in {shlex.join(offered)}; do
            export COMP_LINE COMP_POINT=${{#COMP_LINE}} COMP_CWORD=2
            hydra_bash_completion
            echo "${{COMPREPLY[*]}}"
        done
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    registered, *found = done.stdout.splitlines()
    assert "hydra_bash_completion python" in registered
    assert [set(words.split()) for words in found] == list(offered.values())


def test_a_user_config_folder_must_exist(tmp_path: Path) -> None:
    done = command(tmp_path, "--config-dir", "nowhere", "method=lora")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config-dir: no such folder: nowhere. It must contain files as conf/ does")


def test_a_wrong_value_in_a_user_config_folder_is_reported_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "own" / "data").mkdir(parents=True)
    file = tmp_path / "own" / "data" / "mine.yaml"
    file.write_text("# Mine.\ndefaults: [sample, _self_]\nname: mine\nmax_length: long\n", encoding="utf-8")
    done = command(tmp_path, "-m", "--config-dir=own", "data=mine", "seed=1,2")
    assert done.returncode == 2
    assert str(file) in done.stderr
    assert "data.max_length" in done.stderr


def test_several_problems_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        command_line.check(["method=lroa", "train.epochs=x"])
    shown = cli.describe(caught.value)
    assert shown.startswith("error: 2 problems\n  method: ")
    assert "\n  train.epochs: " in shown


def test_every_stage_has_a_configuration_file_and_vice_versa() -> None:
    assert set(cli.available_stages()) == set(catalogue.choices_of("stage"))


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("method=lora", "python run.py method=lora resume=true"),
        ("method=lora resume=true", "python run.py method=lora resume=true"),
        ("stage=chain experiment=finsa_moe", "python run.py stage=chain experiment=finsa_moe resume=true"),
        ("-m seed=1,2", "python run.py -m seed=1,2"),
        ("stage=predict run=x", "python run.py stage=predict run=x"),
    ],
)
def test_command_that_resumes(words: str, command: str) -> None:
    assert cli.resuming(["run.py", *words.split()], Session(run_folders=[Path("x")])) == command


def test_an_experiment_that_is_a_sweep_resumes_by_itself() -> None:
    typed, session = ["run.py", "experiment=aidf_ablation", "model=tiny"], Session(run_folders=[Path("x")])
    prepared, _ = cli.prepare(typed[1:])
    assert cli.resuming(typed, session, prepared) == "python run.py experiment=aidf_ablation model=tiny"


@pytest.mark.parametrize(
    ("program", "environment", "start"),
    [
        ("run.py", {}, "python run.py"),
        ("/a/b/run.py", {}, "python /a/b/run.py"),
        ("/venv/bin/finsa", {}, "/venv/bin/finsa"),
        ("/lib/finsa/__main__.py", {}, "python -m finsa"),
        ("run.py", {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "torchrun --nproc-per-node 2 run.py"),
    ],
)
def test_the_program_is_started_as_before(
    program: str, environment: dict[str, str], start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.resuming([program, "seed=1"], Session()) == f"{start} seed=1"


@pytest.mark.parametrize("words", ["method=lora", "method=lora resume=true"])
def test_a_run_without_a_folder_yet_is_repeated_instead(words: str) -> None:
    """There is nothing to resume, or only an earlier run that would be resumed by mistake."""
    assert cli.resuming(["run.py", *words.split()], Session()) == f"python run.py {words}"


@pytest.mark.parametrize(("opened", "more"), [([], ""), ([Path("x")], " resume=true")])
def test_a_signal_ends_with_the_command_that_resumes(
    capsys: pytest.CaptureFixture[str], opened: list[Path], more: str
) -> None:
    def main() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    assert cli.guard(main, ["run.py", "train=smoke"], Session(run_folders=opened)) == 143
    assert capsys.readouterr().err == f"stopped by SIGTERM. Continue with: python run.py train=smoke{more}\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_interrupt_without_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    assert cli.guard(main, ["run.py", "train=smoke"], Session()) == 130
    assert capsys.readouterr().err == "interrupted. Continue with: python run.py train=smoke\n"


def test_out_of_memory_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise MemoryError

    assert cli.guard(main, ["run.py", "train=smoke"], Session()) == 2
    assert "error: out of memory. Set train.micro_batch_size" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["method=lroa"], ["train.epochs=x"], ["train.memory=16"]])
def test_nothing_heavy_is_imported_for_help_and_wrong_options(words: list[str]) -> None:
    heavy = (
        "numpy",
        "torch",
        "transformers",
        "trl",
        "datasets",
        "peft",
        "polars",
        "scipy",
        "sklearn",
        "wandb",
        "mlflow",
        "swanlab",
        "trackio",
        "tensorboard",
        "matplotlib",
    )
    code = (
        f"import sys, runpy; sys.argv[1:] = {words}\n"
        "try: runpy.run_path('run.py', run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        f"print(code or 0, [name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{0 if words == ['--help'] else 2} []"
