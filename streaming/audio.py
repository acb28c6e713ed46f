"""First arrow: the bytes that arrive become 16 kHz mono float32 samples.

Any chunking of the input gives bit-identical samples. Scaling and mixing work on one sample at a time, and
the resampler is fed in blocks of one fixed size, because its last bits depend on the sizes that it is given.
"""

import math
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt
import soxr

from streaming.errors import DragomanError

SAMPLE_RATE_HZ: Final = 16_000
"""The rate of everything behind this file."""

Encoding = Literal["s16le", "f32le"]
Samples = npt.NDArray[np.float32]

_DTYPES: Final[dict[Encoding, np.dtype[Any]]] = {"s16le": np.dtype("<i2"), "f32le": np.dtype("<f4")}
_MIN_RATE_HZ: Final = 8_000
_MAX_RATE_HZ: Final = 192_000
_MAX_CHANNELS: Final = 8
# Full scale is 1. A float beyond this is not loud but wrongly encoded, and its power spectrum could overflow.
_LOUDEST: Final = 1e6
_NOTHING: Final[Samples] = np.empty(0, np.float32)
# 10 ms: what a live stream waits for, at most, before the resampler sees its newest samples.
_BLOCKS_PER_SECOND: Final = 100


@dataclass(frozen=True)
class AudioFormat:
    """How incoming PCM is to be read.

    Attributes:
        encoding: ``"s16le"``, 16-bit integers, or ``"f32le"``, 32-bit floats of full scale 1; little-endian.
        sample_rate_hz: Samples per second and channel, 8,000 to 192,000.
        channels: Interleaved channels, 1 to 8; they are averaged.

    Raises:
        DragomanError: ``unsupported_encoding``, ``unsupported_rate`` or ``unsupported_channels``.
    """

    encoding: Encoding = "s16le"
    sample_rate_hz: int = SAMPLE_RATE_HZ
    channels: int = 1

    def __post_init__(self) -> None:
        if self.encoding not in get_args(Encoding):
            raise DragomanError(
                "unsupported_encoding",
                f"the PCM encoding {self.encoding!r} is not supported: use s16le or f32le",
            )
        if not _MIN_RATE_HZ <= self.sample_rate_hz <= _MAX_RATE_HZ:
            raise DragomanError(
                "unsupported_rate",
                f"a sample rate of {self.sample_rate_hz} Hz is not supported:"
                f" give audio between {_MIN_RATE_HZ} and {_MAX_RATE_HZ} Hz",
            )
        if not 1 <= self.channels <= _MAX_CHANNELS:
            raise DragomanError(
                "unsupported_channels",
                f"{self.channels} channels are not supported: give between 1 and {_MAX_CHANNELS}",
            )

    @property
    def bytes_per_sample(self) -> int:
        """Size of one sample frame, all channels together, in bytes."""
        return _DTYPES[self.encoding].itemsize * self.channels


class AudioNormalizer:
    """Turns PCM of one format into 16 kHz mono float32, as it comes in.

    The output has no clock of its own: count time on the input side, with `received_samples`, since the
    resampler holds some samples back until `finish`.

    Attributes:
        received_samples: Whole sample frames received so far, at the input rate.
    """

    def __init__(self, fmt: AudioFormat) -> None:
        """Start a stream of audio in the format `fmt`."""
        self.format = fmt
        self.received_samples = 0
        self._partial_bytes = b""
        self._resampler = None if fmt.sample_rate_hz == SAMPLE_RATE_HZ else _resampler(fmt.sample_rate_hz)
        self._block_samples = fmt.sample_rate_hz // _BLOCKS_PER_SECOND
        self._waiting: Samples = np.empty(0, np.float32)  # less than a block
        self._produced_samples = 0
        # What the resampler took last, from a sample on that falls together with one of its output.
        self._taken: Samples = np.empty(0, np.float32)
        self._taken_from_samples = 0
        self._period_samples = fmt.sample_rate_hz // math.gcd(fmt.sample_rate_hz, SAMPLE_RATE_HZ)

    def push(self, pcm: bytes | npt.NDArray[np.float32] | npt.NDArray[np.int16]) -> Samples:
        """Take more audio and return what became ready.

        Args:
            pcm: Either bytes in the declared format, cut anywhere, within a sample too; or an array of
                float32 (full scale 1) or int16, ``[samples]`` when mono, else ``[samples, channels]``.

        Returns:
            Mono float32 at 16 kHz, ``[samples]``, maybe empty.

        Raises:
            DragomanError: ``audio_not_finite`` or ``audio_out_of_range``, with the index of the first bad
                sample; ``audio_odd_bytes`` when an array follows bytes that end within a sample.
            ValueError: The array has another shape or type.
        """
        mono = self._mono(self._frames(pcm))
        self.received_samples += len(mono)
        if self._resampler is None:
            return mono
        waiting = np.concatenate([self._waiting, mono])
        whole = len(waiting) - len(waiting) % self._block_samples
        self._waiting = waiting[whole:].copy()
        blocks = waiting[:whole].reshape(-1, self._block_samples)
        ready = np.concatenate([_NOTHING, *map(self._resampler.resample_chunk, blocks)])
        self._produced_samples += len(ready)
        self._remember(waiting[:whole])
        return ready

    def finish(self) -> Samples:
        """End the stream and return what the resampler still held, mono float32 at 16 kHz, ``[samples]``.

        Raises:
            DragomanError: ``audio_odd_bytes`` when the stream ends within a sample.
        """
        self._require_whole_sample()
        if self._resampler is None:
            return _NOTHING
        return np.asarray(self._resampler.resample_chunk(self._waiting, last=True), np.float32)

    def tail(self) -> Samples:
        """What `finish` would return now, to 1e-5; the stream goes on as if it had not been asked.

        The bytes of an unfinished sample are not looked at. The resampler cannot be copied, so a new
        one hears the last half second again.
        """
        if self._resampler is None:
            return _NOTHING
        again = _resampler(self.format.sample_rate_hz)
        heard = again.resample_chunk(np.concatenate([self._taken, self._waiting]), last=True)
        heard_from = self._taken_from_samples * SAMPLE_RATE_HZ // self.format.sample_rate_hz
        return np.asarray(heard[self._produced_samples - heard_from :], np.float32)

    def _remember(self, taken: Samples) -> None:
        self._taken = np.concatenate([self._taken, taken])
        spare = max(0, len(self._taken) - self.format.sample_rate_hz // 2)
        spare -= spare % self._period_samples
        self._taken = self._taken[spare:].copy()
        self._taken_from_samples += spare

    def _frames(self, pcm: bytes | npt.NDArray[np.float32] | npt.NDArray[np.int16]) -> Samples:
        """Interleaved bytes or an array -> float32 ``[samples, channels]``, full scale 1."""
        if isinstance(pcm, np.ndarray):
            self._require_whole_sample()
            frames = pcm if pcm.ndim == 2 else pcm[:, None]
            if pcm.ndim > 2 or frames.shape[1] != self.format.channels:
                raise ValueError(
                    f"samples have the shape {pcm.shape}: with {self.format.channels} channels"
                    f" it must be [samples, {self.format.channels}]"
                )
        else:
            data = self._partial_bytes + pcm
            whole = len(data) - len(data) % self.format.bytes_per_sample
            self._partial_bytes = data[whole:]
            dtype = _DTYPES[self.format.encoding]
            frames = np.frombuffer(data, dtype, whole // dtype.itemsize).reshape(-1, self.format.channels)
        if frames.dtype.kind == "i" and frames.dtype.itemsize == 2:
            return frames.astype(np.float32) / np.float32(32768)
        if frames.dtype.kind == "f" and frames.dtype.itemsize == 4:
            return frames.astype(np.float32)
        raise ValueError(f"samples are {frames.dtype}: convert them to float32 (full scale 1) or int16")

    def _mono(self, frames: Samples) -> Samples:
        """Check float32 ``[samples, channels]`` and average the channels to ``[samples]``."""
        bad = ~(np.abs(frames) <= _LOUDEST)
        if bad.any():
            index = int(bad.any(axis=1).argmax())
            value = float(frames[index][bad[index]][0])
            code = "audio_out_of_range" if np.isfinite(value) else "audio_not_finite"
            raise DragomanError(
                code,
                f"the audio holds {value:g} at sample index {self.received_samples + index}:"
                " float samples must be finite numbers with full scale 1",
            )
        # Channel by channel: a reduction's order may depend on the array's shape, and with it the last bit.
        mono = frames[:, 0].copy()
        for channel in range(1, self.format.channels):
            mono += frames[:, channel]
        return mono / np.float32(self.format.channels)

    def _require_whole_sample(self) -> None:
        if self._partial_bytes:
            raise DragomanError(
                "audio_odd_bytes",
                f"the audio ends within a sample, after {len(self._partial_bytes)} of its"
                f" {self.format.bytes_per_sample} bytes ({self.format.encoding},"
                f" {self.format.channels} channels): check the declared format, or send the missing bytes",
            )


def _resampler(rate_hz: int) -> soxr.ResampleStream:
    return soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32", quality="HQ")
