import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

import client.microphone
from client import mic
from client.cli import app
from client.mic import listen, own_service, save_as
from client.microphone import Microphone, choose_device, input_devices
from client.output import OutputFormat
from client.view import make_view
from models.recognizer import Recognizer
from models.translator import Translator
from streaming import scheduler
from streaming.audio import AudioFormat
from streaming.errors import DragomanError
from tests import fake_sounddevice
from tests.fakes import FakeRecognizer, FakeSession, FakeTranslator, ForsakenSession, fake_tick, running_service, tone
from tests.proxy import Proxy

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples" / "jfk.flac"
LEVELS = [0.2, 0.4, 0, 0.6]
ENGLISH_SRT = (
    "1\n00:00:00,000 --> 00:00:01,000\nw20 w40\n\n"
    "2\n00:00:01,200 --> 00:00:02,200\nw60\n\n"
)  # fmt: skip


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "Session", FakeSession)
    monkeypatch.setattr(scheduler, "tick", fake_tick)
    monkeypatch.setitem(sys.modules, "sounddevice", fake_sounddevice)


@pytest.fixture
def plays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., bytes]:
    """Makes the microphone play levels, and then press Ctrl-C; gives what it plays."""

    def make(levels: list[float] = LEVELS, end: str = "interrupt", pace: float = 20, rate_hz: int = 16_000) -> bytes:
        return fake_sounddevice.play(monkeypatch, tmp_path / "played.wav", tone(levels, rate_hz), end, pace, rate_hz)

    return make


def own(translator: object = None) -> Any:
    return own_service(cast(Recognizer, FakeRecognizer()), cast(Translator, translator), None)


async def hear(
    service: Any = None, name: str | None = None, kind: str = "txt", languages: tuple[str, ...] = (), **settings: Any
) -> Microphone:
    microphone = Microphone(choose_device(input_devices(), None))
    recording = save_as(name, microphone.format, languages) if name else contextlib.nullcontext()
    with recording as files:
        view = make_view(OutputFormat(kind), languages)
        service = service or own(FakeTranslator())
        await listen(microphone, view, files, service, languages=languages, **settings)
    return microphone


@pytest.mark.parametrize("rate_hz", [16_000, 48_000])
async def test_words_come_until_ctrl_c_and_after_it_the_last(
    rate_hz: int, plays: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    plays(rate_hz=rate_hz)
    microphone = await hear()
    assert capsys.readouterr().out == "w20 w40\nw60\n"
    assert microphone.problems() == []


async def test_all_that_is_saved(
    plays: Callable[..., bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audio = plays()
    await hear(None, str(tmp_path / "v1.talk.wav"), "jsonl", ("es", "fr"))
    kinds = [json.loads(line)["type"] for line in capsys.readouterr().out.splitlines()]
    assert (kinds[0], kinds[-1]) == ("session.created", "session.closed")
    assert set(os.listdir(tmp_path)) - {"played.wav"} == {
        "v1.talk.wav",
        "v1.talk.srt",
        "v1.talk.es.srt",
        "v1.talk.fr.srt",
    }
    with wave.open(str(tmp_path / "v1.talk.wav")) as wav:
        assert wav.readframes(1_000_000) == audio
        assert (wav.getframerate(), wav.getnchannels(), wav.getsampwidth()) == (16_000, 1, 2)
    assert (tmp_path / "v1.talk.srt").read_text() == ENGLISH_SRT
    assert (tmp_path / "v1.talk.fr.srt").read_text() == ENGLISH_SRT.replace("w", "fr")


async def test_files_are_complete_at_any_moment(plays: Callable[..., bytes], tmp_path: Path) -> None:
    audio = plays([0.2, 0.4, 0] * 10, "silence", pace=4)
    task = asyncio.create_task(hear(None, str(tmp_path / "talk")))
    srt = tmp_path / "talk.srt"
    async with asyncio.timeout(20):
        while not srt.exists() or srt.read_text().count("-->") < 3:  # noqa: ASYNC240, ASYNC110
            await asyncio.sleep(0.05)
    heard = soundfile.read(tmp_path / "talk.wav", dtype="int16")[0].tobytes()
    assert 3.2 * 32_000 <= len(heard) < len(audio)
    assert heard == audio[: len(heard)]
    task.cancel()  # as a second Ctrl-C does
    with pytest.raises(asyncio.CancelledError):
        await task
    assert srt.read_text().count("-->") >= 3  # noqa: ASYNC240


async def test_nothing_is_overwritten_and_nothing_is_left_of_nothing(
    plays: Callable[..., bytes], tmp_path: Path
) -> None:
    plays()
    (tmp_path / "a.es.srt").write_text("mine")
    with pytest.raises(DragomanError, match=r"a\.es\.srt is there already"):
        await hear(None, str(tmp_path / "a"), languages=("es",))
    with pytest.raises(DragomanError, match="'xx'"):
        await hear(None, str(tmp_path / "b"), languages=("xx",))
    assert set(os.listdir(tmp_path)) == {"a.es.srt", "played.wav"}


def test_a_wav_file_ends_where_its_sizes_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mic, "_MAX_WAV_BYTES", 5_000)
    with save_as(str(tmp_path / "a"), AudioFormat(), []) as recording:
        for _ in range(3):
            recording.hear(bytes(2_000))
        recording.hear(bytes(10))
        assert ["4 GiB" in problem for problem in recording.problems()] == [True]
    assert soundfile.info(tmp_path / "a.wav").frames == 2_000


async def test_a_service_elsewhere(plays: Callable[..., bytes], capsys: pytest.CaptureFixture[str]) -> None:
    plays()
    async with running_service(translator=FakeTranslator(), tokens=("sesame",)) as url:
        await hear(contextlib.nullcontext((url, "sesame")), languages=("es",), latency="low")
        assert capsys.readouterr().out == "es20 es40\nes60\n"
        with pytest.raises(DragomanError, match="the token is missing"):
            await hear(contextlib.nullcontext((url, None)))
        plays(end="silence")
        talk = asyncio.create_task(hear(contextlib.nullcontext((url, "sesame"))))
        await asyncio.sleep(1)
    await talk
    shown = capsys.readouterr()
    assert shown.out == "w20 w40\nw60\n"
    assert re.fullmatch(r"dragoman: the service reports: [^\n]*shutting down[^\n]*\n", shown.err)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
async def test_what_happens_to_the_session_is_told_once(
    kind: str, plays: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scheduler, "Session", ForsakenSession)
    plays([0.2, 0.4, 0.6, 0.8] * 3, pace=2)
    languages = ("es", "de")
    async with running_service(translator=FakeTranslator()) as url, Proxy(url) as proxy:

        async def fail() -> None:
            await asyncio.sleep(1)
            proxy.cut()
            await asyncio.sleep(0.5)
            proxy.mend()

        failing = asyncio.create_task(fail())
        microphone = Microphone(choose_device(input_devices(), None))
        view = make_view(OutputFormat(kind), languages)
        service = contextlib.nullcontext((proxy.url, None))
        assert not await listen(microphone, view, None, service, languages=languages)
        await failing
    shown = capsys.readouterr()
    assert sorted(shown.err.splitlines()) == [
        "dragoman: the connection was lost: connecting again",
        "dragoman: the service reports: it is gone: nothing more is translated",
        "dragoman: the session goes on",
    ]
    if kind == "txt":
        assert re.findall(r"w\d0", shown.out) == ["w20", "w40", "w60", "w80"] * 3


async def test_the_own_service_is_for_this_program_alone(plays: Callable[..., bytes]) -> None:
    async with own() as (url, token):
        assert url.startswith("ws://127.0.0.1:")
        assert len(token) >= 32
        with pytest.raises(DragomanError, match="the token is missing"):
            await hear(contextlib.nullcontext((url, None)))


async def test_a_device_that_goes_ends_the_session_well(
    plays: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    plays(end="unplug")
    microphone = await hear()
    assert capsys.readouterr().out == "w20 w40\nw60\n"
    assert "has stopped" in microphone.problems()[0]


async def test_an_engine_that_is_behind_loses_audio_and_keeps_the_callback_free(
    plays: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Sound is lost from the text and from the wav file alike, and none of it comes twice or in another place."""

    def tick(sessions: list[FakeSession], **_: int) -> None:
        time.sleep(0.1)
        fake_tick(sessions)

    monkeypatch.setattr(scheduler, "tick", tick)
    monkeypatch.setattr(scheduler, "_MAX_WAITING_S", 2)
    monkeypatch.setattr("client.microphone._MAX_WAITING_S", 2)
    monkeypatch.setattr(fake_sounddevice, "SLOWEST_CALLBACK_S", 0.0)
    audio = plays([0.2 + 0.005 * i for i in range(150)], pace=0)  # 60 s at once
    microphone = await hear(None, str(tmp_path / "talk"))
    heard = soundfile.read(tmp_path / "talk.wav", dtype="int16")[0].tobytes()
    assert 2 * 32_000 <= len(heard) < 50 * 32_000
    assert heard[: 2 * 32_000] == audio[: 2 * 32_000]
    block_bytes = 2 * 16_000 // client.microphone._BLOCKS_PER_S
    played, blocks = (
        iter([pcm[start : start + block_bytes] for start in range(0, len(pcm), block_bytes)]) for pcm in (audio, heard)
    )
    assert all(block in played for block in blocks)
    assert len(heard) / 32_000 + microphone.dropped_s == pytest.approx(60)
    assert fake_sounddevice.SLOWEST_CALLBACK_S < 0.1


PROGRAM = (
    "import tests.fake_sounddevice as f; f.install()\n"
    "import streaming.scheduler as s, models.checkpoint as c, models.translator as m\n"
    "from tests.fakes import *\n"
    "s.Session, s.tick = FakeSession, fake_tick\n"
    "c.load_recognizer = lambda path, **_: FakeRecognizer()\n"
    "m.load_translator = lambda path, **_: FakeTranslator()\n"
    "from client.cli import app; app()\n"
)


def start(*arguments: str, program: str = PROGRAM, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "60", "LINES": "12", "PYTHONIOENCODING": "utf-8"}
    # Where the tests run in a shell's background, Ctrl-C is ignored, and a child would inherit that.
    heed_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-c", program, "mic", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=stderr, env=environment, preexec_fn=heed_ctrl_c)


def shown_on(screen: int) -> str:
    """All that comes to a terminal."""
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that the other side is gone
        while piece := os.read(screen, 4096):
            shown += piece
    os.close(screen)
    return shown.decode()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")


def test_on_a_terminal_there_are_two_panes_and_at_the_end_the_text(plays: Callable[..., bytes]) -> None:
    plays(pace=1)
    screen, terminal = pty.openpty()
    process = start("--to", "es", "--no-speculation", stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = shown_on(screen)
    assert process.wait() == 0
    before, panes = shown.split("\x1b[?1049h")
    panes, after = panes.split("\x1b[?1049l")
    assert "dragoman: listening to USB Microphone, until Ctrl-C" in before
    frames = [plain(frame) for frame in panes.split("\x1b[H")]
    assert all("╭─ speech ─" in frame and "╭─ es ─" in frame for frame in frames[2:])
    full = [frame for frame in frames if re.search(r"│ w20 w40 +│\n.*es ─.*\n│ es20 es40 +│", frame, re.DOTALL)]
    assert full, "words above, their translation below"
    assert any("▮" in frame and "s behind" in frame for frame in full)
    assert plain(after) == "w20\n    es  es20\nw40\n    es  es40\nw60\n    es  es60\n"


def test_in_a_pipe_the_text_is_only_appended_to_and_the_terminal_has_the_level(plays: Callable[..., bytes]) -> None:
    plays(pace=1)
    screen, terminal = pty.openpty()
    process = start(stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    shown = plain(shown_on(screen))
    assert process.communicate()[0] == b"w20 w40\nw60\n"
    assert process.returncode == 0
    assert re.search(r"0:00:0\d  ▮+▯+  \d\.\d s behind  Ctrl-C ends", shown)


def test_a_program_without_models_uses_a_service_elsewhere(plays: Callable[..., bytes]) -> None:
    plays()
    elsewhere = "import tests.fake_sounddevice as f, sys; f.install()\nfrom client.cli import app\n"
    elsewhere += "try: app()\nfinally: print('torch' in sys.modules)\n"
    process = start("--url", "ws://127.0.0.1:9", program=elsewhere, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, complaints = process.communicate()
    assert (process.returncode, out) == (2, b"False\n")
    assert b"dragoman: no service answers at ws://127.0.0.1:9" in complaints


runner = CliRunner()


def test_the_list_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    result = runner.invoke(app, ["mic", "--list-devices"])
    assert result.exit_code == 0
    assert "*  2  USB Microphone (ALSA), 1 channel, 16000 Hz\n" in result.stdout
    monkeypatch.setattr(fake_sounddevice, "query_devices", list)
    result = runner.invoke(app, ["mic", "--list-devices"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no input device" in result.stderr
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    result = runner.invoke(app, ["mic"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "pip install 'dragoman[mic]'" in result.stderr


@pytest.mark.model
@pytest.mark.slow
def test_the_real_models_hear_from_a_microphone_what_they_hear_from_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_MIC_FILE", str(SAMPLE))
    monkeypatch.setenv("FAKE_MIC_PACE", "2")
    monkeypatch.setenv("FAKE_MIC_END", "interrupt")
    real = "import tests.fake_sounddevice as f; f.install()\nfrom client.cli import app; app()\n"
    arguments = ["--to", "es", "--format", "jsonl", "--save", str(tmp_path / "talk")]
    process = start(*arguments, program=real, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, complaints = process.communicate()
    assert process.returncode == 0, complaints
    transcribe = [sys.executable, "-m", "client.cli", "transcribe", str(SAMPLE), "--to", "es", "--format", "jsonl"]
    from_file = subprocess.run(transcribe, cwd=ROOT, capture_output=True, check=True).stdout

    def told(lines: bytes) -> list[dict[str, Any]]:
        events = [json.loads(line) for line in lines.splitlines()]
        own = ("seq", "file", "backlog_ms")
        deltas = [event for event in events if event["type"].endswith(".delta")]
        return [{key: value for key, value in event.items() if key not in own} for event in deltas]

    assert told(out) == told(from_file)
    assert sum("language" in event for event in told(out)) >= 2
    expected = soundfile.read(SAMPLE, dtype="int16")[0]
    np.testing.assert_array_equal(soundfile.read(tmp_path / "talk.wav", dtype="int16")[0], expected)
    assert (tmp_path / "talk.es.srt").read_text().count("-->") >= 2
