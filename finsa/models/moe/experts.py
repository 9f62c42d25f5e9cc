"""Experts of a mixture as ordinary PEFT folders: read, compared, stacked and written.

This needs no base model, so experts that cannot be combined are refused before one is loaded.

Letters: E experts, r rank of each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from finsa.errors import ModelError
from finsa.models.classifier import HEAD_FILE

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings that stacked experts must share, by their names in PEFT and in finsa.
SHARED = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora", "target_modules": "targets"}


@dataclass(frozen=True)
class Expert:
    """The adapter of an expert.

    Args:
        name: name of its domain or role.
        folder: the PEFT folder.
        config: its `LoraConfig`.
    """

    name: str
    folder: Path
    config: Any

    @property
    def scale(self) -> float:
        """The factor of B A x: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
        divisor = math.sqrt(self.config.r) if self.config.use_rslora else self.config.r
        return float(self.config.lora_alpha / divisor)

    def weights(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A (r, in) and B (out, r) of every adapted linear, by the linear's path.

        Raises:
            ModelError: if the file is missing, damaged, or contains other tensors.
        """
        try:
            tensors = load_file(self.folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"expert {self.name}: {self.folder / WEIGHTS} cannot be read: {error}") from None
        ends = (".lora_A.weight", ".lora_B.weight")
        paths = [key.removeprefix(PREFIX).removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])]
        if len(tensors) != 2 * len(paths):
            odd = next(key for key in tensors if not key.endswith(ends))
            raise ModelError(f"expert {self.name}: {self.folder / WEIGHTS} contains '{odd}', which is not part of LoRA")
        return {path: (tensors[PREFIX + path + ends[0]], tensors[PREFIX + path + ends[1]]) for path in paths}


def read(folders: Mapping[str, Path]) -> list[Expert]:
    """Read the experts' configurations and check that they can be stacked.

    Args:
        folders: PEFT folder by expert, at least two, in the order of the mixture.

    Raises:
        ModelError: if a folder contains no LoRA adapter, an adapter is DoRA, or experts differ in rank, alpha or
            targets.
    """
    experts = []
    for name, folder in folders.items():
        if not (folder / WEIGHTS).is_file():
            raise ModelError(f"expert {name}: there is no adapter in {folder}")
        try:
            config = LoraConfig.from_pretrained(str(folder))
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"expert {name}: {folder} is not a LoRA adapter: {str(error).splitlines()[0]}") from None
        if config.use_dora:
            raise ModelError(
                f"expert {name}: {folder} is a DoRA adapter, whose magnitude belongs to a single update and cannot be "
                "gated row by row. Train experts with method.adapter.variant=lora, rslora or pissa"
            )
        experts.append(Expert(name, folder, config))
    first = experts[0]
    for other in experts[1:]:
        for key, word in SHARED.items():
            values = [getattr(expert.config, key) for expert in (first, other)]
            one, two = (sorted(value) if isinstance(value, set | list | tuple) else value for value in values)
            if one != two:
                raise ModelError(
                    f"experts {first.name} and {other.name} differ in {word}: {one} ({first.folder}) against {two} "
                    f"({other.folder}). Train both with the same method.adapter"
                )
    return experts


def stack(experts: Sequence[Expert]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Stack the experts' matrices: A (E*r, in) and B (out, E*r) by path of the linear, float32.

    Raises:
        ModelError: if the experts adapt different linears, or linears of different shapes.
    """
    parts = [expert.weights() for expert in experts]
    for expert, part in zip(experts[1:], parts[1:], strict=True):
        shapes = [{path: (a.shape, b.shape) for path, (a, b) in one.items()} for one in (parts[0], part)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"experts {experts[0].name} and {expert.name} adapt linears of different names or shapes "
                f"({experts[0].folder}, {expert.folder}); were they trained on the same base?"
            )
    return {
        path: (
            torch.cat([part[path][0] for part in parts]).float(),
            torch.cat([part[path][1] for part in parts], dim=1).float(),
        )
        for path in parts[0]
    }


def write(expert: Expert, tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], folder: Path) -> None:
    """Write an expert as a PEFT folder.

    Args:
        expert: provides the configuration.
        tensors: A (r, in) and B (out, r) by path of the linear.
        folder: the folder to write.
    """
    config = copy.copy(expert.config)
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    named = {}
    for path, (a, b) in tensors.items():
        named[f"{PREFIX}{path}.lora_A.weight"] = a.detach().cpu().clone().contiguous()
        named[f"{PREFIX}{path}.lora_B.weight"] = b.detach().cpu().clone().contiguous()
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})


def check_heads(experts: Sequence[Expert], labels: Sequence[str]) -> None:
    """Check in the headers of the files that every expert has a classification head of these classes.

    Raises:
        ModelError: for the first expert that has none, or one of other classes.
    """
    for expert in experts:
        try:
            with safe_open(expert.folder / HEAD_FILE, "pt") as file:
                known = (file.metadata() or {}).get("labels", "").split("\n")
                size = file.get_slice("weight").get_shape()[0]
        except (OSError, SafetensorError) as error:
            if not isinstance(error, FileNotFoundError):
                raise ModelError(f"expert {expert.name}: {expert.folder / HEAD_FILE} cannot be read: {error}") from None
            raise ModelError(
                f"expert {expert.name}: there is no classification head in {expert.folder}; train it with "
                "method.head=classifier, or build the mixture with method.head=lm"
            ) from None
        if size != len(labels) or known != list(labels):
            raise ModelError(
                f"expert {expert.name}: the head in {expert.folder} has {size} classes ({', '.join(known)}), the "
                f"mixture's data {len(labels)} ({', '.join(labels)})"
            )


def mean_head(experts: Sequence[Expert]) -> dict[str, torch.Tensor]:
    """Mean of the experts' classification heads: weight (c, d) and bias (c,)."""
    heads = [load_file(expert.folder / HEAD_FILE) for expert in experts]
    return {name: torch.stack([head[name].float() for head in heads]).mean(0) for name in heads[0]}
