"""Scoring: the figures are those of plain sessions, and what is wrong with a manifest is told in a sentence."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import jiwer
import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner, Result

import client.evaluate
import models.checkpoint
from client.cli import app
from client.evaluate import Delay, Score, WordErrors, backlogs_ms, read_sets, score, session_configs
from client.normalize import normalize_transcript
from streaming.audio import AudioFormat
from streaming.errors import DragomanError
from streaming.events import TranscriptDelta
from streaming.session import Session, SessionConfig
from tests import tiny

RECOGNIZER = tiny.recognizer(2)
CTC = SessionConfig(max_lookahead_ms=480, decoder="ctc")
REFERENCES = ("Ce ev, $5!", "ce c ev is here", "ordsords", "Isev: evcee, ce", "nothing of the kind")
# Of each recording: rate, channels, seconds.
SHAPES = ((16_000, 1, 2.5), (44_100, 2, 3.1), (8_000, 1, 1.7), (16_000, 1, 4.0), (48_000, 1, 0.6))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five recordings of noise that swells and fades, in several formats."""
    folder = tmp_path_factory.mktemp("speech")
    (folder / "audio").mkdir()
    records = []
    for i, (text, (rate_hz, channels, seconds)) in enumerate(zip(REFERENCES, SHAPES, strict=True)):
        rng = np.random.default_rng(i)
        swell = np.repeat(rng.random(100), rate_hz // 16)[: int(seconds * rate_hz), None]
        name = f"audio/{i}.{'flac' if i % 2 else 'wav'}"
        soundfile.write(folder / name, rng.normal(0, 0.1, (len(swell), channels)) * swell, rate_hz)
        records.append({"audio": name, "text": text, "duration_s": seconds})
    return write(folder / "dev.jsonl", records)


def write(path: Path, records: Sequence[object]) -> Path:
    lines = (record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def told(audio: Path, config: SessionConfig, step_ms: int = 50) -> tuple[list[list[TranscriptDelta]], int]:
    """The events of a plain session after each push, those of its end last, and the recording's samples."""
    samples, rate_hz = soundfile.read(audio, dtype="float32", always_2d=True)
    session = Session(RECOGNIZER, replace(config, audio=AudioFormat("f32le", rate_hz, samples.shape[1])))
    bounds = range(0, len(samples), step_ms * rate_hz // 1000)
    pushes = [session.push(samples[start : start + bounds.step]) for start in bounds]
    return [[e for e in events if isinstance(e, TranscriptDelta)] for events in [*pushes, session.finish()]], len(
        samples
    )


def delay_of(delays_ms: list[float], words_at_end: int) -> Delay:
    assert delays_ms, "the test needs words"
    p50_ms, p95_ms = np.quantile(delays_ms, [0.5, 0.95])
    mean_ms = sum(delays_ms) / len(delays_ms)
    return Delay(len(delays_ms), words_at_end, p50_ms, p95_ms, pytest.approx(mean_ms))


def timeless(scored: Score) -> Score:
    return replace(scored, times_real_time=0, replay=None)


@pytest.mark.parametrize("config", session_configs(RECOGNIZER, ["rnnt", "ctc"], [0, 480]))
def test_errors_and_delays_are_those_of_plain_sessions(manifest: Path, config: SessionConfig) -> None:
    hypotheses, delays_ms, words_at_end = [], [], 0
    for utterance in read_sets([manifest])[0].utterances:
        events, _ = told(utterance.audio, config)
        hypotheses.append("".join(event.delta for row in events for event in row))
        delays_ms += [event.emitted_ms - w.end_ms for row in events[:-1] for event in row for w in event.words]
        words_at_end += sum(len(event.words) for event in events[-1])
    references = ["ce ev five dollars", "ce c ev is here", "ordsords", "isev evcee ce", "nothing of the kind"]
    hypotheses = [normalize_transcript(text) or "" for text in hypotheses]
    expected = jiwer.process_words(references, hypotheses)
    scored = score(RECOGNIZER, read_sets([manifest])[0], config)
    assert scored.errors == WordErrors(
        17, expected.substitutions, expected.deletions, expected.insertions, jiwer.wer(references, hypotheses)
    )
    assert scored.delay == delay_of(delays_ms, words_at_end)
    assert words_at_end
    assert (scored.manifest, scored.decoder, scored.lookahead_ms) == ("dev", config.decoder, config.max_lookahead_ms)
    assert (scored.utterances, scored.left_out, scored.problems) == (5, 0, ())
    assert scored.audio_s == pytest.approx(sum(seconds for *_, seconds in SHAPES))
    assert scored.times_real_time > 0
    assert scored.replay is None


def test_the_batch_size_changes_nothing(manifest: Path) -> None:
    (speech,) = read_sets([manifest])
    one, two, all_at_once = (score(RECOGNIZER, speech, CTC, batch_size=size) for size in (1, 2, 16))
    assert timeless(one) == timeless(two) == timeless(all_at_once)
    assert one.delay.words_timed > 5


def test_each_setting_is_scored_once() -> None:
    def settings(*arguments: object) -> list[tuple[str, int | None]]:
        return [(c.decoder, c.max_lookahead_ms) for c in session_configs(RECOGNIZER, *arguments)]  # type: ignore[arg-type]

    assert settings() == [("rnnt", 480)]
    assert settings(["ctc", "rnnt", "ctc"], [100, 80, 0, None, 9999]) == [
        (decoder, ms) for decoder in ("ctc", "rnnt") for ms in (80, 0, 480)
    ]
    with pytest.raises(DragomanError, match="no 'best' head"):
        settings(["best"])


# ----------------------------------------------------------------------------------------------------- live streams


@pytest.mark.parametrize(
    ("costs_ms", "backlogs"),
    [
        ([], []),
        ([10, 20, 30], [10, 20, 30]),  # each done before the next begins
        ([80, 80, 80], [80, 80, 80]),  # only just
        ([200, 10, 10, 10, 10], [200, 130, 60, 10, 10]),  # 200, then 120 left and 10 new, 50 and 10, nothing and 10
        ([100, 100, 100], [100, 120, 140]),  # too slow: 20 ms more each time
        ([0, 240, 0, 0, 0, 0], [0, 240, 160, 80, 0, 0]),
    ],
)
def test_the_backlog_of_a_busy_engine(costs_ms: list[float], backlogs: list[float]) -> None:
    assert backlogs_ms(costs_ms) == backlogs


def test_the_backlog_of_other_steps() -> None:
    assert backlogs_ms([50, 50, 0], step_ms=20) == [50, 80, 60]


@pytest.mark.parametrize("push_ms", [40.0, 100.0])
def test_a_live_stream_adds_the_backlog_to_its_words(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, push_ms: float
) -> None:
    ticks = count()
    clock = SimpleNamespace(perf_counter=lambda: next(ticks) * push_ms / 1e3, process_time=time.process_time)
    monkeypatch.setattr(client.evaluate, "time", clock)
    (speech,) = read_sets([manifest])
    replay = score(RECOGNIZER, speech, CTC, replay=2).replay
    assert replay is not None
    delays_ms, totals_ms, words_at_end, audio_s = [], [], 0, 0.0
    for utterance in (speech.utterances[0], speech.utterances[2]):
        events, samples = told(utterance.audio, CTC, step_ms=80)
        for push, row in enumerate(events[:-1]):
            backlog_ms = push_ms + push * max(0.0, push_ms - 80)
            for delay_ms in [event.emitted_ms - w.end_ms for event in row for w in event.words]:
                delays_ms.append(delay_ms)
                totals_ms.append(delay_ms + backlog_ms)
        words_at_end += sum(len(event.words) for event in events[-1])
        audio_s += samples / soundfile.info(utterance.audio).samplerate
    assert (replay.utterances, replay.audio_s) == (2, pytest.approx(audio_s))
    assert replay.algorithmic == delay_of(delays_ms, words_at_end)
    assert replay.total.words_timed == len(totals_ms)
    assert (replay.total.p50_ms, replay.total.mean_ms) == pytest.approx((np.median(totals_ms), np.mean(totals_ms)))
    assert replay.real_time_factor > 0


def test_more_replays_than_recordings_are_all_of_them(manifest: Path) -> None:
    scored = score(RECOGNIZER, read_sets([manifest], limit=2)[0], CTC, replay=20)
    assert scored.replay is not None
    assert scored.replay.utterances == 2
    assert scored.replay.algorithmic == scored.delay


# -------------------------------------------------------------------------------------------------------- manifests


def test_the_reader_carries_what_a_manifest_holds(tmp_path: Path) -> None:
    separator = "\u2028"  # str.splitlines would end the line here
    rich = {"audio": "a/b.wav", "text": f"one{separator}two", "duration_s": 2, "speaker": 7, "licence": "CC0"}
    rich |= {"es": ["uno", "dos"], "de": "eins"}
    path = write(tmp_path / "dev.jsonl", [rich, "", {"audio": "/c.wav", "text": ""}])
    first, second = read_sets([path])[0].utterances
    assert (first.audio, first.text) == (tmp_path / "a/b.wav", f"one{separator}two")
    assert (first.duration_s, first.speaker) == (2.0, "7")
    assert first.translations == {"es": ("uno", "dos"), "de": ("eins",)}
    assert (second.audio, second.duration_s, second.speaker, second.translations) == (Path("/c.wav"), None, None, {})
    assert len(read_sets([path], limit=1)[0].utterances) == 1


def test_sets_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder / "dev.jsonl", [{"audio": "x.wav", "text": "x"}]))
    other = write(tmp_path / "test.jsonl", [{"audio": "x.wav", "text": "x"}])
    assert [s.name for s in read_sets([*paths, other])] == [str(paths[0]), str(paths[1]), "test"]


GOOD = '{"audio": "x.wav", "text": "x"}'


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no such file"),
        ("", "has no lines"),
        ("\n \n", "has no lines"),
        (f"{GOOD}\n{{audio: 1}}\n", "line 2 is not JSON: Expecting property name"),
        (f'{GOOD}\n\n{GOOD}\n{{"audio": "x', "line 4 is not JSON"),
        (f'{GOOD}\n["x.wav", "x"]\n', "line 2 is not a JSON object"),
        (f'{GOOD}\n{GOOD}\n{{"audio": "x.wav"}}\n', "line 3 has no text"),
        ('{"text": "x"}\n', "line 1 has no audio"),
        ('{"audio": "x.wav", "text": 3}\n', "line 1 has a text that is not a string"),
        (b'{"audio": "x.wav", "text": "\xff"}\n', "it is not UTF-8 text"),
    ],
)
def test_a_bad_manifest_is_told_in_one_sentence(tmp_path: Path, content: str | bytes | None, sentence: str) -> None:
    path = tmp_path / "dev.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = evaluate(path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(rf"dragoman: {re.escape(str(path))}[^\n]*{re.escape(sentence)}[^\n]*\n", result.stderr)


def test_a_folder_is_no_manifest(tmp_path: Path) -> None:
    assert "Is a directory" in evaluate(tmp_path).stderr


# ---------------------------------------------------------------------------------------------------------- command


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.checkpoint, "load_recognizer", lambda path, **_: RECOGNIZER)


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture
def damaged(manifest: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A manifest with recordings that cannot be read between those that can, and what is wrong with each."""
    soundfile.write(tmp_path / "nan.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    (tmp_path / "notes.wav").write_text("hello\n")
    bad = {"missing.wav": "there is no such file", "nan.wav": "sample index 0", "notes.wav": "not audio"}
    good = [{"audio": str(manifest.parent / f"audio/{i}.wav"), "text": REFERENCES[i]} for i in (0, 2)]
    records = [{"audio": name, "text": "never heard"} for name in bad]
    return write(tmp_path / "damaged.jsonl", [records[0], good[0], *records[1:], good[1]]), bad


def test_recordings_that_cannot_be_read_are_named_once_and_the_others_scored(
    manifest: Path, damaged: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    path, bad = damaged
    report = tmp_path / "report.json"
    result = evaluate(
        path, manifest, "--max-lookahead-ms", 0, "--max-lookahead-ms", 480, "--replay", 3, "--json", report
    )
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == len(bad)
    for name, reason in bad.items():
        (line,) = (line for line in lines if line.startswith(f"dragoman: {path.parent / name}: "))
        assert reason in line
    scores = json.loads(report.read_text())["scores"]
    assert [(s["manifest"], s["utterances"], s["left_out"]) for s in scores] == [
        *[("damaged", 2, 3)] * 2,
        *[("dev", 5, 0)] * 2,
    ]
    assert [s["replay"]["utterances"] for s in scores] == [2, 2, 3, 3]
    alone = write(tmp_path / "alone.jsonl", [line for line in path.read_text().splitlines() if "never" not in line])
    (speech,) = read_sets([alone])
    assert scores[1]["errors"]["wer"] == score(RECOGNIZER, speech, SessionConfig()).errors.wer


def test_a_set_of_which_nothing_can_be_read_has_no_rate(tmp_path: Path) -> None:
    path = write(tmp_path / "gone.jsonl", [{"audio": "x.wav", "text": "x"}])
    result = evaluate(path)
    assert result.exit_code == 2
    assert "–" in result.stdout


def test_an_utterance_without_a_usable_reference_is_left_out(manifest: Path, tmp_path: Path) -> None:
    audio = str(manifest.parent / "audio/0.wav")
    path = write(tmp_path / "dev.jsonl", [{"audio": audio, "text": text} for text in ("ce", "and/or", "…")])
    scored = score(RECOGNIZER, read_sets([path])[0], CTC)
    assert (scored.utterances, scored.left_out, scored.errors.words) == (1, 2, 1)


def test_the_table(manifest: Path) -> None:
    result = evaluate(manifest, "--decoder", "ctc", "--decoder", "rnnt", "--replay", 1, "--limit", 2)
    assert (result.exit_code, result.stderr) == (0, "")
    (speech,) = read_sets([manifest], limit=2)
    for config in session_configs(RECOGNIZER, ["ctc", "rnnt"]):
        expected = score(RECOGNIZER, speech, config)
        (row,) = (line for line in result.stdout.splitlines() if f" {config.decoder} " in line)
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        errors = expected.errors
        assert cells[:8] == [
            *("dev", config.decoder, "480 ms", "2", "0", "9", f"{100 * (errors.wer or 0):.1f}"),
            f"{errors.substitutions}/{errors.deletions}/{errors.insertions}",
        ]
        if expected.delay.words_timed:
            assert cells[8].split("/")[0] == f"{expected.delay.p50_ms:.0f}"
    assert "client.normalize.normalize_transcript" in result.stdout
    assert "Load average" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--decoder", "best"], "has no 'best' head"),
        (["--json", "no/such/folder.json"], "cannot be written"),
        (["--curve", "curve.gif"], ".png or .svg"),
        (["--curve", "no/such/curve.png"], "cannot be written"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_measured(
    manifest: Path, arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.evaluate, "score", None)
    result = evaluate(manifest, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(rf"dragoman: [^\n]*{re.escape(sentence)}[^\n]*\n", result.stderr)
