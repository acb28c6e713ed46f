"""An hour of one live session: does memory or the time of a step grow?

    python -m benchmarks.flatness samples/jfk.flac --minutes 60

The recording is repeated without end and pushed in pieces of 80 ms, as a live client sends them. Memory is the
process's resident set, step time the median over a minute of audio; both are printed as they were at 5 minutes and
at the end, with their ratio. Audio is not paced, so an hour takes as long as the model needs for it.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from itertools import cycle
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile
import soxr
import torch
import typer

from models.checkpoint import load_recognizer
from models.recognizer import Recognizer
from streaming.audio import AudioFormat
from streaming.session import Session, SessionConfig

PIECE_SAMPLES = 1280
PIECES_PER_MINUTE = 60 * 16000 // PIECE_SAMPLES


def resident_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(recognizer: Recognizer, audio: np.ndarray, minutes: int, config: SessionConfig) -> list[dict[str, float]]:
    """One entry a minute: ``minute``, ``resident_mb``, ``words`` so far, ``step_ms``: median of encoding pushes.

    Args:
        recognizer: The model.
        audio: ``float32[n]`` at 16 kHz, repeated as often as needed.
        minutes: Length of the session.
        config: Of the session; its audio format must be 16 kHz mono float.
    """
    session, words, rows = Session(recognizer, config), 0, []
    chunk_frames = recognizer.lookahead_frames(config.max_lookahead_ms) + 1  # one push in so many makes a step
    pieces = cycle(np.array_split(audio, max(1, len(audio) // PIECE_SAMPLES)))
    for minute in range(1, minutes + 1):
        times = []
        for _ in range(PIECES_PER_MINUTE):
            piece = next(pieces)
            begun = time.perf_counter()
            events = session.push(piece)
            times.append(time.perf_counter() - begun)
            words += sum(len(getattr(event, "words", ())) for event in events)
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
    samples, rate = soundfile.read(recording, dtype="float32", always_2d=True)
    audio = soxr.resample(samples.mean(1), rate, 16000).astype(np.float32)
    rows = measure(load_recognizer(model), audio, minutes, SessionConfig(AudioFormat("f32le")))
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
