"""Audio in, transcript and translation out, with the real session and small random models: files, socket, text."""

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosedError

from client.cli import app
from models.checkpoint import save_checkpoint
from models.recognizer import Recognizer
from models.translator import Translator
from streaming.audio import AudioFormat, Samples
from streaming.drafts import NGrams
from streaming.events import Event, TranscriptDelta, TranslationDelta
from streaming.session import Session, SessionConfig
from streaming.speculation import Speculation
from streaming.text_session import TextSession
from tests import tiny
from tests.fakes import running_service

ROOT = Path(__file__).parents[1]
runner = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random model."""
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder, tiny.config(), tiny.net().checkpoint(), tiny.tokenizer(), "A model of random weights.\n")
    return folder


@pytest.fixture(scope="module")
def translator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random translator."""
    return tiny.save_tiny_translator(tmp_path_factory.mktemp("translator"), seed=2)


@pytest.fixture(scope="module")
def recognizer() -> Recognizer:
    return tiny.recognizer()


@pytest.fixture(scope="module")
def translator() -> Translator:
    return tiny.translator(2)


def sound(seconds: float, seed: int = 0, rate_hz: int = 16_000, channels: int = 1) -> Samples:
    """Noise that swells and fades twice a second, so that a random model has something to say about it."""
    samples = round(seconds * rate_hz)
    swell = 0.5 * np.sin(np.pi * 2 * np.arange(samples) / rate_hz) ** 2
    noise = np.random.default_rng(seed).normal(0, 0.3, (samples, channels))
    return np.clip(noise * swell[:, None], -1, 1).astype(np.float32)


def told(events: list[Event]) -> list[dict[str, Any]]:
    return [event.to_dict() for event in events]


def alone(
    recognizer: Recognizer, samples: Samples, fmt: AudioFormat, translator: Translator | None = None, **settings: Any
) -> list[Event]:
    """What a session tells about the whole of the audio."""
    session = Session(recognizer, SessionConfig(fmt, **settings), translator)
    return session.push(samples) + session.finish()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("settings", [{}, {"max_lookahead_ms": 100}, {"decoder": "ctc"}], ids=str)
def test_files_in_a_batch_get_what_each_has_alone(
    batch_size: int, settings: dict[str, Any], recognizer: Recognizer, model: Path, tmp_path: Path
) -> None:
    shapes = [(7.3, 16_000, 1), (0.2, 8_000, 1), (12.0, 44_100, 2), (3.0, 48_000, 6), (0.0001, 16_000, 1)]
    expected, paths = [], []
    for seed, (seconds, rate_hz, channels) in enumerate(shapes):
        samples = sound(seconds, seed, rate_hz, channels)
        paths.append(str(tmp_path / f"{seed}.wav"))
        soundfile.write(paths[-1], samples, rate_hz, subtype="FLOAT")
        events = alone(recognizer, samples, AudioFormat("f32le", rate_hz, channels), **settings)
        expected += [{**event, "file": paths[-1]} for event in told(events)]
    flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    command = ["transcribe", "--model", str(model), "--batch-size", str(batch_size), "--format", "jsonl"]
    result = runner.invoke(app, [*command, *flags, *paths])
    assert (result.exit_code, result.stderr) == (0, "")
    assert [json.loads(line) for line in result.stdout.splitlines()] == expected
    assert sum("words" in event for event in expected) > 5, "the test is empty if nothing is said"


@pytest.mark.parametrize(("batch_size", "flag"), [(1, "--no-speculation"), (3, "--speculation")])
def test_translations_of_files_are_what_each_has_alone(
    batch_size: int,
    flag: str,
    recognizer: Recognizer,
    translator: Translator,
    model: Path,
    translator_folder: Path,
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {"languages": ("es", "de"), "latency": "low", "glossary": {"the": {"es": "hablante"}}}
    expected, paths = [], []
    for seed, (seconds, rate_hz) in enumerate([(6.0, 16_000), (2.0, 8_000), (4.0, 44_100)]):
        samples = sound(seconds, seed, rate_hz)
        paths.append(str(tmp_path / f"{seed}.wav"))
        soundfile.write(paths[-1], samples, rate_hz, subtype="FLOAT")
        events = alone(recognizer, samples, AudioFormat("f32le", rate_hz, 1), translator, **settings)
        expected += [{**event, "file": paths[-1]} for event in told(events)]
    (tmp_path / "terms.tsv").write_text("the\tes\thablante\n")
    command = ["transcribe", "--model", str(model), "--translator", str(translator_folder), "--to", "es,de"]
    command += ["--latency", "low", "--glossary", str(tmp_path / "terms.tsv"), "--batch-size", str(batch_size), flag]
    result = runner.invoke(app, [*command, "--format", "jsonl", *paths])
    assert (result.exit_code, result.stderr) == (0, "")
    assert [json.loads(line) for line in result.stdout.splitlines()] == expected
    assert sum(event.get("language") == "es" for event in expected) > 5, "the test is empty if nothing is translated"


def test_raw_pcm_is_the_same_as_a_file(model: Path, tmp_path: Path) -> None:
    pcm = (sound(5, rate_hz=8_000) * 32_767).astype("<i2")
    soundfile.write(tmp_path / "a.wav", pcm, 8_000)
    from_file = runner.invoke(app, ["transcribe", "--model", str(model), str(tmp_path / "a.wav")])
    command = ["transcribe", "--model", str(model), "-", "--rate", "8000"]
    from_pipe = runner.invoke(app, command, input=pcm.tobytes())
    assert from_file.exit_code == from_pipe.exit_code == 0
    assert from_pipe.stdout == from_file.stdout
    assert len(from_file.stdout) > 20


def test_the_end_within_a_sample_costs_no_word(model: Path) -> None:
    pcm = (sound(5) * 32_767).astype("<i2").tobytes()
    command = ["transcribe", "--model", str(model), "-"]
    whole, odd = (runner.invoke(app, command, input=data) for data in (pcm, pcm + b"\0"))
    assert odd.stdout == whole.stdout
    assert (whole.exit_code, odd.exit_code) == (0, 2)
    assert re.fullmatch(r"dragoman: -: the audio ends within a sample[^\n]*\n", odd.stderr)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [(["--decoder", "none"], "decoder"), (["--rate", "x"], "rate")],
)
def test_wrong_flags(flags: list[str], sentence: str, model: Path) -> None:
    result = runner.invoke(app, ["transcribe", "--model", str(model), "-", *flags], input=bytes(100))
    assert result.exit_code == 2
    assert sentence in result.stderr


async def over_the_socket(url: str, audio: bytes, session: dict[str, Any], message_bytes: int) -> list[Any]:
    async with connect(url) as connection:
        await connection.send(json.dumps({"type": "session.update", "session": session}))
        for start in range(0, len(audio), message_bytes):
            await connection.send(audio[start : start + message_bytes])
        await connection.send(json.dumps({"type": "session.close"}))
        events = [json.loads(frame) async for frame in connection][2:]
    for event in events:
        assert event.pop("backlog_ms", 0) >= 0  # the clock's: another at every run
    return events


async def test_sessions_over_the_socket_get_what_each_has_alone(recognizer: Recognizer) -> None:
    # Different lengths, rates, look-aheads and heads, and messages that end anywhere, in one batch.
    settings: list[dict[str, Any]] = [
        {},
        {"max_lookahead_ms": 0},
        {"decoder": "ctc"},
        {"max_lookahead_ms": 100, "lookahead": "adaptive"},
    ]
    talks, expected = [], []
    async with running_service(recognizer) as url:
        for seed, (rate_hz, channels) in enumerate([(16_000, 1), (8_000, 1), (48_000, 2), (24_000, 1)]):
            audio = (sound(4 + seed, seed, rate_hz, channels) * 32_767).astype("<i2")
            events = alone(recognizer, audio, AudioFormat("s16le", rate_hz, channels), **settings[seed])
            expected.append([{**event, "seq": event["seq"] + 2} for event in told(events)])
            fmt = {"type": "audio/pcm", "rate": rate_hz, "channels": channels}
            session = {"audio": {"input": {"format": fmt}}, **settings[seed]}
            talks.append(over_the_socket(url, audio.tobytes(), session, 1_001 + 2_222 * seed))
        assert await asyncio.gather(*talks) == expected
    assert sum(map(len, expected)) > 3 * len(expected), "the test is empty if nothing is said"


@pytest.mark.parametrize("speculates", [False, True])
async def test_translations_over_the_socket_are_what_each_has_alone(
    speculates: bool, recognizer: Recognizer, translator: Translator
) -> None:
    settings: list[dict[str, Any]] = [
        {"languages": ("es",), "latency": "low"},
        {"languages": ("de", "fr"), "latency": "medium", "glossary": {"the": {"de": "nada"}}},
        {},
        {"languages": ("es", "de"), "latency": "offline"},
    ]
    talks, expected = [], []
    speculation = Speculation([NGrams()]) if speculates else None
    async with running_service(recognizer, translator, speculation) as url:
        for seed, own in enumerate(settings):
            audio = (sound(4 + seed, seed) * 32_767).astype("<i2")
            events = alone(recognizer, audio, AudioFormat(), translator, **own)
            expected.append([{**event, "seq": event["seq"] + 2} for event in told(events)])
            fields = {key: value for key, value in own.items() if key != "languages"}
            output = {"languages": own.get("languages", ())}
            session = {"audio": {"input": {"format": {"rate": 16_000}}, "output": output}, **fields}
            talks.append(over_the_socket(url, audio.tobytes(), session, 1_001 + 2_222 * seed))
        assert await asyncio.gather(*talks) == expected
    translated = [event for events in expected for event in events if event.get("language")]
    assert len(translated) > 10, "the test is empty if nothing is translated"
    assert speculation is None or sum(speculation.accepted.values()) > 10, "and if nothing is drafted"
    for events in expected:  # a translation comes after its words
        heard = 0
        for event in events:
            heard += len(event.get("words", ()))
            assert event.get("source_words", [0, 0])[1] < max(1, heard)


async def test_a_flush_in_mid_stream_tells_the_last_word_at_once(recognizer: Recognizer) -> None:
    audio = (sound(6) * 32_767).astype("<i2").tobytes()
    session = Session(recognizer, SessionConfig())
    before = session.push(audio)
    flushed = session.flush()
    expected = [event.delta for event in before + flushed if isinstance(event, TranscriptDelta)]
    async with running_service(recognizer) as url, connect(url) as connection:
        declared = {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 16_000}}}}
        await connection.send(json.dumps({"type": "session.update", "session": declared}))
        await connection.send(audio)
        await connection.send('{"type": "session.input_audio_buffer.commit"}')
        events = [json.loads(await connection.recv()) for _ in range(2 + len(expected))]
        assert [event["delta"] for event in events[2:]] == expected
    assert len(flushed) > 0


@pytest.mark.parametrize(
    ("session", "code"),
    [
        ({"max_lookahead_ms": -1}, "unsupported_lookahead"),
        ({"decoder": "none"}, "unsupported_decoder"),
        ({"endpoint_silence_ms": 1}, "unsupported_endpoint"),
    ],
)
async def test_what_the_model_cannot_do(session: dict[str, Any], code: str, recognizer: Recognizer) -> None:
    async with running_service(recognizer) as url, connect(url) as connection:
        await connection.send(json.dumps({"type": "session.update", "session": session}))
        with pytest.raises(ConnectionClosedError):
            while True:
                event = json.loads(await connection.recv())
        assert event["error"]["code"] == code


@pytest.fixture
def service(model: Path, translator_folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`dragoman serve` as a process of its own, and its URL."""
    command = [sys.executable, "-m", "client.cli", "serve", "--port", "0", "--model", str(model)]
    command += ["--translator", str(translator_folder)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    url = re.search(r"ws://\S+", line)
    assert url, line
    yield process, url[0]
    process.kill()
    process.communicate()


def test_text_as_a_program(translator_folder: Path, translator: Translator, tmp_path: Path) -> None:
    lines = ["the speaker is still talking", "", "nothing once shown"]
    run = [sys.executable, "-m", "client.cli", "translate", "--translator", str(translator_folder), "--to", "es"]
    result = subprocess.run(run, cwd=ROOT, input="\n".join(lines), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    expected = []
    for line in lines:
        session = TextSession(translator, ["es"])
        events = [event for word in line.split() for event in session.push(word)] + session.finish()
        expected.append("".join(event.delta for event in events if isinstance(event, TranslationDelta)))
    assert result.stdout == "".join(f"{text}\n" for text in expected)
    assert any(expected)


def test_serve_and_live_as_programs(
    service: tuple[subprocess.Popen[str], str], model: Path, translator_folder: Path, tmp_path: Path
) -> None:
    process, url = service
    samples = np.round(sound(5) * 32_767).astype("<i2")
    soundfile.write(tmp_path / "a.wav", samples, 16_000)
    run = [sys.executable, "-m", "client.cli"]
    to = ["--to", "es,de", "--latency", "low"]
    transcribe = [*run, "transcribe", "--model", str(model), "--translator", str(translator_folder), *to]
    transcribe += [str(tmp_path / "a.wav")]
    from_file = subprocess.run(transcribe, cwd=ROOT, capture_output=True, text=True)
    live = [*run, "live", str(tmp_path / "a.wav"), "--url", url, "--pace", "20", *to]
    from_service = subprocess.run(live, cwd=ROOT, capture_output=True, text=True)
    assert (from_file.returncode, from_file.stderr) == (0, "")
    assert (from_service.returncode, from_service.stderr) == (0, "")
    assert from_service.stdout == from_file.stdout
    assert len(from_file.stdout) > 20
    assert "\n    es  " in from_file.stdout
    serve = [*run, "serve", "--model", str(model), "--port", url.split(":")[2].partition("/")[0]]
    second = subprocess.run(serve, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 2
    assert re.fullmatch(r"dragoman: [^\n]*address already in use[^\n]*\n", second.stderr)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    missing = subprocess.run([*run, "live", "missing.wav"], cwd=ROOT, capture_output=True, text=True)
    assert (missing.returncode, missing.stderr) == (2, "dragoman: missing.wav: there is no such file\n")
    gone = subprocess.run(live, cwd=ROOT, capture_output=True, text=True)
    assert gone.returncode == 2
    assert re.fullmatch(r"dragoman: no service answers at [^\n]*\n", gone.stderr)
