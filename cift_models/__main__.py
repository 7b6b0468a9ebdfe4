"""`python -m cift_models train | evaluate | inspect | export | features`: models from a catalog, their scores, what an artifact holds."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from catalog.errors import InputError, exit_code, run_typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Train, score and look at models.")
Catalog = Annotated[Path, typer.Option(help="folder of a NautilusTrader catalog")]
Symbols = Annotated[str, typer.Option(help="instruments, with commas; all where empty")]
Start = Annotated[str, typer.Option(help="first time, ISO 8601 UTC or ns")]
End = Annotated[str, typer.Option(help="last time, ISO 8601 UTC or ns")]
Seed = Annotated[int, typer.Option(help="fixes every random choice")]
Own = Annotated[list[str] | None, typer.Option("--member", help="a member of your own, package.module:Class; may be repeated")]


def nanoseconds(text: str) -> int | None:
    """ISO 8601 (UTC where no zone is told) or an integer -> ns UTC; None where empty."""
    if not text:
        return None
    if text.isdigit():
        return int(text)
    try:
        t = dt.datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"{text!r} is no time: write 2024-08-08, 2024-08-08T09:30:00 or nanoseconds since 1970") from None
    t = t if t.tzinfo else t.replace(tzinfo=dt.UTC)
    since = t - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1_000


def _symbols(text: str) -> list[str] | None:
    return [s.strip() for s in text.split(",") if s.strip()] or None


@app.command()
def train(
    catalog: Catalog, out: Annotated[Path, typer.Option(help="folder of the artifact")], symbols: Symbols = "",
    start: Start = "", end: End = "", seed: Seed = 0,
    folds: Annotated[int, typer.Option(min=1, help="walk-forward folds; the last is kept")] = 1,
    only: Annotated[str, typer.Option(help="train these members alone, with commas")] = "", member: Own = None,
    measure_latency: Annotated[bool, typer.Option(help="store this machine's latency instead of the default table")] = False,
) -> None:  # fmt: skip
    """Train on a catalog and write an artifact folder."""
    from cift_models.train import Config
    from cift_models.train import train as run

    config = Config(folds=folds, measure_latency=measure_latency)
    path = run(catalog, _symbols(symbols), nanoseconds(start), nanoseconds(end), out, seed, _symbols(only), member or (), config)
    print(path)


@app.command()
def evaluate(
    catalog: Catalog, artifacts: Annotated[Path, typer.Option(help="folder of the artifact")], symbols: Symbols = "", start: Start = "",
    end: End = "", seed: Seed = 0, member: Own = None,
    out: Annotated[Path | None, typer.Option(help="write the scores there, JSON")] = None,
    json_: Annotated[bool, typer.Option("--json", help="print the scores as JSON")] = False,
) -> None:  # fmt: skip
    """Score an artifact on a part of a catalog that comes after its training range."""
    from cift_models.validate import lines, score_catalog

    scores = score_catalog(artifacts, catalog, _symbols(symbols), nanoseconds(start), nanoseconds(end), seed, member or ())
    if out is not None:
        out.write_text(json.dumps(scores, indent=1) + "\n")
    print(json.dumps(scores) if json_ else "\n".join(lines(scores)))


@app.command()
def inspect(artifact: Annotated[Path, typer.Argument(help="folder of the artifact")]) -> None:
    """Verify an artifact and print what lies in it."""
    from cift_models.artifacts import read

    found = read(artifact)
    m: dict[str, Any] = found.manifest
    when = [dt.datetime.fromtimestamp(m["range"][k] / 1e9, dt.UTC).isoformat(timespec="seconds") for k in ("start", "end")]
    print(f"{found.path}: version {found.version}, written by {m['code']}, seed {m['seed']}")
    print(f"trained on {', '.join(m['instruments'])}: {m['range']['decisions']:,} decisions, {when[0]} to {when[1]}")
    print(f"horizons {', '.join(m['horizons_trained'])}; {len(m['features'])} features")
    print(f"members {', '.join(f'{name} ({path})' for name, path in m['members'].items())}")
    latency = m["latency"]
    quantiles = (f"p{100 * q:g} {ns / 1e6:.2f} ms" for q, ns in zip(latency["q"], latency["ns"]))
    print(f"latency ({latency['source']}) {', '.join(quantiles)}")
    for fold in m["folds"]:
        for line in fold["left_out"]:
            print(f"left out: {line}")
    if "fusion" in m["members"]:
        from cift_models.fusion import SLICES, Fusion

        print(f"fusion looks at (share of the gain; share of SHAP in {SLICES} slices of the training range)")
        for line in Fusion.load(found.path, tuple(m["features"])).leading():
            print(f"  {line}")
    for name, sha in m["files"].items():
        print(f"{sha[:12]}  {name}")


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
def features() -> None:
    """Print the table of features (docs/features.md)."""
    from cift_models.features import features_markdown

    print(features_markdown())


def main() -> None:
    """The command line; how it ends is told by exceptions (:func:`catalog.errors.exit_code`)."""
    run_typer(app)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
