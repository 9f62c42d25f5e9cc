"""The hub of models and data sets: whether it is reachable, and the contents of its cache.

huggingface_hub repeats every refused request five times, over half a minute, and logs each attempt. So one request is
sent here first, and if the hub does not answer, the libraries use their caches only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

TIMEOUT = 10.0  # seconds, as in huggingface_hub


def unreachable() -> str | None:
    """Send one request to the hub.

    Returns:
        Why it cannot be reached; None if it answers, with any status.
    """
    from huggingface_hub import constants, get_session, is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE=1 forbids network access"
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # of the HTTP library behind huggingface_hub, which differs between its versions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{constants.ENDPOINT} does not answer: {reason}"
    return None


def refusal(source: str) -> str | None:
    """Why a source cannot be downloaded; None for a local folder, or if the hub answers."""
    return None if Path(source).exists() else unreachable()


@contextmanager
def cache_alone(refused: str | None) -> Iterator[None]:
    """Restrict the libraries to their caches, if the hub does not answer.

    This is their offline mode, switched on temporarily: some of their requests ignore ``local_files_only``.

    Args:
        refused: from `refusal`; None changes nothing.
    """
    from huggingface_hub import constants

    places: list[Any] = [constants, *([sys.modules["datasets"].config] if "datasets" in sys.modules else [])]
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = place.HF_HUB_OFFLINE or refused is not None
        with progress_shown():
            yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


@contextmanager
def progress_shown() -> Iterator[None]:
    """Show the progress bars of downloads and uploads on a terminal only.

    `processes.QUIET` disables the bars of huggingface_hub by its environment variable, because transformers respects it
    too and would otherwise show one for every loaded checkpoint.
    """
    bars: Any = import_module("huggingface_hub.utils.tqdm")
    before, visible = bars.HF_HUB_DISABLE_PROGRESS_BARS, sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    if "datasets" in sys.modules:
        (sys.modules["datasets"].enable_progress_bars if visible else sys.modules["datasets"].disable_progress_bars)()
    try:
        bars.HF_HUB_DISABLE_PROGRESS_BARS = None if visible else before
        yield
    finally:
        bars.HF_HUB_DISABLE_PROGRESS_BARS = before


def cached(repository: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a model repository in the local cache, without network; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def fetch(repository: str, name: str, revision: str | None = None) -> Path | None:
    """Download a small file of a model repository, unless it is cached; None if the repository has no such file.

    Raises:
        OSError: if the repository cannot be read. Ask `unreachable` first.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None
