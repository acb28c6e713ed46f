"""An hour of speech with pauses, noise and music: is every sentence heard, nothing repeated, nothing stuck?

    python -m benchmarks.hour samples/jfk.flac --minutes 60

The recording is cut into its phrases. A stream is drawn from them, at varied speed and loudness, with pauses between
them: digital silence up to a minute, white noise, mains hum, and chords that change like music. It is pushed in pieces
of 80 ms. So that a weak model can be judged, a phrase of the stream is compared with what the same model hears in the
same samples alone: a decoder that had stuck, or that went on about the past, would hear less or more as time goes by.
The words themselves may differ: each phrase is heard in the light of those before it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import jiwer
import numpy as np
import soxr
import torch
import typer

from benchmarks.flatness import Minute, measure
from benchmarks.speed import CONFIG, PIECE_SAMPLES, read_audio
from models.checkpoint import load_recognizer
from models.recognizer import Recognizer
from streaming.events import Event, Word
from streaming.session import Session, SessionConfig

RATE_HZ: Final = 16000
#: Where the recording is softer than this part of its loudest 20 ms for this long, a phrase ends; shorter ones than
#: this are left out, because a weak model may hear nothing in a syllable.
PHRASE_END_LEVEL, PHRASE_END_S, PHRASE_MIN_S = 0.05, 0.3, 1.0
#: A word belongs to a phrase if its middle is in it, or so close: recognisers place words late.
SLACK_MS = 400
#: Silence around a phrase that is heard alone.
MARGIN_S = 1.0
PAUSES: Final = ("silence", "noise", "hum", "music")
MAX_LOOP_WORDS = 8


class Part(NamedTuple):
    """A stretch of the stream."""

    kind: str  # "speech" or one of PAUSES
    samples: np.ndarray


@dataclass(frozen=True)
class Phrase:
    """A phrase of the stream.

    Attributes:
        start_ms: Where it begins.
        after: What was before it.
        heard: Its words in the stream.
        alone: The words of the same samples alone.
    """

    start_ms: int
    after: str
    heard: tuple[str, ...]
    alone: tuple[str, ...]


@dataclass(frozen=True)
class Heard:
    """What came of a stream.

    Attributes:
        minutes: Memory, time and words, minute by minute.
        phrases: In their order.
        words_in_pauses: Words that no phrase explains.
        pauses_s: Length of all pauses.
        longest_loop: How often a group of words was said in direct succession, at most.
    """

    minutes: list[Minute]
    phrases: list[Phrase]
    words_in_pauses: int
    pauses_s: float
    longest_loop: int

    @property
    def missed(self) -> list[Phrase]:
        """Phrases of which the stream has nothing, though they are heard alone."""
        return [phrase for phrase in self.phrases if phrase.alone and not phrase.heard]

    @property
    def difference(self) -> float:
        """Word error rate of the phrases in the stream, their words alone being the reference."""
        pairs = [(" ".join(p.alone), " ".join(p.heard)) for p in self.phrases if p.alone]
        return float(jiwer.wer([alone for alone, _ in pairs], [heard for _, heard in pairs]))

    def kept(self, start: float = 0.0, stop: float = 1.0) -> float:
        """Words of the phrases in the stream over their words alone, in a part of the stream."""
        part = self.phrases[round(start * len(self.phrases)) : round(stop * len(self.phrases))]
        return sum(len(p.heard) for p in part) / max(1, sum(len(p.alone) for p in part))


def phrases(audio: np.ndarray) -> list[np.ndarray]:
    """Cuts a recording where it pauses."""
    frame = RATE_HZ // 50
    level = np.sqrt((audio[: len(audio) // frame * frame].reshape(-1, frame) ** 2).mean(1))
    loud = np.flatnonzero(level > PHRASE_END_LEVEL * level.max())
    cuts = np.flatnonzero(np.diff(loud) > PHRASE_END_S * 50)
    spans = [(part[0], part[-1] + 1) for part in np.split(loud, cuts + 1)]
    return [audio[max(0, a - 2) * frame : (b + 2) * frame] for a, b in spans if b - a >= PHRASE_MIN_S * 50]


def parts(spoken: Sequence[np.ndarray], seed: int) -> Iterator[Part]:
    """An endless stream of phrases and pauses; speech begins it and every pause is followed by speech."""
    rng = np.random.default_rng(seed)
    while True:
        for _ in range(rng.integers(1, 4)):
            phrase = spoken[int(rng.integers(len(spoken)))]
            speed, gain = rng.uniform(0.9, 1.1), 10 ** rng.uniform(-0.6, 0.2)
            faster = soxr.resample(phrase, RATE_HZ * speed, RATE_HZ).astype(np.float32)
            yield Part("speech", (gain * faster).clip(-1, 1))
            yield Part("silence", np.zeros(int(rng.uniform(0.5, 1.5) * RATE_HZ), np.float32))
        kind = PAUSES[rng.integers(len(PAUSES))]
        seconds = rng.uniform(20, 60) if rng.random() < 0.1 else rng.uniform(2, 15)
        yield Part(kind, pause(kind, int(seconds * RATE_HZ), rng))


def pause(kind: str, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Silence, or a sound that is not speech, at -40 to -20 dB."""
    time = np.arange(samples) / RATE_HZ
    if kind == "silence":
        sound = np.zeros(samples)
    elif kind == "noise":
        sound = rng.standard_normal(samples)
    elif kind == "hum":
        sound = np.sum([np.sin(2 * np.pi * 50 * k * time) / k for k in range(1, 8)], 0)
    else:  # a chord every half second, with overtones that die away
        sound = np.zeros(samples)
        for start in range(0, samples, RATE_HZ // 2):
            t = time[: samples - start][: RATE_HZ // 2]
            root = 110 * 2 ** (rng.integers(0, 12) / 12)
            tones = [root * ratio * k for ratio in (1, 1.26, 1.5) for k in (1, 2, 3)]
            sound[start : start + len(t)] = np.sum([np.sin(2 * np.pi * f * t) for f in tones], 0) * np.exp(-3 * t)
    gain = 10 ** rng.uniform(-2, -1) / max(float(np.sqrt((sound**2).mean())), 1e-9)
    return (gain * sound).clip(-1, 1).astype(np.float32) if kind != "silence" else sound.astype(np.float32)


def longest_loop(words: Sequence[str]) -> int:
    """How often a group of at most eight words is said in direct succession."""
    most = min(1, len(words))
    for size in range(1, MAX_LOOP_WORDS + 1):
        run = 0
        for i in range(size, len(words)):
            run = run + 1 if words[i] == words[i - size] else 0
            most = max(most, 1 + run // size)
    return most


def words_of(events: Sequence[Event]) -> list[Word]:
    """The words that events tell."""
    return [word for event in events for word in getattr(event, "words", ())]


def hear(recognizer: Recognizer, spoken: Sequence[np.ndarray], minutes: int, config: SessionConfig, seed: int) -> Heard:
    """Runs a stream of so many minutes, and each of its phrases alone.

    Args:
        recognizer: The model.
        spoken: Phrases to draw from, ``float32`` at 16 kHz.
        minutes: Length of the stream.
        config: Of the sessions; the audio format must be 16 kHz mono float.
        seed: Of the stream.
    """

    def pieces() -> Iterator[np.ndarray]:
        rest = np.zeros(0, np.float32)
        for part in parts(spoken, seed):
            rest = np.concatenate([rest, part.samples])
            whole = len(rest) // PIECE_SAMPLES * PIECE_SAMPLES
            yield from rest[:whole].reshape(-1, PIECE_SAMPLES)
            rest = rest[whole:]

    events: list[Event] = []
    rows = measure(recognizer, pieces(), minutes, config, events)
    # The stream is drawn again, so that memory that grows is the session's.
    return _compared(recognizer, parts(spoken, seed), words_of(events), rows, config)


def _compared(
    recognizer: Recognizer,
    drawn: Iterator[Part],
    words: list[Word],
    minutes: list[Minute],
    config: SessionConfig,
) -> Heard:
    """Gives the words to the phrases."""
    end_ms, ms = 60_000 * len(minutes), RATE_HZ // 1000
    found, explained, before, pauses_s = [], 0, "nothing", 60.0 * len(minutes)
    margin = np.zeros(int(MARGIN_S * RATE_HZ), np.float32)
    at = 0
    for part in drawn:
        start_ms, stop_ms = at // ms, (at + len(part.samples)) // ms
        if start_ms >= end_ms:
            break
        at += len(part.samples)
        if part.kind == "speech" and stop_ms + 2000 < end_ms:
            heard = [w.word for w in words if start_ms <= (w.start_ms + w.end_ms) / 2 < stop_ms + SLACK_MS]
            session = Session(recognizer, config)
            alone = session.push(np.concatenate([margin, part.samples, margin])) + session.finish()
            found.append(Phrase(start_ms, before, tuple(heard), tuple(w.word for w in words_of(alone))))
            explained += len(heard)
            pauses_s -= (stop_ms - start_ms) / 1000
        before = part.kind
    known = [w for w in words if found and w.start_ms < found[-1].start_ms]
    last = len(found[-1].heard) if found else 0
    return Heard(minutes, found, len(known) - explained + last, pauses_s, longest_loop([w.word for w in words]))


def run(
    recording: Annotated[Path, typer.Argument(help="Any sound file that soundfile opens, with pauses in it.")],
    minutes: Annotated[int, typer.Option(help="Minutes of audio, at least 6.", min=6)] = 60,
    model: Annotated[Path | None, typer.Option(help="Model folder; the embedded one by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the stream.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prints what a stream with pauses loses, adds and repeats, and whether memory or time grows."""
    torch.set_num_threads(1)
    spoken = phrases(read_audio(recording))
    heard = hear(load_recognizer(model), spoken, minutes, CONFIG, seed)
    early, late = heard.minutes[4], heard.minutes[-1]
    figures = {
        "phrases": len(heard.phrases),
        "phrases_missed": len(heard.missed),
        "word_error_rate_against_alone": heard.difference,
        "words_over_words_alone": heard.kept(),
        "the_same_in_the_first_third": heard.kept(0, 1 / 3),
        "the_same_in_the_last_third": heard.kept(2 / 3, 1),
        "words": late["words"],
        "words_in_pauses_per_minute": heard.words_in_pauses / heard.pauses_s * 60,
        "longest_loop": heard.longest_loop,
        "resident_mb_5_min": early["resident_mb"],
        "resident_mb_end": late["resident_mb"],
        "step_ms_5_min": early["step_ms"],
        "step_ms_end": late["step_ms"],
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps(figures) if as_json else "\n".join(f"{name:32} {value:9.3f}" for name, value in figures.items()))


if __name__ == "__main__":
    typer.run(run)
