import os
import pty
import subprocess
import sys

import pytest

from genkl_ext.cli import progress as progress_module
from genkl_ext.cli.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_short_work_is_silent(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("scoring", "rows") as progress:
        for done in range(5):
            clock[0] += 0.09
            progress(done, 5)
    assert capsys.readouterr() == ("", "")


def test_a_log_gets_a_line_now_and_then(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("scoring", "rows") as progress:
        for done in range(1000, 25_000, 1000):
            clock[0] += 1.0
            progress(done, 40_000)
    assert capsys.readouterr() == (
        "",
        "scoring: 10,000 of 40,000 rows (25%), 1,000 rows/s, 30 s left\n"
        "scoring: 20,000 of 40,000 rows (50%), 1,000 rows/s, 20 s left\n",
    )


def test_a_terminal_gets_a_bar() -> None:
    program = (
        "from genkl_ext.cli import progress\n"
        "progress._QUIET_SECONDS = 0\n"
        "with progress.Progress('scoring', 'rows') as p:\n"
        "    p(250, 1000)\n"
    )
    controller, terminal = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stderr=terminal,
            stdout=subprocess.PIPE,
            check=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        )
        shown = os.read(controller, 1 << 16).decode()
    finally:
        os.close(controller)
        os.close(terminal)
    assert done.stdout == b""
    assert "scoring" in shown and "25 %" in shown and "1,000 rows" in shown
