"""The provenance of a result: code, library versions, base weights, machine, memory."""

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
# Libraries that compute results, which may change with their versions.
COMPUTING = (
    *("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "tokenizers"),
    *("numpy", "scipy", "scikit-learn"),
)
PACKAGES = (*COMPUTING, "datasets", "hydra-core", "wandb", "finsa")
# Files that transformers reads from the folder of a model.
MODEL_FILES = (
    *("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.gguf", "*.index.json", "*.py"),
    *("config.json", "generation_config.json", "adapter_config.json", "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "chat_template*"),
)
NUMERIC = (".safetensors", ".bin", ".gguf", "tokenizer.json")  # of these, the files that an adapter depends on
WHOLE = 16 << 20  # bytes up to which a file is hashed completely; of larger files, samples are hashed
SAMPLE, SAMPLES = 4096, 1024  # bytes per sample, and number of samples of a file without tensors


def peak_memory() -> int:
    """Peak resident memory of this process, in bytes.

    Linux's VmHWM is preferred: the peak of ``getrusage`` includes that of the parent before the fork.
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
    """Current resident memory of this process, in bytes."""
    import psutil  # a run needs it, a wrong option does not

    return int(psutil.Process().memory_info().rss)


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of the weight files of a run, by path relative to its folder; without the model cards next to them."""
    return {
        f"{part}/{name}": digest
        for part in WEIGHTS
        if (folder / part).is_dir()
        for name, digest in files.digests(folder / part).items()
        if not name.endswith(".md")
    }


def require_weights(folder: Path, facts: Mapping[str, Any]) -> None:
    """Check that the weights of a run are unchanged.

    Args:
        folder: of the run.
        facts: contents of its ``run.json``; older versions did not record checksums.

    Raises:
        RunError: with the first file that is missing or different.
    """
    recorded: dict[str, str] = facts.get("weights") or {}
    for name, digest in recorded.items():
        file = folder / name
        if not file.is_file() or files.digest(file) != digest:
            state = "has changed since the run (its checksum differs from run.json)" if file.is_file() else "is missing"
            raise RunError(f"run: {file} {state}; restore it from a copy, or repeat the command of the run")


# ------------------------------------------------------------------------------------------------ base weights


def base_weights(cfg: RunConfig) -> dict[str, dict[str, str]]:
    """Fingerprints of the pretrained weights and tokenizer of a run: by role, then by file; or the commit on the hub.

    Random weights have none: seed and architecture are in the configuration.
    """
    if isinstance(cfg.method.baseline, Encoder | LinearProbe):
        sources: dict[str, Model | Encoder | LinearProbe] = {"encoder": cfg.method.baseline}
    elif cfg.method.baseline is not None:
        return {}
    else:
        sources = {"model": cfg.model}
    fingerprints = {
        role: files_of(source)
        for role, source in sources.items()
        if isinstance(source, LinearProbe) or source.weights == "pretrained"  # a probe has no random weights
    }
    if "model" in fingerprints and cfg.model.tokenizer is not None:
        fingerprints["tokenizer"] = _source(cfg.model.tokenizer, None, "main")
    return fingerprints


def files_of(source: Model | Encoder | LinearProbe) -> dict[str, str]:
    """Fingerprints of the files of a model with pretrained weights."""
    return _source(source.path, source.hub_id, source.revision)


def adapter_weights(cfg: RunConfig) -> dict[str, dict[str, str]]:
    """Fingerprints of the saved adapter that training starts from; a finished run no longer needs it."""
    adapter = cfg.method.adapter
    if adapter is None or adapter.init is None:
        return {}
    return {"adapter": model_files(adapter_folders.read(adapter.init).folder)}


def _source(path: str | None, hub_id: str | None, revision: str) -> dict[str, str]:
    if path is not None and locate(path).exists():
        return model_files(locate(path))
    return {"commit": _commit(path or str(hub_id), "main" if path else revision)}


def _commit(hub_id: str, revision: str) -> str:
    """The commit of a revision: the revision itself, or the cached commit of a branch."""
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import try_to_load_from_cache  # rarely needed, and slow to import

    try:
        found = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    except ValueError:  # not a valid repository name
        return "unknown"
    return Path(found).parent.name if isinstance(found, str) else "unknown"


def model_files(path: Path) -> dict[str, str]:
    """Fingerprints of the files in a model folder that transformers reads; or of a single file."""
    if path.is_file():
        return {path.name: fingerprint(path)}
    names = {file for pattern in MODEL_FILES for file in path.glob(pattern) if file.is_file()}
    return {file.name: fingerprint(file) for file in sorted(names)}


def fingerprint(file: Path) -> str:
    """Hash of the size and content of a file, 16 hexadecimal digits; of a large file, only header and samples are read.

    Samples are taken from the middle of every tensor. Training changes a tensor everywhere, so a few megabytes out of
    many gigabytes show whether weights differ.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= WHOLE:
            digest.update(stream.read())
        else:
            digest.update(stream.read(SAMPLE))
            for offset in sorted({*_sample_offsets(stream, size), size - SAMPLE}):
                stream.seek(offset)
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()[:16]


def _sample_offsets(stream: BinaryIO, size: int) -> list[int]:
    """Offsets of the samples: the middle of each tensor of a safetensors file; in other files, evenly spaced."""
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
    """Check that the base weights of an adapter or head are those that it was trained on.

    Args:
        path: of the run.
        cfg: of the run.
        facts: contents of its ``run.json``; older versions did not record fingerprints.

    Raises:
        RunError: with the first file that differs.
    """
    for role, recorded in (facts.get("base_weights") or {}).items():
        now = base_weights(cfg).get(role, {})
        for name in sorted(recorded.keys() & now.keys()):
            if name.endswith(NUMERIC) and recorded[name] != now[name]:
                section: Any = cfg.method.baseline if role == "encoder" else cfg.model
                source = section.tokenizer if role == "tokenizer" else section.path or section.hub_id
                place = locate(source) if locate(source).exists() else source
                raise RunError(
                    f"run: {path} was trained on a different base model: {name} in {place} has changed since "
                    f"(fingerprint {recorded[name]}, now {now[name]}). Restore it, or repeat the command of the run"
                )


# ------------------------------------------------------------------------------------------------ code and versions


@cache
def code() -> str:
    """Hash of the source code of finsa, 16 hexadecimal digits, committed or not."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "finsa").rglob("*.py")):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def environment() -> str:
    """The source code, library versions and processor that results depend on, apart from their inputs."""
    return f"{code()} {[(name, _version(name)) for name in COMPUTING]} {platform.machine()}"


def changes(facts: Mapping[str, Any]) -> list[str]:
    """List the differences in code and numerical libraries between a run and this process.

    Args:
        facts: contents of the run's ``run.json``.
    """
    differences = list(facts.get("resumed_with", ()))
    versions = facts.get("versions", {})
    if facts.get("code") != code():
        was, now = facts.get("git_commit") or versions.get("finsa"), _git("rev-parse", "HEAD") or _version("finsa")
        note = ", with other changes" if was == now and "code" in facts else ""
        differences.append(f"finsa's code: {str(was)[:12]}, now {str(now)[:12]}{note}")
    installed = {name: _version(name) for name in COMPUTING if name in versions}
    return differences + [
        f"{name}: {versions[name]}, now {version}" for name, version in installed.items() if versions[name] != version
    ]


def of(cfg: RunConfig) -> dict[str, Any]:
    """The provenance of a run that starts now: code, versions, machine, number of processes, seed."""
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
    """Whether there are uncommitted changes, or untracked code or configuration files."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return bool(changed or _git("ls-files", "--others", "--", "conf/*.yaml", "finsa/*.py", "run.py"))


def _git(*words: str) -> str | None:
    if not (ROOT / ".git").exists():  # installed: a repository around it would be a different one
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
