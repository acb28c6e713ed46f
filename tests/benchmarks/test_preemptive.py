"""The benchmark of translating ahead: that it compares what it says, and tells it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import typer
from typer.testing import CliRunner

from benchmarks import preemptive
from benchmarks.preemptive import Told, compare_ahead, compare_retranslation, hear, next_word_rate, read_words, report
from tests import tiny

SENTENCES = [line.split() for line in ["the speaker is still talking", "nothing is taken back", "words go on"]] * 2


def test_every_beginning_is_translated_alike_with_drafts_and_without() -> None:
    found = compare_retranslation(tiny.translator(0), SENTENCES, target="es", latency="offline", seeds={})
    assert found["identical"] is True and found["translations"] == sum(map(len, SENTENCES))
    ways = found["ways"]
    assert ways["without drafts"]["forward_ratio"] == 1.0
    assert all(way["forward_ratio"] > 1 for name, way in ways.items() if name != "without drafts")
    assert 0 <= ways["old output"]["acceptance"]["old output"] <= 1


def test_a_text_that_is_translated_ahead_is_told_alike_and_sooner() -> None:
    runs = [read_words(tiny.translator(0), SENTENCES, "es", "offline", ahead=ahead) for ahead in (False, True)]
    found = compare_ahead(*runs)
    assert found["identical"] is True and found["words"] == sum(map(len, SENTENCES))
    assert found["plain"]["at_once"] == 0 and found["ahead"]["at_once"] == 1
    assert found["ahead"]["forwards"] == found["plain"]["forwards"] + found["in_vain"]


def test_speech_is_told_alike() -> None:
    audio = 0.1 * np.random.default_rng(0).standard_normal(48_000).astype(np.float32)
    runs = [hear(tiny.recognizer(4), tiny.translator(0), audio, "es", ahead=ahead) for ahead in (False, True)]
    found = compare_ahead(*runs)
    assert found["identical"] is True and found["words"] == runs[0].words > 0
    assert 0 <= found["guessed"] <= 1


def test_no_delays_have_figures() -> None:
    assert compare_ahead(Told(), Told())["ahead"]["delay_p50_ms"] == 0


def test_next_words_are_counted() -> None:
    assert 0 <= next_word_rate(tiny.translator(0), SENTENCES, "es") <= 1
    assert next_word_rate(tiny.translator(0), [["the"], []], "es") == 0


def test_the_command_prints_figures(tmp_path: Path) -> None:
    folder = tiny.save_tiny_translator(tmp_path / "tiny")
    manifest = tmp_path / "text.jsonl"
    manifest.write_text("".join(json.dumps({"text": " ".join(words), "es": ["x"]}) + "\n" for words in SENTENCES))
    app = typer.Typer()
    app.command()(preemptive.main)
    arguments = ["--text", str(manifest), "--translator", str(folder), "--latency", "offline", "--sentences", "2"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["text"]["words"] == 9 and "old output" in report(found)
