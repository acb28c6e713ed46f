"""Synthesis: which sentences are spoken, by whom, and that a run can be stopped and taken up again."""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from training.asr.synthesize import (
    app,
    compose,
    fingerprint,
    make_engine,
    read_sentences,
    synthesize,
    synthesize_held_out,
    usable_sentences,
)
from training.asr.voices import Engine, Espeak, Festival, Flite, RHVoice, Samples, SpeechError, Voice

KED = Path("/usr/share/festival/voices/english/ked_diphone")
SENTENCES = [f"This is sentence number {word}." for word in "one two three four five six seven".split()]


class Tones:
    """An engine that hums: a tenth of a second for each character, silent on demand."""

    name = "tones"
    licence = "none"
    held_out: Sequence[str] = ("low",)

    def draw(self, rng: np.random.Generator, name: str | None = None) -> Voice:
        name = name or str(rng.choice(["high", "middle"]))
        return Voice(speaker=f"tones-{name}", name=name, pitch=float(rng.uniform(0.5, 2)))

    def speak(self, text: str, voice: Voice) -> Samples:
        if "four" in text:
            raise SpeechError("four cannot be hummed")
        time_s = np.arange(1600 * len(text)) / 16_000
        return (0.1 * np.sin(2 * np.pi * 200 * voice.pitch * time_s)).astype(np.float32)


def manifest_of(out: Path, name: str = "tones") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def test_sentences_are_read_from_pairs_json_lines_verses_and_text(tmp_path: Path) -> None:
    with lzma.open(tmp_path / "pairs.tsv.xz", "wt") as lines:
        lines.write("Go.\tVe.\nHi.\tHola.\n")
    (tmp_path / "dev.jsonl").write_text('{"en": "Go."}\n{"text": "Hi."}\n')
    (tmp_path / "plain.txt").write_text("Go.\nHi.\n")
    (tmp_path / "verses.imp").write_text("$$$Verse 1:1\nGo. Hi.\n")
    for name in ("pairs.tsv.xz", "dev.jsonl", "plain.txt", "verses.imp"):
        assert [line.strip() for line in read_sentences(tmp_path / name)] == ["Go.", "Hi."]


def test_excluded_repeated_and_unspeakable_sentences_are_not_spoken(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("Don't  stop!\nI have 3 cats.\nyes and/or no\nI have 3 cats!\n" + "ab " * 90)
    (tmp_path / "dev.txt").write_text("don’t stop\n")
    assert usable_sentences([tmp_path / "all.txt"], [tmp_path / "dev.txt"]) == ["I have three cats!"]


@given(st.text(alphabet="aB '’.!-1", max_size=20))
def test_the_fingerprint_ignores_case_spaces_and_punctuation(text: str) -> None:
    assert fingerprint(text) == fingerprint(f" {text.upper()}?! ")


def test_composed_texts_take_every_sentence_and_join_some() -> None:
    texts = list(islice(compose(SENTENCES, [0]), 200))
    assert all(any(sentence in text for text in texts[:14]) for sentence in SENTENCES)
    joined = [text for text in texts if text.count(".") > 1]
    assert 0.1 < len(joined) / len(texts) < 0.5
    assert max(map(len, texts)) <= 230
    assert list(islice(compose(SENTENCES, [0]), 200)) == texts


def test_the_manifest_tells_what_each_file_holds(tmp_path: Path) -> None:
    hours = synthesize(SENTENCES, Tones(), tmp_path, hours=0.01)
    records = manifest_of(tmp_path)
    assert hours == pytest.approx(sum(record["duration_s"] for record in records) / 3600)
    assert hours >= 0.01
    for record in records:
        assert (tmp_path / record["audio"]).exists()
        assert record["duration_s"] == pytest.approx(len(record["text"]) / 10)
        assert record["speaker"] in ("tones-high", "tones-middle")
    # What the engine cannot speak is left out, and the run goes on.
    assert not any("four" in record["text"] for record in records)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, workers: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    synthesize(SENTENCES, Tones(), whole, hours=0.02)
    synthesize(SENTENCES, Tones(), parts, hours=0.005, workers=workers)
    with (parts / "tones.jsonl").open("a") as lines:
        lines.write('{"audio": "tones/0000')
    synthesize(SENTENCES, Tones(), parts, hours=0.02, workers=workers)
    assert manifest_of(parts) == manifest_of(whole)


def test_held_out_voices_speak_only_when_asked(tmp_path: Path) -> None:
    assert synthesize_held_out([s for s in SENTENCES if "four" not in s], [Tones()], tmp_path) == 40
    assert {record["speaker"] for record in manifest_of(tmp_path, "heldout_voices")} == {"tones-low"}


def skip_without_program(engine: Engine) -> None:
    program = {"flite": "flite", "espeak": "espeak-ng", "festival": "festival", "rhvoice": "RHVoice-test"}[engine.name]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    if engine.name == "festival" and not KED.is_dir():
        pytest.skip("Festival's voice ked (Debian festvox-kdlpc16k) is not installed")


@pytest.mark.parametrize("engine", [Flite(), Espeak(), RHVoice()], ids=lambda engine: engine.name)
def test_no_drawn_voice_is_a_held_out_one(engine: Engine) -> None:
    timbres = {name.split("+")[-1] for name in engine.held_out}
    drawn = {engine.draw(np.random.default_rng(seed)).name.split("+")[-1] for seed in range(500)}
    assert not timbres & drawn
    assert len(drawn) >= 3


@pytest.mark.parametrize("engine", [Flite(), Espeak(), Festival(), RHVoice()], ids=lambda engine: engine.name)
def test_a_real_engine_speaks_at_16_khz(engine: Engine) -> None:
    skip_without_program(engine)
    samples = engine.speak("Good morning, everyone.", engine.draw(np.random.default_rng(0)))
    assert samples.dtype == np.float32 and np.abs(samples).max() <= 1
    assert 0.8 < samples.size / 16_000 < 4


@pytest.mark.parametrize("engine", [Flite(), Festival(), RHVoice()], ids=lambda engine: engine.name)
def test_size_keeps_the_pace_and_pace_does_not(engine: Engine) -> None:
    skip_without_program(engine)
    name = engine.draw(np.random.default_rng(0)).name
    usual, small, quick = (
        engine.speak("The children went to the market and bought some apples.", voice).size
        for voice in (Voice("", name), Voice("", name, size=1.1), Voice("", name, pace=1.2))
    )
    assert small == pytest.approx(usual, rel=0.07)
    assert quick < 0.9 * usual


def test_festival_speaks_what_its_language_would_take_for_code() -> None:
    engine = Festival()
    skip_without_program(engine)
    plain, quoted = (engine.speak(text, Voice("", "ked")) for text in ("A cafe. Yes.", 'A "café".\\ Yes.'))
    assert quoted.size == pytest.approx(plain.size, rel=0.05)


def test_festival_starts_anew_when_it_has_ended() -> None:
    engine = Festival()
    skip_without_program(engine)
    first = engine.speak("Good morning.", Voice("", "ked"))
    with pytest.raises(SpeechError, match="festival could not speak"):
        engine.speak("Good morning.", Voice("", "nobody"))
    with pytest.raises(SpeechError, match="festival ended"):
        engine._evaluate("(quit)")
    np.testing.assert_array_equal(engine.speak("Good morning.", Voice("", "ked")), first)


def test_no_sentences_and_no_such_engine_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 usable sentences"):
        synthesize([], Tones(), tmp_path, hours=1)
    with pytest.raises(ValueError, match="choose flite, espeak, festival, rhvoice or kokoro"):
        make_engine("parrot")
    with pytest.raises(ValueError, match="--styles"):
        make_engine("kokoro")
    assert CliRunner().invoke(app, ["--out", str(tmp_path), "--engine", "parrot"]).exit_code == 2
