"""Export of a run's merged model as a GGUF file, the format of llama.cpp, with an Ollama Modelfile.

The names of metadata and tensors are those of the package ``gguf``, which llama.cpp publishes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, LlamaFileType, TokenType
from tokenizers import Regex, pre_tokenizers

from finsa.data.rows import Renderer
from finsa.errors import ModelError
from finsa.inference.graphs import LLAMA_FILE

MODELFILE = "Modelfile"
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
TYPES = {
    "fp32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
COMPARED = 500  # texts on which rules that split texts are compared
CONTEXT = 2048  # minimum context of the Modelfile, in tokens
SAME_TOKENS = 0.99  # minimum share of them with the same tokens


def refusal(config: Any, renderer: Renderer) -> str | None:
    """Why a model cannot be written as GGUF; None if it can.

    Args:
        config: of transformers, of the base model.
        renderer: provides the tokenizer.
    """
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        return f"models of type {config.model_type} are not written as gguf, only {known}; choose format=merged"
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in ("default", "llama3") or (kind == "llama3" and ARCHITECTURES[config.model_type] != MODEL_ARCH.LLAMA):
        return f"positions of type {kind} are not written as gguf for {config.model_type}; choose format=merged"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "a model with sliding-window attention is not written as gguf; choose format=merged"
    if "ByteLevel" not in str(renderer.literal.pre_tokenizer):
        return "only byte-level tokenizers are written as gguf, and that of this model is another; choose format=merged"
    return None


def write(
    model: Any, renderer: Renderer, name: str, precision: str, texts: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Write ``model.gguf`` and ``Modelfile`` to a folder that contains the tokenizer.

    Args:
        model: a causal language model of one of `ARCHITECTURES`, without an adapter.
        renderer: of its prompts.
        name: of the model.
        precision: one of `TYPES`, of the matrices; vectors are float32.
        texts: on which the rule that splits texts before tokenization is chosen.
        folder: output folder.

    Returns:
        Entries of the manifest: ``split_rule``, and ``same_tokens``, the share of the texts with the same tokens.

    Raises:
        ModelError: if llama.cpp would split texts differently, or has no place for a tensor.
    """
    config, (kind, file_type) = model.config, TYPES[precision]
    rule, same = split_rule(renderer, texts[:COMPARED])
    architecture = ARCHITECTURES[config.model_type]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(folder / LLAMA_FILE, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, renderer.tokenizer, rule, config.vocab_size, folder)
    if config.rope_parameters["rope_type"] == "llama3":  # llama.cpp divides the frequencies by these factors
        frequencies = model.base_model.rotary_emb.inv_freq.double().cpu().numpy()
        plain = config.rope_parameters["rope_theta"] ** -(np.arange(0, width, 2) / width)
        writer.add_tensor("rope_freqs.weight", (plain / frequencies).astype(np.float32))
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for source, tensor in model.state_dict().items():
        if source == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ModelError(f"format: llama.cpp has no tensor for {source} of this {config.model_type} model")
        values = tensor.detach().to("cpu", torch.float32).numpy()
        if architecture == MODEL_ARCH.LLAMA and (part := re.search(r"attn_([qk])\.", target)):
            # in its Llama, the two halves of a rotary pair are next to each other
            count = heads if part[1] == "q" else kv_heads
            values = values.reshape(count, 2, width // 2, -1).swapaxes(1, 2).reshape(values.shape)
        type_ = kind if values.ndim == 2 else GGMLQuantizationType.F32
        if type_ == GGMLQuantizationType.Q8_0 and values.shape[1] % gguf.GGML_QUANT_SIZES[type_][0]:
            type_ = GGMLQuantizationType.F16  # no whole blocks
        writer.add_tensor(target, gguf.quants.quantize(np.ascontiguousarray(values), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / MODELFILE).write_text(modelfile(renderer, config.max_position_embeddings), encoding="utf-8")
    return {"split_rule": rule, "same_tokens": same}


def split_rule(renderer: Renderer, texts: Sequence[str]) -> tuple[str, float]:
    """The name of llama.cpp's rule for splitting texts that gives the tokens of this tokenizer.

    Returns:
        The name, and the share of the texts with the same tokens. Of equal rules, one that is stated in the same way
        precedes, then that of Qwen2.

    Raises:
        ModelError: if every rule gives other tokens for more than one text in a hundred.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    splits = {GGUF_PRE_TOKENIZER_SPLITS[name]: name for name in ("qwen2", "llama-bpe", "tekken", "qwen35", "gpt-4o")}
    rules: dict[str, Any] = {
        name: [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        for split, name in splits.items()
    }
    rules["smollm"] = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    rules["gpt-2"] = [pre_tokenizers.ByteLevel(False)]
    tokenizer, found = renderer.literal, dict[str, tuple[float, bool]]()
    stated, wanted = _stated(tokenizer), [one.ids for one in tokenizer.encode_batch(list(texts))]
    for name, parts in rules.items():
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        same = [one.ids == ids for one, ids in zip(tokenizer.encode_batch(list(texts)), wanted, strict=True)]
        found[name] = (float(np.mean(same)), _stated(tokenizer) == stated)
    best = max(found, key=lambda name: found[name])
    if found[best][0] < SAME_TOKENS:
        raise ModelError(
            f"format: llama.cpp has no rule that splits texts as this tokenizer does (the closest, {best}, gives the "
            f"same tokens for {found[best][0]:.1%} of the texts); choose format=merged"
        )
    return best, found[best][0]


def _stated(tokenizer: Any) -> list[str]:
    """The patterns and digits of a tokenizer's rule for splitting texts."""
    return re.findall(r"(?:Regex\(\"|individual_digits=|use_regex=)[^,]*", str(tokenizer.pre_tokenizer))


def _add_tokenizer(writer: Any, tokenizer: Any, rule: str, size: int, folder: Path) -> None:
    """Add the vocabulary, of the size of the embedding, merges, special tokens and chat template."""
    names, added = {number: token for token, number in tokenizer.get_vocab().items()}, tokenizer.added_tokens_decoder
    types = [
        (TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED)
        if number in added
        else (TokenType.NORMAL if number in names else TokenType.UNUSED)
        for number in range(size)
    ]
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(rule)
    writer.add_token_list([names.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
    leads = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "pad")}
    special.special_token_ids = {kind: number for kind, number in ids.items() if number is not None}
    special.add_special_token = {"bos": leads, "eos": False}
    special.add_to_gguf(writer, quiet=True)


def modelfile(renderer: Renderer, positions: int) -> str:
    """An Ollama Modelfile whose template puts the run's prompt around a text, and decodes greedily.

    Args:
        renderer: of the prompts.
        positions: of the model.
    """
    tokenizer, prefix = renderer.tokenizer, list(renderer.prefix)
    if prefix[:1] == [tokenizer.bos_token_id] and tokenizer("a")["input_ids"][:1] == prefix[:1]:
        del prefix[0]  # llama.cpp adds it
    before, after = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (prefix, renderer.suffix))
    answer = max(len(ids) for ids in renderer.answers) + 1
    longest = len(renderer.prefix) + renderer.room + len(renderer.suffix) + answer
    context = min(positions, max(longest, CONTEXT))  # Ollama truncates a longer text at its start
    return "\n".join(
        [
            "# ollama create <name> -f Modelfile; ollama run <name> <text>",
            f"FROM ./{LLAMA_FILE}",
            f'TEMPLATE """{_go_text(before)}{{{{ .Prompt }}}}{_go_text(after)}"""',
            "PARAMETER temperature 0",
            f"PARAMETER num_predict {answer}",
            f"PARAMETER num_ctx {context}",
            f'PARAMETER stop "{tokenizer.decode([renderer.end], skip_special_tokens=False)}"',
            "",
        ]
    )


def _go_text(text: str) -> str:
    r"""Text in a template of Go between three quotation marks.

    Braces and three quotation marks would end it, and Ollama drops characters that are not printable, so they are
    written as strings of Go: ``{{ "\u3000" }}``.
    """

    def escaped(match: re.Match[str]) -> str:
        return '{{ "' + "".join(f"\\U{ord(letter):08x}" for letter in match[0]) + '" }}'

    text = re.sub(r'\{\{|"""|"$', escaped, text)
    return "".join(
        sign if sign.isprintable() or sign in "\t\n" else escaped(re.match(r"(?s).", sign))  # type: ignore[arg-type]
        for sign in text
    )
