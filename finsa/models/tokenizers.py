"""A model's tokenizer: loaded from where the model is, or trained; or looked at without transformers.

transformers takes a second or more to import, torch longer, so that both are imported where they are used.
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

# Settings of a tokenizer that leave its file as it is, and the classes of transformers that take it as it is.
_SETTINGS, _CLASSES = (
    ("backend", "tokenizer_class", "model_max_length"),
    ("TokenizersBackend", "PreTrainedTokenizerFast"),
)
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def train(documents: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer.

    The 3,755 most common Chinese characters (level 1 of the standard GB 2312) are one token each even where the
    documents lack them, so that real text does not fall apart into bytes; so are the usual English label words.

    Args:
        documents: texts to take merges from.
        vocabulary: size, special tokens included.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Digits one by one: numbers are compared by the model, not looked up.
    split = pre_tokenizers.Split(_pattern(), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, OPEN, CLOSE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,  # two Chinese characters as the library counts: words, never the generator's phrases
        show_progress=False,
    )
    # Each common character this often makes its bytes' merges frequent enough to be taken before rarer words.
    common = ["。".join([*common_characters(), "positive", "neutral", "negative"])] * 400
    tokenizer.train_from_iterator([*documents, *common], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def common_characters() -> list[str]:
    """Level 1 of GB 2312: rows 16 to 55 of the code table."""
    found = []
    for row in range(0xB0, 0xD8):
        for column in range(0xA1, 0xFF):
            try:
                found.append(bytes([row, column]).decode("gb2312"))
            except UnicodeDecodeError:
                continue
    return found


def _pattern() -> Regex:
    return Regex(r"\d|[A-Za-z]+| ?[A-Za-z]+|[\u4e00-\u9fff]+|[^\sA-Za-z\d\u4e00-\u9fff]|\s+")


def load_tokenizer(model: Model, local_only: bool = False) -> Any:
    """Load the tokenizer that goes with a model.

    Args:
        model: the model's section.
        local_only: ask no network.

    Returns:
        A fast tokenizer. For random weights whose own tokenizer is not on this machine, the embedded one: such a model
        has learnt nothing, and any ids below its vocabulary size do.

    Raises:
        ConfigError: for a path that holds none.
        ModelError: where it cannot be had.
    """
    folders.require_tokenizer(model)
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


def peek(model: Model) -> Any:
    """The tokenizer of a model in a local folder, without torch; None where it takes more to load it.

    Returns:
        One of transformers, or where these would change nothing about its file a `Bare` one, which gives the same ids.
    """
    folder = Path(source_of(model, model.tokenizer)[0])
    if not (folder / "tokenizer.json").is_file():
        return None
    bare = Bare.of(folder) if model.prompt == "plain" else None
    if bare is not None:
        return bare
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def require_source(model: Model) -> None:
    """Report a tokenizer that cannot be had before torch is imported: it is not here, and the hub does not answer.

    Raises:
        ModelError: then.
    """
    source, revision = source_of(model, model.tokenizer)
    if model.weights == "random" or Path(source).is_absolute():
        return
    if not any(hub.cached(source, name, revision) for name in ("tokenizer.json", "tokenizer_config.json")):
        refusal = hub.unreachable()
        if refusal is not None:
            raise unavailable(model, source, revision, "tokenizer", refusal)


class Bare:
    """What a renderer of plain prompts asks of a tokenizer, without transformers.

    Args:
        backend: the tokenizer as its file describes it.
        end: its end token.
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
    def of(cls, folder: Path) -> Bare | None:
        """Read a folder; None where its settings say more than transformers takes over as it is."""
        if any((folder / name).is_file() for name in ("special_tokens_map.json", "added_tokens.json")):
            return None
        try:
            settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(settings, dict) or not settings.keys() <= {*_SETTINGS, *_SPECIAL}:
            return None
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        special = [settings[name] for name in _SPECIAL if settings.get(name) is not None]
        if settings.get("tokenizer_class") not in _CLASSES or not _as_written(backend, special):
            return None
        return cls(backend, settings.get("eos_token"))


def _as_written(backend: Tokenizer, special: list[Any]) -> bool:
    """Whether transformers would leave a tokenizer as its file has it: nothing to add, to cut, to fill up, to mend."""
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    plain = [AddedToken(token, special=True, normalized=False) for token in special if isinstance(token, str)]
    return (
        len(plain) == len(special)
        and all(repr(added.get(token.content)) == repr(token) for token in plain)
        and backend.truncation is None
        and backend.padding is None
        and backend.post_processor is not None
        and backend.get_vocab_size() <= 100_000  # of larger ones transformers looks for a faulty split
    )


def own_or_embedded(model: Model, local_only: bool) -> tuple[Any, str, Model]:
    """Load the model's tokenizer; where it cannot be had the embedded one, for an estimate, and saying so.

    Args:
        model: the model's section.
        local_only: ask no network.

    Returns:
        The tokenizer, whose it is, and the model's section with the prompt style that it can render.
    """
    try:
        return load_tokenizer(model, local_only), "the model's own", model
    except ModelError:
        plain = model.model_copy(update={"weights": "random", "prompt": "plain", "think": "none"})
        note = "the embedded one, plain prompt: an estimate, because the model's own is not on this machine"
        return load_tokenizer(plain), note, plain


@cache
def _tokenizer(source: str, revision: str | None, trust: bool, local_only: bool) -> Any:
    from transformers import AutoTokenizer  # brings torch with it, which a wrong option need not wait for

    tokenizer = AutoTokenizer.from_pretrained(
        source, revision=revision, trust_remote_code=trust, local_files_only=local_only
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # only ever fills what a mask made from lengths leaves out
    return tokenizer


def source_of(model: Model, override: str | None = None) -> tuple[str, str | None]:
    """Where to load from: a folder, or a hub id with its revision.

    A GGUF file is converted into a folder below ``models/`` when it is first asked for.

    Raises:
        ModelError: for a GGUF file that cannot be converted.
    """
    if override is not None:
        folder = locate(override)
        return (str(folder) if folder.exists() else override), None
    if model.path is not None:
        place = locate(model.path)
        if place.is_file() and place.suffix == gguf.SUFFIX:
            place = gguf.folder_of(place, Path("models").absolute())
        return str(place), None
    return str(model.hub_id), model.revision


def unavailable(model: Model, source: str, revision: str | None, what: str, error: Exception | str) -> ModelError:
    """What to do about weights or a tokenizer that cannot be had."""
    reason = (str(error).splitlines() or [type(error).__name__])[0][:160].rstrip(".")
    if Path(source).is_absolute():
        remedy = "Check the files of this folder, or copy them again"
    else:
        given = f" --revision {revision}" if revision else ""
        key = "model.path" if what == "weights" or model.tokenizer is None else "model.tokenizer"
        remedy = f"With network: hf download {source}{given}. Without: {key}=<folder>"
        if key == "model.path":
            remedy += ", or model.weights=random for a model that has learnt nothing"
    return ModelError(f"model={model.name}: no {what} at {source} ({reason}). {remedy}")
