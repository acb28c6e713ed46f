import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import soundfile
from websockets.asyncio.server import ServerConnection

import server
from client.connection import to_bytes
from client.files import AudioFile
from client.live import stream
from client.output import OutputFormat, make_writer
from client.progress import Display
from streaming import scheduler
from streaming.audio import AudioFormat
from streaming.errors import DragomanError
from tests.fakes import FakeTranslator, ForsakenSession, running_service, tone
from tests.proxy import Proxy

ROOT = Path(__file__).parents[2]
LEVELS = [0.2, 0.4, 0.6]  # 1.2 s
TEXT = "w20 w40 w60\n"


pytestmark = pytest.mark.usefixtures("fake_sessions")


@pytest.fixture
def recording(tmp_path: Path) -> Callable[..., AudioFile]:
    def make(levels: list[float] = LEVELS, name: str = "a.wav", rate_hz: int = 16_000) -> AudioFile:
        soundfile.write(tmp_path / name, tone(levels, rate_hz), rate_hz)
        return AudioFile(tmp_path / name)

    return make


async def live(url: str, source: AudioFile, kind: str = "txt", **arguments: Any) -> bool:
    return await stream(
        source, url, make_writer(OutputFormat(kind), "a.wav"), Display(1), **{"pace": None, **arguments}
    )


async def test_words_come_back(recording: Callable[..., AudioFile], capsys: pytest.CaptureFixture[str]) -> None:
    async with running_service() as url:
        await live(url, recording())
        await live(url, recording(rate_hz=48_000, name="b.flac"))
    assert capsys.readouterr().out == TEXT * 2


async def test_json_lines(recording: Callable[..., AudioFile], capsys: pytest.CaptureFixture[str]) -> None:
    async with running_service() as url:
        await live(url, recording(), "jsonl")
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["type"] for event in events[:2]] == ["session.created", "session.updated"]
    assert [event["seq"] for event in events] == list(range(6))
    assert {event["file"] for event in events} == {"a.wav"}


async def test_translations_come_back(recording: Callable[..., AudioFile], capsys: pytest.CaptureFixture[str]) -> None:
    settings: Any = {"languages": ("es", "de"), "latency": "low", "glossary": {"w20": {"es": "x"}}}
    async with running_service(translator=FakeTranslator()) as url:
        for languages in (["es"], ["es", "de"]):
            writer = make_writer(OutputFormat.TXT, "a.wav", languages)
            await stream(recording(), url, writer, Display(1), pace=None, **settings)
        assert (await failure(url, recording(), languages=["xx"])).code == "unsupported_language"
    told = "w20\n    es  es20\n    de  de20\nw40\n    es  es40\n    de  de40\nw60\n    es  es60\n    de  de60\n"
    assert capsys.readouterr().out == f"es20 es40 es60\n{told}"


@pytest.mark.parametrize(("pace", "least_s", "most_s"), [(4.0, 0.3, 1.1), (1.0, 1.2, 5.0)])
async def test_the_pace(pace: float, least_s: float, most_s: float, recording: Callable[..., AudioFile]) -> None:
    async with running_service() as url:
        started_s = time.monotonic()
        await live(url, recording(), pace=pace)
        assert least_s <= time.monotonic() - started_s < most_s


async def test_ctrl_c_ends_the_audio_and_waits_for_the_last_words(
    recording: Callable[..., AudioFile], capsys: pytest.CaptureFixture[str]
) -> None:
    async with running_service() as url:
        asyncio.get_running_loop().call_later(1.0, os.kill, os.getpid(), signal.SIGINT)
        await live(url, recording([0.2] * 100), pace=4.0)
    words = capsys.readouterr().out.split()
    assert 1 <= len(words) < 50
    assert set(words) == {"w20"}


class Program:
    """`dragoman live` as a program of its own, whose input, and maybe whose output, this test holds."""

    def __init__(self, url: str, file: str, *arguments: str, screen: bool = False) -> None:
        self._screen, terminal = pty.openpty() if screen else os.pipe()
        command = [sys.executable, "-m", "client.cli", "live", file, "--url", url, *arguments]
        # Where the tests run in a shell's background, Ctrl-C is ignored, and a child would inherit that.
        heed_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=terminal,
            stderr=terminal if screen else subprocess.PIPE,
            env=environment,
            preexec_fn=heed_ctrl_c,
        )
        os.close(terminal)
        self._came = b""
        self.shown = ""

    async def until(self, text: str | None) -> str:
        """What it has shown when that is in it; None: at its end."""
        while text is None or text not in self.shown:
            try:
                piece = await asyncio.to_thread(os.read, self._screen, 65_536)
            except OSError:  # how a terminal says that the other side is gone
                piece = b""
            self._came += piece  # a piece may end within a character, or within an escape sequence
            self.shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._came.decode(errors="ignore"))
            if not piece:
                assert text is None, f"{text!r} was never shown: {self.shown!r}"
                os.close(self._screen)
                break
        return self.shown

    async def end(self) -> tuple[int, bytes]:
        """Its exit code, and what it wrote to standard error."""
        await self.until(None)
        complaints = self.process.stderr.read() if self.process.stderr else b""
        assert self.process.stdin is not None
        code = await asyncio.to_thread(self.process.wait)
        self.process.stdin.close()
        return code, complaints


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_ctrl_c_ends_what_waits_for_a_pipe(number: int) -> None:
    async with running_service() as url:
        program = Program(url, "-", "--fast")
        assert program.process.stdin is not None
        program.process.stdin.write(to_bytes(tone([0.2, 0.4, 0.6])[:-100], AudioFormat()))
        program.process.stdin.flush()
        await program.until("w40")
        await asyncio.sleep(1)  # the third word has come but for its last samples
        program.process.send_signal(number)
        assert await program.end() == (0, b"")
    assert program.shown == TEXT


async def test_progress_shares_the_terminal_with_the_words(recording: Callable[..., AudioFile]) -> None:
    async with running_service(translator=FakeTranslator()) as url:
        program = Program(url, str(recording().path), "--fast", "--to", "es", screen=True)
        assert await program.end() == (0, b"")
    lines = program.shown.replace("\r", "\n").split("\n")
    told = ["w20", "    es  es20", "w40", "    es  es40", "w60", "    es  es60"]
    assert list(dict.fromkeys(line for line in lines if re.match(r"w|    es", line))) == told
    assert re.search(r"0:00:01/0:00:01, [\d.]+x real time(, [\d.]+ s behind)?", program.shown)


def test_a_client_does_not_load_what_computes() -> None:
    code = "import sys, client.live, client.connection, client.glossary; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


async def failure(url: str, source: AudioFile, **arguments: Any) -> DragomanError:
    with pytest.raises(DragomanError) as caught:
        await live(url, source, **arguments)
    assert "\n" not in str(caught.value)
    return caught.value


async def test_what_can_go_wrong_with_the_service(recording: Callable[..., AudioFile]) -> None:
    assert "dragoman serve" in str(await failure("ws://127.0.0.1:9", recording()))
    assert "not the service" in str(await failure("http://127.0.0.1:9", recording()))
    async with running_service(max_sessions=1, tokens=("sesame",)) as url:
        assert "there is no /v1/realtime/trans here" in str(await failure(url.removesuffix("lations"), recording()))
        assert "token" in str(await failure(url, recording()))
        await live(url, recording(), token="sesame")
    async with running_service() as url:
        assert (await failure(url, recording(), colour="red")).code == "unknown_field"


async def test_a_service_that_goes_away(
    recording: Callable[..., AudioFile], capsys: pytest.CaptureFixture[str]
) -> None:
    async with running_service() as url:
        talk = asyncio.create_task(live(url, recording([0.2] * 100), pace=4.0))
        await asyncio.sleep(1)
    assert not await talk
    shown = capsys.readouterr()
    assert shown.out.endswith("w20\n")
    assert re.fullmatch(r"dragoman: the service reports: the server is shutting down[^\n]*\n", shown.err)


@pytest.mark.parametrize("screen", [False, True])
async def test_a_translator_that_goes_away_is_told_once_and_at_once_and_the_words_go_on(
    screen: bool, recording: Callable[..., AudioFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "Session", ForsakenSession)
    sentence = "dragoman: the service reports: it is gone: nothing more is translated"
    async with running_service(translator=FakeTranslator()) as url:
        program = Program(url, str(recording([0.2, 0.4, 0.6, 0.8]).path), "--to", "es,de", screen=screen)
        if screen:
            await program.until(sentence)
            assert "w80" not in program.shown
        code, complaints = await program.end()
    assert code == 2
    if screen:
        lines = program.shown.replace("\r", "\n").split("\n")
        assert [line for line in lines if line.startswith("dragoman")] == [sentence]
        assert any(line.endswith("w40 w60 w80") for line in lines)
    else:
        assert complaints.decode() == f"{sentence}\n"
        assert program.shown == "w20\n    es  es20\n    de  de20\nw40 w60 w80\n"


async def test_a_connection_that_breaks(recording: Callable[..., AudioFile], monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang_up(self: server.Service, connection: ServerConnection) -> None:
        connection.transport.abort()

    monkeypatch.setattr(server.Service, "_handle", hang_up)
    async with running_service() as url:
        assert (await failure(url, recording())).code == "connection_lost"


async def test_a_lost_connection_is_told_and_the_words_go_on(
    recording: Callable[..., AudioFile], capsys: pytest.CaptureFixture[str]
) -> None:
    async with running_service() as url, Proxy(url) as proxy:
        talk = asyncio.create_task(live(proxy.url, recording([0.2] * 50), pace=10.0))
        await asyncio.sleep(0.8)
        proxy.cut()
        await asyncio.sleep(0.3)
        proxy.mend()
        await talk
    shown = capsys.readouterr()
    assert shown.out == "w20 " * 49 + "w20\n"
    assert shown.err == "dragoman: the connection was lost: connecting again\ndragoman: the session goes on\n"


async def test_a_recording_that_is_cut_off(
    recording: Callable[..., AudioFile], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording([0.2] * 20, "a.mp3").close()
    data = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(data[: len(data) // 2])
    async with running_service() as url:
        assert "cut off" in str(await failure(url, AudioFile(tmp_path / "a.mp3")))
    assert "w2" in capsys.readouterr().out
