"""Input devices, and their audio as it comes; through PortAudio, which the package sounddevice brings in."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Self

from streaming.audio import AudioFormat
from streaming.errors import DragomanError

_BLOCKS_PER_S: Final = 25  # PortAudio's calls: half a frame of the encoder
_MAX_WAITING_S: Final = 10  # what waits for whoever reads, before the newest is dropped
_SILENT_DEVICE_S: Final = 5.0  # a device that gives nothing for so long has been unplugged


@dataclass(frozen=True)
class Device:
    """One input.

    Attributes:
        index: PortAudio's number of it.
        name: What the system calls it.
        host_api: Through what it is reached, such as ALSA or Core Audio.
        channels: How many it has at most.
        rate_hz: The rate at which it runs by itself.
        is_default: Whether it is the system's default.
    """

    index: int
    name: str
    host_api: str
    channels: int
    rate_hz: int
    is_default: bool

    def __str__(self) -> str:
        mark, plural = "*" if self.is_default else " ", "" if self.channels == 1 else "s"
        return (
            f"{mark}{self.index:3}  {self.name} ({self.host_api}), {self.channels} channel{plural}, {self.rate_hz} Hz"
        )


def input_devices() -> list[Device]:
    """The inputs of this machine.

    Raises:
        DragomanError: ``mic_unavailable``: sounddevice or PortAudio is not installed.
    """
    sd = _sounddevice()
    apis, default = sd.query_hostapis(), sd.default.device[0]
    return [
        Device(
            index=index,
            name=" ".join(found["name"].split()),
            host_api=apis[found["hostapi"]]["name"],
            channels=found["max_input_channels"],
            rate_hz=round(found["default_samplerate"]),
            is_default=index == default,
        )
        for index, found in enumerate(sd.query_devices())
        if found["max_input_channels"] > 0
    ]


def choose_device(devices: Sequence[Device], wanted: str | None) -> Device:
    """The device of that number, or of that name or a part of it; None: the default.

    Raises:
        DragomanError: ``no_device``: there is none, none such, or several.
    """
    if not devices:
        raise DragomanError(
            "no_device", "this machine has no input device that PortAudio can see: plug in a microphone"
        )
    if wanted is None:
        return next((device for device in devices if device.is_default), devices[0])
    if wanted.isdecimal():
        matching = [device for device in devices if device.index == int(wanted)]
    else:
        named = {device: device.name.casefold() for device in devices}
        matching = [device for device, name in named.items() if name == wanted.casefold()]
        matching = matching or [device for device, name in named.items() if wanted.casefold() in name]
    if len(matching) == 1:
        return matching[0]
    count = f"{len(matching)} input devices match" if matching else "no input device matches"
    raise DragomanError("no_device", f"{count} {wanted!r}: give a number from dragoman mic --list-devices")


class Microphone:
    """The audio of one device, s16le at its own rate, while the context is entered.

    PortAudio's thread hands over each block and never waits: what finds no room is dropped, and counted.

    Attributes:
        device: The device.
        format: The format of the audio.
        dropped_samples: Sample frames that found no room, because whoever reads is behind.
        overflows: How often the system itself lost audio, because this program came too late.
    """

    def __init__(self, device: Device) -> None:
        """Find a format in which the device can be recorded.

        Raises:
            DragomanError: ``device_unusable``, or a format that `AudioFormat` refuses.
        """
        self.device = device
        self.format = _usable_format(device)
        self.dropped_samples = 0
        self.overflows = 0
        self._problem: str | None = None  # why the audio ended, if nobody has asked for its end
        self._blocks: deque[bytes] = deque()
        # Each is counted up by one thread only.
        self._heard_samples = 0
        self._given_samples = 0
        self._ended = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._stream = await asyncio.to_thread(self._open)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended = True
        await asyncio.to_thread(self._stream.close)

    @property
    def waiting_s(self) -> float:
        """Audio that waits for whoever reads, in seconds."""
        return (self._heard_samples - self._given_samples) / self.format.sample_rate_hz

    @property
    def dropped_s(self) -> float:
        """Audio that was dropped, in seconds."""
        return self.dropped_samples / self.format.sample_rate_hz

    def problems(self) -> list[str]:
        """What went wrong so far, in one sentence each."""
        problems = []
        if self.dropped_samples:
            problems.append(f"{self.dropped_s:.1f} s of audio were lost: interpreting takes longer here than speaking")
        if self.overflows:
            problems.append(f"the system lost audio ({self.overflows}x): this machine has too much else to do")
        return problems + ([self._problem] if self._problem else [])

    def stop(self) -> None:
        """Take no more audio; what has been taken is still given. Called on the event loop."""
        self._ended = True
        self._arrived.set()

    async def blocks(self) -> AsyncIterator[bytes]:
        """Yield what has come, whole sample frames, until `stop` or until the device gives no more."""
        ended = False
        while not ended:
            ended = self._ended  # before the last look: what came earlier must not be left behind
            if not ended and not self._blocks:
                try:
                    async with asyncio.timeout(_SILENT_DEVICE_S):
                        await self._arrived.wait()
                except TimeoutError:
                    self._problem = (
                        f"{self.device.name} has given no audio for {_SILENT_DEVICE_S:g} s: is it plugged in?"
                    )
                    self._ended = True
                self._arrived.clear()
            waiting = [self._blocks.popleft() for _ in range(len(self._blocks))]
            if waiting:
                self._given_samples += sum(map(len, waiting)) // self.format.bytes_per_sample
                yield b"".join(waiting)

    def _open(self) -> Any:
        sd = _sounddevice()
        stream = None
        try:
            stream = sd.RawInputStream(
                device=self.device.index,
                samplerate=self.format.sample_rate_hz,
                channels=self.format.channels,
                dtype="int16",
                blocksize=self.format.sample_rate_hz // _BLOCKS_PER_S,
                callback=self._take,
                finished_callback=self._finish,
            )
            stream.start()
        except sd.PortAudioError as error:
            if stream is not None:
                stream.close()
            raise _unusable(self.device, error) from None
        return stream

    def _take(self, block: Any, samples: int, _: object, status: Any) -> None:
        """Take one block; called on PortAudio's thread, which must not wait."""
        if self._ended:
            return
        # At the start, what came before this program could take it is no loss.
        self.overflows += bool(status.input_overflow) and self._heard_samples > self.format.sample_rate_hz
        if self.waiting_s >= _MAX_WAITING_S:
            self.dropped_samples += samples
            return
        self._heard_samples += samples
        self._blocks.append(bytes(block))
        self._wake()

    def _finish(self) -> None:
        """Note that the stream has ended; called on PortAudio's thread."""
        if not self._ended:
            self._problem = f"{self.device.name} has stopped: is it still plugged in?"
            self._ended = True
            self._wake()

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._arrived.set)


def _usable_format(device: Device) -> AudioFormat:
    """Mono where the device can do it, else stereo, else all of its channels; at its own rate."""
    sd = _sounddevice()
    refused: Exception | None = None
    for channels in sorted({1, min(2, device.channels), device.channels}):
        fmt = AudioFormat("s16le", device.rate_hz, channels)
        try:
            sd.check_input_settings(device.index, channels, "int16", samplerate=fmt.sample_rate_hz)
        except sd.PortAudioError as error:
            refused = refused or error
        else:
            return fmt
    raise _unusable(device, refused)


def _unusable(device: Device, error: object) -> DragomanError:
    reason = " ".join(str(error).split())
    return DragomanError(
        "device_unusable", f"{device.name} cannot be recorded from ({reason}): choose another --device"
    )


def _sounddevice() -> Any:
    try:
        import sounddevice
    except ModuleNotFoundError:
        raise DragomanError(
            "mic_unavailable", "recording needs the package sounddevice: pip install 'dragoman[mic]'"
        ) from None
    except OSError:
        raise DragomanError(
            "mic_unavailable",
            "recording needs the library PortAudio: install libportaudio2 (Debian, Ubuntu) or portaudio (Fedora, brew)",
        ) from None
    return sounddevice
