"""Conversion of GGUF files (the format of llama.cpp) into ordinary model folders.

transformers reads many GGUF files, but it cannot save the loaded model, does not restore decimals that were rounded to
float32, and does not know every pre-tokenizer. A converted folder avoids all of this: it works wherever a model folder
does, and its weights are exactly the dequantized values, in float32.
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
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from finsa.errors import ModelError
from finsa.runs import files, locks

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SUFFIX = ".gguf"
ORIGIN = "origin.json"  # records in a converted folder which file it was converted from
_FIELDS = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
_SAMPLED = 1 << 20  # bytes that the fingerprint reads at the start, the middle and the end of a file


@dataclass(frozen=True)
class Header:
    """Metadata of a GGUF file.

    Args:
        architecture: its name in llama.cpp, such as ``llama`` or ``gemma3``.
        types: number of tensors by type, such as ``{"Q4_1": 210, "F32": 61}``.
        split_rule: the pre-tokenizer of a byte-level vocabulary; None for other vocabularies.
    """

    architecture: str
    types: dict[str, int]
    split_rule: str | None


def has_magic(file: Path) -> bool:
    """Whether a file begins with the bytes ``GGUF``."""
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def converted_folder(file: Path, base: Path) -> Path:
    """Return the folder that a GGUF file is converted into, converting it on first use.

    Args:
        file: the GGUF file.
        base: parent of the converted folders.

    Raises:
        ModelError: if the file cannot be read; then nothing is written.
    """
    folder = base / f"{file.stem}-{fingerprint(file)[:12]}"
    if not (folder / ORIGIN).is_file():
        with locks.creating(folder):
            if not (folder / ORIGIN).is_file():  # another process may have converted it meanwhile
                print(f"converting {file} into {folder} (once)", flush=True)
                convert(file, folder, {"file": str(file)})
    return folder


def fingerprint(file: Path) -> str:
    """SHA-256 of a file's size and three sampled megabytes, to identify a large file without reading all of it."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for start in (0, size // 2, max(size - _SAMPLED, 0)):
            stream.seek(start)
            digest.update(stream.read(_SAMPLED))
    return digest.hexdigest()


def convert(file: Path, folder: Path, origin: dict[str, Any]) -> None:
    """Convert a GGUF file into a model folder (configuration, tokenizer, float32 weights), atomically.

    Args:
        file: the GGUF file.
        folder: the folder to write; created if missing.
        origin: entries to add to `ORIGIN`.

    Raises:
        ModelError: if the file is not GGUF, truncated, or of an unknown architecture, quantization or pre-tokenizer.
    """
    header = read_header(file)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    name = file.name
    quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())  # hides the progress bar
    try:
        with TemporaryDirectory() as place, quiet:
            # alone, because transformers would mix the tokenizer with one that lies beside the file
            (Path(place) / name).symlink_to(file.absolute())
            config = _round_floats(AutoConfig.from_pretrained(place, gguf_file=name))
            tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
            read = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    except (ValueError, KeyError, RuntimeError, OSError, ImportError, NotImplementedError) as error:
        raise ModelError(f"{file} cannot be read by transformers: {str(error).splitlines()[0][:200]}") from None
    _set_split_rule(tokenizer, header, file)
    # transformers refuses to save a model loaded from GGUF, so its weights are moved into a new one.
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
    """Read and check the metadata of a GGUF file (2 to 10 seconds, most of it for the vocabulary).

    Raises:
        ModelError: if the file is not GGUF, truncated, damaged, or of an architecture that transformers cannot read.
    """
    from gguf import GGUFReader
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    if not file.is_file():
        raise ModelError(f"no such file: {file}")
    if not has_magic(file):
        raise ModelError(f"{file} is not a GGUF file: it does not begin with GGUF")
    try:
        reader = GGUFReader(file)
    except Exception as error:  # numpy raises many types for a damaged file
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


def _round_floats(config: PretrainedConfig) -> PretrainedConfig:
    """Restore decimals that were stored as float32: 9.999999747378752e-06 becomes 1e-05."""
    import numpy as np

    for key, value in config.to_dict().items():
        if isinstance(value, float) and value != float(str(np.float32(value))) == float(f"{value:.6g}"):
            setattr(config, key, float(str(np.float32(value))))
    return config


def _set_split_rule(tokenizer: Any, header: Header, file: Path) -> None:
    """Set the pre-tokenizer that a file names, if transformers does not know it.

    Raises:
        ModelError: if finsa does not know it either; the token ids would be silently wrong.
    """
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if header.split_rule in (*GGUF_PRE_TOKENIZER_SPLITS, "gpt-2", None):
        return
    if header.split_rule != "smollm":
        raise ModelError(
            f"{file} names an unknown pre-tokenizer, '{header.split_rule}'; use the original folder of the model"
        )
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
