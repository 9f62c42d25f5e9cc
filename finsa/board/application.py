"""The pages of the board, one per language, and the files of runs that they show."""

from __future__ import annotations

import asyncio
import csv
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime, timedelta
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import gradio as gr
import yaml
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, PlainTextResponse, RedirectResponse, Response

from finsa.board import commands, processes, runs
from finsa.board.access import Access
from finsa.board.commands import Scope
from finsa.config import BoardStage, catalogue, quoting
from finsa.config.base import LOWER_IS_BETTER
from finsa.errors import FinsaError
from finsa.evaluation import pages, tables

TEMPLATES = Path(__file__).parent / "templates"
OTHER = {"en": "zh", "zh": "en"}
FIRST = ("model", "method", "data", "train", "stage", "experiment")  # groups that are always shown
SERVED = (".html", ".png", ".svg", ".csv", ".md", ".json", ".jsonl")  # files of runs that the board hands out
# A page of a run may contain texts of the data: it can load nothing and reach nothing of the board.
OF_RUNS = (
    "sandbox allow-scripts allow-popups; default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'"
)
ROWS = 100  # answers shown


def build(scope: Scope, stage: BoardStage, token: str | None) -> Access:
    """Build the application.

    Args:
        scope: what its commands may name.
        stage: its options.
        token: asked for; None: no token.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(scope.output_dir / processes.FOLDER / "uploads")
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/")
    async def root(request: Request) -> Response:
        chinese = request.headers.get("accept-language", "").lower().startswith("zh")
        return RedirectResponse("/zh/" if chinese else "/en/", 303)

    @app.get("/manifest.json")
    @app.get("/favicon.ico")
    async def nothing() -> dict[str, str]:
        return {"name": "finsa"}  # pages of gradio ask for them at the root

    @app.get("/files/{name:path}")
    async def file(name: str) -> Response:
        path = scope.output_dir / name
        if path.suffix not in SERVED or not commands.within(path, [scope.output_dir.resolve()]) or not path.is_file():
            return PlainTextResponse("no such file", 404)
        return FileResponse(path, headers={"content-security-policy": OF_RUNS, "cache-control": "no-store"})

    fonts = ["system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]  # none is downloaded
    fixed = ["ui-monospace", "Menlo", "Consolas", "Noto Sans Mono CJK SC", "monospace"]
    for language in OTHER:
        blocks = page(scope, stage, language)
        blocks.has_launched = True  # otherwise gradio does not check that the file of a request was uploaded
        gr.mount_gradio_app(
            app,
            blocks,
            path=f"/{language}",
            footer_links=[],
            allowed_paths=[],
            show_error=True,
            max_file_size=stage.file_bytes,
            ssr_mode=False,
            theme=gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=fixed),
            css=(TEMPLATES / "board.css").read_text(encoding="utf-8"),
            head='<link rel="icon" href="data:,">',
        )
    return Access(app, token)


@cache
def texts() -> dict[str, dict[str, str]]:
    """The texts of the board by language."""
    return dict(yaml.safe_load((TEMPLATES / "texts.yaml").read_text(encoding="utf-8")))


def page(scope: Scope, stage: BoardStage, language: str) -> gr.Blocks:
    """Build the page of a language: its components from top to bottom, then what they do."""
    say, output = texts()[language], scope.output_dir
    hidden = [stage.token_env] if stage.token_env else []
    private: dict[str, Any] = {"api_visibility": "private"}
    quiet: dict[str, Any] = {**private, "show_progress": "hidden"}

    def render(name: str, **values: Any) -> str:
        return pages.environment(TEMPLATES).get_template(f"{name}.html.j2").render(texts=say, **values)

    def choice(group: str) -> gr.Dropdown:
        names = [(name, name) for name in catalogue.choices_of(group) if name not in (*commands.SERVERS, "list")]
        value = commands.defaults()[group]
        return gr.Dropdown(
            names if value else [(say["none"], ""), *names], value=value, label=say[group], elem_id=group
        )

    def code(name: str, label: str, **more: Any) -> gr.Code:
        more |= {"interactive": False, "show_line_numbers": False, "buttons": ["copy"], "elem_id": name}
        return gr.Code(label=label, **more)

    with gr.Blocks(title=say["title"], analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True) as blocks:
        shown, picked, boxes = gr.State(""), gr.State([]), dict[str, gr.Dropdown]()
        gr.HTML(render("head", other=OTHER[language]))
        with gr.Tabs() as tabs:
            with gr.Tab(say["compose"], id="compose"), gr.Row():
                with gr.Column(min_width=300):
                    for pair in (FIRST[:2], FIRST[2:4], FIRST[4:]):
                        with gr.Row():
                            boxes |= {group: choice(group) for group in pair}
                    overrides = gr.Textbox(
                        label=say["overrides"], info=say["overrides_hint"], lines=3, elem_id="overrides"
                    )
                    with gr.Accordion(say["more"], open=False):
                        boxes |= {group: choice(group) for group in catalogue.ORDER if group not in FIRST}
                    start = gr.Button(say["start"], variant="primary", interactive=False, elem_id="start")
                    about = gr.HTML(elem_id="about")
                with gr.Column(min_width=300):
                    verdict = gr.HTML(elem_id="verdict")
                    command = code("command", say["command"], language="shell", lines=1, wrap_lines=True)
                    plan = gr.HTML(elem_id="plan")
                    written = code("yaml", say["yaml"], language="yaml", lines=5, max_lines=18)
            with gr.Tab(say["runs"], id="runs"), gr.Row():
                with gr.Column(min_width=300, scale=6):
                    table = gr.HTML(js_on_load=(TEMPLATES / "runs.js").read_text(encoding="utf-8"), elem_id="list")
                    compare = gr.Button(say["picked"], interactive=False, elem_id="compare")
                with gr.Column(min_width=300, scale=5):
                    stop = gr.Button(say["stop"], variant="stop", visible=False, elem_id="stop")
                    resume = gr.Button(say["resume"], variant="primary", visible=False, elem_id="resume")
                    detail = gr.HTML(elem_id="run")
                    again = code("again", say["command"], language="shell", lines=1, wrap_lines=True, visible=False)
            with gr.Tab(say["report"], id="report"):
                comparison = gr.HTML(render("report", failed="", page="", note=say["no_report"]), elem_id="comparison")
            with gr.Tab(say["try"], id="try"), gr.Row():
                with gr.Column(min_width=300, scale=4):
                    finished = gr.Dropdown([], label=say["finished_run"], elem_id="finished")
                    lines = gr.Textbox(label=say["texts"], lines=5, elem_id="texts")
                    upload = gr.File(label=say["file"], height=140, elem_id="file")
                    predict = gr.Button(say["predict"], variant="primary", elem_id="predict")
                with gr.Column(min_width=300, scale=5):
                    answers = gr.HTML(elem_id="answers")
        timer = gr.Timer(stage.refresh_seconds)

        # ------------------------------------------------------------------------------------ a new run

        def given(values: Sequence[Any]) -> list[str]:
            return commands.words(dict(zip(boxes, values[:-1], strict=True)), values[-1] or "", scope)

        def on_change(*values: Any) -> list[Any]:
            """The command, what is wrong with it, and its configuration."""
            typed, composed, problems, note = "", "", list[str](), say["no_plan"]
            chosen = {group: name for group, name in zip(boxes, values[:-1], strict=True) if group in FIRST and name}
            described = {group: catalogue.summary(catalogue.file_of(group, name)) for group, name in chosen.items()}
            jobs = []
            try:
                typed = commands.in_shell(given(values))
                jobs = commands.check(given(values), scope)
                composed = commands.as_yaml(jobs)
                note = say["planning"] if jobs[0].stage.name in ("train", "check") else note
            except FinsaError as error:
                problems = commands.problems(error)
            found = render("verdict", problems=problems, jobs=len(jobs))
            waiting, said = render("plan", note=note, printed="", failed=False), render("about", described=described)
            return [found, typed, composed, gr.update(interactive=not problems), waiting, said]

        async def on_valid(*values: Any) -> AsyncIterator[Any]:
            """The plan of a valid training run, as ``stage=check`` prints it; a later change cancels it."""
            await asyncio.sleep(0.7)  # more changes may follow
            try:
                words = given(values)
                jobs = await asyncio.to_thread(commands.check, words, scope)
            except FinsaError:
                return
            if jobs[0].stage.name in ("train", "check"):
                planned = processes.start(commands.of_plan(words), processes.new_folder(output), hidden, columns=66)
                try:
                    failed = await processes.ended(planned) != 0
                    yield render("plan", note="", printed=planned.printed, failed=failed)
                finally:
                    if planned.running:
                        processes.stop(planned.pid, signal.SIGKILL)
                    shutil.rmtree(planned.folder, ignore_errors=True)

        def on_start(*values: Any) -> list[Any]:
            """Start the command, and show it in the list."""
            try:
                words = given(values)
                commands.check(words, scope)
            except FinsaError as error:
                raise gr.Error("\n".join(commands.problems(error))) from None
            started = processes.start(words, processes.new_folder(output), hidden)
            return [gr.update(selected="runs"), f"{processes.FOLDER}/{started.folder.name}"]

        # ------------------------------------------------------------------------------------ runs

        def refreshed(name: str, chosen: list[str]) -> list[Any]:
            """The list of runs and the run that is shown."""
            entries = runs.listed(output)
            entry = next((one for one in entries if name in one.names), None)
            done = {e.name: e for e in entries if e.status == "complete" and e.score}
            choices = [(f"{e.title}, {e.started[5:16]}, {e.score[1]:.3f}", n) for n, e in done.items() if e.score]
            return [
                render("runs", entries=entries, shown=entry.name if entry else "", picked=chosen),
                _run(entry, scope, say, render),
                gr.update(visible=entry is not None and entry.pid is not None),
                gr.update(visible=entry is not None and entry.resumable),
                gr.update(visible=bool(entry and entry.words), value=commands.in_shell(entry.words) if entry else ""),
                gr.update(choices=choices),
                gr.update(interactive=len(set(chosen) & set(done)) > 1),
            ]

        def on_tick(name: str, chosen: list[str], before: str, entry: str) -> list[Any]:
            new = refreshed(name, chosen)  # what is the same is not drawn again, so that a selected text stays selected
            return [gr.skip()] * len(new) if new[:2] == [before, entry] else new

        def on_select(event: gr.EventData) -> str:
            return str(event.shown)

        def on_pick(event: gr.EventData) -> list[str]:
            return [str(name) for name in event.picked]

        def on_stop(name: str) -> None:
            entry = runs.find(output, name)
            if entry is not None and entry.pid is not None:
                processes.stop(entry.pid)

        def on_resume(name: str) -> str:
            """Repeat the command of a run with ``resume=true``; its words are those of its folder."""
            entry = runs.find(output, name)
            words = commands.resuming(entry.words) if entry is not None and entry.resumable else None
            if entry is None or words is None:
                raise gr.Error(say["choose_run"])
            processes.start(words, processes.new_folder(output), hidden)
            return entry.name

        # ------------------------------------------------------------------------------------ reports and answers

        async def ran(words: Sequence[str], folder: Path) -> str:
            """Run a command to its end; what it has printed if it failed, otherwise nothing."""
            command = processes.start([*scope.always, *words], folder, hidden)
            if await processes.ended(command) == 0:
                return ""
            return command.printed[max(0, command.printed.rfind("error: ")) :] or "?"

        def places(names: Sequence[str]) -> list[str]:
            """The folders of finished runs in the list, as words of a command."""
            found = {entry.name: entry.folder for entry in runs.listed(output) if entry.status == "complete"}
            if not names or set(names) - set(found):
                raise gr.Error(say["no_finished"])
            return [quoting.quoted(str(found[name])) for name in names]

        async def on_compare(chosen: list[str]) -> str:
            """Compare the selected runs with ``stage=report``, and show its page."""
            name = f"report_{datetime.now():%Y-%m-%d_%H-%M-%S}"
            compared = ",".join(await asyncio.to_thread(places, chosen))
            words = ["stage=report", f"runs=[{compared}]", f"output={quoting.quoted(str(output / name))}"]
            failed = await ran(words, processes.new_folder(output))
            return render("report", failed=failed, page=f"/files/{name}/report.html", note="")

        async def on_predict(name: str, text: str, file: str | None) -> str:
            """Predict texts or the rows of a file with ``stage=predict``, in a process that frees its memory."""
            rows = [[line] for line in (text or "").splitlines() if line.strip()]
            try:
                if not rows and not file:
                    raise gr.Error(say["no_input"])
                (place,), folder = await asyncio.to_thread(places, [name]), processes.new_folder(output)
            except gr.Error as error:
                return render("answers", failed=error.message, rows=None)
            words = ["stage=predict", f"run={place}", f"output={quoting.quoted(str(folder / 'answers.csv'))}"]
            if rows:
                file = str(folder / "texts.csv")
                with Path(file).open("w", encoding="utf-8", newline="") as stream:
                    csv.writer(stream).writerows([["text"], *rows])
                words.append("stage.text_column=text")
            failed = await ran([*words, f"input={quoting.quoted(str(file))}"], folder)
            found, total = ([], 0) if failed else _answers(folder / "answers.csv")
            link = f"/files/{processes.FOLDER}/{folder.name}/answers.csv"
            return render("answers", failed=failed, rows=found, total=total, page=link)

        form, view = [*boxes.values(), overrides], [table, detail, stop, resume, again, finished, compare]
        changes = [box.change for box in form]
        changed = [verdict, command, written, start, plan, about]
        checked = gr.on([*changes, blocks.load], on_change, form, changed, trigger_mode="always_last", **quiet)
        planned = checked.then(on_valid, form, plan, trigger_mode="multiple", **quiet)
        gr.on(changes, None, cancels=[planned], **private)
        timer.tick(on_tick, [shown, picked, table, detail], view, **quiet)
        waiting = [gr.update(selected="report"), render("report", failed="", page="", note=say["reporting"])]
        asked = compare.click(lambda: waiting, None, [tabs, comparison], **quiet)
        asked.then(on_compare, picked, comparison, **quiet)
        asked = predict.click(
            lambda: render("answers", failed="", rows=None, note=say["predicting"]), None, answers, **quiet
        )
        asked.then(on_predict, [finished, lines, upload], answers, **quiet)
        stop.click(on_stop, shown, None, **private)
        for event in (
            blocks.load(lambda: None, **quiet),
            start.click(on_start, form, [tabs, shown], **private),
            table.select(on_select, None, shown, **quiet),
            table.input(on_pick, None, picked, **quiet),
            resume.click(on_resume, shown, shown, **private),
        ):
            event.then(refreshed, [shown, picked], view, **quiet)
    return blocks


def _run(entry: runs.Entry | None, scope: Scope, say: dict[str, str], render: Callable[..., str]) -> str:
    """What is shown of a run: scores, progress, curves and log."""
    if entry is None:
        return render("run", entry=None)
    made, seconds = runs.progress(entry), entry.facts.get("wall_seconds")
    place = next((name for name in ("index.html", "run.html") if (entry.folder / name).is_file()), None)
    score = made.score if made else ""
    return render(
        "run",
        entry=entry,
        progress=made,
        lower=score in LOWER_IS_BETTER,
        titles={score: f"{say['validation']}: {tables.TITLES.get(score, score)}", "loss": say["loss"]},
        left=_clock(made.left) if made and made.left is not None else "",
        seconds=_clock(seconds) if seconds and entry.status != "running" else "",
        scored=tables.TITLES.get(entry.score[0], entry.score[0]) if entry.score else "",
        error=entry.facts.get("error") if entry.status != "running" else None,
        shown_folder=str(scope.named / entry.name),
        page=f"/files/{entry.name}/{place}" if place else "",
        log=entry.command.printed if entry.command else "",
    )


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _answers(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The first answers of a file, and their number."""
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        rows, names = list(islice(reader, ROWS)), list(reader.fieldnames or ())
        total = len(rows) + sum(1 for _ in reader)
    added = [name for name in names if name.startswith("p_")]
    label = names.index(added[0]) - 1 if added else len(names) - 1  # the label comes before its probabilities
    shown = []
    for row in rows:
        text = row.get("text") or max((row[name] or "" for name in names[:label]), key=len, default="")
        probs = sorted(((name[2:], float(row[name])) for name in added if row[name]), key=lambda one: -one[1])
        shown.append({"text": text, "label": row[names[label]], "probs": probs})
    return shown, total
