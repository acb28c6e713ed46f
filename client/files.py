"""Audio from a file or a stream, block by block: soundfile first, PyAV for what it does not open.

Memory is bounded by the block, whatever the length of the recording. soundfile is asked only for the formats
that it knows best (wav, flac, ogg and their kin): it takes much else for mp3, and its mp3 decoder writes to
stderr on its own.
"""

from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Final, Protocol

import av
import numpy as np
import numpy.typing as npt
import soundfile

from streaming.audio import AudioFormat, Samples
from streaming.errors import DragomanError

# How the files begin that are left to soundfile: wav and its kin, aiff, flac, ogg, caf, au.
_SOUNDFILE_HEADS: Final = (b"RIFF", b"RIFX", b"RF64", b"riff", b"FORM", b"fLaC", b"OggS", b"caff", b".snd")
# A header's length may be off by a codec's padding; where more is missing than both, the file was cut off.
_MISSING_S: Final = 0.5
_MISSING_SHARE: Final = 0.02
# Containers whose header states the length; of the others FFmpeg only guesses it from the bit rate.
_DECLARING_CONTAINERS: Final = ("mov,mp4", "matroska,webm", "flac", "wav", "ogg", "asf")


class AudioSource(Protocol):
    """Audio that can be read once, from the start."""

    @property
    def format(self) -> AudioFormat:
        """How its blocks are to be read."""
        ...

    @property
    def duration_s(self) -> float | None:
        """Its length in seconds, where that is known beforehand."""
        ...

    @property
    def problem(self) -> str | None:
        """After the last block, one sentence about what was not readable."""
        ...

    def blocks(self, block_samples: int) -> Iterator[Samples | bytes]:
        """The audio in pieces of about that many sample frames."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class PcmStream:
    """Raw PCM from a pipe, as it arrives: standard input, for one."""

    duration_s = None
    problem = None

    def __init__(self, stream: BufferedReader, fmt: AudioFormat) -> None:
        """Read `stream` as PCM in the format `fmt`; it is left open at the end."""
        self.format = fmt
        self._stream = stream

    def blocks(self, block_samples: int) -> Iterator[bytes]:
        """Yield what has arrived, at most `block_samples` sample frames at a time, as soon as it has.

        Raises:
            DragomanError: ``audio_empty`` when the stream ends before its first byte.
        """
        empty = True
        # Without the buffer, whose lock would abort the program if it ends while a thread still waits here.
        stream = getattr(self._stream, "raw", self._stream)
        while pcm := stream.read(block_samples * self.format.bytes_per_sample):
            empty = False
            yield pcm
        if empty:
            raise DragomanError("audio_empty", "there were 0 s of audio: pipe raw PCM into standard input")

    def close(self) -> None:
        """Do nothing: the stream belongs to the caller."""


class _Reader(Protocol):
    """One way to decode a file: float32 ``[samples, channels]`` in pieces of any size."""

    format: AudioFormat
    duration_s: float | None
    declares_length: bool
    damaged: bool

    def pieces(self) -> Iterator[Samples]: ...

    def close(self) -> None: ...


class AudioFile:
    """A recording that is open for one pass of decoding.

    Attributes:
        path: Where it is.
        format: Its sample rate and channels; the blocks are float32.
        duration_s: Its length in seconds as far as the header tells; None when it does not.
        problem: After the last block, one sentence about what could not be decoded; None when all is well.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` and find its format.

        Raises:
            DragomanError: ``file_missing``, ``file_unreadable``, ``file_empty``, ``not_audio``,
                ``audio_empty``, or a format that `AudioFormat` refuses.
        """
        self.path = path
        self.problem: str | None = None
        self._reader = _open(path)
        self.format = self._reader.format
        self.duration_s = self._reader.duration_s

    def blocks(self, block_samples: int) -> Iterator[Samples]:
        """Decode the recording, once.

        Args:
            block_samples: Least number of sample frames in a block, but for the last.

        Yields:
            float32 ``[samples, channels]``, full scale 1.

        Raises:
            DragomanError: ``audio_empty`` when there was nothing to decode.
        """
        total_samples = 0
        block: list[Samples] = []
        for piece in self._reader.pieces():
            total_samples += len(piece)
            block.append(piece)
            if sum(map(len, block)) >= block_samples:
                yield np.concatenate(block)
                block = []
        if block:
            yield np.concatenate(block)
        self._judge(total_samples / self.format.sample_rate_hz)

    def _judge(self, decoded_s: float) -> None:
        """After the end: was it all there?"""
        if decoded_s == 0:
            raise DragomanError("audio_empty", "the file holds 0 s of audio: there is nothing to transcribe")
        declared_s = self.duration_s if self._reader.declares_length else None
        if declared_s is not None and declared_s - decoded_s > max(_MISSING_S, _MISSING_SHARE * declared_s):
            self.problem = (
                f"the file is cut off: {decoded_s:.1f} s of the {declared_s:.1f} s that it declares"
                " could be decoded, and these are transcribed"
            )
        elif self._reader.damaged:
            self.problem = f"the file is damaged: the {decoded_s:.1f} s that could be decoded are transcribed"

    def close(self) -> None:
        """Release the file."""
        self._reader.close()


def _open(path: Path) -> _Reader:
    if path.is_dir():
        raise DragomanError("file_unreadable", "this is a directory: name the audio files in it")
    # A pipe can be opened and read only once, and forwards: that is FFmpeg's ground, with no peek.
    if not path.exists() or path.is_file():
        head = _head(path)
        if not head:
            raise DragomanError("file_empty", "the file is empty (0 bytes)")
        if head in _SOUNDFILE_HEADS:
            try:
                return _SoundFileReader(path)
            except (soundfile.SoundFileError, TypeError):
                pass  # a TypeError asks for the format of a name in .raw
    try:
        return _PyAvReader(path)
    except (av.error.FFmpegError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DragomanError(
            "not_audio",
            f"the file is not audio that soundfile or PyAV can open, or it is damaged ({reason});"
            " raw PCM goes through standard input: dragoman transcribe -",
        ) from None


class _SoundFileReader:
    """libsndfile: wav, flac, ogg (Vorbis, Opus), aiff, au, caf and others."""

    declares_length = True

    def __init__(self, path: Path) -> None:
        self._file = soundfile.SoundFile(path)
        try:
            self.format = AudioFormat("f32le", self._file.samplerate, self._file.channels)
        except DragomanError:
            self.close()
            raise
        self.duration_s: float | None = self._file.frames / self._file.samplerate
        self.damaged = False

    def pieces(self) -> Iterator[Samples]:
        while not self.damaged:
            try:
                piece = self._file.read(self.format.sample_rate_hz, dtype="float32", always_2d=True)
            except soundfile.SoundFileError:
                self.damaged = True
                return
            if not len(piece):
                return
            yield piece

    def close(self) -> None:
        self._file.close()


class _PyAvReader:
    """FFmpeg: mp3, m4a, mp4, webm and every other container with an audio stream, its first one."""

    def __init__(self, path: Path) -> None:
        # Prefix and list keep a file's name, or a playlist within it, from reaching out to the network.
        options = {"protocol_whitelist": "file"}
        self._container = av.open(f"file:{path}", options=options, metadata_errors="ignore")
        try:
            if not self._container.streams.audio:
                raise DragomanError("not_audio", "the file has no audio in it")
            self.damaged = False
            self._frames = self._decode()
            self._first = next(self._frames, None)
            if self._first is None:
                raise DragomanError("audio_empty", "no audio could be decoded: the file is empty or cut off")
            # Not the header's: in some m4a files the rate doubles when the decoder has seen the data.
            rate, channels = self._first.sample_rate, self._first.layout.nb_channels
            self.format = AudioFormat("f32le", rate, channels)
        except BaseException:
            self.close()
            raise
        duration_us = self._container.duration
        self.duration_s = None if duration_us is None else duration_us / av.time_base
        name = self._container.format.name
        self.declares_length = _has_mp3_length(path) if name == "mp3" else name.startswith(_DECLARING_CONTAINERS)

    def pieces(self) -> Iterator[Samples]:
        frame = self._first
        while frame is not None:
            if (frame.sample_rate, frame.layout.nb_channels) != (
                self.format.sample_rate_hz,
                self.format.channels,
            ):
                self.damaged = True
                return
            yield _to_float(frame)
            frame = next(self._frames, None)

    def close(self) -> None:
        self._container.close()

    def _decode(self) -> Iterator[av.AudioFrame]:
        try:
            for packet in self._container.demux(self._container.streams.audio[0]):
                try:
                    yield from packet.decode()
                except av.error.InvalidDataError:
                    self.damaged = True  # a bad packet: go on with the next, as players do
        except av.error.FFmpegError:
            self.damaged = True


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except FileNotFoundError:
        raise DragomanError("file_missing", "there is no such file") from None
    except OSError as error:
        raise DragomanError("file_unreadable", f"the file cannot be read: {error.strerror}") from None


def _to_float(frame: av.AudioFrame) -> Samples:
    """One decoded frame of any sample format -> float32 ``[samples, channels]``, full scale 1."""
    raw: npt.NDArray[Any] = frame.to_ndarray()
    samples = raw.T if frame.format.is_planar else raw.reshape(-1, frame.layout.nb_channels)
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        samples = samples / -float(np.iinfo(samples.dtype).min)
    return samples.astype(np.float32)


def _has_mp3_length(path: Path) -> bool:
    """Whether an mp3 states its length, in the Xing, Info or VBRI tag of its first frame."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        id3 = file.read(10)
        if id3[:3] == b"ID3":  # its size: four bytes of seven bits
            a, b, c, d = id3[6:10]
            file.seek(10 + (a << 21 | b << 14 | c << 7 | d))
        else:
            file.seek(0)
        first_frame = file.read(256)
    return any(tag in first_frame for tag in (b"Xing", b"Info", b"VBRI"))
