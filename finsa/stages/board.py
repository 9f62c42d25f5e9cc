"""A board in the browser: compose, start, watch, stop and resume runs, compare them, and try them on texts."""

from __future__ import annotations

from contextlib import closing
from importlib.util import find_spec

from finsa.config import BoardStage, RunConfig
from finsa.errors import RunError
from finsa.runs.run_folder import Result
from finsa.session import Session


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Bind the address and answer until a stop signal; processes that the board has started continue.

    Raises:
        RunError: if gradio or the token is missing, or the address cannot be bound.
    """
    session, stage = session or Session(), cfg.stage
    assert isinstance(stage, BoardStage)
    if find_spec("gradio") is None:
        raise RunError('stage=board needs gradio: pip install "finsa[board]"')
    from finsa.serving import server  # uvicorn comes with gradio

    token = server.token(stage.token_env)
    with closing(server.bind(stage.host, stage.port if cfg.port is None else cfg.port)) as socket:
        import uvicorn

        from finsa.board import application  # gradio takes seconds to import: after the checks
        from finsa.board.commands import Scope

        app = application.build(Scope.of(cfg, stage, session.folders), stage, token)
        greeting = f"board at {server.url(socket)}  (runs: {cfg.output_dir}  stop: Ctrl-C)"
        settings = uvicorn.Config(
            app,
            lifespan="on",
            ws="none",
            log_config=None,
            log_level="critical",  # it reports open pages, which end with the board, as errors
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
        server.StageServer(settings, lambda: print(greeting, flush=True)).run([socket])
    print("stopped; processes that the board has started continue")
    return Result("board")
