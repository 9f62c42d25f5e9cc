"""GGUF files (the format of llama.cpp), converted once into an ordinary model folder.

transformers reads many GGUF files but refuses to save what it read, rounds no float back to the decimal that was
written, and knows not every rule by which a vocabulary splits text. A converted folder has none of these surprises:
everything that reads a model folder works with it, and the weights are the dequantised values, exactly, in float32.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finsa.errors import ModelError
from finsa.runs import files, locks

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SUFFIX = ".gguf"
ORIGIN = "origin.json"  # in a converted folder: which file it was converted from
_FIELDS = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
_SAMPLED = 1 << 20  # bytes at the start, the middle and the end of a file that identify it


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself.

    Args:
        architecture: in the words of llama.cpp, such as ``llama`` or ``gemma3``.
        types: number of tensors by type, such as ``{"Q4_1": 210, "F32": 61}``.
        split_rule: how a byte-level vocabulary splits text before merges; None for other vocabularies.
    """

    architecture: str
    types: dict[str, int]
    split_rule: str | None


def begins(file: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def folder_of(file: Path, base: Path) -> Path:
    """Return the folder that a GGUF file was converted into, converting it on first use.

    Args:
        file: the GGUF file.
        base: where converted folders lie.

    Raises:
        ModelError: for a file that cannot be read; nothing is left behind.
    """
    folder = base / f"{file.stem}-{fingerprint(file)[:12]}"
    if not (folder / ORIGIN).is_file():
        with locks.creating(folder):
            if not (folder / ORIGIN).is_file():  # another process may have converted it meanwhile
                print(f"converting {file} into {folder} (once)", flush=True)
                convert(file, folder, {"file": str(file)})
    return folder


def fingerprint(file: Path) -> str:
    """Identify a large file without reading all of it: its size and three sampled megabytes, as SHA-256."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for start in (0, size // 2, max(size - _SAMPLED, 0)):
            stream.seek(start)
            digest.update(stream.read(_SAMPLED))
    return digest.hexdigest()


def convert(file: Path, folder: Path, origin: dict[str, Any]) -> None:
    """Write a model folder (configuration, tokenizer, float32 weights) from a GGUF file, whole or not at all.

    Args:
        file: the GGUF file.
        folder: to be written; made where it is missing.
        origin: what `ORIGIN` says beside the quantisation.

    Raises:
        ModelError: for a file that is not GGUF, truncated, of an unknown architecture, quantisation or tokenizer rule.
    """
    header = read_header(file)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place, name = str(file.parent), file.name
    quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())  # a progress bar is for terminals
    try:
        config = rounded(AutoConfig.from_pretrained(place, gguf_file=name))
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
        with quiet:
            read = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    except (ValueError, KeyError, RuntimeError, OSError, ImportError, NotImplementedError) as error:
        raise ModelError(f"{file} cannot be read by transformers: {str(error).splitlines()[0][:200]}") from None
    _set_split_rule(tokenizer, header, file)
    # transformers refuses to save a model that came from GGUF, so its weights move into a fresh one.
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(read.state_dict(), assign=True)
    fresh.tie_weights()
    with files.staged(folder) as staging:
        fresh.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        facts = {
            **origin,
            "fingerprint": fingerprint(file),
            "architecture": header.architecture,
            "quantization": header.types,
        }
        (staging / ORIGIN).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read_header(file: Path) -> Header:
    """Read and check a GGUF file without dequantising it (2 to 10 seconds, most of it for the vocabulary).

    Raises:
        ModelError: where it is not GGUF, truncated or damaged, or of an architecture that transformers cannot read.
    """
    from gguf import GGUFReader
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    if not file.is_file():
        raise ModelError(f"no such file: {file}")
    if not begins(file):
        raise ModelError(f"{file} is not a GGUF file: it does not begin with GGUF")
    try:
        reader = GGUFReader(file)
    except Exception as error:  # a damaged file fails in any of numpy's ways
        raise ModelError(
            f"{file} is truncated or damaged ({str(error).splitlines()[0][:120]}); copy or download it again"
        ) from None
    fields = {name: field.contents() for name, field in reader.fields.items() if name in _FIELDS}
    architecture = fields.get("general.architecture")
    known = sorted({*GGUF_CONFIG_MAPPING, *GGUF_CONFIG_ARCHS} - {"general", "tokenizer"})
    if architecture is None or architecture not in known:
        raise ModelError(
            f"{file} is of architecture '{architecture}', which transformers does not read from GGUF; use the original "
            f"folder of the model. It reads: {', '.join(known)}"
        )
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    split_rule = fields.get("tokenizer.ggml.pre") if fields.get("tokenizer.ggml.model") == "gpt2" else None
    return Header(architecture, dict(types), split_rule)


def rounded(config: PretrainedConfig) -> PretrainedConfig:
    """Give floats that went through float32 the decimal they were written as: 9.999999747378752e-06 is 1e-05."""
    import numpy as np

    for key, value in config.to_dict().items():
        if isinstance(value, float) and value != float(str(np.float32(value))) == float(f"{value:.6g}"):
            setattr(config, key, float(str(np.float32(value))))
    return config


def _set_split_rule(tokenizer: Any, header: Header, file: Path) -> None:
    """Set how text is split before merges, where transformers does not know the rule that a file names.

    Raises:
        ModelError: for a rule that is not known here either; token ids would be silently wrong.
    """
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if header.split_rule in (*GGUF_PRE_TOKENIZER_SPLITS, "gpt-2", None):
        return
    if header.split_rule != "smollm":
        raise ModelError(
            f"{file}: the rule '{header.split_rule}' by which its tokenizer splits text is not known; use the original "
            "folder of the model"
        )
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
