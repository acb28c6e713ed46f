"""Samples to log-mel, incrementally and bit-equal to the whole-file result for any chunking.

The numbers are those of NeMo's streaming models (``AudioToMelSpectrogramPreprocessor`` without normalisation or
dither): pre-emphasis 0.97, 25 ms Hann windows every 10 ms centred on their sample, 512-point power spectrum,
Slaney mel filters from 0 to 8 kHz, ``log(x + 2^-24)``, ``floor(samples / 160)`` frames.

Frames come in the encoder's groups of eight, and every group is the same arithmetic on the same shape, whether its
samples came in one piece or one by one, and however many groups, of one stream or of several, share the call: that,
and carrying 240 samples over instead of padding each piece, is what makes the result independent of the chunking.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from models.config import FRAME_SAMPLES, HOP_SAMPLES, SUBSAMPLING_FACTOR, FeatureConfig
from models.fastconformer import LEADING_SLOTS

WINDOW_SAMPLES = 400
FFT_SIZE = 512
PREEMPHASIS = np.float32(0.97)
LOG_GUARD = 2.0**-24
#: Samples after the last hop of a group that its last window still touches: 12.5 ms.
GROUP_TAIL_SAMPLES = WINDOW_SAMPLES // 2
#: Samples before the first one that the first group's windows touch.
GROUP_LEAD_SAMPLES = LEADING_SLOTS * HOP_SAMPLES + WINDOW_SAMPLES // 2
GROUP_SAMPLES = GROUP_LEAD_SAMPLES + GROUP_TAIL_SAMPLES
#: Groups that share a call: few enough that no operation is shared out among threads, whose parts would depend on them.
_CALL_GROUPS = 16


@dataclass(frozen=True)
class FeatureState:
    """The past of one stream.

    Attributes:
        pending: ``float32[n]``, pre-emphasised samples from the start of the next group's first window on.
        last_sample: The last sample received, for the pre-emphasis of the next one.
        groups: Groups made so far.
        samples: Samples received so far.
    """

    pending: np.ndarray
    last_sample: np.float32
    groups: int
    samples: int


class FrontEnd:
    """The log-mel of one model; holds constants only, the past is in :class:`FeatureState`."""

    def __init__(self, config: FeatureConfig) -> None:
        self.config = config
        self._window = torch.hann_window(WINDOW_SAMPLES, periodic=False)
        self._filters = slaney_filters(config.mel_bins, config.sample_rate_hz).t().contiguous()

    def init_state(self) -> FeatureState:
        """The state of a stream that has not begun."""
        return FeatureState(np.zeros(GROUP_LEAD_SAMPLES, np.float32), np.float32(0), 0, 0)

    def step(self, samples: np.ndarray, state: FeatureState, *, last: bool = False) -> tuple[Tensor, int, FeatureState]:
        """Makes every group that the samples so far complete; :meth:`cut`, then :meth:`mel`.

        Returns:
            Log-mel ``[groups, 8, mel_bins]``, the number of real slots in the groups (unreal ones are zero), and the
            state.
        """
        groups, slots, after = self.cut(samples, state, last=last)
        mel = self.mel(groups)
        mel.view(-1, self.config.mel_bins)[slots:] = 0
        return mel, slots, after

    def cut(self, samples: np.ndarray, state: FeatureState, *, last: bool = False) -> tuple[Tensor, int, FeatureState]:
        """The samples of every group that the samples so far complete. Computes nothing else.

        Args:
            samples: ``float32[n]`` at 16 kHz, in [-1, 1].
            state: The past.
            last: The audio ends with these samples; what is left over becomes a last, partly filled group.

        Returns:
            Pre-emphasised samples ``[groups, 1520]``, from the beginning of a group's first window to the end of its
            last, the number of real slots in the groups (short of ``8 * groups`` only when ``last``), and the state.
        """
        before = np.concatenate([[state.last_sample], samples[:-1]]) if len(samples) else samples
        pending = np.concatenate([state.pending, samples - PREEMPHASIS * before])
        total = state.samples + len(samples)
        ready = max(0, (len(pending) - GROUP_SAMPLES) // FRAME_SAMPLES + 1)
        slots = ready * SUBSAMPLING_FACTOR
        if last:
            mel_frames = total // HOP_SAMPLES
            # Frame k ends with mel frame 8k, so n mel frames make 1 + ceil((n - 1) / 8) groups.
            wanted = 1 - (1 - mel_frames) // SUBSAMPLING_FACTOR if mel_frames else 0
            ready = wanted - state.groups
            slots = min(ready * SUBSAMPLING_FACTOR, mel_frames + LEADING_SLOTS - SUBSAMPLING_FACTOR * state.groups)
            missing = ready * FRAME_SAMPLES + GROUP_SAMPLES - FRAME_SAMPLES - len(pending)
            pending = np.concatenate([pending, np.zeros(max(0, missing), np.float32)])
        groups = np.empty((ready, GROUP_SAMPLES), np.float32)
        for i in range(ready):
            groups[i] = pending[i * FRAME_SAMPLES : i * FRAME_SAMPLES + GROUP_SAMPLES]
        newest = samples[-1] if len(samples) else state.last_sample
        after = FeatureState(pending[ready * FRAME_SAMPLES :].copy(), newest, state.groups + ready, total)
        return torch.from_numpy(groups), slots, after

    def mel(self, groups: Tensor) -> Tensor:
        """Log-mel ``[groups, 8, mel_bins]`` of what :meth:`cut` returns, of one stream or of several."""
        mel = groups.new_empty(len(groups), SUBSAMPLING_FACTOR, self.config.mel_bins)
        for start in range(0, len(groups), _CALL_GROUPS):
            mel[start : start + _CALL_GROUPS] = self._mel(groups[start : start + _CALL_GROUPS])
        return mel

    def _mel(self, groups: Tensor) -> Tensor:
        frames = groups.unfold(1, WINDOW_SAMPLES, HOP_SAMPLES)
        # Centred in the transform as in NeMo: with the same rounding, quiet bins beside loud ones agree to 2e-6.
        centred = torch.nn.functional.pad(frames * self._window, [(FFT_SIZE - WINDOW_SAMPLES) // 2] * 2)
        spectrum = torch.fft.rfft(centred)
        power = spectrum.real.square() + spectrum.imag.square()
        # A product for each group: one for all would round as their number has it.
        return torch.log(torch.bmm(power, self._filters.expand(len(groups), -1, -1)) + LOG_GUARD)


@cache
def front_end(config: FeatureConfig) -> FrontEnd:
    """The front end of a model; one for all sessions, since it holds constants only."""
    return FrontEnd(config)


def slaney_filters(mel_bins: int, sample_rate_hz: int) -> Tensor:
    """Triangular mel filters ``[mel_bins, 257]`` with unit area in Hz, from 0 Hz to half the sample rate.

    The scale is linear below 1 kHz and logarithmic above (M. Slaney, "Auditory Toolbox", 1998); the values are
    those of ``librosa.filters.mel`` with its defaults.
    """
    knee_hz, hz_per_mel = 1000.0, 200.0 / 3
    log_step = np.log(6.4) / 27.0
    knee_mel = knee_hz / hz_per_mel
    top_mel = knee_mel + np.log(sample_rate_hz / 2 / knee_hz) / log_step
    mels = np.linspace(0.0, top_mel, mel_bins + 2)
    edges_hz = np.where(mels < knee_mel, mels * hz_per_mel, knee_hz * np.exp(log_step * (mels - knee_mel)))
    bins_hz = np.arange(FFT_SIZE // 2 + 1) * (sample_rate_hz / FFT_SIZE)
    rising = (bins_hz[None] - edges_hz[:-2, None]) / np.diff(edges_hz)[:-1, None]
    falling = (edges_hz[2:, None] - bins_hz[None]) / np.diff(edges_hz)[1:, None]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    area = 2.0 / (edges_hz[2:] - edges_hz[:-2])
    return torch.from_numpy((triangles * area[:, None]).astype(np.float32))
