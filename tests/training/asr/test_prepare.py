"""Packing: samples arrive as they were, the index points at them, and what is unfit is counted, not kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from training.asr.prepare import app, pack, read_audio, rejection

RATE_HZ = 16_000


def write_set(folder: Path, name: str, records: list[dict[str, Any]]) -> Path:
    """Writes a manifest whose recordings are noise as long as stated, or `actual_s` long."""
    rng = np.random.default_rng(len(name))
    manifest = folder / f"{name}.jsonl"
    with manifest.open("w") as lines:
        for number, record in enumerate(records):
            n = int(record.pop("actual_s", record["duration_s"]) * RATE_HZ)
            pcm = rng.integers(-20_000, 20_000, n).astype(np.int16)
            soundfile.write(folder / f"{name}{number}.flac", pcm, RATE_HZ)
            lines.write(json.dumps({"audio": f"{name}{number}.flac", **record}) + "\n")
    return manifest


def read_index(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


@pytest.fixture
def manifests(tmp_path: Path) -> list[Path]:
    first = [
        {"text": "One, two.", "speaker": "ann", "duration_s": 1.0},
        {"text": "and/or", "speaker": "ann", "duration_s": 1.0},
        {"text": "At 7:30 a.m.", "duration_s": 2.0},
    ]
    second = [{"text": "A long way to go.", "speaker": "bob", "duration_s": 1.5}]
    return [write_set(tmp_path, "first", first), write_set(tmp_path, "second", second)]


def test_the_index_points_at_the_samples_of_each_utterance(manifests: list[Path], tmp_path: Path) -> None:
    pack(manifests, tmp_path / "packed")
    audio = np.memmap(tmp_path / "packed" / "audio.i16", dtype="<i2", mode="r")
    index = read_index(tmp_path / "packed")
    assert [line["text"] for line in index] == ["one two", "at seven thirty a m", "a long way to go"]
    for line, name in zip(index, ["first0", "first2", "second0"], strict=True):
        packed = audio[line["offset_samples"] : line["offset_samples"] + line["n_samples"]]
        np.testing.assert_array_equal(packed, read_audio(tmp_path / f"{name}.flac"))
    assert audio.size == sum(line["n_samples"] for line in index)


def test_sources_speakers_and_weights_are_kept(manifests: list[Path], tmp_path: Path) -> None:
    summaries = pack(manifests, tmp_path / "packed", {"second": 2.5})
    index = read_index(tmp_path / "packed")
    assert [line["source"] for line in index] == ["first", "first", "second"]
    assert [line["weight"] for line in index] == [1.0, 1.0, 2.5]
    assert [line["speaker"] for line in index] == ["ann", "first-first2", "bob"]
    assert summaries["first"].dropped == {"unspeakable text": 1}
    assert (summaries["second"].utterances, summaries["second"].seconds) == (1, 1.5)


@pytest.mark.parametrize(
    ("text", "duration_s", "reason"),
    [
        ("a few words here", 1.0, None),
        (None, 1.0, "unspeakable text"),
        ("a few words here", 16.1, "too long"),
        ("a", 0.2, "too short"),
        ("far too many words for a second", 1.0, "implausible pace"),
        ("too few", 9.0, "implausible pace"),
    ],
)
def test_unfit_utterances_have_a_reason(text: str | None, duration_s: float, reason: str | None) -> None:
    assert rejection(text, duration_s) == reason


def test_the_decoded_length_decides(tmp_path: Path) -> None:
    record = {"text": "A few words here.", "duration_s": 1.0, "actual_s": 0.1}
    summaries = pack([write_set(tmp_path, "lies", [record])], tmp_path / "packed")
    assert summaries["lies"].dropped == {"too short": 1}
    assert read_index(tmp_path / "packed") == []


def test_stereo_at_another_rate_becomes_mono_at_16_khz(tmp_path: Path) -> None:
    tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100)).astype(np.float32)
    soundfile.write(tmp_path / "stereo.wav", np.stack([tone, tone], axis=1), 44_100)
    samples = read_audio(tmp_path / "stereo.wav")
    assert samples.dtype == np.int16 and samples.shape == (RATE_HZ,)
    assert np.abs(np.fft.rfft(samples)).argmax() == 440


def test_a_manifest_that_is_still_being_written_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    manifest = write_set(tmp_path, "live", [{"text": "Some words.", "duration_s": 1.0}])
    with manifest.open("a") as lines:
        lines.write('{"audio": "live1.fl')
    assert pack([manifest], tmp_path / "packed")["live"].utterances == 1


def test_the_command_prints_a_row_for_each_source(manifests: list[Path], tmp_path: Path) -> None:
    options = [option for manifest in manifests for option in ("--manifest", str(manifest))]
    result = CliRunner().invoke(app, [*options, "--out", str(tmp_path / "packed"), "--weight", "second=0.5"])
    assert result.exit_code == 0, result.output
    assert "first" in result.output and "second" in result.output and "0.5" in result.output


@pytest.mark.parametrize("weight", ["second", "second=much"])
def test_a_weight_without_a_number_is_a_usage_error(manifests: list[Path], tmp_path: Path, weight: str) -> None:
    options = ["--manifest", str(manifests[0]), "--out", str(tmp_path / "packed"), "--weight", weight]
    assert CliRunner().invoke(app, options).exit_code == 2


def test_a_weight_for_no_manifest_is_an_error(manifests: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weight for thrid"):
        pack(manifests, tmp_path / "packed", {"thrid": 2.0})


def test_no_sentence_of_a_test_set_is_packed(manifests: list[Path], tmp_path: Path) -> None:
    pack(manifests, tmp_path / "all")
    taken = read_index(tmp_path / "all")[0]["text"]
    test_set = tmp_path / "test.jsonl"
    test_set.write_text(json.dumps({"text": f" {taken.upper()}! "}) + "\n")
    summaries = pack(manifests, tmp_path / "packed", exclude=[test_set])
    assert taken not in {row["text"] for row in read_index(tmp_path / "packed")}
    assert sum(summary.dropped["in a test set"] for summary in summaries.values()) >= 1
