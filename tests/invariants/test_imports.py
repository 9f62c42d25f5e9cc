"""Imports go one way, and nothing heavy is loaded before the configuration is known to be right."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A module may import from layers below its own, and from its own package.
LAYERS = [
    {"run", "cli", "__main__"},
    {"sweeps"},
    {"stages"},
    {"board"},
    {"serving", "interop"},
    {"training"},
    {"inference"},
    {"baselines"},
    {"evaluation"},
    {"models"},
    {"data"},
    {"synthetic"},
    {"runs"},
    {"config"},
    {"session"},
    {"errors"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
NO_TORCH = (
    "config",
    "errors",
    "cli",
    "runs",
    "sweeps",
    "synthetic",
    "data",
    "training.preflight",
    "training.results",
    "training.run_baseline",
    "models.folders",
    "evaluation",
    "serving",
    "board",
    "inference.predictor",
    "inference.predict",
    "inference.row_files",
    "stages.board",
    "stages.check",
    "stages.evaluate",
    "stages.export",
    "stages.moe_joint",
    "stages.predict",
    "stages.report",
    "stages.search",
    "stages.serve",
    "stages.train",
)


def modules() -> dict[Path, str]:
    """Every module of the product, with the layer it belongs to."""
    found = {ROOT / "run.py": "run"}
    for file in (ROOT / "finsa").rglob("*.py"):
        parts = file.relative_to(ROOT / "finsa").with_suffix("").parts
        if parts != ("__init__",):
            found[file] = parts[0]
    return found


def imported(file: Path) -> list[str]:
    """Layers of the project that a file imports from, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name.split(".")[1] for name in names if name.startswith("finsa.")]


def test_every_module_has_a_layer() -> None:
    layers = modules()
    assert len(layers) >= 35
    assert {layer for layer in layers.values() if layer not in RANK} == set()


def test_imports_go_one_way() -> None:
    wrong = []
    for file, own in modules().items():
        for other in imported(file):
            same_package = own == other and (ROOT / "finsa" / own).is_dir()
            if other in RANK and not same_package and RANK[other] < RANK[own]:
                wrong.append(f"{file.relative_to(ROOT)} imports {other}")
    assert wrong == []


def test_stages_never_import_each_other() -> None:
    wrong = [file.name for file, layer in modules().items() if layer == "stages" and "stages" in imported(file)]
    assert wrong == []


def test_light_modules_import_without_torch() -> None:
    names = [
        "finsa." + ".".join(file.relative_to(ROOT / "finsa").with_suffix("").parts)
        for file in modules()
        if file.name not in ("run.py", "__init__.py")
        and ".".join(file.relative_to(ROOT / "finsa").with_suffix("").parts).startswith(NO_TORCH)
    ]
    assert len(names) >= 15
    check = "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    code = f"import sys; [__import__(n) for n in {names}]; {check}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
