"""The pages of the board, one per language, and the files of runs that they show."""

from __future__ import annotations

import asyncio
import csv
import os
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime, timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import gradio as gr
import yaml
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, PlainTextResponse, RedirectResponse, Response

from finsa.board import commands, processes, runs
from finsa.board.access import Access
from finsa.board.commands import Scope
from finsa.board.processes import Command
from finsa.config import BoardStage, RunConfig, catalogue, quoting
from finsa.errors import ConfigError, FinsaError, Problem
from finsa.evaluation import pages, tables

TEMPLATES = Path(__file__).parent / "templates"
LANGUAGES = ("en", "zh")
FIRST = ("model", "method", "data", "train", "stage", "experiment")  # groups that are always shown
HIDDEN_STAGES = (*commands.SERVERS, "list")
SERVED = (".html", ".png", ".svg", ".csv", ".md", ".json", ".jsonl")  # files of runs that the board hands out
# A page of a run may contain texts of the data: it can load nothing and reach nothing of the board.
OF_RUNS = "sandbox allow-scripts allow-popups; default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
ROWS = 100  # answers shown
Shown = Callable[..., str]


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

    @app.get("/files/{name:path}")
    async def file(name: str) -> Response:
        path = scope.output_dir / name
        allowed = commands.within(path, [scope.output_dir.resolve()]) and path.suffix in SERVED
        if not allowed or not path.is_file():
            return PlainTextResponse("no such file", 404)
        return FileResponse(path, headers={"content-security-policy": OF_RUNS, "cache-control": "no-store"})

    @app.get("/manifest.json")
    @app.get("/favicon.ico")
    async def nothing() -> Response:
        return Response('{"name": "finsa"}', media_type="application/json")  # the page of gradio asks for them at the root

    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        font=["system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "Noto Sans Mono CJK SC", "monospace"],
    )
    for language in LANGUAGES:
        gr.mount_gradio_app(
            app,
            page(scope, stage, language),
            path=f"/{language}",
            footer_links=[],
            allowed_paths=[],
            show_error=True,
            max_file_size=stage.file_bytes,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            theme=theme,
            css=(TEMPLATES / "board.css").read_text(encoding="utf-8"),
            head='<link rel="icon" href="data:,">',
        )
    return Access(app, token, partial(_render, "login.html.j2", **texts()))


@cache
def texts() -> dict[str, dict[str, str]]:
    """The texts of the board by language."""
    return dict(yaml.safe_load((TEMPLATES / "texts.yaml").read_text(encoding="utf-8")))


def _render(name: str, wrong: bool | None = None, **values: Any) -> str:
    return pages.environment(TEMPLATES).get_template(name).render(wrong=wrong, **values)


def page(scope: Scope, stage: BoardStage, language: str) -> gr.Blocks:
    """Build the page of a language: its components from top to bottom, then what they do."""
    say = texts()[language]
    render: Shown = partial(_render, texts=say)
    hidden = [stage.token_env] if stage.token_env else []
    private: dict[str, Any] = {"api_visibility": "private"}
    quiet: dict[str, Any] = {**private, "show_progress": "hidden"}

    def choice(group: str) -> gr.Dropdown:
        names = [name for name in catalogue.choices_of(group) if group != "stage" or name not in HIDDEN_STAGES]
        default = commands.defaults()[group]
        none = [] if default else [(say["none"], "")]
        return gr.Dropdown([*none, *((name, name) for name in names)], value=default, label=say[group], elem_id=group)

    with gr.Blocks(title=say["title"], analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True) as blocks:
        shown, picked = gr.State(""), gr.State([])
        gr.HTML(render("head.html.j2", other=f"/{LANGUAGES[1 - LANGUAGES.index(language)]}/"))
        with gr.Tabs() as tabs:
            with gr.Tab(say["compose"], id="compose"), gr.Row():
                with gr.Column(min_width=300):
                    boxes = {}
                    for pair in (FIRST[:2], FIRST[2:4], FIRST[4:]):
                        with gr.Row():
                            boxes |= {group: choice(group) for group in pair}
                    overrides = gr.Textbox(
                        label=say["overrides"], info=say["overrides_hint"], lines=3, elem_id="overrides"
                    )
                    with gr.Accordion(say["more"], open=False):
                        boxes |= {group: choice(group) for group in catalogue.ORDER if group not in FIRST}
                    about = gr.HTML(elem_id="about")
                    start = gr.Button(say["start"], variant="primary", interactive=False, elem_id="start")
                with gr.Column(min_width=300):
                    verdict = gr.HTML(elem_id="verdict")
                    command = gr.Code(
                        label=say["command"],
                        language="shell",
                        interactive=False,
                        lines=1,
                        wrap_lines=True,
                        show_line_numbers=False,
                        buttons=["copy"],
                        elem_id="command",
                    )
                    plan = gr.HTML(elem_id="plan")
                    written = gr.Code(
                        label=say["yaml"],
                        language="yaml",
                        interactive=False,
                        lines=5,
                        max_lines=18,
                        show_line_numbers=False,
                        buttons=["copy"],
                        elem_id="yaml",
                    )
            with gr.Tab(say["runs"], id="runs"), gr.Row():
                with gr.Column(min_width=300, scale=6):
                    table = gr.HTML(
                        js_on_load=(TEMPLATES / "runs.js").read_text(encoding="utf-8"), elem_id="list"
                    )
                    compare = gr.Button(say["picked"], interactive=False, elem_id="compare")
                with gr.Column(min_width=300, scale=5):
                    with gr.Row(visible=False) as actions:
                        stop = gr.Button(say["stop"], variant="stop", elem_id="stop")
                        resume = gr.Button(say["resume"], variant="primary", elem_id="resume")
                    detail = gr.HTML(elem_id="run")
                    again = gr.Code(
                        label=say["command"],
                        language="shell",
                        interactive=False,
                        lines=1,
                        wrap_lines=True,
                        show_line_numbers=False,
                        buttons=["copy"],
                        visible=False,
                        elem_id="again",
                    )
            with gr.Tab(say["report"], id="report"):
                report = gr.HTML(render("report.html.j2", failed="", page="", note=say["no_report"]), elem_id="comparison")
            with gr.Tab(say["try"], id="try"), gr.Row():
                with gr.Column(min_width=300, scale=4):
                    finished = gr.Dropdown([], label=say["finished_run"], elem_id="finished")
                    lines = gr.Textbox(label=say["texts"], lines=5, elem_id="texts")
                    file = gr.File(label=say["file"], height=120, elem_id="file")
                    predict = gr.Button(say["predict"], variant="primary", elem_id="predict")
                with gr.Column(min_width=300, scale=5):
                    answers = gr.HTML(elem_id="answers")
        timer = gr.Timer(stage.refresh_seconds)
        form = [*boxes.values(), overrides]

        # ------------------------------------------------------------------------------------ a new run

        def given(values: Sequence[Any]) -> list[str]:
            return commands.words(dict(zip(boxes, values[:-1], strict=True)), values[-1] or "", scope)

        def on_change(*values: Any) -> list[Any]:
            """The command, what is wrong with it, and its configuration."""
            typed, chosen = "", dict(zip(boxes, values[:-1], strict=True))
            described = {g: catalogue.summary(catalogue.file_of(g, n)) for g, n in chosen.items() if g in FIRST and n}
            said = render("about.html.j2", described=described)
            try:
                words = given(values)
                typed = commands.in_shell(words)
                jobs = commands.check(words, scope)
            except FinsaError as error:
                found = render("verdict.html.j2", problems=commands.problems(error), jobs=0)
                plan_note = render("plan.html.j2", note=say["no_plan"], printed="")
                return [found, typed, "", gr.update(interactive=False), plan_note, said]
            found = render("verdict.html.j2", problems=[], jobs=len(jobs))
            note = say["planning"] if jobs[0].stage.name in ("train", "check") else say["no_plan"]
            plan_note = render("plan.html.j2", note=note, printed="")
            return [found, typed, commands.as_yaml(jobs), gr.update(interactive=True), plan_note, said]

        async def on_valid(*values: Any) -> AsyncIterator[Any]:
            """The plan of a valid training run, as ``stage=check`` prints it; a later change cancels it."""
            await asyncio.sleep(0.7)  # more changes may follow
            try:
                words = given(values)
                jobs = await asyncio.to_thread(commands.check, words, scope)
            except FinsaError:
                return
            if jobs[0].stage.name in ("train", "check"):
                code, printed = await processes.printed(commands.of_plan(words), hidden)
                yield render("plan.html.j2", note="", printed=printed.strip(), failed=code != 0)

        def on_start(*values: Any) -> list[Any]:
            """Start the command, and show it in the list."""
            try:
                words = given(values)
                commands.check(words, scope)
            except FinsaError as error:
                raise gr.Error("\n".join(commands.problems(error))) from None
            started = processes.start(words, scope.output_dir, hidden)
            return [gr.update(selected="runs"), started.folder.relative_to(scope.output_dir).as_posix()]

        # ------------------------------------------------------------------------------------ runs

        def refreshed(name: str, chosen: list[str]) -> list[Any]:
            """The list of runs and the run that is shown."""
            entries = runs.listed(scope.output_dir)
            entry = next((one for one in entries if name in runs.names(one, scope.output_dir)), None)
            done = [one.name for one in entries if one.status == "complete" and one.score]
            return [
                render("runs.html.j2", entries=entries, shown=entry.name if entry else "", picked=chosen),
                _run(entry, scope, say, render),
                gr.update(visible=entry is not None and (entry.pid is not None or entry.resumable)),
                gr.update(visible=entry is not None and entry.pid is not None),
                gr.update(visible=entry is not None and entry.resumable),
                gr.update(visible=bool(entry and entry.words), value=commands.in_shell(entry.words) if entry else ""),
                gr.update(choices=done),
                gr.update(interactive=len([one for one in chosen if one in done]) > 1),
            ]

        def on_tick(name: str, chosen: list[str], before: str, entry: str) -> list[Any]:
            new = refreshed(name, chosen)
            if new[:2] == [before, entry]:  # nothing is drawn again, so that a selected text stays selected
                return [gr.skip()] * len(new)
            return new

        def on_select(event: gr.EventData) -> str:
            return str(event.shown)

        def on_pick(event: gr.EventData) -> list[str]:
            return [str(name) for name in event.picked]

        def on_stop(name: str) -> None:
            entry = runs.find(scope.output_dir, name)
            if entry is not None and entry.pid is not None:
                processes.stop(entry.pid)

        def on_resume(name: str) -> str:
            """Repeat the command of a run with ``resume=true``; its words are those of its folder."""
            entry = runs.find(scope.output_dir, name)
            words = commands.resuming(entry.words) if entry is not None and entry.resumable else None
            if entry is None or words is None:
                raise gr.Error(say["choose_run"])
            processes.start(words, scope.output_dir, hidden)
            return entry.name

        # ------------------------------------------------------------------------------------ reports and answers

        def path_of(name: str) -> str:
            """The folder of a finished run in the list, as a word of a command."""
            entry = runs.find(scope.output_dir, name)
            if entry is None or entry.status != "complete":
                raise gr.Error(say["no_finished"])
            place = str(entry.folder)
            return place if place.isascii() and not set(place) & set(" ,'\"[]{}()=") else quoting.quoted(place)

        async def on_compare(chosen: list[str]) -> AsyncIterator[Any]:
            """Compare the selected runs with ``stage=report``, and show its page."""
            if len(chosen) < 2:
                raise gr.Error(say["pick_some"])
            yield [gr.update(selected="report"), render("report.html.j2", failed="", page="", note=say["reporting"])]
            name = f"report_{datetime.now():%Y-%m-%d_%H-%M-%S}"
            places = [await asyncio.to_thread(path_of, one) for one in chosen]
            words = ["stage=report", f"runs=[{','.join(places)}]", f"output={scope.output_dir / name}"]
            failed = await _ended(processes.start([*scope.always, *words], scope.output_dir, hidden))
            link = f"/files/{name}/report.html"
            yield [gr.skip(), render("report.html.j2", failed=failed, page=link, note="")]

        async def on_predict(name: str, text: str, upload: str | None) -> AsyncIterator[str]:
            """Predict texts or the rows of a file with ``stage=predict``, in a process whose memory is freed afterwards."""
            texts_given = [line for line in (text or "").splitlines() if line.strip()]
            if not name:
                raise gr.Error(say["no_finished"])
            if not texts_given and not upload:
                raise gr.Error(say["no_input"])
            yield render("answers.html.j2", failed="", rows=None, note=say["predicting"])
            place = await asyncio.to_thread(path_of, name)
            folder, source = processes.new_folder(scope.output_dir), upload
            words = ["stage=predict", f"run={place}", f"output={folder / 'answers.csv'}"]
            if not upload or texts_given:
                source = str(folder / "texts.csv")
                with (folder / "texts.csv").open("w", encoding="utf-8", newline="") as stream:
                    csv.writer(stream).writerows([["text"], *([line] for line in texts_given)])
                words.append("stage.text_column=text")
            words.append(f"input={quoting.quoted(str(source))}")
            failed = await _ended(processes.start([*scope.always, *words], scope.output_dir, hidden, folder))
            rows, total = ([], 0) if failed else _answers(folder / "answers.csv")
            link = f"/files/{processes.FOLDER}/{folder.name}/answers.csv"
            yield render("answers.html.j2", failed=failed, rows=rows, total=total, page=link, note="")

        view = [table, detail, actions, stop, resume, again, finished, compare]
        changes = [box.change for box in form]
        checked = gr.on(
            [*changes, blocks.load],
            on_change,
            form,
            [verdict, command, written, start, plan, about],
            trigger_mode="always_last",
            **quiet,
        )
        planned = checked.then(on_valid, form, plan, trigger_mode="multiple", **quiet)
        gr.on(changes, None, cancels=[planned], **private)
        start.click(on_start, form, [tabs, shown], **private).then(refreshed, [shown, picked], view, **quiet)
        gr.on([timer.tick], on_tick, [shown, picked, table, detail], view, **quiet)
        blocks.load(refreshed, [shown, picked], view, **quiet)
        table.select(on_select, None, shown, **quiet).then(refreshed, [shown, picked], view, **quiet)
        table.input(on_pick, None, picked, **quiet).then(refreshed, [shown, picked], view, **quiet)
        stop.click(on_stop, shown, None, **private)
        resume.click(on_resume, shown, shown, **private).then(refreshed, [shown, picked], view, **quiet)
        compare.click(on_compare, picked, [tabs, report], **quiet)
        predict.click(on_predict, [finished, lines, file], answers, **quiet)
    return blocks


def _run(entry: runs.Entry | None, scope: Scope, say: dict[str, str], render: Shown) -> str:
    """What is shown of a run: scores, progress, curves and log."""
    if entry is None:
        return render("run.html.j2", entry=None)
    made, drawn = runs.progress(entry), []
    if made is not None:
        titles = {"loss": say["loss"], made.score: f"{say['validation']}: {tables.TITLES.get(made.score, made.score)}"}
        curves = {name: runs.chart(points, 320, 100) for name, points in made.curves.items()}
        drawn = [(titles[name], curve, "") for name, curve in curves.items() if curve]
    seconds = entry.facts.get("wall_seconds")
    place = next((name for name in ("index.html", "run.html") if (entry.folder / name).is_file()), None)
    return render(
        "run.html.j2",
        entry=entry,
        progress=made,
        best=runs.best(made) if made else None,
        left=_clock(made.left) if made and made.left is not None else "",
        seconds=_clock(seconds) if seconds and entry.status != "running" else "",
        scored=tables.TITLES.get(entry.score[0], entry.score[0]) if entry.score else "",
        error=entry.facts.get("error") if entry.status != "running" else None,
        shown_folder=str(scope.named / entry.name),
        page=f"/files/{entry.name}/{place}" if place else "",
        charts=drawn,
        log=processes.tail(entry.command.log) if entry.command else "",
    )


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


async def _ended(command: Command) -> str:
    """Wait for a command; what it has printed if it failed, otherwise nothing."""
    while command.running:
        await asyncio.sleep(0.2)
    printed = processes.tail(command.log).strip()
    return "" if command.exit_code == 0 else printed[printed.rfind("error:") :] if "error:" in printed else printed or "?"


def _answers(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The first answers of a file, and their number."""
    shown, total = list[dict[str, Any]](), 0
    with file.open(encoding="utf-8-sig", newline="") as stream:
        for row in csv.DictReader(stream):
            total += 1
            if len(shown) >= ROWS:
                continue
            probs = {key: float(value) for key, value in row.items() if key.startswith("p_") and value}
            names = list(row)
            added = names.index(next(iter(probs))) - 1 if probs else len(names) - 1  # the label comes before them
            text = row.get("text") or max((row[name] or "" for name in names[:added]), key=len, default="")
            ranked = sorted(probs.items(), key=lambda one: -one[1])
            shown.append({"text": text, "label": row[names[added]], "probs": [(key[2:], prob) for key, prob in ranked]})
    return shown, total
