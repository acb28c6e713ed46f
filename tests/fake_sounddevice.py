"""Stands where sounddevice would be: two input devices, one of which plays a recording.

A program of its own imports it by way of `install`, and is told by the environment what to play:

    FAKE_MIC_FILE   the recording; without it, silence
    FAKE_MIC_PACE   times real time, 1 if left out; 0 as fast as it can
    FAKE_MIC_END    what comes after it: interrupt (Ctrl-C, the default), unplug, hang or silence
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

STARTED: list["RawInputStream"] = []
SLOWEST_CALLBACK_S = 0.0


class PortAudioError(Exception):
    pass


default = SimpleNamespace(device=[2, 0])


def query_hostapis() -> tuple[dict[str, Any], ...]:
    return ({"name": "ALSA"},)


def query_devices() -> list[dict[str, Any]]:
    found = [
        ("Speakers", 0, 48_000.0),
        ("HDMI In", 2, 48_000.0),
        ("USB  Microphone", 1, rate_hz()),
        ("Broken Mic", 2, 44_100.0),
    ]
    return [
        {"name": name, "hostapi": 0, "max_input_channels": channels, "default_samplerate": rate}
        for name, channels, rate in found
    ]


def rate_hz() -> float:
    file = os.environ.get("FAKE_MIC_FILE")
    return float(soundfile.info(file).samplerate) if file else 16_000.0


def check_input_settings(device: int, channels: int, dtype: str, samplerate: float) -> None:
    if device == 3 or (device == 1 and channels == 1):
        raise PortAudioError("Invalid number of channels [PaErrorCode -9998]\n")


class RawInputStream:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.closed = threading.Event()
        self.overflow = False
        self._thread = threading.Thread(target=self._play, daemon=True)
        assert settings["dtype"] == "int16"

    def start(self) -> None:
        STARTED.append(self)
        self._thread.start()

    def close(self) -> None:
        self.closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _play(self) -> None:
        rate, block, channels = (self.settings[key] for key in ("samplerate", "blocksize", "channels"))
        file = os.environ.get("FAKE_MIC_FILE")
        audio = soundfile.read(file, dtype="int16", always_2d=True)[0] if file else np.zeros((0, channels), np.int16)
        assert audio.shape[1] == channels
        pace = float(os.environ.get("FAKE_MIC_PACE", "1"))
        started_s = time.monotonic()
        for start in range(0, len(audio), block):
            if pace:
                time.sleep(max(0.0, started_s + (start + block) / rate / pace - time.monotonic()))
            if self.closed.is_set():
                return
            self._give(audio[start : start + block])
        match os.environ.get("FAKE_MIC_END", "interrupt"):
            case "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            case "unplug":
                self.settings["finished_callback"]()
            case "silence":
                while not self.closed.wait(block / rate):
                    self._give(np.zeros((block, channels), np.int16))
        self.closed.wait()

    def _give(self, samples: Any) -> None:
        global SLOWEST_CALLBACK_S
        buffer = bytearray(samples.tobytes())
        started_s = time.monotonic()
        status = SimpleNamespace(input_overflow=self.overflow)
        self.settings["callback"](memoryview(buffer), len(samples), None, status)
        SLOWEST_CALLBACK_S = max(SLOWEST_CALLBACK_S, time.monotonic() - started_s)
        buffer[:] = b"\x55" * len(buffer)  # PortAudio uses its buffer again


def install() -> None:
    sys.modules["sounddevice"] = sys.modules[__name__]


def play(
    monkeypatch: pytest.MonkeyPatch, file: Path, samples: np.ndarray, end: str, pace: float, rate_hz: int
) -> bytes:
    """Makes the microphone play samples, and then do something; what it plays, as it does."""
    pcm = np.rint(samples * 32767).astype(np.int16)
    soundfile.write(file, pcm, rate_hz)
    monkeypatch.setenv("FAKE_MIC_FILE", str(file))
    monkeypatch.setenv("FAKE_MIC_PACE", str(pace))
    monkeypatch.setenv("FAKE_MIC_END", end)
    return pcm.tobytes()
