"""A service whose engines are processes: the same words, and no process is left, however the service ends."""

import asyncio
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import soundfile

from client.connection import connect
from models.checkpoint import load_recognizer
from models.translator import load_translator
from streaming.events import Event, TranscriptDelta, TranslationDelta
from streaming.session import Session, SessionConfig
from tests.integration.service import EMBEDDED, ROOT

COMMAND: Final = (*EMBEDDED, "--engines", "2", "--drain-s", "0")
PIECE_BYTES: Final = 2_560


def started() -> tuple[subprocess.Popen[str], str]:
    """A service in a process group of its own, and its URL."""
    process = subprocess.Popen(COMMAND, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    found = None
    while found is None:
        line = process.stderr.readline()
        assert line, "the service has ended"
        found = re.search(r"ws://\S+", line)
    return process, found[0]


def engines_of(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    children = [child for thread in threads for child in thread.read_text().split()]
    return [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def told(events: list[Event]) -> list[dict[str, Any]]:
    """What text there is, without what depends on the clock or on how a confidence is rounded."""
    texts = [event.to_dict() for event in events if isinstance(event, TranscriptDelta | TranslationDelta)]
    for text in texts:
        for word in text.get("words", []):
            del word["confidence"]
    return [{key: value for key, value in text.items() if key not in ("seq", "backlog_ms")} for text in texts]


async def speak(url: str, pcm: bytes) -> list[Event]:
    async with connect(url, languages=("es",)) as session:

        async def send() -> None:
            for start in range(0, len(pcm), PIECE_BYTES):
                await session.send(pcm[start : start + PIECE_BYTES])
            await session.finish()

        sender = asyncio.create_task(send())
        events = [event async for event in session]
        await sender
        return events


async def speak_all(url: str, pcm: bytes, sessions: int) -> list[list[Event]]:
    return await asyncio.gather(*(speak(url, pcm) for _ in range(sessions)))


def test_sessions_on_several_engines_are_told_what_they_would_be_told_alone() -> None:
    samples, _ = soundfile.read(ROOT / "samples" / "jfk.flac", dtype="int16")
    pcm = samples.tobytes()
    alone = Session(load_recognizer(), SessionConfig(languages=("es",)), load_translator())
    expected = told([*alone.push(pcm), *alone.finish()])
    process, url = started()
    try:
        engines = engines_of(process.pid)
        assert len(engines) == 2
        for events in asyncio.run(speak_all(url, pcm, 4)):
            assert told(events) == expected
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C
        assert process.wait(60) == 0
    assert all(map(is_gone, engines))


def wait_until(done: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end_s
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_engine_outlives_the_service(how: signal.Signals) -> None:
    process, _ = started()
    engines = engines_of(process.pid)
    assert len(engines) == 2
    process.send_signal(how)
    process.wait(60)
    wait_until(lambda: all(map(is_gone, engines)))
