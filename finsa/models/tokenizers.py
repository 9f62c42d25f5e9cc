"""Tokenizers: loaded from a folder or the hub, trained, or read without transformers.

transformers takes a second or more to import, torch longer, so both are imported only where they are used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from finsa.config import ROOT, Model, locate
from finsa.data import hub
from finsa.errors import ModelError
from finsa.models import folders, gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EMBEDDED_TOKENIZER = ROOT / "data" / "tiny"

END, OPEN, CLOSE = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Entries of tokenizer_config.json, and tokenizer classes, with which transformers uses tokenizer.json unchanged.
_SETTINGS = ("backend", "tokenizer_class", "model_max_length")
_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def train(documents: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    The 3,755 most common Chinese characters (level 1 of the standard GB 2312) and the usual English label words become
    one token each even if no document contains them, so that real text is not split into bytes.

    Args:
        documents: the texts that merges are learned from.
        vocabulary: vocabulary size, special tokens included.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Digits are split one by one, so that the model compares numbers instead of memorizing them.
    pattern = Regex(r"\d|[A-Za-z]+| ?[A-Za-z]+|[\u4e00-\u9fff]+|[^\sA-Za-z\d\u4e00-\u9fff]|\s+")
    split = pre_tokenizers.Split(pattern, behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, OPEN, CLOSE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,  # two Chinese characters as the library counts: words, but no phrases of the generator
        show_progress=False,
    )
    # Repeated so often that the merges of these characters' bytes are learned before those of rarer words.
    common = ["。".join([*common_characters(), "positive", "neutral", "negative"])] * 400
    tokenizer.train_from_iterator([*documents, *common], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def common_characters() -> list[str]:
    """The characters of GB 2312, level 1: rows 16 to 55 of the code table."""
    codes = (bytes([row, column]) for row in range(0xB0, 0xD8) for column in range(0xA1, 0xFF))
    return [character for code in codes if (character := code.decode("gb2312", errors="ignore"))]


def load_tokenizer(model: Model, local_only: bool = False) -> Any:
    """Load a model's tokenizer.

    Args:
        model: the configuration of the model.
        local_only: whether to stay off the network.

    Returns:
        A fast tokenizer. A model with random weights gets the embedded tokenizer if its own is not on this machine:
        the model is untrained, so any ids below its vocabulary size will do.

    Raises:
        ConfigError: if the given path contains no tokenizer.
        ModelError: if the tokenizer cannot be loaded.
    """
    folders.raise_any(folders.tokenizer_problems(model))
    source, revision = source_of(model, model.tokenizer)
    local = local_only or model.weights == "random"
    refusal = None if local else hub.refusal(source)
    try:
        if model.tokenizer is None:
            folders.require_no_adapter(source, revision, local or refusal is not None)
        with hub.cache_alone(refusal):
            return _tokenizer(source, revision, model.trust_remote_code, local or refusal is not None)
    except (OSError, ValueError) as error:
        if model.weights == "random" and model.tokenizer is None and EMBEDDED_TOKENIZER.is_dir():
            return _tokenizer(str(EMBEDDED_TOKENIZER), None, False, True)
        raise unavailable(model, source, revision, "tokenizer", refusal or error) from None


def load_without_torch(model: Model) -> Any:
    """Load a model's tokenizer from its ``tokenizer.json``; None if that is not in a local folder.

    Returns:
        A `BareTokenizer` if it gives the same ids, otherwise a tokenizer of transformers.
    """
    folder = Path(source_of(model, model.tokenizer)[0])
    if not (folder / "tokenizer.json").is_file():
        return None
    bare = BareTokenizer.read(folder) if model.prompt == "plain" else None
    if bare is not None:
        return bare
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def require_source(model: Model) -> None:
    """Check, without importing torch, that a model's tokenizer is on this machine or the hub answers.

    Raises:
        ModelError: if neither is the case.
    """
    source, revision = source_of(model, model.tokenizer)
    if model.weights == "random" or Path(source).is_absolute():
        return
    if not any(hub.cached(source, name, revision) for name in ("tokenizer.json", "tokenizer_config.json")):
        refusal = hub.unreachable()
        if refusal is not None:
            raise unavailable(model, source, revision, "tokenizer", refusal)


class BareTokenizer:
    """The part of a tokenizer that rendering a plain prompt takes, without transformers.

    Args:
        backend: the tokenizer that ``tokenizer.json`` describes.
        end: the end-of-sequence token.
    """

    def __init__(self, backend: Tokenizer, end: str | None) -> None:
        self.backend_tokenizer = backend
        self.eos_token_id = None if end is None else backend.token_to_id(end)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Encode a text."""
        return {"input_ids": self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size())

    @classmethod
    def read(cls, folder: Path) -> BareTokenizer | None:
        """Read a folder's tokenizer; None if transformers might change what ``tokenizer.json`` describes."""
        if any((folder / name).is_file() for name in ("special_tokens_map.json", "added_tokens.json")):
            return None
        try:
            settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(settings, dict) or not settings.keys() <= {*_SETTINGS, *_SPECIAL}:
            return None
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        special = [settings[name] for name in _SPECIAL if settings.get(name) is not None]
        unchanged = (
            settings.get("tokenizer_class") in _CLASSES
            and all(
                isinstance(token, str)
                and repr(added.get(token)) == repr(AddedToken(token, special=True, normalized=False))
                for token in special
            )
            and backend.truncation is None
            and backend.padding is None
            and backend.post_processor is not None
            and backend.get_vocab_size() <= 100_000  # in larger ones transformers looks for a faulty split to fix
        )
        return cls(backend, settings.get("eos_token")) if unchanged else None


def load_or_embedded(model: Model, local_only: bool) -> tuple[Any, str, Model]:
    """Load the model's tokenizer, or for an estimate the embedded one if the model's is not available.

    Args:
        model: the configuration of the model.
        local_only: whether to stay off the network.

    Returns:
        The tokenizer, which one it is, and the model's configuration with a prompt style that it can render.
    """
    try:
        return load_tokenizer(model, local_only), "the model's", model
    except ModelError:
        plain = model.model_copy(update={"weights": "random", "prompt": "plain", "think": "none"})
        note = "the embedded one, plain prompt: an estimate, because the model's is not on this machine"
        return load_tokenizer(plain), note, plain


@cache
def _tokenizer(source: str, revision: str | None, trust: bool, local_only: bool) -> Any:
    from transformers import AutoTokenizer  # imports torch, which a wrong option should not have to wait for

    tokenizer = AutoTokenizer.from_pretrained(
        source, revision=revision, trust_remote_code=trust, local_files_only=local_only
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by the rows' lengths, so any token does
    return tokenizer


def source_of(model: Model, override: str | None = None) -> tuple[str, str | None]:
    """Where a model or tokenizer is loaded from: a folder, or a hub id and its revision.

    A GGUF file is converted into a folder below ``models/`` on first use.

    Raises:
        ModelError: if a GGUF file cannot be converted.
    """
    if override is not None:
        folder = locate(override)
        return (str(folder) if folder.exists() else override), None
    if model.path is not None:
        place = locate(model.path)
        if place.is_file() and place.suffix == gguf.SUFFIX:
            place = gguf.converted_folder(place, Path("models").absolute())
        return str(place), None
    return str(model.hub_id), model.revision


def unavailable(model: Model, source: str, revision: str | None, what: str, error: Exception | str) -> ModelError:
    """The error for weights or a tokenizer that cannot be loaded, with the ways to fix it."""
    reason = (str(error).splitlines() or [type(error).__name__])[0][:160].rstrip(".")
    if Path(source).is_absolute():
        fix = "Check the files of this folder, or copy them again"
    else:
        given = f" --revision {revision}" if revision else ""
        key = "model.path" if what == "weights" or model.tokenizer is None else "model.tokenizer"
        fix = f"With network: hf download {source}{given}. Without: {key}=<folder>"
        if key == "model.path":
            fix += ", or model.weights=random for an untrained model"
    return ModelError(f"model={model.name}: no {what} at {source} ({reason}). {fix}")
