"""What the machine computes with: threads, precision, and its description for the record."""

from __future__ import annotations

import logging
import os
import platform
import warnings
from pathlib import Path

import torch
import transformers

from finsa.config import Train


def prepare(train: Train) -> None:
    """Set device, threads and the precision of float32 products once, and silence the libraries' advice."""
    take_own_device()
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    if not torch.cuda.is_available():
        precision = cpu_precision() if train.matmul_precision == "auto" else train.matmul_precision
        torch.set_float32_matmul_precision(precision)
        # Under "medium" torch's fused attention calls oneDNN tile by tile and is 6 to 10 times as slow (measured).
        torch.backends.cuda.enable_flash_sdp(precision != "medium")  # the CPU's too, whatever the name says
    transformers.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(trl|transformers|peft)\b")


def cpu_precision() -> str:
    """The precision of float32 products that is fast on this CPU and stays float32-accurate.

    On AMD "medium" takes oneDNN's kernels in place of MKL's, and was twice as fast. On Intel MKL is as fast, the
    attention much faster, and with AMX "medium" would compute in bfloat16.
    """
    described = Path("/proc/cpuinfo")
    amd = described.is_file() and "AuthenticAMD" in described.read_text(encoding="utf-8", errors="replace")
    return "medium" if amd else "highest"


def take_own_device() -> None:
    """Of several processes on a machine, let each have the GPU of its number."""
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def describe(dtype: torch.dtype) -> str:
    """Name device and type: ``cpu, 2 threads, float32``."""
    name = str(dtype).removeprefix("torch.")
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {name}"
    return f"{platform.processor() or platform.machine()} cpu, {torch.get_num_threads()} threads, {name}"


def memory() -> int:
    """Memory of the device that models run on, in bytes."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
