"""An inspection on the terminal; what the colours say is also written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finsa.evaluation.confounds import percent
from finsa.evaluation.examples import Example, Segment, visible
from finsa.evaluation.tables import MANY, console, show

STYLES = {"prompt": "dim", "text": "cyan", "cut": "red strike", "answer": "bold green", "end": "magenta"}
LOSS = "underline"
CUT_SHOWN = 60  # characters of a cut text that are shown


def show_examples(examples: Sequence[Example]) -> None:
    """Print rows part by part: which part, how many of its tokens carry loss, and its text."""
    out = console()
    legend = Text("examples as the model sees them: ", style="bold")
    for part, style in STYLES.items():
        legend.append(part, style=style).append(", ")
    legend.append("with loss", style=LOSS).append(" (* in the column loss); ↵ is a line's end")
    out.print(legend)
    for example in examples:
        _show(example, out)


def _show(example: Example, out: Console) -> None:
    given = (
        "" if example.seen else ("; the answer is scored, not given" if example.split != "train" else "; not learnt")
    )
    title = (
        f"{example.split}: {example.id}, {example.label}: {example.tokens} tokens, {example.learnt} with loss{given}"
    )
    table = Table(title=Text(title), title_justify="left", title_style="bold", expand=True)
    table.add_column("part")
    table.add_column("tokens", justify="right")
    table.add_column("loss", justify="right")
    table.add_column("what", overflow="fold", ratio=1)
    for segment in example.segments:
        carried = f"* {segment.learnt}" if segment.learnt else "-"
        table.add_row(Text(segment.part, style=STYLES[segment.part]), str(segment.tokens), carried, _content(segment))
    out.print(table)


def _content(segment: Segment) -> Text:
    content, style = Text(), STYLES[segment.part]
    if segment.part == "cut":
        more = "…" if len(segment.text) > CUT_SHOWN else ""
        return content.append(visible(segment.text[:CUT_SHOWN]) + more, style=style)
    for piece in segment.pieces:
        content.append(visible(piece.text), style=f"{style} {LOSS}" if piece.loss else style)
    return content


def show_near(close: Mapping[str, Any]) -> None:
    """Print how many rows of each split nearly repeat a row of another."""
    table = _titled("near duplicates across splits", ("held out", "other"))
    for name in ("pairs", "held-out rows", "share", "pairs of different labels"):
        table.add_column(name, justify="right")
    for one in close["between"]:
        cells = [f"{one['pairs']:,}", f"{one['rows']:,} of {one['of']:,}", percent(one["share"], 1)]
        table.add_row(one["held_out"], one["other"], *cells, f"{one['other_label']:,}")
    table.caption = f"Jaccard similarity of runs of {close['shingle']} characters, {close['threshold']} or more"
    show(table, optional=(5, 2))


def show_groups(groups: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    """Print the labels of each group."""
    for found in groups:
        table = _titled(f"labels by {found['kind']}", (found["kind"],))
        many = len(labels) > MANY
        for name in (*(("classes", "most frequent class", "rows of it") if many else labels), "together"):
            table.add_column(Text(name), justify="right")
        for group in found["groups"]:
            counts = [f"{count:,}" for count in group["labels"].values()]
            if many:
                most = max(group["labels"], key=group["labels"].__getitem__)
                counts = [str(sum(map(bool, group["labels"].values()))), most, f"{group['labels'][most]:,}"]
            table.add_row(Text(group["name"]), *map(Text, counts), f"{group['rows']:,}")
        guess = found["guess"]
        table.caption = (
            f"Cramér's V {found['association']:.3f}; guessed from the {found['kind']} alone "
            f"{percent(guess['accuracy'], 1)}, from nothing {percent(guess['majority'], 1)}"
        )
        show(table, optional=() if many else range(len(labels), 0, -1))


def show_findings(findings: Sequence[str]) -> None:
    """Print the sentences."""
    out = console()
    out.print("findings", style="bold")
    for sentence in findings:
        out.print(Text(f"- {sentence}"))


def _titled(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    for name in columns:
        table.add_column(name)
    return table
