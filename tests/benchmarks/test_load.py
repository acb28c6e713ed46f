"""The server of a measurement is read for as long as it speaks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.load import listening

CHATTERS = """
import sys
print("listening at ws://here", file=sys.stderr, flush=True)
sys.stderr.write("word\\n" * 100_000)
"""


def started(program: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)


def test_a_server_that_says_much_does_not_wait_for_a_reader() -> None:
    process = started(CHATTERS)
    assert listening(process) == "ws://here"
    assert process.wait(30) == 0


def test_a_server_that_ends_before_it_listens() -> None:
    with pytest.raises(RuntimeError, match="ended with 3"):
        listening(started("raise SystemExit(3)"))
