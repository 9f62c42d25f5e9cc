"""The cells of the notebook, run as Jupyter does; ``python tests/notebooks.py <run folder>`` stores their outputs."""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "results.ipynb"


def cells() -> list[dict[str, Any]]:
    """The code cells."""
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def run(sources: list[str]) -> tuple[dict[str, Any], list[Any], list[str]]:
    """Run cells in one name space.

    Returns:
        The names, and per cell the value of its last expression and what it printed.
    """
    names: dict[str, Any] = {}
    values, printed = [], []
    for source in sources:
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(tree, str(NOTEBOOK), "exec"), names)
            values.append(eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names) if last else None)
        printed.append(out.getvalue())
    return names, values, printed


def outputs(value: Any, printed: str, number: int) -> list[dict[str, Any]]:
    """The outputs that Jupyter stores for a cell: printed lines, and its value as text and as a picture or a table."""
    found: list[dict[str, Any]] = []
    if printed:
        found.append({"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)})
    if value is not None:
        data: dict[str, Any] = {"text/plain": str(value).splitlines(keepends=True)}
        if html := getattr(value, "_repr_html_", lambda: None)():
            data["text/html"] = html.splitlines(keepends=True)
        if hasattr(value, "savefig"):
            picture = io.BytesIO()
            value.savefig(picture, format="png", dpi=72, bbox_inches="tight", metadata={"Software": None})
            data["image/png"] = base64.b64encode(picture.getvalue()).decode() + "\n"
        kept = {"data": data, "metadata": {}, "output_type": "execute_result", "execution_count": number}
        found.append(kept)
    return found


def store(folder: Path) -> None:
    """Run the notebook on a run folder and store the outputs of its cells."""
    os.environ["FINSA_RUN"] = str(folder)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    _, values, printed = run(["".join(cell["source"]) for cell in code])
    for number, (cell, value, text) in enumerate(zip(code, values, printed, strict=True), start=1):
        cell["execution_count"], cell["outputs"] = number, outputs(value, text, number)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    store(Path(sys.argv[1]))
