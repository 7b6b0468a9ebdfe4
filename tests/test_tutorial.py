"""The tutorial stays true: each of its commands is one that this code takes, and says what it printed."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
CALL = re.compile(r"python -m uv run (?:python -m (catalog|cift_models)\b|(run_backtest)\.py)([^|;>\n]*)")
CALLS = [(m[1] or m[2], m[3]) for m in CALL.finditer(PAGE)]


def test_it_leads_from_a_file_to_a_retrained_model():
    steps = ["check", "describe", "import", "facts", "train", "evaluate", "ablate", "--out out/tutorial/run", "--latency-ms", "--since"]
    first = [next(i for i, (_, words) in enumerate(CALLS) if step in words) for step in steps]
    assert first == sorted(first)


@pytest.mark.parametrize(("program", "words"), CALLS)
def test_every_command_and_option_is_there(program, words):
    sys.path.insert(0, str(ROOT))
    try:
        app = importlib.import_module(program if program == "run_backtest" else f"{program}.__main__").app
    finally:
        sys.path.remove(str(ROOT))
    command, args = typer.main.get_command(app), shlex.split(words)
    if program != "run_backtest":
        name, args = args[0], args[1:]
        command = command.get_command(None, name)
        assert command is not None, name
    command.make_context("tutorial", [a.replace("$ms", "1") for a in args])


def test_every_command_shows_what_it_printed():
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.S):
        lines = block.splitlines()
        silent = [a for a, b in zip(lines, [*lines[1:], "$ "]) if a.startswith("$ ") and b.startswith("$ ")]
        assert all("make_market" in a or a.startswith("$ cp ") or " > " in a for a in silent), silent
