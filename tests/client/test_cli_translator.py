"""Every command that translates can have a server do it, and says so if that fails."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner, Result

import models.checkpoint
from client.cli import app
from streaming import remote
from streaming.audio import Samples
from tests import fake_sounddevice, tiny
from tests.completions import Completions, completions, plain_folder
from tests.streaming.test_remote import planned

#: What loading the translator asks for: ids, which this server refuses, and text.
LOADED: list[int | str] = ["", ""]


@pytest.fixture
def model() -> Iterator[Completions]:
    """A server whose model translates by writing capitals."""
    with completions(planned, takes_ids=False) as server:
        yield server


@pytest.fixture
def options(model: Completions, tmp_path: Path) -> list[str]:
    """What names it on a command line."""
    folder = plain_folder(tmp_path / "tiny")
    return ["--translator-url", model.url, "--translator", str(folder), "--translator-key", "sesame"]


@pytest.fixture(autouse=True)
def tiny_recognizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.checkpoint, "load_recognizer", lambda path, **_: tiny.recognizer())
    monkeypatch.setattr(remote, "PAUSE_S", 0.01)


def noise() -> Samples:
    """Sound in which the tiny recogniser hears something, ``[samples, 1]``."""
    return np.random.default_rng(0).normal(0, 0.25, (6_000, 1)).astype(np.float32)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "talk.wav", noise(), 16_000)
    return tmp_path / "talk.wav"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def texts(result: Result) -> tuple[str, str]:
    """The letters of the transcript and of its translation, of JSON lines; a long word may be written in parts."""
    events = [json.loads(line) for line in result.stdout.splitlines()]
    said, written = (
        "".join(event["delta"] for event in events if event["type"] == f"session.{kind}_transcript.delta")
        for kind in ("input", "output")
    )
    return said.replace(" ", ""), written.replace(" ", "")


def test_of_recordings(model: Completions, options: list[str], recording: Path) -> None:
    command = ["transcribe", recording, "--to", "es", "--format", "jsonl", *options]
    result = run(*command)
    said, written = texts(result)
    assert (result.exit_code, result.stderr) == (0, "") and written == said.upper() != ""
    assert set(model.keys) == {"Bearer sesame"}
    model.faults = [*LOADED, *[500] * 99]
    failed = run(*command)
    assert failed.exit_code == 2 and texts(failed)[0] == said
    assert re.fullmatch(rf"dragoman: {recording}: the translator's server [^\n]*\n", failed.stderr)


def test_of_text(model: Completions, options: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("where the words come from\n\nand go to\n")
    command = ["translate", text, "--to", "es", *options]
    result = run(*command, "--translator-policy", "local-agreement")
    assert (result.exit_code, result.stdout) == (0, "WHERE THE WORDS COME FROM\n\nAND GO TO\n")
    model.faults = [404, 404, *[500] * 99]
    failed = run(*command)
    assert failed.exit_code == 2 and "404" in failed.stderr


def test_of_a_microphone(
    model: Completions, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", fake_sounddevice)
    fake_sounddevice.play(monkeypatch, tmp_path / "played.wav", noise(), "interrupt", 20, 16_000)
    result = run("mic", "--to", "es", "--format", "jsonl", *options)
    said, written = texts(result)
    assert result.exit_code == 0 and written == said.upper() != ""


def test_of_scores(model: Completions, options: list[str], recording: Path, tmp_path: Path) -> None:
    pairs, talks, report = (tmp_path / name for name in ("pairs.jsonl", "talks.jsonl", "report.json"))
    pairs.write_text(json.dumps({"text": "where the words come from and go to", "es": "WHERE"}) + "\n")
    talks.write_text(json.dumps({"audio": str(recording), "text": "words"}) + "\n")
    command = ["eval", pairs, talks, "--to", "es", "--json", report, "--log", tmp_path, *options]
    result = run(*command)
    assert (result.exit_code, result.stderr) == (0, "")
    read = json.loads(report.read_text())
    assert read["translator"] == "tiny" and "sesame" not in report.read_text()
    assert [score["segments"] for score in read["translations"]] == [1, 1]
    (line,) = map(json.loads, (tmp_path / "pairs.es.medium.jsonl").read_text().splitlines())
    assert line["prediction"] == "WHERE THE WORDS COME FROM AND GO TO"
    report.unlink()
    model.faults = [*LOADED, *[500] * 999]
    failed = run(*command)
    assert failed.exit_code == 2 and not report.exists()
    assert re.fullmatch(r"dragoman: the translator's server [^\n]*\n", failed.stderr)


@pytest.mark.parametrize("command", ["serve", "translate", "transcribe", "mic", "eval"])
def test_a_server_that_is_none(command: str, recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", fake_sounddevice)
    (tmp_path / "pairs.jsonl").write_text('{"text": "a", "es": "b"}\n')
    folder = plain_folder(tmp_path / "tiny")
    arguments = {
        "serve": ["--port", "0"],
        "translate": ["--to", "es", __file__],
        "transcribe": ["--to", "es", recording],
        "mic": ["--to", "es"],
        "eval": [tmp_path / "pairs.jsonl"],
    }[command]
    for options, sentence in (
        (["--translator-url", "http://127.0.0.1:9/v1", "--translator", folder], "cannot be reached"),
        (["--translator-url", "http://127.0.0.1:9/v1"], "name a folder"),
        (["--translator-url", "127.0.0.1", "--translator", folder], "no URL"),
    ):
        result = run(command, *arguments, *options)
        assert (result.exit_code, result.stdout) == (2, "") and sentence in result.stderr


def test_a_language_that_it_does_not_know(options: list[str], recording: Path) -> None:
    for command in (["transcribe", recording], ["translate", __file__]):
        result = run(*command, "--to", "xx", *options)
        assert result.exit_code == 2 and "cannot write the language 'xx'" in result.stderr
