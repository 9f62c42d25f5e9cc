"""What a result was made with, for the record: code, versions, base weights, machine, memory."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from finsa.config import ROOT, Encoder, LinearProbe, Model, RunConfig, locate
from finsa.errors import RunError
from finsa.runs import adapter_folders, files, processes

WEIGHTS = ("adapters", "mixture", "model", "baseline")
# Libraries that compute results; with other versions of them a run may come out otherwise.
COMPUTING = (
    *("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "tokenizers"),
    *("numpy", "scipy", "scikit-learn"),
)
PACKAGES = (*COMPUTING, "datasets", "hydra-core", "wandb", "finsa")
# What transformers reads of a model's folder.
MODEL_FILES = (
    *("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.gguf", "*.index.json", "*.py"),
    *("config.json", "generation_config.json", "adapter_config.json", "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "chat_template*"),
)
READ_BY_NUMBER = (".safetensors", ".bin", ".gguf", "tokenizer.json")  # of these, what an adapter is fitted to
WHOLE = 16 << 20  # bytes up to which a file is hashed whole; of larger ones samples are
SAMPLE, SAMPLES = 4096, 1024  # bytes of a sample, and how many of a file that is not made of tensors


def peak_memory() -> int:
    """Peak resident memory of this process, in bytes.

    Linux's own figure first: to ``getrusage`` a process begins with what its parent had when it was forked.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return 1024 * int(re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[0])
    except (OSError, IndexError):
        pass
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory() -> int:
    """Resident memory of this process now, in bytes."""
    import psutil  # a run needs it, a wrong option does not

    return int(psutil.Process().memory_info().rss)


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a run's weights, by their paths within its folder; Markdown beside them is left out."""
    return {
        f"{part}/{name}": digest
        for part in WEIGHTS
        if (folder / part).is_dir()
        for name, digest in files.digests(folder / part).items()
        if not name.endswith(".md")
    }


def require_weights(folder: Path, facts: Mapping[str, Any]) -> None:
    """Check that a run's weights are those that it wrote.

    Args:
        folder: of the run.
        facts: of its ``run.json``; a run of an older version did not note them.

    Raises:
        RunError: naming a file that is gone or another.
    """
    noted: dict[str, str] = facts.get("weights") or {}
    for name, digest in noted.items():
        file = folder / name
        if not file.is_file() or files.digest(file) != digest:
            state = "another file than the run wrote (its checksum in run.json differs)" if file.is_file() else "gone"
            raise RunError(f"run: {file} is {state}; restore it from a copy, or repeat the run's command")


# ------------------------------------------------------------------------------------------------ base weights


def base_weights(cfg: RunConfig) -> dict[str, dict[str, str]]:
    """Fingerprints of the files that a run starts from: by what they are, then by file, or the hub's commit.

    Weights that are drawn at random have none: seed and architecture are in the configuration.
    """
    if isinstance(cfg.method.baseline, Encoder | LinearProbe):
        sources: dict[str, Model | Encoder | LinearProbe] = {"encoder": cfg.method.baseline}
    elif cfg.method.baseline is not None:
        return {}
    else:
        sources = {"model": cfg.model}
    found = {
        what: files_of(source)
        for what, source in sources.items()
        if isinstance(source, LinearProbe) or source.weights == "pretrained"  # a probe has no random weights
    }
    if "model" in found and cfg.model.tokenizer is not None:
        found["tokenizer"] = _source(cfg.model.tokenizer, None, "main")
    return found


def files_of(source: Model | Encoder | LinearProbe) -> dict[str, str]:
    """Fingerprints of the files of a model with pretrained weights."""
    return _source(source.path, source.hub_id, source.revision)


def adapter_weights(cfg: RunConfig) -> dict[str, dict[str, str]]:
    """The same of the saved adapter that training starts from; once it is trained, a run no longer needs it."""
    adapter = cfg.method.adapter
    if adapter is None or adapter.init is None:
        return {}
    return {"adapter": model_files(adapter_folders.read(adapter.init).folder)}


def _source(path: str | None, hub_id: str | None, revision: str) -> dict[str, str]:
    if path is not None and locate(path).exists():
        return model_files(locate(path))
    return {"commit": _commit(path or str(hub_id), "main" if path else revision)}


def _commit(hub_id: str, revision: str) -> str:
    """The commit of a revision: the revision itself, or what this machine has of a branch."""
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import try_to_load_from_cache  # seldom needed, and it takes its time

    try:
        found = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    except ValueError:  # no name that the hub could have
        return "unknown"
    return Path(found).parent.name if isinstance(found, str) else "unknown"


def model_files(path: Path) -> dict[str, str]:
    """Fingerprints of the files of a model's folder that transformers reads, or of one file."""
    if path.is_file():
        return {path.name: fingerprint(path)}
    names = {file for pattern in MODEL_FILES for file in path.glob(pattern) if file.is_file()}
    return {file.name: fingerprint(file) for file in sorted(names)}


def fingerprint(file: Path) -> str:
    """Hash of a file's size and content, 16 hexadecimal digits; of a large file, of its header and samples.

    Samples are taken from the middle of every tensor: training changes all of a tensor, so that other weights are seen
    after reading a few megabytes of many gigabytes.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= WHOLE:
            digest.update(stream.read())
        else:
            digest.update(stream.read(SAMPLE))
            for place in sorted({*_tensors(stream, size), size - SAMPLE}):
                stream.seek(place)
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()[:16]


def _tensors(stream: BinaryIO, size: int) -> list[int]:
    """Where to take samples: in the middle of each tensor of a safetensors file, elsewhere at even distances."""
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if length < min(size, 100 << 20):
        try:
            header = json.loads(stream.read(length))
            spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
            return [8 + length + max(start, (start + end - SAMPLE) // 2) for start, end in spans]
        except (ValueError, LookupError, TypeError, AttributeError):  # another format
            pass
    return [number * size // SAMPLES for number in range(SAMPLES)]


def require_base(path: Path, cfg: RunConfig, facts: Mapping[str, Any]) -> None:
    """Check that the weights below a run's adapter or head are those that it was trained on.

    Args:
        path: of the run.
        cfg: of the run.
        facts: of its ``run.json``; a run of an older version did not note them.

    Raises:
        RunError: naming a file that is another one.
    """
    for what, noted in (facts.get("base_weights") or {}).items():
        now = base_weights(cfg).get(what, {})
        for name in sorted(noted.keys() & now.keys()):
            if name.endswith(READ_BY_NUMBER) and noted[name] != now[name]:
                raise RunError(
                    f"run: {path} was trained on another base: {name} in {_place(cfg, what)} has changed since "
                    f"(fingerprint {noted[name]}, now {now[name]}). Restore it, or repeat the run's command"
                )


def _place(cfg: RunConfig, what: str) -> str:
    section: Any = cfg.method.baseline if what == "encoder" else cfg.model
    place = section.tokenizer if what == "tokenizer" else section.path or section.hub_id
    return str(locate(place)) if locate(place).exists() else str(place)


# ------------------------------------------------------------------------------------------------ code and versions


@cache
def code() -> str:
    """Hash of finsa's own source code, 16 hexadecimal digits, whatever git says of it."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "finsa").rglob("*.py")):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def changes(facts: Mapping[str, Any]) -> list[str]:
    """In which code and libraries, of those that can change a result, a record differs from this process."""
    found = list(facts.get("resumed_with", ()))
    versions = facts.get("versions", {})
    if facts.get("code") != code():
        was, now = facts.get("git_commit") or versions.get("finsa"), _git("rev-parse", "HEAD") or _version("finsa")
        note = ", with other changes" if was == now and "code" in facts else ""
        found.append(f"finsa's code: {str(was)[:12]}, now {str(now)[:12]}{note}")
    libraries = {name: _version(name) for name in COMPUTING if name in versions}
    return found + [f"{name}: {versions[name]}, now {one}" for name, one in libraries.items() if versions[name] != one]


def of(cfg: RunConfig) -> dict[str, Any]:
    """What a result was made with: code, versions, machine, number of processes, seed."""
    return {
        "stage": cfg.stage.name,
        "started": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "pid": os.getpid(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": _dirty(),
        "code": code(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "processes": processes.world_size(),
        "versions": {name: _version(name) for name in PACKAGES},
        "seed": cfg.seed,
        "error": None,
    }


def _dirty() -> bool:
    """Whether a file that is tracked was changed, or one that git does not know can define a run: code, a choice."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return bool(changed or _git("ls-files", "--others", "--", "conf/*.yaml", "finsa/*.py", "run.py"))


def _git(*words: str) -> str | None:
    if not (ROOT / ".git").exists():  # installed: a repository around it would be another one
        return None
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
