"""Service processes for clients that are not ours; run as a module, this is one without models."""

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import server
from streaming import scheduler
from tests.fakes import FakeRecognizer, FakeSession, FakeTranslator, fake_tick

ROOT: Final = Path(__file__).parents[2]
FAKE: Final = (sys.executable, "-m", "tests.integration.service")
EMBEDDED: Final = (sys.executable, "-m", "client.cli", "serve", "--port", "0")


@contextmanager
def running(command: tuple[str, ...]) -> Iterator[str]:
    """A service process; gives its host and port."""
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        first = process.stderr.readline()
        found = re.search(r"ws://([^/]+)/", first)
        assert found, first + process.stderr.read()
        yield found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stderr.close()


def _serve() -> None:
    fakes: dict[str, Any] = {"Session": FakeSession, "tick": fake_tick}
    vars(scheduler).update(fakes)
    models = cast(Any, (FakeRecognizer(), FakeTranslator()))
    asyncio.run(server.serve(models[0], server.Settings(port=0), models[1]))


if __name__ == "__main__":
    _serve()
