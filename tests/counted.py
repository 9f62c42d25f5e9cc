"""``run.py``, and what it has loaded in its last line: how often a base, and how many texts each tokenization had."""

from __future__ import annotations

import json
import runpy
from typing import Any

from transformers import AutoModelForCausalLM

from finsa.config import ROOT
from finsa.data.rows import Renderer

loaded: list[Any] = []
tokenized: list[int] = []
load, encode = AutoModelForCausalLM.from_pretrained, Renderer.encode_texts


def counted_load(*arguments: Any, **named: Any) -> Any:
    """Load a base."""
    loaded.append(arguments)
    return load(*arguments, **named)


def counted_encode(renderer: Renderer, texts: Any, *further: Any) -> Any:
    """Tokenize texts."""
    tokenized.append(len(texts))
    return encode(renderer, texts, *further)


if __name__ == "__main__":
    AutoModelForCausalLM.from_pretrained = counted_load
    Renderer.encode_texts = counted_encode  # type: ignore[method-assign]
    try:
        runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
    finally:
        print(json.dumps({"loaded": len(loaded), "tokenized": sorted(tokenized)}))
