"""Documentation is checked like code: its commands pass the check of a real command, its names and links exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from compositions import check

from finsa.config import ROOT, catalogue, command_line
from finsa.errors import ConfigError

READMES = ("README.md", "README_zh.md")
CHOICES = ("docs/choices.md", "docs/choices_zh.md")
PAIRS = (READMES, ("docs/commands.md", "docs/commands_zh.md"), CHOICES)  # the same in both languages
# Documents, and the fewest commands each of them shows: a pattern that finds nothing must not pass.
COMMANDS = {"README.md": 9, "README_zh.md": 9, "CONTRIBUTING.md": 3, "data/README.md": 2}
# Pages of the documentation; those that show no command are named, so that a new page has to be looked at.
SILENT = ("docs/findings.md", "docs/release.md", "docs/reference.md", "docs/reliability.md", "docs/performance.md")
PAGES = sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md"))
COMMANDS |= {page: 0 if page in SILENT else 1 for page in PAGES}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
STARTS = ("python run.py ", "torchrun ", "accelerate launch ", "srun torchrun ")
OVERRIDE = re.compile(r"[a-z_.]+=.+", re.DOTALL)
QUOTED = re.compile(r""""[^"]*"|'[^']*'""")
SUFFIXES = ("py", "yaml", "json", "md")
FLAGS_WITH_VALUE = ("--cfg", "-c", "--config-dir")


def _read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def _blocks(document: str) -> list[tuple[str, str]]:
    """Fenced blocks of a document, as language and content."""
    return FENCE.findall(_read(document))


def _code(document: str) -> list[str]:
    """The code in a document: lines of fenced blocks and inline code."""
    blocks = [block.replace("\\\n", " ") for _, block in _blocks(document)]
    fenced = [line.strip().removeprefix("# ") for block in blocks for line in block.splitlines()]
    return fenced + INLINE.findall(FENCE.sub("", _read(document)))


def _commands(document: str) -> list[str]:
    """Commands of one process, and those that start several."""
    return [code for code in _code(document) if code.startswith(STARTS) and "run.py" in code]


def _fragments(document: str) -> list[str]:
    """Overrides shown within sentences and tables, such as ``train=aidf``, as commands."""
    return [f"python run.py {code}" for code in _code(document) if _is_fragment(code)]


def _is_fragment(code: str) -> bool:
    try:
        words = _words(code.removeprefix("-m "))
    except ValueError:  # a quote that nothing closes: no shell would take it
        return False
    return bool(words) and all(map(OVERRIDE.fullmatch, words))


def _words(code: str) -> list[str]:
    """The words that a shell would parse, without comments."""
    return shlex.split(_without_placeholders(code), comments=True)


def _without_placeholders(code: str) -> str:
    return re.sub(r"<[^<>]*>", "placeholder", code)


def _overrides(command: str) -> list[str]:
    """A command's overrides: placeholders become a word, flags and their values are omitted."""
    words = _words(command)
    words = words[words.index("run.py") + 1 :]
    after_flag = (before in FLAGS_WITH_VALUE for before in ["", *words])
    return [word for word, value in zip(words, after_flag, strict=False) if not value and not word.startswith("-")]


def _shown_files() -> dict[str, str]:
    """Configuration files that CONTRIBUTING.md shows how to write: by name, their content."""
    shown = [block for language, block in _blocks("CONTRIBUTING.md") if language == "yaml"]
    return {re.findall(r"^name: (\w+)$", block, re.MULTILINE)[0]: block for block in shown}


def _uses_shown_file(command: str) -> bool:
    """Whether a command needs a file that a document shows; tests/test_docs.py runs those of the documentation."""
    return (
        "--config-dir" in command
        or "stage=count" in command
        or any(command.endswith(f"={name}") for name in _shown_files())
    )


ALL_COMMANDS = sorted({line for document in COMMANDS for line in _commands(document) + _fragments(document)})


@pytest.mark.parametrize("pair", PAIRS)
def test_both_languages_show_the_same_code_in_the_same_order(pair: tuple[str, str]) -> None:
    """Comments are translated, but in the same places."""
    english, chinese = ([re.sub(r"^# .*$", "#", code, flags=re.MULTILINE) for _, code in _blocks(p)] for p in pair)
    assert english == chinese
    assert english


@pytest.mark.parametrize("pair", PAIRS)
def test_both_languages_have_the_same_structure(pair: tuple[str, str]) -> None:
    shape = [re.findall(r"^(#+ |\||<!-- \w+ -->|!\[)", FENCE.sub("", _read(page)), re.MULTILINE) for page in pair]
    assert shape[0] == shape[1]


@pytest.mark.parametrize("pair", PAIRS)
def test_both_languages_name_the_same_things(pair: tuple[str, str]) -> None:
    named = [sorted(set(INLINE.findall(FENCE.sub("", _read(page))))) for page in pair]
    assert named[0] == named[1]


@pytest.mark.parametrize("document", COMMANDS)
def test_number_of_commands(document: str) -> None:
    assert len(_commands(document)) >= COMMANDS[document]
    assert len(_fragments(document)) >= (3 if document in READMES else 10 if document in CHOICES else 0)


CHECKED = [tuple(_overrides(command)) for command in ALL_COMMANDS if not _uses_shown_file(command)]


@pytest.mark.parametrize("words", sorted(set(CHECKED)), ids=" ".join)
def test_command_passes_the_check(words: tuple[str, ...]) -> None:
    check(*words)


@pytest.mark.parametrize("document", COMMANDS)
def test_words_that_a_shell_would_expand_are_quoted(document: str) -> None:
    """A shell interprets unquoted braces and brackets: it splits ``{a: b}`` into several words."""
    shown = [*_commands(document), *(code for code in _code(document) if OVERRIDE.match(code))]
    bare = {code: QUOTED.sub("", _without_placeholders(code)) for code in shown}
    assert [code for code, rest in bare.items() if re.search(r"\w=[{\[]", rest)] == []


def test_configuration_files_in_contributing_compose(tmp_path: Path) -> None:
    checked = []
    for name, content in _shown_files().items():
        command = re.findall(r"^# (python run\.py .*)$", content, re.MULTILINE)[0]
        group = re.findall(rf"(\w+)={name}", command)[0]
        (tmp_path / name / group).mkdir(parents=True)
        (tmp_path / name / group / f"{name}.yaml").write_text(content, encoding="utf-8")
        command_line.check(_overrides(command), folders=(tmp_path / name,))
        checked.append(name)
    assert checked == ["my_forum", "lora_wide"]


def test_a_wrong_command_would_be_detected() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'lora'"):
        check(*_overrides("python run.py -m stage=evaluate run=<folder or file> --cfg job method=lara"))
    with pytest.raises(ConfigError, match="Did you mean 'lora'"):
        check(*_overrides("torchrun --nproc-per-node 2 run.py method=lara  # on two processors"))
    with pytest.raises(ConfigError, match="利好,: is not of the form key=value"):
        check(*_overrides("python run.py data.labels={positive: 利好, negative: 利空}"))


@pytest.mark.parametrize("document", COMMANDS)
def test_data_files_of_commands_exist(document: str) -> None:
    files = re.findall(r"data\.files=([\w/.]+)", "\n".join(block for _, block in _blocks(document)))
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", _read("Makefile"), re.MULTILINE))
    used = {name for document in COMMANDS for code in _code(document) for name in re.findall(r"^make (\w+)", code)}
    assert {"run", "test", "lint", "bench"} <= used <= targets


@pytest.mark.parametrize("document", COMMANDS)
def test_relative_links_exist(document: str) -> None:
    links = [link.split("#")[0] for link in LINK.findall(_read(document)) if "://" not in link]
    folder = (ROOT / document).parent
    assert [link for link in links if link and not (folder / link).exists()] == []
    assert links or document not in READMES


@pytest.mark.parametrize("page", CHOICES)
@pytest.mark.parametrize("group", ["model", "method", "data", "stage", "train", "tracking", "experiment"])
def test_every_choice_is_named(page: str, group: str) -> None:
    choices = catalogue.choices_of(group)
    assert choices
    assert [name for name in choices if f"`{name}`" not in _read(page)] == []


def test_paths_in_the_map_exist() -> None:
    cells = [line.split("|")[1] for line in _read("CONTRIBUTING.md").splitlines() if line.startswith("| `")]
    paths = [path for cell in cells for path in INLINE.findall(cell) if "/" in path or path.endswith(".py")]
    assert len(paths) >= 15
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_functions_named_in_contributing_exist() -> None:
    named = set(re.findall(r"`((?:[a-z_]+\.)+(?:[A-Z]\w+\.)?\w+)`", _read("CONTRIBUTING.md")))
    packages = {path.stem for path in (ROOT / "finsa").iterdir()}
    checked, missing = 0, []
    for name in sorted(
        name for name in named if name.split(".")[0] in packages and name.split(".")[-1] not in SUFFIXES
    ):
        parts = name.split(".")
        length = next(
            (
                n
                for n in range(len(parts), 0, -1)
                if (ROOT / "finsa" / "/".join(parts[:n])).with_suffix(".py").is_file()
            ),
            0,
        )
        source = _read("finsa/" + "/".join(parts[:length]) + ".py") if length else ""
        defined = all(
            re.search(rf"\b(?:def|class) {part}\b|^{part} =", source, re.MULTILINE) for part in parts[length:]
        )
        missing += [] if source and defined else [name]
        checked += 1
    assert missing == []
    assert checked >= 30
