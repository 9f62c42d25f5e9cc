"""Short finished runs of the embedded default: one per method and test session."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from few import FEW

from finsa.config import RunConfig

SHORT = (FEW, "train=smoke", "tracking=none", "stage.compare_base=false", "model.dtype=float32")  # on every machine
STEPS = {"lora_response": 40, "classifier": 30}  # enough for answers that are not all the same


@cache
def run_folder(config: Callable[..., RunConfig], base: Path, method: str, *words: str) -> Path:
    """Train a run and return its folder.

    Args:
        config: the fixture.
        base: a folder that exists for the whole session.
        method: its name.
        words: further overrides.
    """
    from finsa.stages import train

    steps = ("train.batch_size=8", f"train.max_steps={STEPS.get(method, 2)}")
    done = train.run(config(f"method={method}", *SHORT, *steps, *words, f"output_dir={base / method}"))
    assert done.run_dir is not None
    return done.run_dir


@cache
def of_instructions(config: Callable[..., RunConfig], base: Path) -> tuple[Path, Path]:
    """Train a run on a mixture of instruction rows and chats.

    Args:
        config: the fixture.
        base: a folder that exists for the whole session.

    Returns:
        The run folder, and the folder of the files: ``instructions.json`` and ``chats.json``.
    """
    from finsa.stages import train

    texts = [(f"第{number}条：{'涨跌平'[number % 3] * 3}{number}", "多空平"[number % 3]) for number in range(60)]
    instructions: list[dict[str, Any]] = [
        {"instruction": "判断情绪", "input": f" 甲{text}\n", "output": label, "history": [["在吗", "在"]][: number % 2]}
        for number, (text, label) in enumerate(texts)
    ]
    chats: list[dict[str, Any]] = [
        {
            "system": "空头"[: number % 3],
            "conversations": [
                {"from": "human", "value": [{"type": "text", "text": f"乙{text}"}]},
                {"from": "gpt", "value": label},
            ],
        }
        for number, (text, label) in enumerate(texts)
    ]
    base.mkdir(parents=True, exist_ok=True)
    for name, rows in (("instructions", instructions), ("chats", chats)):
        (base / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (base / "conf" / "data").mkdir(parents=True)
    (base / "conf" / "data" / "both.yaml").write_text(
        "defaults: [table, alpaca@parts.alpaca, messages@parts.chats, _self_]\nname: both\nsource: mixture\n"
        f"parts: {{alpaca: {{files: {base / 'instructions.json'}}}, chats: {{files: {base / 'chats.json'}}}}}\n"
        "labels: [多, 空, 平]\nprompt: '{text}：'\n",
        encoding="utf-8",
    )
    words = ("data=both", "method=lora_response", *SHORT[1:], "train.max_steps=2", f"output_dir={base / 'out'}")
    cfg = config(*words, folders=(base / "conf",))
    done = train.run(cfg)
    assert done.run_dir is not None
    return done.run_dir, base
