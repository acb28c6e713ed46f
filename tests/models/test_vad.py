"""Voice activity of a whole stretch is what the package says window by window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.vad import WINDOW_SAMPLES, are_silent, speech_probabilities

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
    stretches = np.stack([samples[start : start + length], samples[5_000 : 5_000 + length]])
    probabilities = speech_probabilities(stretches)
    assert probabilities.shape == (2, length // WINDOW_SAMPLES)
    for of_stretch, stretch in zip(probabilities, stretches, strict=True):
        torch.testing.assert_close(of_stretch, torch.tensor(of_the_package(stretch)), atol=1e-4, rtol=0)


def test_speech_is_heard_and_noise_is_not_in_stretches_of_any_length() -> None:
    samples, _ = soundfile.read(SAMPLE, dtype="float32")
    noise = np.random.default_rng(0).normal(0, 0.01, 16_000).astype(np.float32)
    silence = np.zeros(9_000, np.float32)
    speech = samples[8_000:24_000]
    short, none = samples[8_000:8_511], samples[:0]
    assert are_silent([silence, speech, short, noise, none, speech]) == [True, False, True, True, True, False]
    assert are_silent([]) == []


@given(st.lists(st.tuples(st.integers(0, 170_000), st.sampled_from([2_560, 6_000, 12_800])), min_size=2, max_size=9))
@settings(deadline=None, max_examples=20)
def test_an_answer_does_not_depend_on_the_other_stretches(cuts: list[tuple[int, int]]) -> None:
    samples, _ = soundfile.read(SAMPLE, dtype="float32")
    stretches = [samples[start : start + length] for start, length in cuts]
    assert are_silent(stretches) == [are_silent([stretch])[0] for stretch in stretches]
