"""What `gpu.py` runs: each section is a row of parts, and a part that fails leaves the others alone.

The reference of an equality is computed in float32 on the CPU in the plainest way there is: one row at a time, through
transformers' forward pass, logits at all positions, no packing and no shared prefix. On a CPU the same functions
compare finsa's ways with it at tiny shapes, so an error of theirs shows without a GPU.

Letters: n rows, c classes.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu import row

from finsa.models import hardware
from gpu_parts.common import GPUError, Part, Setting, configured, reason, release
from gpu_parts.equalities import attention, correctness, precision
from gpu_parts.needs import glm9b, memory
from gpu_parts.running import behavior, runs
from gpu_parts.speed import inference_speed, machine, training

SECTIONS: dict[str, Callable[[Setting], Iterator[Part]]] = {
    "machine": machine,
    "correctness": correctness,
    "precision": precision,
    "attention": attention,
    "training": training,
    "inference": inference_speed,
    "glm9b": glm9b,
    "behavior": behavior,
    "memory": memory,
    "runs": runs,
}


def run(names: Sequence[str], device: str, file: Path) -> None:
    """Run sections and write their events to a file, a line of JSON each; see `gpu.events`."""
    at = Setting(torch.device(device), device == "cpu", "tiny" if device == "cpu" else "qwen05b")
    hardware.prepare(configured("model=tiny").train)
    with file.open("a", encoding="utf-8") as stream:

        def tell(event: str, section: str, **more: Any) -> None:
            stream.write(json.dumps({"event": event, "section": section, **more}, ensure_ascii=False) + "\n")
            stream.flush()

        for name in names:
            started = time.monotonic()
            try:
                for part, measure in SECTIONS[name](at):
                    for made in _attempt(at, part, measure):
                        tell("row", name, row=made)
                    if not at.small:
                        release()
            except Exception as error:
                tell("row", name, row=row("section", reason(error), ok=False))
                _require_device(at)
            if not at.small:
                release()
            tell("end", name, seconds=round(time.monotonic() - started, 1))


def _attempt(at: Setting, part: str, measure: Callable[[], Iterable[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The rows of a part; where it fails, one with its error."""
    try:
        yield from measure()
    except GPUError:
        yield row(part, "needs a GPU")
    except Exception as error:
        traceback.print_exc()
        yield row(part, reason(error), ok=False)
        _require_device(at)


def _require_device(at: Setting) -> None:
    """End this process where an error has spoilt the device for it: the next section gets another one."""
    try:
        hardware.synchronize()
        torch.ones(1, device=at.device).sum().item()
    except RuntimeError as error:
        print(f"the device has failed: {error}", flush=True)
        os._exit(3)
