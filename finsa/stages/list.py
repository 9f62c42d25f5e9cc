"""List the choices of every group, each with the first sentence of its file."""

from __future__ import annotations

from rich.table import Table

from finsa.config import ListStage, RunConfig, catalogue
from finsa.evaluation import tables
from finsa.runs.run_folder import Result
from finsa.session import Session


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Print names and first sentences: of all groups, truncated to the width of the terminal, or of one, complete."""
    assert isinstance(cfg.stage, ListStage)
    folders = session.folders if session else ()
    console = tables.console()
    counts: dict[str, int] = {}
    for group in (cfg.stage.group,) if cfg.stage.group else catalogue.ORDER:
        lines = Table(title=f"{group}=", title_justify="left", title_style="bold", show_header=False, box=None)
        lines.add_column(no_wrap=True, style="cyan")
        lines.add_column(no_wrap=cfg.stage.group is None and console.is_terminal, overflow="ellipsis")
        for name in catalogue.choices_of(group, folders):
            lines.add_row(name, catalogue.summary(catalogue.file_of(group, name, folders)))
        console.print(lines, highlight=False)
        counts[group] = lines.row_count
    if cfg.stage.group is None:
        console.print("Complete sentences: python run.py stage=list stage.group=method", highlight=False)
    return Result("list", None, counts)
