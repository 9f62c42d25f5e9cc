"""What a configuration may not do: name code to be run, or read what is no part of it.

YAML is handed around: experiment files, files of a group, the ``config.yaml`` of a run. Reading one must not run
anything but Hydra's own launchers and sweepers, and must not copy secrets of the environment into a run folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from finsa.errors import ConfigError, Problem

# Hydra instantiates these of its own section; each stands for a module, or names one object.
TARGETS = ("hydra._internal.core_plugins.", "hydra_plugins.", "hydra.experimental.callbacks.", "finsa.sweeps.Remember")
LOGGING = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "colorlog.ColoredFormatter")
# OmegaConf's resolvers that read the environment or build values of text; ${now:...} and ${other.key} remain.
RESOLVERS = ("oc.env", "oc.decode", "oc.create", "oc.deprecated", "oc.dict.keys", "oc.dict.values", "oc.select")
WHY_NO_RESOLVER = "it would put what lies outside of conf/ into run folders; write the value itself"
FORBIDDEN_FLAGS = {
    "--experimental-rerun": "it reads a pickle, which can run any code",
    "--config-path": "finsa reads its own conf/; put your file into a group there",
    "--config-name": "finsa reads its own conf/; put your file into a group there",
    "--config-dir": "finsa reads its own conf/; put your file into a group there",
}
_SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8  # characters; a shorter value would blot out ordinary words

for _name in RESOLVERS:
    OmegaConf.clear_resolver(_name)


def require_no_code(values: Any) -> None:
    """Refuse ``_target_`` but of Hydra's own plug-ins, and loggers of unknown classes.

    Args:
        values: the composed configuration, Hydra's section included, not resolved.

    Raises:
        ConfigError: with the path of each.
    """
    problems = list(_code(values, ()))
    if problems:
        raise ConfigError(problems)


def _code(values: Any, path: tuple[str, ...]) -> Iterator[Problem]:
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in entries:
        here = (*path, str(key))
        inside = path[:1] == ("hydra",)
        if key in ("_target_", "_args_", "_partial_", "_recursive_", "_convert_"):
            allowed = inside and (key != "_target_" or (isinstance(value, str) and _named(value)))
            if not allowed:
                yield Problem(".".join(here), f"names code to be run, {value!r}; a configuration holds values alone")
        elif inside and here[1:2] in (("job_logging",), ("hydra_logging",)) and key in ("class", "()", "ext"):
            if value not in LOGGING:
                yield Problem(".".join(here), f"names code to be run, {value!r}; leave Hydra's loggers as they are")
        else:
            yield from _code(value, here)


def _named(target: str) -> bool:
    return any(target == known or (known.endswith(".") and target.startswith(known)) for known in TARGETS)


def masked(text: str) -> str:
    """A text without the environment's secrets: values of variables called key, token, secret, password."""
    values = {value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return text
