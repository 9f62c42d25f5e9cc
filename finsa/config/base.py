"""The base class of all configuration sections, the field types they share, and paths of the project."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from finsa.errors import ConfigError, Problem

_PACKAGE = Path(__file__).resolve().parents[1]
# conf/ and data/ are next to the package in a checkout, and inside it in an installed wheel (see pyproject.toml).
ROOT = _PACKAGE / "home" if (_PACKAGE / "home").is_dir() else _PACKAGE.parent
# Any letters, but no path separator and no leading dot, so that the name cannot lead out of the run folder.
FOLDER_NAME = r"^[^/\\\x00-\x1f.][^/\\\x00-\x1f]{0,79}$"


def _label_text(value: Any) -> Any:
    """A label is text; a number or a boolean becomes its YAML text: 1, 0.5, true."""
    return json.dumps(value) if isinstance(value, bool | int | float) else value


FolderName = Annotated[str, Field(pattern=FOLDER_NAME)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Label = Annotated[str, BeforeValidator(_label_text)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Toggle = bool | Literal["auto"]
Balance = Literal["none", "downsample", "oversample"]
# Measures as scikit-learn defines them; see `finsa.evaluation.metrics.measures`.
Measure = Literal[
    "mcc",
    "balanced_accuracy",
    "kappa",
    "quadratic_kappa",
    "jaccard",
    "mae",
    "auroc",
    "average_precision",
    "log_loss",
    "brier",
]
ValueMeasure = Literal["rmse", "pearson", "spearman", "cosine", "micro_f1", "subset_accuracy"]
# Measures by task, the first of which compares runs and selects checkpoints unless another one is configured.
MEASURES: dict[str, tuple[str, ...]] = {
    "regression": ("rmse", "mae", "pearson", "spearman", "cosine"),
    "multi_label": ("macro_f1", "micro_f1", "subset_accuracy"),
}
COSTS = ("cost", "least_cost")  # measures that need `evaluation.costs`
LOWER_IS_BETTER = ("loss", "mae", "rmse", "log_loss", "brier", *COSTS)


class Section(BaseModel):
    """Base of all sections: immutable, strict about types (``"3"`` is not a number), closed to unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def headline(task: str | None) -> str:
    """The measure that compares runs of a task and selects checkpoints by default."""
    return MEASURES.get(task or "", ("macro_f1",))[0]


def placeholders(template: str) -> list[str]:
    """Names of the ``{placeholders}`` of a prompt template, in their order.

    Raises:
        ValueError: for a brace that belongs to no placeholder.
    """
    try:
        return [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"not a valid template ({error}); write {{{{ for a literal brace") from None


def locate(path: str | Path) -> Path:
    """Resolve a path written by the user: absolute, relative to the working directory, or relative to the project.

    Returns:
        The first of these that exists; otherwise the one relative to the working directory.
    """
    written = Path(path).expanduser()
    if written.is_absolute() or written.exists():
        return written.absolute()
    return (ROOT / written) if (ROOT / written).exists() else written.absolute()


_Kind = TypeVar("_Kind", bound=Section)


def read_section(kind: type[_Kind], key: str, file: str) -> _Kind:
    """Read the YAML file that a key names, such as ``stage.prices``.

    Raises:
        ConfigError: if it cannot be read, or has other keys or values.
    """
    place = locate(file)
    if not place.is_file():
        raise ConfigError([Problem(key, f"there is no file {place}")])
    try:
        # As JSON, whose lists may be tuples in strict types.
        return kind.model_validate_json(json.dumps(yaml.safe_load(place.read_text(encoding="utf-8"))))
    except ValidationError as error:
        found = [(".".join(map(str, one["loc"])), one["msg"].removeprefix("Value error, ")) for one in error.errors()]
        faults = [f"{path}: {text}" if path else "the file has no keys" for path, text in found]
    except (OSError, UnicodeDecodeError, TypeError, yaml.YAMLError) as error:
        faults = [f"the file cannot be read: {' '.join(str(error).split())}"]
    raise ConfigError([Problem(key, fault, str(place)) for fault in faults])
