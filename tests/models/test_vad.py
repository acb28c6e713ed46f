"""Voice activity of a whole stretch is what the package says window by window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from models.vad import WINDOW_SAMPLES, is_silent, speech_probabilities

SAMPLE = Path(__file__).parents[2] / "samples" / "jfk.flac"


def of_the_package(samples: np.ndarray) -> list[float]:
    from silero_vad import load_silero_vad

    threads = torch.get_num_threads()
    model = load_silero_vad()
    torch.set_num_threads(threads)
    windows = len(samples) // WINDOW_SAMPLES
    with torch.no_grad():
        audio = torch.from_numpy(samples[len(samples) - windows * WINDOW_SAMPLES :].copy())
        return [float(model(window, 16_000)) for window in audio.view(windows, WINDOW_SAMPLES)]


@pytest.mark.parametrize(("start", "length"), [(0, 32_000), (40_001, 13_333), (90_000, 700), (150_000, 20_000)])
def test_all_windows_at_once_are_the_packages_one_by_one(start: int, length: int) -> None:
    samples, _ = soundfile.read(SAMPLE, dtype="float32")
    stretch = samples[start : start + length]
    probabilities, expected = speech_probabilities(stretch), of_the_package(stretch)
    assert len(probabilities) == length // WINDOW_SAMPLES
    torch.testing.assert_close(probabilities, torch.tensor(expected), atol=1e-4, rtol=0)
    assert is_silent(stretch) == (max(expected[4:], default=0.0) < 0.5)


def test_speech_is_heard_and_noise_is_not() -> None:
    samples, _ = soundfile.read(SAMPLE, dtype="float32")
    noise = np.random.default_rng(0).normal(0, 0.01, 16_000).astype(np.float32)
    assert not is_silent(samples[8_000:24_000])
    assert is_silent(noise)
    assert is_silent(np.zeros(16_000, np.float32))
    assert is_silent(samples[:511]) and is_silent(samples[:0])
