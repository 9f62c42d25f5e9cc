"""Fuzzing of all parsers: arbitrary bytes give a value or one of finsa's errors.

python tests/fuzz.py 20000        the long version: `make fuzz`; with atheris, where it is installed, by coverage
"""

from __future__ import annotations

import contextlib
import io
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib import util
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from finsa import cli
from finsa.config import RunConfig, compose
from finsa.data import dataset
from finsa.data.schema import Reading
from finsa.errors import FinsaError
from finsa.inference import row_files
from finsa.session import Session

ENDINGS = ("csv", "tsv", "jsonl", "json", "parquet", "arrow", "xlsx", "txt")
SEEDS = (
    b"id,text,label\n1,\xe8\x82\xa1\xe4\xbb\xb7\xe4\xb8\x8a\xe6\xb6\xa8,\xe5\x88\xa9\xe5\xa5\xbd\n2,b,c\n",
    b'{"text": "a", "label": "b"}\n{"text": 1, "label": null}\n',
    b'[{"text": "a", "label": "b", "id": [1]}]',
    b"text\tlabel\n\"a\tb\n\"\tc\n",
    b"PK\x03\x04not a workbook",
    b"PAR1not a tablePAR1",
    b"\xff\xfet\x00e\x00x\x00t\x00",
)  # fmt: skip
_base: list[RunConfig] = []


def _cfg() -> RunConfig:
    if not _base:
        words = ["data=table", "data.files=somewhere"]
        values, choices = compose.compose_values(words)
        _base.append(compose.build(values, choices, words))
    return _base[0]


def read_table(content: bytes) -> None:
    """A table of rows: the first byte chooses the ending."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"rows.{ENDINGS[content[0] % len(ENDINGS) if content else 0]}"
        file.write_bytes(content[1:])
        data = _cfg().data.model_copy(update={"files": str(file), "cache": None, "on_unknown_label": "drop"})
        dataset.load(data)


def read_stream(content: bytes) -> None:
    """The input of a prediction."""
    with tempfile.TemporaryDirectory() as folder:
        ending = ("csv", "tsv", "jsonl", "txt", "parquet")[content[0] % 5 if content else 0]
        file = Path(folder) / f"rows.{ending}"
        file.write_bytes(content[1:])
        for item in row_files.open_stream(str(file), row_files.input_format(str(file), None), Reading("text")).rows:
            Reading("text").text_of(item.values)


def give_words(content: bytes) -> None:
    """Give the words of a command to the real check; nothing is started."""
    words = content.decode("utf-8", "replace").replace("\x00", "").split("\n")
    kept = [word for word in words[:4] if not word.startswith("-")]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = cli.guard(lambda: None, ["run.py", *kept], Session())
    if code not in (0, 2) or "Traceback" in said.getvalue():
        raise AssertionError((kept, code, said.getvalue()))
    if code == 2:
        raise FinsaError(said.getvalue())


def write_prompt(content: bytes) -> None:
    """A prompt template, as in a configuration."""
    values, choices = _cfg().model_dump(mode="json"), {}
    values["data"]["prompt"] = content.decode("utf-8", "replace")
    compose.build(values, choices, [])


TARGETS: tuple[Callable[[bytes], None], ...] = (read_table, read_stream, give_words, write_prompt)


def attempt(target: Callable[[bytes], None], content: bytes) -> bool:
    """Whether the content was accepted; errors other than finsa's are raised."""
    try:
        target(content)
    except FinsaError:
        return False
    return True


def spoilt(chance: random.Random) -> bytes:
    """A seed with bytes changed, deleted, doubled or inserted."""
    content = bytearray(bytes([chance.randrange(256)]) + chance.choice(SEEDS))
    for _ in range(chance.randrange(1, 8)):
        at = chance.randrange(len(content) + 1)
        how = chance.randrange(3)
        if how == 0 and content:
            content[at % len(content)] = chance.randrange(256)
        elif how == 1:
            content[at:at] = bytes(
                chance.choice(b'\x00\n\r"\\,{}[]\xff\xe4=+~$') for _ in range(chance.randrange(1, 6))
            )
        else:
            del content[at : at + chance.randrange(1, 9)]
    return bytes(content)


def main() -> int:
    """Run all targets; an error other than finsa's ends with its traceback."""
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 20000
    if util.find_spec("atheris") is not None and "--plain" not in sys.argv:
        import atheris

        counts: Counter[str] = Counter()

        def one(content: bytes) -> None:
            target = TARGETS[content[0] % 4 if content else 0]
            counts[target.__name__] += 1
            attempt(target, content[1:])

        atheris.instrument_all()
        atheris.Setup([sys.argv[0], f"-atheris_runs={number}", "-max_len=400"], one)
        atheris.Fuzz()  # prints its own count and ends the process
    chance = random.Random(8)
    taken = Counter[str]()
    for turn in range(number):
        target = TARGETS[turn % len(TARGETS)]
        taken[f"{target.__name__}: {'taken' if attempt(target, spoilt(chance)) else 'refused'}"] += 1
    print(f"{number:,} executions without a traceback", dict(taken))
    return 0


if __name__ == "__main__":
    sys.exit(main())
