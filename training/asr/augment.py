"""Makes one clean recording sound like many: other speeds, rooms, noises, microphones and lines.

Pure functions of samples and a generator, and `Augmenter`, which draws from them. All audio is float32 [n] at
16 kHz. Only a change of speed and what is put before the recording change the length. The cost is
about a millisecond of one core per second of audio: a training run can augment anew each time that it draws
an utterance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
from numpy.typing import NDArray

from training.asr.prepare import SAMPLE_RATE_HZ, read_audio

__all__ = [
    "AugmentConfig",
    "Augmenter",
    "add_noise",
    "amplify",
    "band_limit",
    "chords",
    "clip_peaks",
    "coloured_noise",
    "reverberate",
    "simulate_room",
    "speed_perturb",
]

Samples = NDArray[np.float32]

# The tail of a room below this length carries no more than the noise that is added anyway.
_MAX_ROOM_S = 1.2
_TELEPHONE_BAND_HZ = (300.0, 3400.0)
# Width of a filter's edge: steep as codecs and lines are, wide enough not to ring.
_EDGE_HZ = 150.0
_COLOURED_NOISE_S = 20.0


def _power(samples: Samples) -> float:
    return float(np.dot(samples, samples)) / max(1, samples.size)


def _fft_length(n: int) -> int:
    """The smallest length of at least n with small prime factors: FFTs of prime lengths are far slower."""
    step = 1 << max(0, n.bit_length() - 5)
    return next(m * step for m in (1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 15, 16, 18, 20, 24, 27, 30, 32) if m * step >= n)


def speed_perturb(samples: Samples, factor: float) -> Samples:
    """Plays a recording faster or slower, pitch and formants included (Ko et al. 2015).

    Args:
        samples: float32 [n].
        factor: Speed, above 1 is faster.

    Returns:
        float32 [about n / factor].
    """
    if factor == 1.0 or samples.size == 0:
        return samples
    return np.asarray(soxr.resample(samples, SAMPLE_RATE_HZ * factor, SAMPLE_RATE_HZ, quality="LQ"), dtype=np.float32)


def add_noise(samples: Samples, noise: Samples, snr_db: float) -> Samples:
    """Adds a noise at a signal-to-noise ratio, counted in mean power over the whole recording.

    Args:
        samples: float32 [n].
        noise: float32 [n].
        snr_db: Ratio in dB. A silent recording or noise leaves the recording as it is.
    """
    if samples.shape != noise.shape:
        raise ValueError(f"noise of {noise.shape} samples for a recording of {samples.shape}: cut or repeat it first")
    signal_power, noise_power = _power(samples), _power(noise)
    if signal_power < 1e-12 or noise_power < 1e-12:
        return samples
    return samples + noise * np.float32(np.sqrt(signal_power / noise_power * 10 ** (-snr_db / 10)))


def simulate_room(rng: np.random.Generator, decay_s: float, direct_db: float) -> Samples:
    """Makes the impulse response of a room: a direct sound, then noise that dies away (Moorer 1979).

    Args:
        rng: Source of the noise.
        decay_s: Time after which the reverberation has lost 60 dB (T60).
        direct_db: Power of the direct sound relative to all of the reverberation, in dB: far speakers have
            less.

    Returns:
        float32 [m], the direct sound first.
    """
    n = int(min(1.0 * decay_s, _MAX_ROOM_S) * SAMPLE_RATE_HZ) + 1
    time_s = np.arange(n, dtype=np.float32) / SAMPLE_RATE_HZ
    tail: Samples = rng.standard_normal(n, dtype=np.float32) * np.exp(
        -np.log(1000.0) * time_s / decay_s, dtype=np.float32
    )
    # Walls are some way off: nothing comes back in the first milliseconds.
    tail[: int(rng.uniform(0.001, 0.008) * SAMPLE_RATE_HZ)] = 0.0
    tail *= np.float32(10 ** (-direct_db / 20) / max(1e-6, float(np.linalg.norm(tail))))
    tail[0] = 1.0
    return tail


def reverberate(samples: Samples, room: Samples) -> Samples:
    """Convolves a recording with an impulse response, keeping its length, its timing and its mean power.

    Args:
        samples: float32 [n].
        room: float32 [m], the direct sound first.
    """
    if samples.size == 0:
        return samples
    length = _fft_length(samples.size + room.size - 1)
    spectrum = np.fft.rfft(samples, length) * np.fft.rfft(room, length)
    wet = np.fft.irfft(spectrum, length)[: samples.size].astype(np.float32, copy=False)
    matched: Samples = wet * np.float32(np.sqrt(_power(samples) / max(1e-12, _power(wet))))
    return matched


def band_limit(samples: Samples, low_hz: float, high_hz: float) -> Samples:
    """Keeps one band of frequencies, as a telephone line or a low-rate codec does; zero phase, soft edges.

    Args:
        samples: float32 [n].
        low_hz: Lower edge; 0 keeps all low frequencies.
        high_hz: Upper edge; 8000 keeps all high ones.
    """
    length = _fft_length(samples.size + SAMPLE_RATE_HZ // 50)
    frequency_hz = np.fft.rfftfreq(length, 1 / SAMPLE_RATE_HZ).astype(np.float32)
    gain = np.ones_like(frequency_hz)
    if low_hz > 0:
        gain *= np.clip((frequency_hz - low_hz) / _EDGE_HZ + 0.5, 0, 1)
    if high_hz < SAMPLE_RATE_HZ / 2:
        gain *= np.clip((high_hz - frequency_hz) / _EDGE_HZ + 0.5, 0, 1)
    limited = np.fft.irfft(np.fft.rfft(samples, length) * gain, length)
    return limited[: samples.size].astype(np.float32, copy=False)


def clip_peaks(samples: Samples, level: float) -> Samples:
    """Cuts off what exceeds `level` (0..1) times the highest peak, as an overdriven microphone does."""
    if samples.size == 0:
        return samples
    limit = level * float(np.abs(samples).max())
    clipped: Samples = np.clip(samples, -limit, limit)
    return clipped


def amplify(samples: Samples, gain_db: float, quietest_dbfs: float = -32.0) -> Samples:
    """Changes the level by `gain_db`, after raising a very quiet recording; stays within -1..1.

    Args:
        samples: float32 [n].
        gain_db: Gain in dB.
        quietest_dbfs: Lowest mean power, relative to full scale, that a recording has before the gain.
    """
    level_db = 10 * np.log10(max(1e-12, _power(samples)))
    # Digital silence stays silent: raising it would only make noise of rounding errors.
    if -90.0 < level_db < quietest_dbfs:
        gain_db += quietest_dbfs - level_db
    amplified: Samples = np.clip(samples * np.float32(10 ** (gain_db / 20)), -1.0, 1.0)
    return amplified


def coloured_noise(rng: np.random.Generator, n: int, slope: float) -> Samples:
    """Makes Gaussian noise [n] of mean power 1 whose power falls as 1/f^slope: 0 white, 1 pink, 2 brown."""
    spectrum = rng.standard_normal(n // 2 + 1) + 1j * rng.standard_normal(n // 2 + 1)
    spectrum *= np.maximum(1.0, np.arange(n // 2 + 1)) ** (-slope / 2)
    # Below 20 Hz there is nothing to hear, and brown noise would be nothing else.
    spectrum[: int(20 * n / SAMPLE_RATE_HZ) + 1] = 0.0
    noise = np.fft.irfft(spectrum, n).astype(np.float32)
    return noise / np.float32(np.sqrt(max(1e-12, _power(noise))))


def chords(rng: np.random.Generator, n: int) -> Samples:
    """Makes music [n] of mean power 1: chords of three or four voices, struck or held, of 0.2 to 1 s."""
    music = np.zeros(n, dtype=np.float32)
    at = 0
    while at < n:
        length = min(n - at, int(rng.uniform(0.2, 1.0) * SAMPLE_RATE_HZ))
        time_s = np.arange(length, dtype=np.float32) / SAMPLE_RATE_HZ
        envelope = np.exp(-rng.uniform(0.0, 6.0) * time_s) * np.minimum(1.0, time_s / 0.01)
        root_hz = 110.0 * 2 ** (rng.integers(0, 25) / 12)
        for step in rng.choice([0, 3, 4, 7, 9, 12], rng.integers(3, 5), replace=False):
            for harmonic in range(1, rng.integers(2, 6)):
                tone = np.sin(2 * np.pi * root_hz * 2 ** (step / 12) * harmonic * time_s + rng.uniform(0, 6.28))
                music[at : at + length] += (tone * envelope / harmonic).astype(np.float32)
        at += length
    return music / np.float32(np.sqrt(max(1e-12, _power(music))))


@dataclass(frozen=True)
class AugmentConfig:
    """How often each change is made, and the range that its strength is drawn from (uniformly).

    Attributes:
        speed_probability: Chance of another speed.
        speed: Range of the speed.
        reverb_probability: Chance of a room.
        simulated_share: Share of the rooms that are simulated; the others are recorded ones.
        decay_s: Range of the T60 of simulated rooms.
        direct_db: Range of the direct-to-reverberant ratio of simulated rooms.
        noise_probability: Chance of a background noise.
        snr_db: Range of the signal-to-noise ratio.
        telephone_probability: Chance of the telephone band, 300-3400 Hz.
        low_pass_probability: Chance of a low-pass, if it is not a telephone.
        low_pass_hz: Range of its edge.
        clip_probability: Chance of clipping.
        clip_level: Range of the level that is clipped at, relative to the peak.
        gain_db: Range of the gain.
        before_probability: Chance that something else is heard before the recording: noise, music or nothing.
        before_s: Range of its length.
        before_snr_db: Range of the recording's power relative to it.
    """

    speed_probability: float = 0.8
    speed: tuple[float, float] = (0.9, 1.1)
    reverb_probability: float = 0.35
    simulated_share: float = 0.7
    decay_s: tuple[float, float] = (0.1, 0.8)
    direct_db: tuple[float, float] = (-3.0, 15.0)
    noise_probability: float = 0.5
    snr_db: tuple[float, float] = (5.0, 30.0)
    telephone_probability: float = 0.07
    low_pass_probability: float = 0.1
    low_pass_hz: tuple[float, float] = (2800.0, 7500.0)
    clip_probability: float = 0.05
    clip_level: tuple[float, float] = (0.3, 0.8)
    gain_db: tuple[float, float] = (-12.0, 6.0)
    before_probability: float = 0.15
    before_s: tuple[float, float] = (0.3, 4.0)
    before_snr_db: tuple[float, float] = (-3.0, 25.0)


class Augmenter:
    """Draws one of endlessly many versions of a recording; one generator state gives one version."""

    def __init__(self, noise_manifest: Path | None = None, config: AugmentConfig | None = None) -> None:
        """Loads noises and rooms.

        Args:
            noise_manifest: JSON lines with `audio` (relative to the manifest) and `kind`, ``noise`` or
                ``impulse_response``. None: coloured noises and simulated rooms only, which are always there
                too.
            config: Probabilities and ranges; None for the defaults.

        Raises:
            ValueError: If a line has another `kind`.
        """
        self.config = config or AugmentConfig()
        rng = np.random.default_rng(0)
        n = int(_COLOURED_NOISE_S * SAMPLE_RATE_HZ)
        self._noises: list[Samples] = [coloured_noise(rng, n, slope) for slope in (0.0, 1.0, 2.0)]
        self._rooms: list[Samples] = []
        if noise_manifest is not None:
            self._load(noise_manifest)
        # A noise of a second repeats itself in every utterance: longer ones are drawn more often.
        weights = np.array([min(noise.size / SAMPLE_RATE_HZ, 10.0) for noise in self._noises])
        self._noise_weights = weights / weights.sum()

    def _load(self, noise_manifest: Path) -> None:
        for line in noise_manifest.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            pcm = read_audio(noise_manifest.parent / record["audio"])
            samples: Samples = pcm.astype(np.float32) / np.float32(32768)
            if record["kind"] == "noise":
                self._noises.append(samples)
            elif record["kind"] == "impulse_response":
                # From the direct sound on, so that reverberation does not move the words in time.
                start = int(np.abs(samples).argmax())
                self._rooms.append(samples[start : start + int(_MAX_ROOM_S * SAMPLE_RATE_HZ)])
            else:
                raise ValueError(f"{noise_manifest}: kind {record['kind']!r} is neither 'noise' nor 'impulse_response'")

    def _room(self, rng: np.random.Generator) -> Samples:
        if not self._rooms or rng.random() < self.config.simulated_share:
            return simulate_room(rng, rng.uniform(*self.config.decay_s), rng.uniform(*self.config.direct_db))
        return self._rooms[rng.integers(len(self._rooms))]

    def _noise(self, n: int, rng: np.random.Generator) -> Samples:
        """Draws a noise and cuts n samples from anywhere in it; it starts again at its end."""
        noise = self._noises[rng.choice(len(self._noises), p=self._noise_weights)]
        return _cyclic(noise, int(rng.integers(noise.size)), n)

    def _before(self, samples: Samples, rng: np.random.Generator) -> Samples:
        """Draws what is heard before a recording, in all of its left context perhaps."""
        n = int(rng.uniform(*self.config.before_s) * SAMPLE_RATE_HZ)
        kind = rng.integers(4)
        if kind == 0:
            return np.zeros(n, dtype=np.float32)
        heard = chords(rng, n) if kind == 1 else self._noise(n, rng)
        level = np.sqrt(_power(samples) / max(1e-12, _power(heard))) * 10 ** (
            -rng.uniform(*self.config.before_snr_db) / 20
        )
        return heard * np.float32(level)

    def __call__(self, samples: Samples, rng: np.random.Generator) -> Samples:
        """Draws a version of a recording.

        Args:
            samples: float32 [n] at 16 kHz, within -1..1.
            rng: Source of every choice.

        Returns:
            float32 [m] within -1..1; m is n over the speed that was drawn, and what is heard before.
        """
        config = self.config
        if rng.random() < config.speed_probability:
            samples = speed_perturb(samples, rng.uniform(*config.speed))
        if rng.random() < config.reverb_probability:
            samples = reverberate(samples, self._room(rng))
        if rng.random() < config.noise_probability:
            samples = add_noise(samples, self._noise(samples.size, rng), rng.uniform(*config.snr_db))
        if rng.random() < config.before_probability:
            samples = np.concatenate([self._before(samples, rng), samples])
        if rng.random() < config.telephone_probability:
            samples = band_limit(samples, *_TELEPHONE_BAND_HZ)
        elif rng.random() < config.low_pass_probability:
            samples = band_limit(samples, 0.0, rng.uniform(*config.low_pass_hz))
        if rng.random() < config.clip_probability:
            samples = clip_peaks(samples, rng.uniform(*config.clip_level))
        return amplify(samples, rng.uniform(*config.gain_db))


def _cyclic(samples: Samples, start: int, n: int) -> Samples:
    """Cuts n samples from `start` on, beginning again at the end as often as needed."""
    pieces: Sequence[Samples] = [samples[start:], *[samples] * (n // samples.size + 1)]
    return np.concatenate(pieces)[:n] if start + n > samples.size else samples[start : start + n]
