"""Backtest the ensemble: on the embedded demo market, on Databento files, on a NautilusTrader catalog, or on downloaded history."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from catalog.errors import InputError, exit_code, run_typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=__doc__)
def backtest(
    dbn: Annotated[list[Path] | None, typer.Option(help="Databento files (MBO, MBP-10, MBP-1, ...), or folders of them")] = None,
    catalog: Annotated[Path | None, typer.Option(help="a NautilusTrader Parquet catalog")] = None,
    databento: Annotated[str | None, typer.Option(help="Databento dataset to download from: GLBX.MDP3; asks the price first")] = None,
    schema: Annotated[str | None, typer.Option(help="what to download: mbo (default), mbp-10, mbp-1, ...")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="pay what the download costs without a question")] = False,
    polygon: Annotated[str | None, typer.Option(help="symbols of Polygon's history, separated by commas")] = None,
    session: Annotated[Path | None, typer.Option(help="a recorded live session (its --state): computed again and compared")] = None,
    symbols: Annotated[str | None, typer.Option(help="instruments to use, separated by commas; default: all")] = None,
    start: Annotated[str | None, typer.Option(help="first time used, UTC: 2024-05-08 or 2024-05-08T14:30:00 or ns")] = None,
    end: Annotated[str | None, typer.Option(help="last time used, UTC")] = None,
    instruments: Annotated[Path | None, typer.Option(help="TOML with definitions where the data has none")] = None,
    train_fraction: Annotated[float | None, typer.Option(help="share of the events to train on; default 0.6")] = None,
    artifacts: Annotated[Path | None, typer.Option(help="trained models to use instead of training")] = None,
    altdata: Annotated[Path | None, typer.Option(help="table of alternative data, .parquet or .csv (docs/altdata.md)")] = None,
    latency_ms: Annotated[str | None, typer.Option(help="time a decision takes: auto (drawn from the models' own) or a number")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda")] = None,
    seed: Annotated[int | None, typer.Option(help="of the demo market, of training and of latencies; default 7")] = None,
    out: Annotated[Path | None, typer.Option(help="output folder; default out/<source>")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML with the same settings and more; the command line goes first")] = None,
    sweep: Annotated[Path | None, typer.Option(help="TOML of many runs: parameters, search, validation (docs/research.md)")] = None,
    ray: Annotated[str | None, typer.Option(help="Ray cluster that computes a sweep: HOST:PORT, or auto")] = None,
    show: Annotated[bool, typer.Option("--show", help="open the run in the dashboard; what --out holds is not run again")] = False,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="of the dashboard; 0: any free one")] = 8765,
    as_json: Annotated[bool, typer.Option("--json", help="print the summary as the last line")] = False,
    more: Annotated[list[Path] | None, typer.Argument(hidden=True)] = None,
) -> None:
    if more and not dbn:
        raise InputError(f"{more[0]} is no option: write --dbn FILE... or --catalog DIR")
    given = {
        "dbn": (*dbn, *(more or ())) if dbn else None, "catalog": catalog, "databento": databento, "schema": schema,
        "pay": yes or None, "polygon": _names(polygon), "symbols": _names(symbols), "start": _ns(start), "end": _ns(end),
        "instruments": instruments, "train_fraction": train_fraction, "artifacts": artifacts, "altdata": altdata, "session": session,
        "latency_ms": _latency(latency_ms), "device": device, "seed": seed, "out": out,
    }  # fmt: skip
    if ray is not None and sweep is None:
        raise InputError("--ray computes the runs of a sweep: name its file with --sweep")
    if sweep is not None:
        if config is not None:
            raise InputError(f'--config goes into the sweep file: write base = "{config}" into {sweep}')
        if show:
            raise InputError("--show opens one run: leave it out, and open the sweep's sweep.html")
        _sweep(sweep, {k: v for k, v in given.items() if v is not None}, ray, as_json)
        return
    from cift_strategies.backtest import RunConfig
    from cift_strategies.settings import configured

    settings = configured(RunConfig, config, {k: v for k, v in given.items() if v is not None}, {"start": _ns, "end": _ns})

    if show and settings.out is not None and (settings.out / "summary.json").is_file():
        _show(settings.out, port)
        return

    if settings.session is not None:
        from cift_strategies.session_replay import run as again

        outcome = again(settings)
    else:
        from cift_strategies.backtest import run

        outcome = run(settings, leave=_leave)
    summary = dict(outcome.summary)
    folder = settings.out or Path("out") / outcome.source

    from cift_strategies.report import print_summary
    from cift_strategies.results import plain

    print_summary({**summary, "rule": summary["baseline_rule"]})
    print(f"report: {folder / 'report.html'}")
    if as_json:
        print(json.dumps(plain(summary), allow_nan=False))
    if show:
        _show(folder, port)


def _sweep(path: Path, given: dict[str, Any], ray: str | None, as_json: bool) -> None:
    from cift_strategies.sweep import sweep

    folder = Path(given["out"]) if "out" in given else Path("out") / path.stem
    found = sweep(path, given, ray)
    print("\n".join(found["told"]))
    print(f"figures: {folder / 'sweep.html'}")
    if as_json:
        from cift_strategies.results import plain

        print(json.dumps(plain(found), allow_nan=False))


def _show(folder: Path, port: int) -> None:
    from cift_strategies.show import serve

    serve(folder, port)


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(s.strip() for s in text.split(",") if s.strip())


def _ns(text: str | None) -> int | None:
    from catalog.moments import nanoseconds

    return None if text is None else nanoseconds(text)


def _latency(text: str | None) -> float | str | None:
    if text is None or text == "auto":
        return text
    try:
        value = float(text)
    except ValueError:
        raise InputError(f'--latency-ms "{text}" is no number: write auto or milliseconds') from None
    if not 0 <= value < 1e6:
        raise InputError(f"--latency-ms {text}: write 0 or more milliseconds")
    return value


def _leave(error: BaseException) -> None:
    """End the process from within an engine callback, which swallows what is raised."""
    from cift_strategies.backtest import clean_up

    clean_up()
    sys.stdout.flush()
    code = exit_code(lambda: _raise(error))
    sys.stderr.flush()
    os._exit(code)


def _raise(error: BaseException) -> None:
    raise error


if __name__ == "__main__":
    raise SystemExit(exit_code(lambda: run_typer(app)))
