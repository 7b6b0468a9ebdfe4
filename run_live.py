"""Trade the ensemble on a live feed: the demo market's replay on paper without keys, Databento or Polygon with one."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # a kill during the imports waits for `run`: by itself it ends the process

import typer  # noqa: E402

from catalog.errors import exit_code, run_typer  # noqa: E402

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=__doc__)
def live(
    feed: Annotated[str | None, typer.Option(help="replay (default, needs no key), databento or polygon")] = None,
    venue: Annotated[str | None, typer.Option(help="sandbox (default), test, or package.module:Factory of an execution client")] = None,
    artifacts: Annotated[Path | None, typer.Option(help="trained models; default: the demo's, trained at the first start")] = None,
    speed: Annotated[float | None, typer.Option(help="how fast a replay's time runs; 0: as fast as it is read; default 1")] = None,
    duration: Annotated[float | None, typer.Option(help="seconds until the session ends; default: Ctrl-C, or the replay's end")] = None,
    state: Annotated[Path | None, typer.Option(help="folder with the journal and the report; default out/live")] = None,
    port: Annotated[int | None, typer.Option(help="of the page and the API; default 0: any free one")] = None,
    real: Annotated[bool, typer.Option("--live", help="send real orders to a --venue of your own; asks first")] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda")] = None,
    seed: Annotated[int | None, typer.Option(help="of the demo market and of training; default 7")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML with the same settings and more; the command line goes first")] = None,
) -> None:
    given = {
        "feed": feed, "venue": venue, "artifacts": artifacts, "speed": speed, "duration": duration, "state": state, "port": port,
        "live": real or None, "device": device, "seed": seed,
    }  # fmt: skip

    from cift_strategies.live import run
    from cift_strategies.live_config import LiveConfig
    from cift_strategies.settings import configured

    settings = configured(LiveConfig, config, {k: v for k, v in given.items() if v is not None})

    folder = run(settings)
    summary = folder / "summary.json"
    if summary.is_file():
        import json

        from cift_strategies.report import print_summary

        told = json.loads(summary.read_text())
        print_summary({**told, "rule": told["baseline_rule"]})
        print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    raise SystemExit(exit_code(lambda: run_typer(app)))
