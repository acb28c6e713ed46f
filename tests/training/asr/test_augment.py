"""Augmentation: what each change does to power, spectrum and length, and that a seed fixes all of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from training.asr.augment import (
    AugmentConfig,
    Augmenter,
    Samples,
    add_noise,
    amplify,
    band_limit,
    chords,
    clip_peaks,
    coloured_noise,
    reverberate,
    simulate_room,
    speed_perturb,
)

RATE_HZ = 16_000
NEVER = AugmentConfig(
    speed_probability=0,
    reverb_probability=0,
    noise_probability=0,
    telephone_probability=0,
    low_pass_probability=0,
    clip_probability=0,
    gain_db=(0.0, 0.0),
    before_probability=0,
)
ALWAYS = AugmentConfig(
    speed_probability=1,
    reverb_probability=1,
    noise_probability=1,
    telephone_probability=0.5,
    low_pass_probability=1,
    clip_probability=1,
    before_probability=0,
)


@pytest.fixture(scope="module")
def speech() -> Samples:
    """A second and a half of noise that swells as syllables do."""
    time_s = np.arange(3 * RATE_HZ // 2) / RATE_HZ
    noise = coloured_noise(np.random.default_rng(0), time_s.size, 1.0)
    swell: Samples = (0.1 * np.sin(2 * np.pi * 2 * time_s) ** 2).astype(np.float32)
    return noise * swell


@pytest.fixture(scope="module")
def augmenter() -> Augmenter:
    return Augmenter(config=ALWAYS)


def tone(hz: float, n: int = RATE_HZ) -> Samples:
    time_s = np.arange(n, dtype=np.float32) / np.float32(RATE_HZ)
    wave: Samples = np.sin(np.float32(2 * np.pi * hz) * time_s) * np.float32(0.5)
    return wave


def power_db(samples: Samples) -> float:
    return float(10 * np.log10(np.mean(samples.astype(np.float64) ** 2)))


def loudest_hz(samples: Samples) -> float:
    return float(np.abs(np.fft.rfft(samples)).argmax() * RATE_HZ / samples.size)


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.07, 1.1])
def test_speed_changes_length_and_pitch_alike(factor: float) -> None:
    fast = speed_perturb(tone(440), factor)
    assert fast.size == pytest.approx(RATE_HZ / factor, abs=2)
    assert loudest_hz(fast) == pytest.approx(440 * factor, abs=2)


@given(snr_db=st.floats(-5, 40), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_signal_to_noise_ratio_is_the_one_asked_for(snr_db: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    clean, noise = tone(300), coloured_noise(rng, RATE_HZ, 1.0) * np.float32(rng.uniform(0.001, 1))
    added = add_noise(clean, noise, snr_db) - clean
    assert power_db(clean) - power_db(added) == pytest.approx(snr_db, abs=0.05)


def test_silence_gets_no_noise_and_a_silent_noise_adds_nothing(speech: Samples) -> None:
    silence = np.zeros_like(speech)
    np.testing.assert_array_equal(add_noise(silence, speech, 10), silence)
    np.testing.assert_array_equal(add_noise(speech, silence, 10), speech)


def test_noise_of_another_length_is_an_error(speech: Samples) -> None:
    with pytest.raises(ValueError, match="cut or repeat"):
        add_noise(speech, speech[1:], 10)


def test_a_room_with_only_its_direct_sound_changes_nothing(speech: Samples) -> None:
    np.testing.assert_allclose(reverberate(speech, np.ones(1, np.float32)), speech, atol=1e-6)


def test_reverberation_is_convolution_at_the_same_power(speech: Samples) -> None:
    room = simulate_room(np.random.default_rng(1), decay_s=0.3, direct_db=0.0)
    wet = reverberate(speech, room)
    expected = np.convolve(speech, room)[: speech.size]
    np.testing.assert_allclose(wet / np.abs(wet).max(), expected / np.abs(expected).max(), atol=1e-4)
    assert power_db(wet) == pytest.approx(power_db(speech), abs=0.01)


@pytest.mark.parametrize(("decay_s", "direct_db"), [(0.1, 10.0), (0.4, 0.0), (0.8, -3.0)])
def test_a_simulated_room_has_the_ratio_and_decay_asked_for(decay_s: float, direct_db: float) -> None:
    room = simulate_room(np.random.default_rng(2), decay_s, direct_db)
    assert room.argmax() == 0
    assert -10 * np.log10(np.sum(room[1:] ** 2)) == pytest.approx(direct_db, abs=0.1)
    # Half of the decay time loses 30 dB: compare windows that are so far apart.
    window = int(0.05 * decay_s * RATE_HZ)
    starts = int(0.2 * decay_s * RATE_HZ), int(0.7 * decay_s * RATE_HZ)
    early_db, late_db = (power_db(room[start : start + window]) for start in starts)
    assert early_db - late_db == pytest.approx(30, abs=4)


@pytest.mark.parametrize(("hz", "passes"), [(100, False), (1000, True), (3000, True), (5000, False)])
def test_the_telephone_keeps_its_band_only(hz: float, passes: bool) -> None:
    limited = band_limit(tone(hz), 300.0, 3400.0)
    lost_db = power_db(tone(hz)) - power_db(limited)
    assert abs(lost_db) < 0.5 if passes else lost_db > 20


def test_clipping_cuts_at_a_share_of_the_peak(speech: Samples) -> None:
    clipped = clip_peaks(speech, 0.5)
    assert np.abs(clipped).max() == pytest.approx(0.5 * np.abs(speech).max())
    untouched = np.abs(speech) < 0.5 * np.abs(speech).max()
    np.testing.assert_array_equal(clipped[untouched], speech[untouched])


def test_gain_is_in_db_and_very_quiet_recordings_are_raised_first() -> None:
    assert power_db(amplify(tone(300), -12.0)) == pytest.approx(power_db(tone(300)) - 12, abs=0.01)
    assert power_db(amplify(tone(300) * np.float32(1e-3), 0.0)) == pytest.approx(-32, abs=0.01)
    assert np.abs(amplify(tone(300), 20.0)).max() == 1.0
    assert not amplify(np.zeros(10, np.float32), 6.0).any()


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**32), level=st.sampled_from([0.0, 1e-5, 0.1, 1.0]))
@settings(max_examples=60, deadline=None)
def test_any_recording_stays_finite_within_range_and_near_its_length(
    augmenter: Augmenter, n: int, seed: int, level: float
) -> None:
    rng = np.random.default_rng(seed)
    samples = (level * rng.uniform(-1, 1, n)).astype(np.float32)
    changed = augmenter(samples, rng)
    assert changed.dtype == np.float32 and np.isfinite(changed).all() and np.abs(changed).max(initial=0) <= 1
    assert n / 1.1 - 2 <= changed.size <= n / 0.9 + 2


def test_only_speed_changes_the_length(speech: Samples) -> None:
    augmenter = Augmenter(config=replace(ALWAYS, speed_probability=0))
    assert all(augmenter(speech, np.random.default_rng(seed)).size == speech.size for seed in range(20))


def test_the_same_seed_gives_the_same_version_and_another_seed_another(augmenter: Augmenter, speech: Samples) -> None:
    first, again, other = (augmenter(speech, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert other.size != first.size or not np.array_equal(other, first)


def test_with_all_chances_at_zero_nothing_changes(speech: Samples) -> None:
    original = speech.copy()
    np.testing.assert_array_equal(Augmenter(config=NEVER)(speech, np.random.default_rng(0)), speech)
    Augmenter(config=ALWAYS)(speech, np.random.default_rng(0))
    np.testing.assert_array_equal(speech, original)


def write_manifest(folder: Path, kind: str) -> Path:
    """A recording of half a second, silent but for a click and a tone after it, in a manifest."""
    samples = np.zeros(RATE_HZ // 2, np.float32)
    samples[100], samples[200:] = 0.9, tone(1000)[: samples.size - 200] * 0.2
    soundfile.write(folder / "sound.wav", samples, RATE_HZ)
    manifest = folder / "noise.jsonl"
    manifest.write_text(json.dumps({"audio": "sound.wav", "kind": kind}) + "\n")
    return manifest


def test_short_recorded_noises_are_repeated_to_the_length_of_the_speech(tmp_path: Path, speech: Samples) -> None:
    config = replace(NEVER, noise_probability=1.0, snr_db=(0.0, 0.0))
    augmenter = Augmenter(write_manifest(tmp_path, "noise"), config)
    added = [augmenter(speech, np.random.default_rng(seed)) - speech for seed in range(200)]
    recorded = [noise for noise in added if loudest_hz(noise) == pytest.approx(1000, abs=1)]
    assert recorded
    # The second half is as loud as the first: the noise began again.
    halves = (power_db(recorded[0][: speech.size // 2]), power_db(recorded[0][speech.size // 2 :]))
    assert halves[0] == pytest.approx(halves[1], abs=3)


def test_recorded_rooms_begin_with_their_direct_sound(tmp_path: Path) -> None:
    config = replace(NEVER, reverb_probability=1.0, simulated_share=0.0)
    augmenter = Augmenter(write_manifest(tmp_path, "impulse_response"), config)
    click = np.zeros(RATE_HZ, np.float32)
    click[500] = 0.5
    assert np.abs(augmenter(click, np.random.default_rng(0))).argmax() == 500


def test_an_unknown_kind_of_noise_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither 'noise' nor 'impulse_response'"):
        Augmenter(write_manifest(tmp_path, "music"))


@pytest.mark.parametrize("seed", range(8))
def test_something_else_may_be_heard_before_the_recording(speech: Samples, seed: int) -> None:
    config = replace(NEVER, before_probability=1, before_s=(0.5, 1.0), before_snr_db=(6.0, 6.0))
    heard = Augmenter(config=config)(speech, np.random.default_rng(seed))
    before = heard[: -speech.size]
    assert 0.5 * RATE_HZ <= before.size <= RATE_HZ
    np.testing.assert_array_equal(heard[before.size :], amplify(speech, 0.0))
    power = float(np.mean(before**2)) / float(np.mean(speech**2))
    assert power == 0 or power == pytest.approx(10**-0.6, rel=0.01)


def test_chords_are_loud_in_few_places_of_the_spectrum() -> None:
    music = chords(np.random.default_rng(0), 4 * RATE_HZ)
    assert np.mean(music**2) == pytest.approx(1.0, rel=1e-3)

    def share(samples: Samples) -> float:
        power = np.sort(np.abs(np.fft.rfft(samples[: RATE_HZ // 5])) ** 2)[::-1]
        return float(power[:40].sum() / power.sum())

    assert share(music) > 0.8 > 0.5 > share(coloured_noise(np.random.default_rng(0), RATE_HZ, 0.0))
