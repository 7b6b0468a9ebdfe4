"""`python -m cift_models train | evaluate | ablate | inspect | export | features`: models from a catalog, their scores, what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from catalog.errors import InputError, exit_code, run_typer
from catalog.moments import nanoseconds

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Train, score and look at models.",
)  # fmt: skip
Catalog = Annotated[Path, typer.Option(help="folder of a NautilusTrader catalog")]
Symbols = Annotated[str, typer.Option(help="instruments, with commas; all where empty")]
Start = Annotated[str, typer.Option(help="first time, ISO 8601 UTC or ns")]
End = Annotated[str, typer.Option(help="last time, ISO 8601 UTC or ns")]
Seed = Annotated[int, typer.Option(help="fixes every random choice")]
Alternative = Annotated[Path | None, typer.Option("--altdata", help="table of alternative data, .parquet or .csv (docs/altdata.md)")]
Own = Annotated[list[str] | None, typer.Option("--member", help="a member of your own, package.module:Class; may be repeated")]


def _symbols(text: str) -> list[str] | None:
    return [s.strip() for s in text.split(",") if s.strip()] or None


def _table(path: Path | None) -> Any:
    from catalog.altdata import read

    return None if path is None else read(path)


@app.command()
def train(
    catalog: Catalog, out: Annotated[Path, typer.Option(help="folder of the artifact")], symbols: Symbols = "",
    start: Start = "", end: End = "", seed: Seed = 0,
    seeds: Annotated[int | None, typer.Option(min=1, help="fit with so many seeds; the one in the middle is kept; default 5")] = None,
    folds: Annotated[int | None, typer.Option(min=1, help="walk-forward folds; the last is kept; default 2")] = None,
    only: Annotated[str, typer.Option(help="train these members alone, with commas")] = "", member: Own = None,
    config: Annotated[Path | None, typer.Option(help="TOML with [train], [ensemble] and a table for each member")] = None,
    measure_latency: Annotated[bool, typer.Option(help="store this machine's latency instead of the default table")] = False,
    altdata: Alternative = None,
    since: Annotated[
        str, typer.Option(help="retrain: a champion's folder, or a time from which to learn, the champion being --out; it is replaced only "
                          "by a better one")
    ] = "",
) -> None:  # fmt: skip
    """Train on a catalog and write an artifact folder. Interrupted, the same command goes on where it stood."""
    from cift_models import settings
    from cift_models.train import Config
    from cift_models.train import train as run

    tables = settings.read(config) if config is not None else {}
    typed = {"folds": folds, "seeds": seeds, "measure_latency": measure_latency or None}
    if since:
        from cift_models import retrain

        champion, begin = retrain.since(since, out)
        if only or (folds or 1) > 1:
            raise InputError("--only and --folds do not go with --since: a challenger has the champion's members, and one fold")
        tables["train"] = tables.get("train", {}) | {k: v for k, v in typed.items() if v is not None}
        verdict = retrain.retrain(
            champion, catalog, out, begin, nanoseconds(start), nanoseconds(end), seed, member or (), _table(altdata), tables,
            _symbols(symbols),
        )  # fmt: skip
        print(retrain.line(verdict, out))
        return
    how = {"folds": 2, "seeds": 5} | tables.pop("train", {}) | {k: v for k, v in typed.items() if v is not None}
    path = run(
        catalog, _symbols(symbols), nanoseconds(start), nanoseconds(end), out, seed, _symbols(only), member or (),
        settings.checked(Config, how, "[train]"), _table(altdata), tables,
    )  # fmt: skip
    print(path)


@app.command()
def evaluate(
    catalog: Catalog, artifacts: Annotated[Path, typer.Option(help="folder of the artifact")], symbols: Symbols = "", start: Start = "",
    end: End = "", seed: Seed = 0, member: Own = None, altdata: Alternative = None,
    out: Annotated[Path | None, typer.Option(help="write the scores there, JSON")] = None,
    json_: Annotated[bool, typer.Option("--json", help="print the scores as JSON")] = False,
) -> None:  # fmt: skip
    """Score an artifact on a part of a catalog that comes after its training range."""
    from cift_models.scorecard import lines, plain
    from cift_models.validate import score_catalog

    known = _table(altdata)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise InputError(f"--out {out} is no place for a file: name one in a folder that is there")
    scores = score_catalog(artifacts, catalog, _symbols(symbols), nanoseconds(start), nanoseconds(end), seed, member or (), known)
    if out is not None:
        out.write_text(json.dumps(plain(scores), indent=1, allow_nan=False) + "\n")
    print(json.dumps(plain(scores), allow_nan=False) if json_ else "\n".join(lines(scores)))


@app.command()
def ablate(
    catalog: Catalog, artifacts: Annotated[Path, typer.Option(help="folder of the artifact")], symbols: Symbols = "",
    end: End = "", seed: Seed = 0, member: Own = None, altdata: Alternative = None,
    truth: Annotated[Path | None, typer.Option(help="truth.json of a synthetic market: what could be known at best")] = None,
    json_: Annotated[bool, typer.Option("--json", help="print the table as JSON")] = False,
) -> None:  # fmt: skip
    """Tell what each member adds: the ensemble with and without it, on what comes after the training range of the same catalog."""
    from cift_models import skill
    from cift_models.scorecard import plain

    found = skill.ablate(artifacts, catalog, _symbols(symbols), nanoseconds(end), seed, member or (), _table(altdata), truth)
    print(json.dumps(plain(found), allow_nan=False) if json_ else "\n".join(skill.lines(found)))


@app.command()
def inspect(artifact: Annotated[Path, typer.Argument(help="folder of the artifact")], member: Own = None) -> None:
    """Verify an artifact and print what lies in it, and what each member says of itself."""
    from cift_models.artifacts import read
    from cift_models.describe import describe

    for line in describe(read(artifact), member or ()):
        print(line)


@app.command()
def export(
    catalog: Annotated[Path, typer.Argument(help="folder of a NautilusTrader catalog")],
    out: Annotated[Path, typer.Option(help="the Parquet file to write")], symbols: Symbols = "", start: Start = "", end: End = "",
) -> None:  # fmt: skip
    """Write features and labels of each decision to Parquet, with the time at which each was known."""
    from cift_models.export import write

    rows = write(catalog, out, _symbols(symbols), nanoseconds(start), nanoseconds(end))
    print(f"{rows:,} decisions: {out}")


@app.command()
def facts(catalog: Catalog, symbols: Symbols = "", start: Start = "", end: End = "") -> None:
    """Check features against what is known: R2 of order flow imbalance, micro-price against mid, VPIN, Kyle's lambda."""
    from catalog.events import read_catalog
    from cift_models import facts as known
    from cift_models.inference import stream

    instruments, chunks = read_catalog(catalog, _symbols(symbols), nanoseconds(start), nanoseconds(end))
    print("\n".join(known.lines(known.facts(stream(instruments, chunks), instruments))))


@app.command()
def features() -> None:
    """Print the table of features (docs/features.md)."""
    from cift_models.features import features_markdown

    print(features_markdown())


def main() -> None:
    """The command line; how it ends is told by exceptions (:func:`catalog.errors.exit_code`)."""
    run_typer(app)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
