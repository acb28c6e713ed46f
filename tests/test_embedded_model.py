"""The model in the repository: whole, described by its card, and able to hear."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from models.checkpoint import EMBEDDED_MODEL, load_recognizer
from models.recognizer import Recognizer
from streaming.audio import AudioFormat
from streaming.events import Event, TranscriptDelta
from streaming.session import Session, SessionConfig

pytestmark = pytest.mark.model
SAMPLE = Path(__file__).parents[1] / "samples" / "jfk.flac"


@pytest.fixture(scope="module")
def recognizer() -> Recognizer:
    return load_recognizer()


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    samples, rate = soundfile.read(SAMPLE, dtype="float32", always_2d=True)
    resampled: np.ndarray = soxr.resample(samples.mean(1), rate, 16000).astype(np.float32)
    return resampled


def heard(recognizer: Recognizer, speech: np.ndarray, piece: int, lookahead_ms: int) -> list[Event]:
    session = Session(recognizer, SessionConfig(AudioFormat("f32le"), lookahead_ms))
    events = [e for start in range(0, len(speech), piece) for e in session.push(speech[start : start + piece])]
    return events + session.finish()


def test_the_folder_is_whole_and_small() -> None:
    sizes = {file.name: file.stat().st_size for file in EMBEDDED_MODEL.iterdir()}
    assert set(sizes) == {"config.json", "model.safetensors", "tokenizer.model", "README.md", "curve.svg"}
    assert sum(sizes.values()) < 32e6
    config = json.loads((EMBEDDED_MODEL / "config.json").read_text())
    assert config["name"] == "en-small"


def test_the_card_has_measured_scores() -> None:
    card = (EMBEDDED_MODEL / "README.md").read_text()
    assert "<!--" not in card
    assert len(re.findall(r"\| (?:rnnt|ctc) \| \d+ ms \| [\d.]+ % \|", card)) >= 10


@pytest.mark.parametrize("lookahead_ms", [0, 80, 240, 480])
def test_any_chunking_gives_the_same_transcript(recognizer: Recognizer, speech: np.ndarray, lookahead_ms: int) -> None:
    whole = heard(recognizer, speech, len(speech), lookahead_ms)
    assert heard(recognizer, speech, 1111, lookahead_ms) == whole
    text = "".join(e.delta for e in whole if isinstance(e, TranscriptDelta))
    assert text.strip()


def test_silence_says_next_to_nothing(recognizer: Recognizer) -> None:
    words = [w for e in heard(recognizer, np.zeros(160_000, np.float32), 16_000, 480) for w in getattr(e, "words", ())]
    assert len(words) <= 1
