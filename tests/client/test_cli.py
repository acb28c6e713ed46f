import contextlib
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

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner, Result

import client.transcribe
import models.checkpoint
import models.translator
import server
from client.cli import app
from tests.fakes import FakeRecognizer, FakeSession, FakeTranslator, fake_tick, tone

ROOT = Path(__file__).parents[2]
runner = CliRunner()


@pytest.fixture(autouse=True)
def fake_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.transcribe, "Session", FakeSession)
    monkeypatch.setattr(client.transcribe, "tick", fake_tick)
    monkeypatch.setattr(models.checkpoint, "load_recognizer", lambda path, **_: FakeRecognizer())
    monkeypatch.setattr(models.translator, "load_translator", lambda path, **_: FakeTranslator())


@pytest.fixture
def wav(tmp_path: Path) -> Callable[..., str]:
    """Makes a recording of the given levels, and gives its path."""

    def make(name: str, *levels: float, rate_hz: int = 16_000, channels: int = 1) -> str:
        path = tmp_path / name
        soundfile.write(path, tone(levels, rate_hz, channels), rate_hz, subtype="FLOAT")
        return str(path)

    return make


def transcribe(*arguments: str, stdin: bytes | None = None) -> Result:
    return runner.invoke(app, ["transcribe", *arguments], input=stdin)


def test_text(wav: Callable[..., str]) -> None:
    result = transcribe(wav("a.wav", 0.2, 0.4, 0, 0.6))
    assert (result.exit_code, result.stdout, result.stderr) == (0, "w20 w40 w60\n", "")


@pytest.mark.parametrize(("rate_hz", "channels"), [(8_000, 1), (44_100, 2), (48_000, 6), (96_000, 1)])
def test_rates_and_channels(rate_hz: int, channels: int, wav: Callable[..., str]) -> None:
    assert transcribe(wav("a.wav", 0.2, 0.4, 0.6, rate_hz=rate_hz, channels=channels)).exit_code == 0


def test_several_files_are_named_and_in_order(wav: Callable[..., str]) -> None:
    paths = [wav("long.wav", *[0.2] * 30), wav("short.wav", 0.4), wav("quiet.wav", 0), wav("last.wav", 0.6)]
    for batch_size in ("1", "2", "8"):
        result = transcribe("--batch-size", batch_size, *paths)
        assert result.exit_code == 0
        texts = [" ".join(["w20"] * 30), "w40", "", "w60"]
        assert result.stdout == "".join(f"{p}: {text}\n" for p, text in zip(paths, texts, strict=True))


def test_json_lines(wav: Callable[..., str]) -> None:
    path = wav("a.wav", 0.2, 0.4)
    events = [json.loads(line) for line in transcribe("--format", "jsonl", path).stdout.splitlines()]
    assert [event["file"] for event in events] == [path] * 3
    assert [event["seq"] for event in events] == [0, 1, 2]
    assert events[-1] == {"type": "session.closed", "seq": 2, "audio_ms": 800, "file": path}


def test_subtitles(wav: Callable[..., str], tmp_path: Path) -> None:
    path = wav("a.wav", 0.2, 0.4, 0.6, 0, 0.3)
    srt = "1\n00:00:00,000 --> 00:00:01,200\nw20 w40 w60\n\n2\n00:00:01,600 --> 00:00:02,600\nw30\n\n"
    assert transcribe("--format", "srt", path).stdout == srt
    assert transcribe("--format", "vtt", path).stdout.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.200\n")
    other = wav("b.wav", 0.2)
    assert transcribe("--format", "srt", path, other).exit_code == 2
    result = transcribe("--format", "srt", path, other, "--output", str(tmp_path / "out"))
    assert (result.exit_code, result.stdout) == (0, "")
    assert (tmp_path / "out" / "a.srt").read_text() == srt


def test_translation(wav: Callable[..., str], tmp_path: Path) -> None:
    path = wav("a.wav", 0.2, 0.4, 0, 0.6)
    result = transcribe(path, "--to", "es")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "es20 es40 es60\n", "")
    assert transcribe(path, "--to", "es, de").stdout.startswith("w20\n    es  es20\n    de  de20\nw40\n    es  es40\n")
    srt = "1\n00:00:00,000 --> 00:00:01,000\nfr20 fr40\n\n2\n00:00:01,200 --> 00:00:02,200\nfr60\n\n"
    assert transcribe(path, "--to", "fr", "--format", "srt").stdout == srt
    assert transcribe(path, "--to", "fr,es", "--format", "srt").exit_code == 2
    result = transcribe(path, "--to", "fr,es", "--format", "srt", "--output", str(tmp_path / "out"))
    assert (result.exit_code, result.stdout) == (0, "")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.es.srt", "a.fr.srt", "a.srt"]
    assert (tmp_path / "out" / "a.fr.srt").read_text() == srt
    events = [json.loads(line) for line in transcribe("--to", "es", "--format", "jsonl", path).stdout.splitlines()]
    assert [event["delta"] for event in events if event.get("language") == "es"] == [" es20", " es40", "", " es60"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to", "xx"], "cannot 'xx'; it knows es, de, fr"),
        (["--to", "es", "--latency", "slow"], "latency is 'slow'; choose one of low, "),
        (["--to", "es,"], "--to has an empty language"),
        (["--to", "es", "--glossary", "none.tsv"], "none.tsv: there is no such file"),
    ],
)
def test_a_translation_that_cannot_be_is_told_once(
    wav: Callable[..., str], arguments: list[str], sentence: str
) -> None:
    result = transcribe(wav("a.wav", 0.2), wav("b.wav", 0.2), *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(rf"dragoman: [^\n]*{re.escape(sentence)}[^\n]*\n", result.stderr)


def test_a_translator_that_is_not_there(
    wav: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(models.checkpoint, "load_recognizer", lambda path, **_: FakeRecognizer())
    monkeypatch.setattr(models.translator, "EMBEDDED_TRANSLATOR", tmp_path / "none")
    result = transcribe(wav("a.wav", 0.2), "--to", "es")
    assert result.exit_code == 2
    assert re.fullmatch(r"dragoman: [^\n]*--translator[^\n]*\n", result.stderr)
    result = transcribe(wav("a.wav", 0.2), "--to", "es", "--translator", str(tmp_path))
    assert result.exit_code == 2
    assert re.fullmatch(r"dragoman: [^\n]*config\.json[^\n]*\n", result.stderr)


def test_bad_files_are_told_in_a_sentence_each_and_the_others_transcribed(
    wav: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "notes.txt").write_text("hello\n")
    bad = [str(tmp_path / name) for name in ("missing.wav", "empty.wav", "notes.txt")]
    bad += [str(tmp_path), wav("nothing.wav"), wav("nan.wav", 0.5, float("nan"))]
    good = wav("good.wav", 0.4)
    result = transcribe(*bad[:3], good, *bad[3:])
    assert result.exit_code == 2
    assert result.stdout == f"{good}: w40\n"
    lines = result.stderr.splitlines()
    assert len(lines) == len(bad)
    for path in bad:
        (line,) = (line for line in lines if line.startswith(f"dragoman: {path}: "))
        assert len(line.removeprefix(f"dragoman: {path}: ")) < 200
    assert "sample index 6400" in result.stderr


def test_a_truncated_mp3_gives_what_it_has_and_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    soundfile.write(path, tone([0.2] * 20), 16_000)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    result = transcribe(str(path))
    assert result.exit_code == 2
    assert result.stdout.count("w2") > 5
    assert re.fullmatch(r"dragoman: .*a\.mp3: the file is cut off: [^\n]*\n", result.stderr)


def test_raw_pcm_from_standard_input() -> None:
    pcm = (tone([0.2, 0.4]) * 32_767).astype("<i2").tobytes()
    assert transcribe("-", stdin=pcm).stdout == "w20 w40\n"
    floats = tone([0.2, 0.4], 48_000, 2).astype("<f4").tobytes()
    arguments = ("--rate", "48000", "--channels", "2", "--encoding", "f32le")
    assert transcribe("-", *arguments, stdin=floats).stdout == "w20 w40\n"


def test_bad_raw_pcm() -> None:
    pcm = (tone([0.2, 0.4]) * 32_767).astype("<i2").tobytes()
    odd = transcribe("-", stdin=pcm + b"\0")
    assert (odd.exit_code, odd.stdout) == (2, "w20 w40\n")
    assert "ends within a sample" in odd.stderr
    empty = transcribe("-", stdin=b"")
    assert (empty.exit_code, empty.stdout) == (2, "")
    assert "0 s of audio" in empty.stderr
    assert "4000 Hz" in transcribe("-", "--rate", "4000", stdin=pcm).stderr


def test_one_sample(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(1, 0.5), 16_000)
    assert transcribe(str(tmp_path / "a.wav")).exit_code == 0


def test_an_output_folder_that_cannot_be(wav: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = transcribe(wav("a.wav", 0.2), "--output", str(tmp_path / "file" / "out"))
    assert result.exit_code == 2
    assert re.fullmatch(r"dragoman: .*\n", result.stderr)


def test_a_model_that_is_not_there(wav: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    result = transcribe(wav("a.wav", 0.2), "--model", str(tmp_path))
    assert result.exit_code == 2
    assert re.fullmatch(r"dragoman: .*config\.json.*\n", result.stderr)


def test_the_limits_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[server.Settings] = []

    async def serve(recognizer: object, settings: server.Settings, *_: object, **__: object) -> None:
        asked.append(settings)

    monkeypatch.setattr(server, "serve", serve)
    for options in (
        "",
        "--max-sessions 3 --max-session-minutes 90 --max-lag-s 4.5 --drain-s 0 --resume-s 9 --metrics",
    ):
        command = ["serve", "--translator", "fake", "--no-speculation", *options.split()]
        assert runner.invoke(app, command).exit_code == 0
    assert asked == [
        server.Settings(),
        server.Settings(max_sessions=3, max_session_s=5_400, max_lag_s=4.5, drain_s=0, resume_s=9, metrics=True),
    ]
    for wrong in ("--max-session-minutes 0", "--max-lag-s 1", "--max-lag-s 30", "--drain-s -1", "--resume-s -1"):
        result = runner.invoke(app, ["serve", *wrong.split()])
        assert result.exit_code == 2 and wrong.split()[0] in result.stderr
    assert len(asked) == 2


def test_device_and_dtype_reach_both_models(monkeypatch: pytest.MonkeyPatch, wav: Callable[..., str]) -> None:
    asked: list[tuple[str, object, object]] = []

    def loading(what: str, model: object) -> Callable[..., object]:
        def load(path: Path | None = None, *, device: str = "", dtype: str = "", **_: object) -> object:
            asked.append((what, device, dtype))
            return model

        return load

    async def serve(*_: object, **__: object) -> None:
        return

    monkeypatch.setattr(server, "serve", serve)
    monkeypatch.setattr(models.checkpoint, "load_recognizer", loading("recogniser", FakeRecognizer()))
    monkeypatch.setattr(models.translator, "load_translator", loading("translator", FakeTranslator()))
    options = ["--translator", "fake", "--no-speculation", "--device", "cuda:1", "--dtype", "bfloat16"]
    for command in (["serve"], ["transcribe", wav("a.wav", 0.2), "--to", "es"]):
        asked.clear()
        assert runner.invoke(app, [*command, *options]).exit_code == 0
        assert sorted(asked) == [("recogniser", "cuda:1", "bfloat16"), ("translator", "cuda:1", "bfloat16")]


def test_help_is_quick_and_names_units() -> None:
    started_s = time.monotonic()
    helped = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "client.cli", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - started_s < 10
    assert helped.returncode == 0
    for command in ("transcribe", "translate", "serve", "live", "mic", "eval", "models"):
        assert command in helped.stdout
    for heavy in ("torch", "numpy", "av", "websockets", "jiwer", "matplotlib"):
        assert f"| {heavy}\n" not in helped.stderr, f"{heavy} is imported for --help"


# The command with the fake session, as a program of its own.
PROGRAM = (
    "import client.transcribe as t, models.checkpoint as c, models.translator as m\n"
    "from tests.fakes import FakeSession, FakeTranslator, fake_tick\n"
    "t.Session, t.tick, c.load_recognizer = FakeSession, fake_tick, lambda path, **_: None\n"
    "m.load_translator = lambda path, **_: FakeTranslator()\n"
    "from client.cli import app; app()\n"
)


def start(*arguments: str, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "60"}
    # Where the tests run in a shell's background, Ctrl-C is ignored, and a child would inherit that.
    heed_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=stderr, env=environment, preexec_fn=heed_ctrl_c)


def test_on_a_terminal_words_and_speed_share_the_screen(wav: Callable[..., str]) -> None:
    screen, terminal = pty.openpty()
    path = wav("a.wav", *[0.2] * 60)
    process = start("transcribe", path, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that the other side is gone
        while piece := os.read(screen, 4096):
            shown += piece
    os.close(screen)
    assert process.wait() == 0
    lines = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown).decode().replace("\r", "\n").split("\n")
    assert " ".join(["w20"] * 15) in lines, "a full line of the screen, broken between words"
    assert any("0:00:24/0:00:24" in line and "x real time" in line for line in lines)


def test_on_a_terminal_the_translation_stands_under_the_words(wav: Callable[..., str]) -> None:
    screen, terminal = pty.openpty()
    process = start("transcribe", wav("a.wav", 0.2, 0.4), "--to", "es", stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):
        while piece := os.read(screen, 4096):
            shown += piece
    os.close(screen)
    assert process.wait() == 0
    lines = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown).decode().replace("\r", "\n").split("\n")
    assert [line for line in lines if re.match(r"w|    es", line)] == ["w20", "    es  es20", "w40", "    es  es40"]


def test_a_progress_bar_on_the_terminal_leaves_piped_results_alone(wav: Callable[..., str]) -> None:
    screen, terminal = pty.openpty()
    path = wav("a.wav", 0.2, 0.4)
    process = start("transcribe", path, "missing.wav", stderr=terminal)
    assert process.communicate()[0] == f"{path}: w20 w40\n".encode()
    os.close(terminal)
    shown = os.read(screen, 65536)
    assert b"dragoman: missing.wav: there is no such file" in shown
    assert b"0:00:01/0:00:01" in shown
    assert b"x real time" in shown
    os.close(screen)


def test_a_reader_that_leaves_ends_the_program_quietly(wav: Callable[..., str]) -> None:
    process = start("transcribe", "--format", "jsonl", wav("a.wav", *[0.2] * 10_000, rate_hz=8_000))
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    assert process.communicate()[1] == b""
    assert process.returncode == 1


def test_ctrl_c_ends_the_program_quietly(wav: Callable[..., str]) -> None:
    process = start("transcribe", "--format", "jsonl", wav("a.wav", *[0.2] * 10_000, rate_hz=8_000))
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert b"Traceback" not in process.communicate()[1]
    assert process.returncode == 130
