"""What a configuration may not do: name code to run, or read values from outside of it.

YAML files are shared: experiments, files of a group, the ``config.yaml`` of a run. Reading one must run nothing
but Hydra's own launchers and sweepers, and must not copy secrets from the environment into a run folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf

from finsa.errors import ConfigError, Problem

# What Hydra may instantiate in its own section: everything in these modules, or the named class.
TARGETS = ("hydra._internal.core_plugins.", "hydra_plugins.", "hydra.experimental.callbacks.", "finsa.sweeps.Remember")
LOGGING = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "colorlog.ColoredFormatter")
# OmegaConf's resolvers that read the environment or build values from text; ${now:...} and ${other.key} remain.
RESOLVERS = ("oc.env", "oc.decode", "oc.create", "oc.deprecated", "oc.dict.keys", "oc.dict.values", "oc.select")
WHY_NO_RESOLVER = "it would copy values from outside of conf/ into run folders; write the value itself"
REMOTE_CODE = "model.trust_remote_code"  # may only be set to true on the command line, never in a file
FORBIDDEN_FLAGS = {
    "--experimental-rerun": "it reads a pickle, which can run any code",
    "--config-path": "finsa reads its own conf/; put your file into a group there",
    "--config-name": "finsa reads its own conf/; put your file into a group there",
}
_SHORT = {"-cp": "--config-path", "-cn": "--config-name", "-cd": "--config-dir"}
_SECRET = re.compile("KEY|TOKEN(?!IZER)|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8  # characters; masking shorter values would hide ordinary words

for _name in RESOLVERS:
    OmegaConf.clear_resolver(_name)


def require_no_code(values: Any) -> None:
    """Refuse ``_target_`` except for Hydra's own plug-ins, and loggers of unknown classes.

    Args:
        values: the composed configuration with Hydra's section, not resolved.

    Raises:
        ConfigError: with the path of each.
    """
    problems = list(_code(values, ()))
    if problems:
        raise ConfigError(problems)


def require_no_code_below(folder: Path) -> None:
    """The same for all YAML files of a folder that ``--config-dir`` adds.

    Raises:
        ConfigError: with file and path of each.
    """
    problems: list[Problem] = []
    for file in sorted(folder.rglob("*.yaml")):
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            continue  # Hydra reports what is wrong with it if it is used
        found = _code({"hydra": values}, ())
        problems += [Problem(one.path.removeprefix("hydra."), one.text, str(file)) for one in found]
    if problems:
        raise ConfigError(problems)


def require_plain_command(words: Sequence[str]) -> None:
    """Refuse flags of Hydra that read an unchecked configuration, and overrides that name code.

    Args:
        words: the command line without the program.

    Raises:
        ConfigError: naming the flag or the key.
    """
    for number, word in enumerate(words):
        flag, _, value = word.partition("=")
        flag = _SHORT.get(flag, flag)
        # argparse accepts the beginning of a flag for the flag
        meant = [name for name in (*FORBIDDEN_FLAGS, "--config-dir") if len(flag) > 4 and name.startswith(flag)]
        if meant == ["--config-dir"]:
            require_no_code_below(Path(value or "".join(words[number + 1 : number + 2])))
        elif meant:
            raise ConfigError([Problem(flag, f"is not allowed: {FORBIDDEN_FLAGS[meant[0]]}", "command line")])
        elif _names_code(word):
            text = "names code to run; a command only sets values"
            raise ConfigError([Problem(flag.lstrip("+~"), text, "command line")])


def consents(overrides: Sequence[str]) -> bool:
    """Whether a command allows code that ships with weights: its last ``model.trust_remote_code`` is true."""
    words = [text.lstrip("+").partition("=") for text in overrides]
    given = [value for key, _, value in words if key == REMOTE_CODE]
    return bool(given) and given[-1].strip().lower() == "true"


def masked(text: str) -> str:
    """A text without the secrets of the environment: values of variables called key, token, secret, password."""
    values = {value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return text


def _names_code(word: str) -> bool:
    """Whether an override sets a key ``_target_``, by its own key or by one in its value; texts may contain it."""
    if "_target_" not in word:
        return False
    if "_target_" in re.split(r"[.@:]", word.partition("=")[0].lstrip("+~")):
        return True
    try:
        return _has_target(OverridesParser.create().parse_override(word).value())
    except HydraException:
        return False  # `command_line` reports it; nothing that cannot be parsed is composed


def _has_target(value: Any) -> bool:
    if isinstance(value, dict):
        return any("_target_" in str(key).split(".") or _has_target(one) for key, one in value.items())
    if isinstance(value, ChoiceSweep):
        return any(map(_has_target, value.list))
    return isinstance(value, list) and any(map(_has_target, value))


def _code(values: Any, path: tuple[str, ...]) -> Iterator[Problem]:
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    in_hydra = path[:1] == ("hydra",)
    for key, value in entries:
        here = ".".join((*path, str(key)))
        if key in ("_target_", "_args_", "_partial_", "_recursive_", "_convert_"):
            if not in_hydra or (key == "_target_" and not _is_allowed(value)):
                yield Problem(here, f"names code to run, {value!r}; a configuration only contains values")
        elif in_hydra and key in ("class", "()") and not isinstance(value, dict):
            if value not in LOGGING:
                yield Problem(here, f"names code to run, {value!r}; keep Hydra's loggers as they are")
        elif str(key).lstrip("+") == REMOTE_CODE:  # an axis of a sweep would become a part of the command
            yield Problem(here, f"runs code that ships with weights; set {REMOTE_CODE} on the command line instead")
        else:
            yield from _code(value, (*path, str(key)))


def _is_allowed(target: Any) -> bool:
    return isinstance(target, str) and any(
        target == known or (known.endswith(".") and target.startswith(known)) for known in TARGETS
    )
