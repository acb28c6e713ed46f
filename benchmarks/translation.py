"""A translator's time for a word, and an hour of talk: does anything grow, loop or fall silent?

    python -m benchmarks.translation --minutes 60

The talk is drawn from the sentences of ``benchmarks/talk.txt``, in an ever new order, as a recogniser would write
them: without case and punctuation. A segment has one sentence, or two, or eight without a pause; now and then the
speaker is silent for so long that many endpoints follow one another. Words are pushed one by one and not paced.

- Time is that of a word's push, with what an endpoint after it writes. Memory is the process's resident set.
- A segment is silent if nothing has been written upon it by its end.
- Repetition is the share of the written groups of four words that stood already among the 100 words before them.
  The talk itself has next to none: a sentence comes again only when all others have been said.
"""

from __future__ import annotations

import gc
import json
import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import torch
import typer

from benchmarks.flatness import resident_mb
from models.translator import Translator, load_translator
from streaming.events import Event, TranslationDelta
from streaming.glossary import word_key
from streaming.text_session import TextSession

TALK: Final = Path(__file__).parent / "talk.txt"
WORDS_PER_MINUTE = 150
#: Sentences of a segment, and how often that many are said without a pause.
RUNS, RUN_WEIGHTS = (1, 2, 8), (16, 3, 1)
#: One segment in so many is followed by a long silence, of so many endpoints.
LONG_SILENCE_EVERY, LONG_SILENCE_ENDPOINTS = 20, 60
GROUP_WORDS, WINDOW_WORDS = 4, 100

Segment = tuple[str, ...]


@dataclass(frozen=True)
class Minute:
    """A minute of talk, which has :data:`WORDS_PER_MINUTE` words.

    Attributes:
        minute: Its number, from 1.
        resident_mb: Memory of the process after it.
        step_ms_p50: Of its words.
        step_ms_p95: Of its words.
        written: Words that were written in it, in all languages.
    """

    minute: int
    resident_mb: float
    step_ms_p50: float
    step_ms_p95: float
    written: int


@dataclass
class Talk:
    """What came of a talk.

    Attributes:
        minutes: Memory, time and words.
        segments: How many ended.
        silent: For each language, indices of the segments upon which nothing was written.
        texts: For each language, what was written.
    """

    minutes: list[Minute] = field(default_factory=list)
    segments: int = 0
    silent: dict[str, list[int]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def longest_silence(self) -> int:
        """Most segments in a row upon which nothing was written into some language."""
        longest = 0
        for silent in self.silent.values():
            runs = [index - i for i, index in enumerate(silent)]  # the same for neighbours
            longest = max([longest, *(runs.count(run) for run in set(runs))])
        return longest

    def written(self, start: float = 0.0, stop: float = 1.0) -> float:
        """Words written for each word read and language, in a part of the talk."""
        part = self.minutes[round(start * len(self.minutes)) : round(stop * len(self.minutes))]
        return sum(one.written for one in part) / max(1, len(part) * WORDS_PER_MINUTE * len(self.texts))

    def repetition(self) -> float:
        """That of the language which has most."""
        return max(repetition(text.split()) for text in self.texts.values())


def sentences() -> list[Segment]:
    """The talk's sentences as a recogniser writes them."""
    return [tuple(map(word_key, line.split())) for line in TALK.read_text(encoding="utf-8").splitlines()]


def segments(spoken: Sequence[Segment], seed: int) -> Iterator[Segment]:
    """An endless talk, segment by segment."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(spoken, len(spoken))
        while order:
            [run] = rng.choices(RUNS, RUN_WEIGHTS)
            yield tuple(chain.from_iterable(order[:run]))
            del order[:run]


def repetition(words: Sequence[str]) -> float:
    """The share of the groups of four words that stood already among the 100 words before them."""
    last: dict[tuple[str, ...], int] = {}
    again = 0
    for i in range(len(words) - GROUP_WORDS + 1):
        group = tuple(words[i : i + GROUP_WORDS])
        again += i - last.get(group, -WINDOW_WORDS - 1) <= WINDOW_WORDS
        last[group] = i
    return again / max(1, len(words) - GROUP_WORDS + 1)


def interpret(session: TextSession, languages: Sequence[str], talk: Iterable[Segment], minutes: int) -> Talk:
    """Says a talk to a session, which stays open.

    Args:
        session: Translates into these languages.
        languages: At least one.
        talk: Segments, as many as there are.
        minutes: After how many minutes to end.
    """
    told = Talk(silent={language: [] for language in languages}, texts=dict.fromkeys(languages, ""))
    times: list[float] = []
    written = 0
    for segment in talk:
        said = dict.fromkeys(languages, "")
        for i, word in enumerate(segment):
            begun = time.perf_counter()
            events = session.push(word)
            if i + 1 == len(segment):
                events += session.end_segment()
            times.append((time.perf_counter() - begun) * 1e3)
            for event in _deltas(events):
                said[event.language] += event.delta
                written += len(event.delta.split())
            if len(times) == WORDS_PER_MINUTE:
                gc.collect()
                p50, p95 = np.percentile(times, (50, 95)).tolist()
                told.minutes.append(Minute(len(told.minutes) + 1, resident_mb(), p50, p95, written))
                times, written = [], 0
                if len(told.minutes) == minutes:
                    return told
        for language in languages:
            told.texts[language] += said[language]
            if not said[language].strip():
                told.silent[language].append(told.segments)
        told.segments += 1
        if told.segments % LONG_SILENCE_EVERY == 0:
            late = [event for _ in range(LONG_SILENCE_ENDPOINTS) for event in session.end_segment()]
            assert not late, "what an endpoint wrote was not all that there was to write"
    return told


def word_times(
    translator: Translator, languages: Sequence[str], latency: str, words: Sequence[str]
) -> dict[str, float]:
    """Wall and processor time of one session's words, in milliseconds, the first 20 left out."""
    session, wall, processor = TextSession(translator, languages, latency), [], []
    for word in words:
        begun = time.perf_counter(), time.process_time()
        session.push(word)
        wall.append((time.perf_counter() - begun[0]) * 1e3)
        processor.append((time.process_time() - begun[1]) * 1e3)
    p50, p95 = np.percentile(wall[20:], (50, 95)).tolist()
    return {"ms_p50": p50, "ms_p95": p95, "processor_ms_p50": float(np.median(processor[20:]))}


def _deltas(events: Sequence[Event]) -> list[TranslationDelta]:
    return [event for event in events if isinstance(event, TranslationDelta)]


def step_times(translator: Translator, latency: str, words: int) -> list[dict[str, float]]:
    """One row for each number of threads and of languages."""
    said = list(islice(chain.from_iterable(segments(sentences(), 1)), words + 20))
    rows, default = [], torch.get_num_threads()
    for threads in sorted({1, default}):
        torch.set_num_threads(threads)
        for n in sorted({1, min(3, len(translator.config.targets))}):
            times = word_times(translator, translator.config.targets[:n], latency, said)
            rows.append({"threads": threads, "languages": n, **times, "load_average": os.getloadavg()[0]})
    torch.set_num_threads(default)
    return rows


def talk_figures(told: Talk) -> dict[str, float]:
    """What is printed of a talk."""
    early, late = told.minutes[min(4, len(told.minutes) - 1)], told.minutes[-1]
    return {
        "words": len(told.minutes) * WORDS_PER_MINUTE,
        "segments": told.segments,
        "segments_silent": sum(map(len, told.silent.values())),
        "segments_silent_in_a_row": told.longest_silence(),
        "written_per_word": told.written(),
        "written_per_word_first_third": told.written(0, 1 / 3),
        "written_per_word_last_third": told.written(2 / 3, 1),
        "repetition": told.repetition(),
        "resident_mb_5_min": early.resident_mb,
        "resident_mb_end": late.resident_mb,
        "step_ms_p50_5_min": early.step_ms_p50,
        "step_ms_p50_end": late.step_ms_p50,
        "step_ms_p95_5_min": early.step_ms_p95,
        "step_ms_p95_end": late.step_ms_p95,
        "load_average": os.getloadavg()[0],
    }


def run(
    translator: Annotated[Path | None, typer.Option(help="Model folder; the embedded one by default.")] = None,
    latency: Annotated[str, typer.Option(help="Latency level.")] = "medium",
    words: Annotated[int, typer.Option(help="Words to take the time of.", min=1)] = 300,
    minutes: Annotated[int, typer.Option(help="Minutes of talk; 0 for the times only.", min=0)] = 60,
    languages: Annotated[int, typer.Option(help="Languages of the talk.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of the talk.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every minute.")] = False,
) -> None:
    """Prints the time of a word on one thread and by default, and what an hour of talk on one thread changes."""
    model = load_translator(translator)
    steps = step_times(model, latency, words)
    told, targets = None, model.config.targets[:languages]
    if minutes:
        torch.set_num_threads(1)
        told = interpret(TextSession(model, targets, latency), targets, segments(sentences(), seed), minutes)
    if as_json:
        talk = told and {**talk_figures(told), "minutes": [asdict(one) for one in told.minutes]}
        print(json.dumps({"steps": steps, "talk": talk}))
        return
    print("\t".join(steps[0]))
    for row in steps:
        print("\t".join(f"{value:.2f}".removesuffix(".00").rjust(len(name)) for name, value in row.items()))
    if told:
        print("\n".join(f"{name:30} {value:9.3f}" for name, value in talk_figures(told).items()))


if __name__ == "__main__":
    typer.run(run)
