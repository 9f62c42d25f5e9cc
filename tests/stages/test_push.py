"""A pushed repository has exactly the files of the run, against a real server; whatever goes wrong is one message."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
import yaml
from hub_server import Hub

from finsa.config import ROOT, RunConfig
from finsa.errors import ConfigError, FinsaError
from finsa.inference import predictor
from finsa.stages import push

Compose = Callable[..., RunConfig]
Trained = Callable[..., Path]
# huggingface_hub sends files by an argument that httpx2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
REPO = "my-org/my-model"
PUSH = ("stage=push", f"stage.repo={REPO}")
TEXTS = ["公司上半年净利润同比增长三成", "大股东减持，股价跌停"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server.serving(Hub()) as served:
        _use(monkeypatch, served.endpoint)
        yield served


def _use(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Let huggingface_hub of this process use a hub; without hf_xet, it uploads by LFS."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """A copy of a run, in which other files lie next to the weights."""
    folder = Path(shutil.copytree(trained("lora_response"), tmp_path / "run"))
    (folder / "adapters" / "default" / ".env").write_text("KEY=secret-of-somebody", encoding="utf-8")
    (folder / "adapters" / "default" / "train.csv").write_text("text,label\n", encoding="utf-8")
    return folder


def _push(config: Compose, run: Path, tmp_path: Path, *words: str) -> None:
    push.run(config(*PUSH, f"run={run}", f"output_dir={tmp_path / 'outputs'}", *words))
    assert list((tmp_path / "outputs").iterdir()) == []


def _digests(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def test_the_bytes_of_the_run_arrive_and_nothing_else(hub: Hub, config: Compose, run: Path, tmp_path: Path) -> None:
    _push(config, run, tmp_path, "stage.message=first version")
    sent, here = hub.files(REPO), run / "adapters" / "default"
    assert sorted(sent) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "config.yaml"),
        *("exported_run.json", "manifest.json", "metrics.json", "tokenizer.json", "tokenizer_config.json"),
    ]
    same = {"adapter_model.safetensors": here, "metrics.json": run}
    same |= dict.fromkeys(("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"), run / "tokenizer")
    expected = {name: (folder / name).read_bytes() for name, folder in same.items()}
    assert _digests({name: sent[name] for name in same}) == _digests(expected)
    assert hub.repositories[REPO]["visibility"] == "private"
    assert [one["summary"] for one in hub.commits] == ["first version"]
    calls = ("/preupload/main", "/lfs/objects/batch", "/verify", "/commit/main")
    assert all(any(call in line for line in hub.asked) for call in calls)


def test_no_path_of_this_machine_and_no_row_is_sent(hub: Hub, config: Compose, run: Path, tmp_path: Path) -> None:
    _push(config, run, tmp_path)
    rows = [json.loads(line)["text"] for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    for name, content in hub.files(REPO).items():
        if not name.endswith((".safetensors", "tokenizer.json")):
            text = content.decode()
            assert str(tmp_path) not in text, name
            assert str(ROOT) not in text, name
            assert "secret-of-somebody" not in text
            assert not [row for row in rows if row in text], name


def test_paths_are_shortened_and_prompts_are_not() -> None:
    words = {"prompt": "/{text}/", "labels": {"/up": "/up"}, "answers": ["/{label}"]}
    paths = {"files": ["/home/me/rows.csv", "~/rows.csv"], "path": {"a": "/home/me/base"}, "other": "data/tiny", "n": 1}
    short = {"files": ["rows.csv", "rows.csv"], "path": {"a": "base"}, "other": "data/tiny", "n": 1}
    assert push._portable({**words, **paths}) == {**words, **short}


def test_the_card_names_the_repository_and_the_scores(hub: Hub, config: Compose, run: Path, tmp_path: Path) -> None:
    _push(config, run, tmp_path)
    card = hub.files(REPO)["README.md"].decode()
    found = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["test"]
    assert f"| macro-F1 | {found['macro_f1']:.4f} |" in card
    assert f'AutoTokenizer.from_pretrained("{REPO}")' in card
    assert re.search(rf'PeftModel\.from_pretrained\(.*, "{REPO}"\)\.eval\(\)', card)
    assert f"hf download {REPO} --local-dir <this folder>\n" in card
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "peft"


def test_a_downloaded_repository_predicts_as_the_run(hub: Hub, config: Compose, run: Path, tmp_path: Path) -> None:
    _push(config, run, tmp_path)
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for name, content in hub.files(REPO).items():
        (downloaded / name).write_bytes(content)
    ours, theirs = (predictor.restore(str(folder), 4096)(TEXTS) for folder in (run, downloaded))
    assert abs(ours.probs - theirs.probs).max() < 1e-6


def test_merged_weights_are_pushed_to_a_branch(hub: Hub, config: Compose, run: Path, tmp_path: Path) -> None:
    _push(config, run, tmp_path, "stage.what=merged", "stage.branch=v1/merged", "stage.private=false")
    sent = hub.files(REPO, "v1/merged")
    assert hub.files(REPO) == {}
    assert hub.repositories[REPO]["visibility"] == "public"
    assert "model.safetensors" in sent
    assert "adapter_model.safetensors" not in sent
    assert sent["README.md"].decode().count(f'from_pretrained("{REPO}")') == 2


def test_a_dry_run_lists_everything_and_sends_nothing(
    hub: Hub, config: Compose, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _push(config, run, tmp_path, "stage.dry_run=true")
    assert hub.asked == []
    shown = capsys.readouterr().out
    size = (run / "adapters" / "default" / "adapter_model.safetensors").stat().st_size
    assert re.search(rf"adapter_model\.safetensors │ +{size:,} ", shown)
    assert "left out: .env\nleft out: train.csv\n" in shown
    assert f"target: {hub.endpoint}/{REPO}, a private repository, branch main\ndry run: nothing was sent" in shown


def test_a_repository_that_exists_is_kept(hub: Hub, config: Compose, run: Path, tmp_path: Path) -> None:
    hub.add(REPO, {"notes.txt": b"mine"})
    with pytest.raises(FinsaError, match=rf"{REPO} exists already\. Choose another name, .*stage\.exist_ok=true"):
        push.run(config(*PUSH, f"run={run}", f"output_dir={tmp_path / 'outputs'}"))
    assert hub.files(REPO) == {"notes.txt": b"mine"}
    _push(config, run, tmp_path, "stage.exist_ok=true")
    assert hub.files(REPO)["notes.txt"] == b"mine"
    assert "adapter_model.safetensors" in hub.files(REPO)
    assert "POST /api/repos/create" not in hub.asked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token": "another"}, r"the hub does not accept the token\. .* \(HTTP 401\); nothing was sent"),
        ({"forbidden": ("my-org",)}, r"the token may not write to my-org/my-model\. .* \(HTTP 403\); nothing was sent"),
        ({"fails": "/commit/"}, r".*500.*; the new repository is still empty; repeat .* with stage\.exist_ok=true"),
    ],
)
def test_a_refused_push_is_one_message(
    hub: Hub, config: Compose, run: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    vars(hub).update(change)
    with pytest.raises(FinsaError, match=f"^stage=push: {message}$") as caught:
        push.run(config(*PUSH, f"run={run}", f"output_dir={tmp_path / 'outputs'}"))
    assert "hf_writes" not in str(caught.value)
    assert not hub.commits or change.get("fails")
    hub.fails, hub.forbidden, hub.token = "", (), "hf_writes"
    _push(config, run, tmp_path, "stage.exist_ok=true")
    assert "README.md" in hub.files(REPO)


def test_without_token_network_or_offline_nothing_is_written(
    hub: Hub, config: Compose, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    def refused(message: str) -> None:
        with pytest.raises(FinsaError, match=message):
            push.run(config(*PUSH, f"run={run}", f"output_dir={tmp_path / 'outputs'}"))
        assert not (tmp_path / "outputs").exists()

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    refused("no token for http.*Log in with `hf auth login`, or set HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE=1 forbids network access. Nothing was sent")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("http://127.0.0.1:9 does not answer: .*refused. Nothing was sent; stage.dry_run=true needs no network")
    assert hub.asked == ["HEAD /"]


def test_a_secret_in_a_file_is_never_sent(
    hub: Hub, config: Compose, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "key-0123456789")
    file = run / "config.yaml"
    text = file.read_text(encoding="utf-8").replace("experiment: null", "experiment: key-0123456789")
    assert "key-0123456789" in text
    file.write_text(text, encoding="utf-8")
    with pytest.raises(FinsaError, match=r"^config\.yaml contains a secret") as caught:
        _push(config, run, tmp_path)
    assert "key-0123456789" not in str(caught.value)
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("tfidf_lr", (), r"method=tfidf_lr is not a language model; predict and serve read its run folder"),
        ("full", (), r"method=full trains no adapter; choose stage\.what=merged"),
        ("few_shot", ("stage.what=merged",), r"has training rows in its prompt \(method\.examples\)"),
    ],
)
def test_a_run_that_cannot_be_pushed_is_refused_before_the_hub_is_asked(
    hub: Hub, config: Compose, trained: Trained, method: str, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        push.run(config(*PUSH, f"run={trained(method)}", *words))
    assert hub.asked == []


@pytest.mark.parametrize("branch", ["a..b", "-x", ".x", "a/.b", "v1.", "v1.lock", "a b"])
def test_an_invalid_name_of_a_branch_is_refused(config: Compose, branch: str) -> None:
    with pytest.raises(ConfigError, match=r"stage\.branch: "):
        config("stage=push", "run=somewhere", f"stage.repo={REPO}", f"stage.branch='{branch}'")


@pytest.mark.parametrize("repo", ["my-model", "a/b/c", "组织/model", "org/mo del", "org/a--b", "org/a.git", "org/.a"])
def test_an_invalid_name_of_a_repository_is_refused(config: Compose, repo: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    with pytest.raises(ConfigError, match=r"stage\.repo: needs <owner>/<name>, each of ASCII letters"):
        config("stage=push", "run=somewhere", f"stage.repo='{repo}'")
    if repo.count("/") == 1:
        with pytest.raises(HFValidationError):
            validate_repo_id(repo)


def test_a_push_needs_a_run_and_a_repository(config: Compose) -> None:
    for words in (("run=somewhere",), (f"stage.repo={REPO}",)):
        with pytest.raises(ConfigError, match=r"stage=push needs run=<folder> stage\.repo=<owner>/<name>"):
            config("stage=push", *words)


def test_the_command_reports_an_unfinished_run_and_pushes_a_finished_one(hub: Hub, run: Path, tmp_path: Path) -> None:
    """A process of its own: the address of the hub and the token come from the environment, and files go by Xet."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.endpoint}
    env |= {"HF_XET_CLIENT_SHARD_API_VERSION": "1", "HF_HOME": str(tmp_path / "hf")}
    words = [sys.executable, str(ROOT / "run.py"), *PUSH, f"run={run}", f"output_dir={tmp_path / 'outputs'}"]
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps({**facts, "status": "failed"}), encoding="utf-8")
    failed = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert (failed.returncode, hub.asked) == (2, [])
    assert re.fullmatch(r"error: run: .* is failed, not complete .*\n", failed.stderr)
    (run / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"pushed: {hub.endpoint}/{REPO}/commit/{hub_server.COMMIT}\n" in done.stdout
    weights = (run / "adapters" / "default" / "adapter_model.safetensors").read_bytes()
    assert hub.files(REPO)["adapter_model.safetensors"].decode() == hashlib.sha256(weights).hexdigest()
    assert hub.chunked > 0.8 * len(weights)
    assert not [line for line in hub.asked if "telemetry" in line or "/lfs/" in line]
