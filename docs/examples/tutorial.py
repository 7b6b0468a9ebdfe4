"""Runs the commands of docs/tutorial.md in their order and writes what each prints, on standard output, into the page.

`python docs/examples/tutorial.py [N]` from the repository's root; N: only the commands of that section, what comes before having been run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "tutorial.md"
BLOCK = re.compile(r"```console\n(.*?)```", re.S)


def commands(text: str) -> list[str]:
    """The commands of the page, in their order."""
    return [line[2:] for block in BLOCK.findall(text) for line in block.splitlines() if line.startswith("$ ")]


def answered(block: re.Match[str]) -> str:
    out = []
    for command in commands(block[0]):
        print(command, file=sys.stderr)
        done = subprocess.run(command, shell=True, executable="/bin/bash", stdout=subprocess.PIPE, text=True, check=True)
        out += [f"$ {command}", *(line.rstrip() for line in done.stdout.rstrip("\n").splitlines())]
    return "```console\n" + "\n".join(out) + "\n```"


def main(only: str | None = None) -> None:
    if only is None:
        shutil.rmtree("out/tutorial", ignore_errors=True)
    parts = re.split(r"(?m)^(?=## )", PAGE.read_text())
    for i, part in enumerate(parts):
        if only is None or part.startswith(f"## {only}. "):
            parts[i] = BLOCK.sub(answered, part)
            PAGE.write_text("".join(parts))


if __name__ == "__main__":
    main(*sys.argv[1:])
