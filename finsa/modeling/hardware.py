"""What the machine computes with: threads, precision, and its description for the record."""

from __future__ import annotations

import logging
import os
import platform
import warnings

import torch
import transformers

from finsa.config import Train


def prepare(train: Train) -> None:
    """Set device, threads and the precision of float32 products once, and silence the libraries' advice."""
    take_own_device()
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    if not torch.cuda.is_available():
        # Measured on CPUs: "medium" picks the faster kernels; without AMX its result stays float32-accurate.
        torch.set_float32_matmul_precision(train.matmul_precision)
    transformers.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(trl|transformers|peft)\b")


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
