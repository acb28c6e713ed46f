"""An hour of one live session: does memory or the time of a step grow?

    python -m benchmarks.flatness samples/jfk.flac --minutes 60

The recording is repeated without end and pushed in pieces of 80 ms, as a live client sends them. Memory is the
process's resident set. Step time is processor time, which other processes disturb less than the clock, and its median
over a minute of audio. Both are printed as they were at 5 minutes and at the end, with their ratio. Audio is not paced,
so an hour takes as long as the model needs for it.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np
import torch
import typer

from benchmarks.speed import CONFIG, PIECE_SAMPLES, read_audio
from models.checkpoint import load_recognizer
from models.recognizer import Recognizer
from streaming.events import Event
from streaming.session import Session, SessionConfig

PIECES_PER_MINUTE = 60 * 16000 // PIECE_SAMPLES


def resident_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Minute(TypedDict):
    """A minute of a session.

    Attributes:
        minute: Its number.
        resident_mb: Memory of the process after it.
        words: Words so far.
        step_ms: Median processor time of the pushes that encode.
    """

    minute: int
    resident_mb: float
    words: int
    step_ms: float


def repeated(audio: np.ndarray) -> Iterator[np.ndarray]:
    """``float32[n]`` at 16 kHz without end, in pieces of 80 ms."""
    return cycle(np.array_split(audio, max(1, len(audio) // PIECE_SAMPLES)))


def measure(
    recognizer: Recognizer,
    pieces: Iterator[np.ndarray],
    minutes: int,
    config: SessionConfig,
    heard: list[Event] | None = None,
) -> list[Minute]:
    """Runs one session.

    Args:
        recognizer: The model.
        pieces: ``float32`` at 16 kHz, 80 ms each, enough of them.
        minutes: Length of the session.
        config: Of the session; its audio format must be 16 kHz mono float.
        heard: Takes the events.
    """
    session, words = Session(recognizer, config), 0
    rows: list[Minute] = []
    chunk_frames = recognizer.lookahead_frames(config.max_lookahead_ms) + 1  # one push in so many makes a step
    chunk_frames = 1 if recognizer.adaptive else chunk_frames
    for minute in range(1, minutes + 1):
        times = []
        for _ in range(PIECES_PER_MINUTE):
            piece = next(pieces)
            begun = time.process_time()
            events = session.push(piece)
            times.append(time.process_time() - begun)
            words += sum(len(getattr(event, "words", ())) for event in events)
            if heard is not None:
                heard += events
        gc.collect()
        step_ms = statistics.median(sorted(times)[-PIECES_PER_MINUTE // chunk_frames :]) * 1e3
        rows.append({"minute": minute, "resident_mb": resident_mb(), "step_ms": step_ms, "words": words})
    return rows


def run(
    recording: Annotated[Path, typer.Argument(help="Any sound file that soundfile opens.")],
    minutes: Annotated[int, typer.Option(help="Minutes of audio, at least 6.", min=6)] = 60,
    model: Annotated[Path | None, typer.Option(help="Model folder; the embedded one by default.")] = None,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print every minute as JSON.")] = False,
) -> None:
    """Prints memory and step time at 5 minutes and at the end."""
    torch.set_num_threads(threads)
    rows = measure(load_recognizer(model), repeated(read_audio(recording)), minutes, CONFIG)
    if as_json:
        print(json.dumps({"load_average": os.getloadavg(), "minutes": rows}))
        return
    early, late = rows[4], rows[-1]
    print(f"load average {os.getloadavg()[0]:.2f}, {threads} thread(s), {late['words']} words")
    for name in ("resident_mb", "step_ms"):
        print(
            f"{name:12} {early[name]:9.2f} at 5 min {late[name]:9.2f} at {minutes} min, ×{late[name] / early[name]:.3f}"
        )


if __name__ == "__main__":
    typer.run(run)
