import asyncio
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import microphone
from client.microphone import Device, Microphone, choose_device, input_devices
from streaming.audio import AudioFormat
from streaming.errors import DragomanError
from tests import fake_sounddevice
from tests.fakes import tone

ROOT = Path(__file__).parents[2]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[Device]:
    monkeypatch.setitem(sys.modules, "sounddevice", fake_sounddevice)
    return input_devices()


@pytest.fixture
def plays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, devices: list[Device]) -> Any:
    """Makes the microphone play levels and then do something; gives what it plays."""

    def make(levels: list[float], end: str = "unplug", pace: float = 20, rate_hz: int = 16_000) -> bytes:
        return fake_sounddevice.play(monkeypatch, tmp_path / "mic.wav", tone(levels, rate_hz), end, pace, rate_hz)

    return make


def the_default() -> Microphone:
    return Microphone(choose_device(input_devices(), None))


def test_devices_in_a_list(devices: list[Device]) -> None:
    assert [str(device) for device in devices] == [
        "   1  HDMI In (ALSA), 2 channels, 48000 Hz",
        "*  2  USB Microphone (ALSA), 1 channel, 16000 Hz",
        "   3  Broken Mic (ALSA), 2 channels, 44100 Hz",
    ]


@pytest.mark.parametrize(
    ("wanted", "index"), [(None, 2), ("1", 1), ("usb", 2), ("hdmi in", 1), ("broken MIC", 3), ("Microphone", 2)]
)
def test_a_device_by_number_or_name(wanted: str | None, index: int, devices: list[Device]) -> None:
    assert choose_device(devices, wanted).index == index


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [("mic", "2 input devices match 'mic'"), ("0", "no input device matches '0'"), ("x", "no inp")],
)
def test_no_such_device(wanted: str, sentence: str, devices: list[Device]) -> None:
    with pytest.raises(DragomanError, match=sentence) as caught:
        choose_device(devices, wanted)
    assert caught.value.code == "no_device"


def test_without_a_default_it_is_the_first(devices: list[Device], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_sounddevice, "default", SimpleNamespace(device=[-1, -1]))
    assert choose_device(input_devices(), None).index == 1
    with pytest.raises(DragomanError, match="no input device that PortAudio can see"):
        choose_device([], None)


def test_a_device_that_has_no_mono_is_recorded_in_stereo(devices: list[Device]) -> None:
    assert Microphone(choose_device(devices, "hdmi")).format == AudioFormat("s16le", 48_000, 2)
    with pytest.raises(DragomanError, match=r"Broken Mic cannot be recorded from \(Invalid number") as caught:
        Microphone(choose_device(devices, "broken"))
    assert caught.value.code == "device_unusable"
    assert "\n" not in str(caught.value)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(DragomanError, match=r"pip install 'dragoman\[mic\]'") as caught:
        input_devices()
    assert caught.value.code == "mic_unavailable"
    monkeypatch.delitem(sys.modules, "sounddevice")
    (tmp_path / "sounddevice.py").write_text("raise OSError('PortAudio library not found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DragomanError, match="libportaudio2") as caught:
        input_devices()
    assert caught.value.code == "mic_unavailable"


def test_the_real_library_lists_devices_or_says_that_there_are_none() -> None:
    code = "import client.microphone as m\nfor d in m.input_devices(): print(d)\nprint('end')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if "mic_unavailable" in result.stderr or "DragomanError: recording needs" in result.stderr:
        pytest.skip("sounddevice or PortAudio is not installed")
    assert result.stdout.endswith("end\n"), result.stderr


RECORD = """
import asyncio, sys
from client.microphone import Microphone, choose_device, input_devices
devices = [device for device in input_devices() if device.name == "recording"]
if not devices: sys.exit(3)
async def main():
    heard = b""
    async with Microphone(choose_device(devices, None)) as mic:
        async for block in mic.blocks():
            heard += block
            if len(heard) > 100_000: mic.stop()
    sys.stdout.buffer.write(heard)
asyncio.run(main())
"""


def test_the_real_library_gives_the_audio_of_a_device(tmp_path: Path) -> None:
    """Of a device of ALSA's that plays a file, so that it needs no sound card."""
    samples = np.random.default_rng(0).integers(-32768, 32767, 40_000).astype("<i2")
    (tmp_path / "played.raw").write_bytes(samples.tobytes())
    device = f'type file slave.pcm "null" file "/dev/null" infile "{tmp_path}/played.raw" format "raw"'
    (tmp_path / ".asoundrc").write_text(f'pcm.recording {{ {device} hint {{ show on description "recording" }} }}\n')
    environment = {**os.environ, "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", RECORD], cwd=ROOT, capture_output=True, env=environment)
    if result.returncode == 3 or b"mic_unavailable" in result.stderr or b"recording needs" in result.stderr:
        pytest.skip("sounddevice, PortAudio or ALSA is not installed")
    assert result.returncode == 0, result.stderr
    assert result.stdout[:80_000] == samples.tobytes()


@given(st.lists(st.floats(0, 0.05), min_size=1, max_size=20))
@settings(max_examples=10, deadline=None)
def test_whatever_the_reader_does_it_gets_all_audio_in_order(pauses_s: list[float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "sounddevice", fake_sounddevice)
        patch.setattr(fake_sounddevice.RawInputStream, "_play", play_numbers)

        async def heard() -> bytes:
            pieces = []
            async with the_default() as mic:
                async for block in mic.blocks():
                    pieces.append(block)
                    await asyncio.sleep(pauses_s[len(pieces) % len(pauses_s)])
                assert (mic.dropped_samples, mic.waiting_s) == (0, 0)
            return b"".join(pieces)

        assert asyncio.run(heard()) == NUMBERS.tobytes()


NUMBERS = np.arange(30_000, dtype=np.int16)


def play_numbers(self: fake_sounddevice.RawInputStream) -> None:
    """In blocks of any size, without a pause."""
    rng = np.random.default_rng(0)
    places = [0, *sorted(rng.integers(0, len(NUMBERS), 40)), len(NUMBERS)]
    for start, end in zip(places, places[1:], strict=False):
        self._give(NUMBERS[start:end])
    self.settings["finished_callback"]()


async def test_a_reader_that_is_behind_loses_audio_and_is_told_how_much(
    plays: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(microphone, "_MAX_WAITING_S", 2)
    monkeypatch.setattr(fake_sounddevice, "SLOWEST_CALLBACK_S", 0.0)
    audio = plays([0.2] * 25, pace=0)  # 10 s at once
    async with the_default() as mic:
        async with asyncio.timeout(20):
            await mic._arrived.wait()
            await asyncio.sleep(1)
        assert mic.waiting_s == 2
        pieces = [block async for block in mic.blocks()]
    assert b"".join(pieces) == audio[: 2 * 32_000]
    assert (mic.dropped_s, mic.waiting_s) == (8, 0)
    assert mic.problems()[0].startswith("8.0 s of audio were lost")
    assert fake_sounddevice.SLOWEST_CALLBACK_S < 0.1


async def test_a_stop_gives_what_has_been_taken_and_no_more(plays: Any) -> None:
    audio = plays([0.2] * 50, pace=4)
    async with the_default() as mic:
        blocks = mic.blocks()
        pieces = [await anext(blocks)]
        await asyncio.sleep(0.3)
        mic.stop()
        pieces += [block async for block in blocks]
    heard = b"".join(pieces)
    assert heard == audio[: len(heard)]
    assert 0.9 < len(heard) / 32_000 < 10
    assert mic.problems() == []


async def test_a_device_that_is_unplugged(plays: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microphone, "_SILENT_DEVICE_S", 0.2)
    for end, sentence in (("unplug", "has stopped"), ("hang", "has given no audio for 0.2 s")):
        audio = plays([0.2], end)
        async with the_default() as mic:
            assert b"".join([block async for block in mic.blocks()]) == audio
        assert len(mic.problems()) == 1
        assert sentence in mic.problems()[0]


async def test_audio_that_the_system_lost_is_counted(plays: Any) -> None:
    plays([0.2] * 10, "unplug")
    async with the_default() as mic:
        fake_sounddevice.STARTED[-1].overflow = True
        async for _ in mic.blocks():
            pass
    assert mic.overflows > 0
    assert any("the system lost audio" in problem for problem in mic.problems())


async def test_a_device_that_another_program_holds(plays: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(self: fake_sounddevice.RawInputStream) -> None:
        raise fake_sounddevice.PortAudioError("Device unavailable [PaErrorCode -9985]")

    plays([0.2])
    monkeypatch.setattr(fake_sounddevice.RawInputStream, "start", busy)
    with pytest.raises(DragomanError, match="Device unavailable"):
        async with the_default():
            pass
