"""What the recogniser made of spoken sentences, with the texts that were spoken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from client.normalize import normalize_transcript
from tests import tiny
from training.translation import recognised
from training.translation.data import read_recognised

TEXTS = ("The speaker is talking.", "Still talking!", "Nothing once shown is ever taken back.")


def spoken(folder: Path, seconds: tuple[float, ...]) -> Path:
    rng = np.random.default_rng(0)
    lines = []
    for k, (text, length_s) in enumerate(zip(TEXTS, seconds, strict=True)):
        soundfile.write(folder / f"{k}.flac", rng.normal(0, 0.1, int(16000 * length_s)), 16000)
        lines.append({"audio": f"{k}.flac", "text": text, "duration_s": length_s})
    manifest = folder / "spoken.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return manifest


def test_each_sentence_has_what_its_own_session_heard(tmp_path: Path) -> None:
    recognizer = tiny.recognizer()
    manifest = spoken(tmp_path, (1.0, 2.5, 1.7))
    speech = recognised.read_sets([manifest])[0].utterances
    together = dict(recognised.hear(recognizer, speech))
    alone = {text: heard for one in speech for text, heard in recognised.hear(recognizer, [one])}
    assert together == alone and set(together) <= set(TEXTS) and together
    assert all(heard == heard.strip() != "" for heard in together.values())


def test_the_file_is_what_packing_reads_and_long_recordings_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recognised, "load_recognizer", lambda folder: tiny.recognizer())
    out = tmp_path / "recognised.jsonl"
    recognised.run([spoken(tmp_path, (1.0, 6.0, 2.0))], tmp_path, out, max_s=5.0, threads=1)
    found = read_recognised(out)
    assert set(found) == {normalize_transcript(TEXTS[0]), normalize_transcript(TEXTS[2])}
