"""Upload a finished run's model to a repository on the model hub, with its model card."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from finsa.config import PushStage, RunConfig, safety
from finsa.data import hub
from finsa.errors import ConfigError, FinsaError, Problem, RunError
from finsa.evaluation.tables import Table
from finsa.inference import export_formats, predictor
from finsa.inference.predictor import MANIFEST, Record
from finsa.runs import files, provenance
from finsa.runs.run_folder import EXPORTED, Result
from finsa.session import Session

CONFIG, METRICS, ADAPTER = "config.yaml", "metrics.json", "adapter_config.json"
# Names of the files that are uploaded; no other file is. Pickles and code are not among them.
UPLOADED = (
    *("README.md", MANIFEST, EXPORTED, CONFIG, METRICS, ADAPTER, "*.safetensors", "*.safetensors.index.json"),
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.jinja"),
)
WORDS = ("prompt", "labels", "answers")  # entries whose texts are no paths, whatever they begin with
TEXTS = (".md", ".json", ".yaml", ".jinja", ".txt")  # endings of files that are searched for secrets


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Write the model to a temporary folder, check what is in it, and upload it in one commit.

    Raises:
        ConfigError: if the run cannot be written in this form, or contains training rows.
        RunError: if the run's weights have changed, or a file contains a secret.
        FinsaError: if the hub does not answer, or refuses the token, the repository or the files.
    """
    stage = cfg.stage
    assert isinstance(stage, PushStage)
    assert stage.repo is not None
    record = predictor.read(str(cfg.run))
    reason = export_formats.refusal(record, stage.what, "fp32")
    if reason is not None:
        raise ConfigError([Problem("stage.what", reason.replace("format=", "stage.what="))])
    if record.cfg.method.examples is not None:
        text = f"{record.path} has training rows in its prompt (method.examples), and no row is ever uploaded"
        raise ConfigError([Problem("run", text)])
    provenance.require_weights(record.path, record.facts)
    exists = False if stage.dry_run else _require_target(stage)
    place = Path(cfg.output_dir).absolute()
    place.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=files.STAGING, dir=place) as temporary:
        folder = Path(temporary) / "model"
        predictor.announce(record.name)
        _write(record, stage, folder)
        chosen, left = _chosen(folder)
        _show(stage, folder, chosen, left, exists)
        if stage.dry_run:
            print("dry run: nothing was sent; leave out stage.dry_run=true to push")
            return Result("push")
        url = _upload(stage, folder, chosen, stage.message or f"Add {record.name}", exists)
    print(f"pushed: {url}")
    return Result("push")


def _write(record: Record, stage: PushStage, folder: Path) -> None:
    """Write the export with metrics, a card that names the repository, and no path of this machine."""
    from finsa.inference import export, model_cards  # torch takes seconds to import: after the checks

    export.write(record, stage.what, "fp32", folder)
    renderer, hub_id = predictor.renderer_of(record), record.cfg.model.hub_id
    shutil.copy2(record.path / METRICS, folder / METRICS)
    model_cards.write(folder, stage.what, record.cfg, record.path, record.facts, renderer, str(stage.repo))
    written: dict[str, Any] = _portable(yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")))
    if hub_id is not None:  # elsewhere, the base model is found by its name
        written["model"]["path"] = None
    text = yaml.safe_dump(written, allow_unicode=True, sort_keys=False)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    for file in (folder / MANIFEST, folder / EXPORTED, *folder.rglob(ADAPTER)):
        values = _portable(json.loads(file.read_text(encoding="utf-8")))
        if "base_model_name_or_path" in values and hub_id is not None:
            values |= {"base_model_name_or_path": hub_id, "revision": record.cfg.model.revision}
        file.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _portable(value: Any) -> Any:
    """Replace absolute paths, which are private and mean nothing elsewhere, by their last part."""
    if isinstance(value, dict):
        return {key: one if key in WORDS else _portable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_portable(one) for one in value]
    is_path = isinstance(value, str) and (value.startswith("~/") or Path(value).is_absolute())
    return Path(value).name if is_path else value


def _chosen(folder: Path) -> tuple[list[str], list[str]]:
    """The files to upload, and those that are left out, by path relative to the folder.

    Raises:
        RunError: if one of them contains a secret of the environment.
    """
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    chosen = [name for name in names if any(fnmatch(Path(name).name, pattern) for pattern in UPLOADED)]
    for name in chosen:
        text = (folder / name).read_text(encoding="utf-8") if name.endswith(TEXTS) else ""
        if safety.masked(text) != text:
            raise RunError(
                f"{name} contains a secret, the value of an environment variable; nothing was sent. Find it in the "
                "files of the run and remove it"
            )
    return chosen, [name for name in names if name not in chosen]


def _show(stage: PushStage, folder: Path, chosen: list[str], left: list[str], exists: bool) -> None:
    """Print every file with its size, and the target."""
    from huggingface_hub import constants

    sizes = {name: (folder / name).stat().st_size for name in chosen}
    rows = [[name, f"{size:,}"] for name, size in sizes.items()]
    kind = "a repository that exists" if exists else f"a {'private' if stage.private else 'public'} repository"
    caption = f"{len(rows)} files, {sum(sizes.values()):,} bytes"
    Table("Files to push", ["file", "bytes"], rows, caption).show()
    for name in left:
        print(f"left out: {name}")
    print(f"target: {constants.ENDPOINT}/{stage.repo}, {kind}, branch {stage.branch}")


# ------------------------------------------------------------------------------------------------ the hub


def _require_target(stage: PushStage) -> bool:
    """Check network, token and repository before anything is written; returns whether the repository exists.

    Raises:
        FinsaError: with the first problem.
    """
    from huggingface_hub import HfApi, constants, get_token

    reason = hub.unreachable()
    if reason is not None:
        raise FinsaError(f"stage=push: {reason}. Nothing was sent; stage.dry_run=true needs no network")
    if get_token() is None:
        raise FinsaError(f"stage=push: no token for {constants.ENDPOINT}. Log in with `hf auth login`, or set HF_TOKEN")
    try:
        api = HfApi()
        api.whoami()
        exists = api.repo_exists(str(stage.repo))
    except Exception as error:  # of the HTTP library behind huggingface_hub, which differs between its versions
        raise _failure(error, stage, "nothing was sent") from None
    if exists and not stage.exist_ok:
        raise FinsaError(
            f"stage.repo: {constants.ENDPOINT}/{stage.repo} exists already. Choose another name, or push to it with "
            "stage.exist_ok=true: files of the same names are replaced by a new commit, the others stay"
        )
    return exists


def _upload(stage: PushStage, folder: Path, chosen: list[str], message: str, exists: bool) -> str:
    """Create the repository and the branch if they do not exist, and commit the files; returns the address."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api, repo, state = HfApi(), str(stage.repo), "nothing was sent"
    try:
        if not exists:
            api.create_repo(repo, private=stage.private, exist_ok=stage.exist_ok)
            state = "the new repository is still empty; repeat the command with stage.exist_ok=true"
        if stage.branch != "main":
            api.create_branch(repo, branch=stage.branch, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in chosen]
        with hub.progress_shown():
            commit = api.create_commit(repo, operations, commit_message=message, revision=stage.branch)
    except Exception as error:  # for the same reason
        raise _failure(error, stage, state) from None
    return str(commit.commit_url)


def _failure(error: BaseException, stage: PushStage, state: str) -> FinsaError:
    """One message for whatever a request raised."""
    causes = [error]  # an upload in a thread wraps the answer of the hub
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    answers = (getattr(getattr(cause, "response", None), "status_code", None) for cause in causes)
    status = next((one for one in answers if one is not None), None)
    owner = str(stage.repo).split("/")[0]
    reasons = {
        401: "the hub does not accept the token. Log in again with `hf auth login`, or set HF_TOKEN",
        403: f"the token may not write to {stage.repo}. Use a token with write access to {owner}",
        409: f"{stage.repo} has just been created by another process",
    }
    lines = dict.fromkeys((str(cause).strip().splitlines() or [type(cause).__name__])[0] for cause in causes)
    reason = f"{reasons[status]} (HTTP {status})" if status in reasons else ": ".join(lines)
    return FinsaError(f"stage=push: {reason}; {state}")
