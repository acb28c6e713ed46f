"""Public synthetic voices behind one interface: draw a voice, speak a text, get 16 kHz samples.

An engine varies what its few voices allow (pitch, pace, and for recorded voices the apparent size of the
speaker), because a model that hears one voice a thousand times learns the voice. Whole voices are held out to see
whether that worked.
"""

from __future__ import annotations

import io
import subprocess
import tempfile
import threading
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

__all__ = [
    "SAMPLE_RATE_HZ",
    "Engine",
    "Espeak",
    "Festival",
    "Flite",
    "RHVoice",
    "Samples",
    "SpeechError",
    "Voice",
    "at_16_khz",
    "run_program",
]

SAMPLE_RATE_HZ = 16_000
Samples = NDArray[np.float32]

# No sentence takes longer; a program that hangs on one must not stop a night of synthesis.
_PROGRAM_TIMEOUT_S = 60.0


class SpeechError(RuntimeError):
    """An engine could not speak a text; the message says which program failed and how."""


@dataclass(frozen=True)
class Voice:
    """One drawn way of speaking.

    Attributes:
        speaker: Who a listener would say is speaking; the manifest's `speaker`.
        name: The engine's own name of the voice.
        pitch: Pitch relative to the voice's usual one.
        pace: Speed of speech relative to the voice's usual one.
        size: Playback speed of the finished waveform: above 1 the speaker sounds smaller (all formants go
            up).
    """

    speaker: str
    name: str
    pitch: float = 1.0
    pace: float = 1.0
    size: float = 1.0


class Engine(Protocol):
    """A speech synthesiser with its voices.

    Attributes:
        name: Short name: folder and manifest are called after it.
        licence: Licence of the voices, for the manifest.
        held_out: Voices that `draw` never returns unless they are asked for by name.
    """

    name: str
    licence: str
    held_out: Sequence[str]

    def draw(self, rng: np.random.Generator, name: str | None = None) -> Voice:
        """Draws a voice: any that is not held out, or the one called `name`; the rest of it is random."""

    def speak(self, text: str, voice: Voice) -> Samples:
        """Speaks a text.

        Args:
            text: A sentence or several, numbers spelled out.
            voice: What `draw` returned.

        Returns:
            float32 samples [n] at 16 kHz within -1..1.

        Raises:
            SpeechError: If the engine fails or stays silent.
        """


def run_program(command: Sequence[str], text: str = "") -> bytes:
    """Runs a synthesis program with `text` as its standard input and returns its standard output.

    Raises:
        SpeechError: If it fails or hangs.
    """
    try:
        done = subprocess.run(
            command, input=text.encode(), capture_output=True, timeout=_PROGRAM_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise SpeechError(f"{command[0]} did not finish within {_PROGRAM_TIMEOUT_S:.0f} s on {text!r}") from error
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip()
        raise SpeechError(f"{command[0]} ended with status {done.returncode}: {reason}")
    return done.stdout


def at_16_khz(samples: Samples, rate_hz: float) -> Samples:
    """Resamples to 16 kHz and keeps within -1..1.

    Raises:
        SpeechError: If there is nothing but silence, since a transcript would be learned for it.
    """
    if samples.size == 0 or float(np.abs(samples).max()) < 1e-3:
        raise SpeechError("the synthesiser produced silence")
    if rate_hz != SAMPLE_RATE_HZ:
        samples = soxr.resample(samples, rate_hz, SAMPLE_RATE_HZ)
    return np.clip(samples, -1.0, 1.0).astype(np.float32)


# Mean fundamental frequency of each flite voice in Hz.
_FLITE_PITCH_HZ = {"kal16": 105.0, "rms": 105.0, "slt": 170.0, "awb": 130.0}
# Playback speeds that make other speakers of a recorded voice.
_SIZES = (0.86, 0.9, 0.94, 0.97, 1.0, 1.03, 1.06, 1.1, 1.14)

_ESPEAK_ACCENTS = (
    *("en-us", "en-us", "en-us", "en-gb", "en-gb-x-rp"),
    *("en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-us-nyc"),
)
# Timbres that are a voice rather than an effect, and that a recogniser (Whisper tiny.en) can follow: whisper,
# croak, robots that clip words and six that it misheard in more than 40 % of the words are left out.
_ESPEAK_TIMBRES = tuple(
    "Alex Alicia Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Jacky Mario Michael Mike "
    "Nguyen Storm adam anika antonio aunty benjamin caleb david ed edward edward2 f1 f2 f3 f5 grandma "
    "grandpa gustave iven iven2 iven3 iven4 john klatt klatt2 klatt3 klatt4 klatt5 klatt6 linda m1 m2 "
    "m3 m4 m5 m6 m8 max michel miguel norbert pablo paul pedro quincy rob robert sandro shelby steph "
    "steph2 steph3 travis victor zac".split()
)


class Flite:
    """CMU Flite (Debian `flite`): four voices, stretched to many sizes of speaker.

    Playing a voice faster or slower moves its formants as a shorter or longer vocal tract does (vocal tract
    length perturbation, Jaitly and Hinton 2013); the pace of the synthesis makes up for the change of
    duration.
    """

    name = "flite"
    licence = "synthetic (CMU Flite, permissive)"
    held_out: Sequence[str] = ("awb",)

    def draw(self, rng: np.random.Generator, name: str | None = None) -> Voice:
        """See `Engine.draw`; a held-out voice keeps its own size."""
        # Statistical voices first: kal16 is a diphone voice, further from a human one.
        name = name or str(rng.choice(["slt", "rms", "kal16"], p=[0.4, 0.35, 0.25]))
        size = 1.0 if name in self.held_out else float(rng.choice(_SIZES))
        pitch, pace = float(rng.uniform(0.88, 1.15)), float(rng.uniform(0.88, 1.2))
        return Voice(speaker=f"flite-{name}-{round(size * 100)}", name=name, pitch=pitch, pace=pace, size=size)

    def speak(self, text: str, voice: Voice) -> Samples:
        """See `Engine.speak`."""
        with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
            wav = Path(folder) / "speech.wav"
            # Duration grows with the size that playback takes away again, so that `pace` alone sets the speed
            # heard.
            stretch, pitch_hz = voice.size / voice.pace, _FLITE_PITCH_HZ[voice.name] * voice.pitch
            settings = [
                "--setf",
                f"duration_stretch={stretch:.3f}",
                "--setf",
                f"int_f0_target_mean={pitch_hz:.1f}",
            ]
            run_program(["flite", "-voice", voice.name, *settings, "-t", text, "-o", str(wav)])
            samples, rate_hz = soundfile.read(wav, dtype="float32")
        return at_16_khz(samples, rate_hz * voice.size)


class Espeak:
    """eSpeak NG (Debian `espeak-ng`): one formant synthesiser with many timbres, American and British."""

    name = "espeak"
    licence = "synthetic (eSpeak NG, GPL-3 program)"
    held_out: Sequence[str] = ("en-us+f4", "en-gb+m7")

    def draw(self, rng: np.random.Generator, name: str | None = None) -> Voice:
        """See `Engine.draw`."""
        name = name or f"{rng.choice(_ESPEAK_ACCENTS)}+{rng.choice(_ESPEAK_TIMBRES)}"
        pitch, pace = int(rng.integers(30, 71)) / 50, int(rng.integers(140, 191)) / 165
        return Voice(speaker=f"espeak-{name}", name=name, pitch=pitch, pace=pace)

    def speak(self, text: str, voice: Voice) -> Samples:
        """See `Engine.speak`."""
        pitch, words_per_minute = round(voice.pitch * 50), round(voice.pace * 165)
        wav = run_program(
            [
                "espeak-ng",
                "-v",
                voice.name,
                "-p",
                str(pitch),
                "-s",
                str(words_per_minute),
                "--stdin",
                "--stdout",
            ],
            text,
        )
        header = soundfile.info(io.BytesIO(wav))
        # The header of a stream has no true length: the samples are read as what follows its 44 bytes.
        pcm = np.frombuffer(wav[44 : len(wav) - len(wav) % 2], dtype="<i2")
        return at_16_khz(pcm.astype(np.float32) / np.float32(32768), header.samplerate)


# Mean fundamental frequency of `ked` in Hz, its deviation, and the factor by which its own set-up slows it.
_KED_PITCH_HZ, _KED_PITCH_DEVIATION_HZ, _KED_STRETCH = 105.0, 15.0, 1.1


class Festival:
    """Festival (Debian `festival`) with Kurt's diphones (`festvox-kdlpc16k`): one speaker, of many sizes.

    Festival takes longer to start than to speak a sentence, so that one process a thread speaks all of them.
    """

    name = "festival"
    licence = "synthetic (Festival ked diphones, University of Edinburgh, permissive)"
    held_out: Sequence[str] = ()

    def __init__(self) -> None:
        """Starts nothing: a process starts with the first sentence of a thread."""
        self._local = threading.local()

    def draw(self, rng: np.random.Generator, name: str | None = None) -> Voice:
        """See `Engine.draw`."""
        name, size = name or "ked", float(rng.choice(_SIZES))
        pitch, pace = float(rng.uniform(0.88, 1.15)), float(rng.uniform(0.88, 1.2))
        return Voice(speaker=f"festival-{name}-{round(size * 100)}", name=name, pitch=pitch, pace=pace, size=size)

    def speak(self, text: str, voice: Voice) -> Samples:
        """See `Engine.speak`."""
        mean_hz, deviation_hz = _KED_PITCH_HZ * voice.pitch, _KED_PITCH_DEVIATION_HZ * voice.pitch
        # Festival reads bytes: what is left of an accent would be spelled out.
        plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
        quoted = plain.replace("\\", " ").replace('"', " ")
        with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
            wav = Path(folder) / "speech.wav"
            # One expression, so that what fails keeps the rest from being spoken.
            self._evaluate(
                f"(begin (voice_{voice.name}_diphone) "
                f"(set! int_lr_params '((target_f0_mean {mean_hz:.1f}) (target_f0_std {deviation_hz:.1f}) "
                "(model_f0_mean 170) (model_f0_std 34))) "
                f"(Parameter.set 'Duration_Stretch {_KED_STRETCH * voice.size / voice.pace:.3f}) "
                f'(utt.save.wave (utt.synth (Utterance Text "{quoted}")) "{wav}" \'riff))'
            )
            if not wav.exists():
                raise SpeechError(f"festival could not speak {text!r}")
            samples, rate_hz = soundfile.read(wav, dtype="float32")
        return at_16_khz(samples, rate_hz * voice.size)

    def _evaluate(self, expression: str) -> None:
        """Has this thread's Festival evaluate a Scheme expression, and waits until it has.

        Raises:
            SpeechError: If the process ends or hangs; the next call starts another. A failed expression is
                none: it shows by what it did not write.
        """
        process = getattr(self._local, "process", None)
        if process is None or process.poll() is not None:
            command = ["festival", "--pipe"]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._local.process = process
        assert process.stdout is not None
        timer = threading.Timer(_PROGRAM_TIMEOUT_S, process.kill)
        timer.start()
        try:
            print(expression, '(format t "done\\n") (fflush nil)', sep="\n", file=process.stdin, flush=True)
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if not answer:
            process.kill()  # it may not have ended yet
            process.wait()
            raise SpeechError(f"festival ended or took more than {_PROGRAM_TIMEOUT_S:.0f} s: {expression}")


class RHVoice:
    """RHVoice (built from source): statistical voices of CMU ARCTIC speakers.

    `clb` is the new speaker; `bdl` and `slt` are heard in recordings too, `slt` also from flite. `alan`
    must never be drawn or installed for training: it was made from the recordings of `awb`, whom `Flite`
    holds out. `lyubov` and `evgeniy-eng` are not for models that ship (CC BY-NC-ND 4.0).
    """

    name = "rhvoice"
    licence = "synthetic (RHVoice, GPL-3 program; voice of CMU ARCTIC, permissive)"
    held_out: Sequence[str] = ("alan",)

    def draw(self, rng: np.random.Generator, name: str | None = None) -> Voice:
        """See `Engine.draw`."""
        name = name or str(rng.choice(["clb", "bdl", "slt"], p=[0.75, 0.125, 0.125]))
        size = float(rng.choice(_SIZES))
        pitch, pace = float(rng.uniform(0.88, 1.15)), float(rng.uniform(0.88, 1.2))
        return Voice(speaker=f"rhvoice-{name}-{round(size * 100)}", name=name, pitch=pitch, pace=pace, size=size)

    def speak(self, text: str, voice: Voice) -> Samples:
        """See `Engine.speak`."""
        rate, pitch = round(100 * voice.pace / voice.size), round(100 * voice.pitch)
        with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
            wav = Path(folder) / "speech.wav"
            settings = ["-p", voice.name, "-r", str(rate), "-t", str(pitch), "-o", str(wav)]
            run_program(["RHVoice-test", *settings], text)
            samples, rate_hz = soundfile.read(wav, dtype="float32")
        return at_16_khz(samples, rate_hz * voice.size)


def _memory_folder() -> str | None:
    """A folder in memory for files that live for milliseconds, or None for the system's own choice."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
