"""No process outlives the test that started it: tests that fail, in a pytest of their own, and the group that they leave running."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
GUARD_MS = 60_000  # against hanging, no more

FAILING = """
import subprocess
import sys
import pytest
from processes import started

TWO = "import os, signal; os.fork(); signal.alarm(120); os.open('held', os.O_WRONLY); os.write(1, b'x'); signal.pause()"

def two():
    process = started([sys.executable, "-c", TWO], stdout=subprocess.PIPE)
    assert process.stdout.read(2) == b"xx"

@pytest.fixture(scope="module")
def broken():
    two()
    raise ArithmeticError

def test_called():
    two()
    raise ArithmeticError

def test_set_up(broken):
    pass

def test_interrupted():
    two()
    raise KeyboardInterrupt
"""


@pytest.mark.parametrize(("test", "code"), [("called", 1), ("set_up", 1), ("interrupted", 2)])
def test_what_a_failed_test_has_started_ends_with_all_its_group(test: str, code: int, tmp_path: Path) -> None:
    """Both processes of the group hold a pipe open for writing, which hangs up when the last of them is gone."""
    os.mkfifo(tmp_path / "held")
    (tmp_path / "test_inner.py").write_text(FAILING)
    held = os.open(tmp_path / "held", os.O_RDONLY | os.O_NONBLOCK)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", f"test_inner.py::test_{test}"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(HERE)}, capture_output=True, text=True)
    assert done.returncode == code and ("ArithmeticError" in done.stdout) == (code == 1), done.stdout + done.stderr
    gone = select.poll()
    gone.register(held, select.POLLHUP)
    assert gone.poll(GUARD_MS) == [(held, select.POLLHUP)]
    os.close(held)
