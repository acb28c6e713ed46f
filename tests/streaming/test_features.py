"""The front end: bit-equal for any chunking, and equal to an independent whole-file computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import FeatureConfig
from streaming.features import FrontEnd, slaney_filters


def speech_like(samples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    envelope = np.repeat(rng.random(samples // 400 + 1), 400)[:samples]
    return (rng.standard_normal(samples) * envelope * 0.2).astype(np.float32)


def whole_file_by_stft(audio: np.ndarray, mel_bins: int) -> torch.Tensor:
    """The definition, written with torch.stft on the whole signal: [frames, mel_bins]."""
    x = torch.from_numpy(audio)
    y = torch.cat([x[:1], x[1:] - 0.97 * x[:-1]])
    window = torch.hann_window(400, periodic=False)
    spectrum = torch.stft(y, 512, 160, 400, window, center=True, pad_mode="constant", return_complex=True)
    power = spectrum.abs() ** 2
    return torch.log(slaney_filters(mel_bins, 16000) @ power + 2**-24).T[: len(audio) // 160]


@pytest.mark.parametrize("mel_bins", [80, 128])
@pytest.mark.parametrize("samples", [160, 1280, 1441, 16000, 48077])
def test_equals_stft_definition(mel_bins: int, samples: int) -> None:
    audio, front_end = speech_like(samples, 1), FrontEnd(FeatureConfig(mel_bins=mel_bins))
    mel, slots, _ = front_end.step(audio, front_end.init_state(), last=True)
    expected = whole_file_by_stft(audio, mel_bins)
    assert slots == 7 + len(expected)
    torch.testing.assert_close(mel.flatten(0, 1)[7:slots], expected, atol=1e-4, rtol=0)
    assert not mel.flatten(0, 1)[slots:].any()


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(0, 9000),
    cuts=st.lists(st.integers(0, 9000), max_size=12),
    seed=st.integers(0, 1000),
    mel_bins=st.sampled_from([80, 128]),
)
def test_any_chunking_is_bit_equal(samples: int, cuts: list[int], seed: int, mel_bins: int) -> None:
    audio, front_end = speech_like(samples, seed), FrontEnd(FeatureConfig(mel_bins=mel_bins))
    whole, whole_slots, _ = front_end.step(audio, front_end.init_state(), last=True)
    state, mels, slots = front_end.init_state(), [], 0
    for part in np.split(audio, sorted(min(cut, samples) for cut in cuts)):
        mel, real, state = front_end.step(part, state)
        assert real == 8 * len(mel)
        mels.append(mel)
        slots += real
    mel, real, _ = front_end.step(audio[:0], state, last=True)
    assert torch.equal(torch.cat([*mels, mel]), whole)
    assert slots + real == whole_slots


def test_a_group_comes_out_with_its_last_sample() -> None:
    front_end = FrontEnd(FeatureConfig())
    audio = speech_like(1280 * 3 + 200, 3)
    mel, _, state = front_end.step(audio[:-1], front_end.init_state())
    assert len(mel) == 3
    mel, _, _ = front_end.step(audio[-1:], state)
    assert len(mel) == 1


def test_carried_samples_do_not_grow() -> None:
    front_end = FrontEnd(FeatureConfig())
    state = front_end.init_state()
    for second in range(30):
        _, _, state = front_end.step(speech_like(16000, second), state)
    assert len(state.pending) < 1520 + 1280
