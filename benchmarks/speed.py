"""How much faster than speech is transcription: one recording alone, several in a batch, and one live stream.

    python -m benchmarks.speed samples/jfk.flac --minutes 5

The recording is repeated to the length asked for. A file is advanced a few chunks at a time, as `dragoman transcribe`
does; the live stream is pushed in pieces of 80 ms and its figure is the share of one core that it takes.
"""

from __future__ import annotations

import json
import os
import time
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
from streaming.session import Session, SessionConfig, tick

PIECE_SAMPLES = 1280
MAX_CHUNKS = 4
CONFIG = SessionConfig(AudioFormat("f32le"))


def read_audio(recording: Path) -> np.ndarray:
    """A recording as ``float32[n]`` at 16 kHz."""
    samples, rate = soundfile.read(recording, dtype="float32", always_2d=True)
    audio: np.ndarray = soxr.resample(samples.mean(1), rate, 16000).astype(np.float32)
    return audio


def files(recognizer: Recognizer, audio: np.ndarray, batch: int, config: SessionConfig = CONFIG) -> float:
    """Seconds to transcribe ``batch`` recordings together."""
    begun = time.perf_counter()
    sessions = [Session(recognizer, config) for _ in range(batch)]
    for start in range(0, len(audio), 5 * 16000):
        for session in sessions:
            session.write(audio[start : start + 5 * 16000])
        while any(session.ready() for session in sessions):
            tick(sessions, max_chunks=MAX_CHUNKS)
    for session in sessions:
        session.close_input()
    while any(session.ready() for session in sessions):
        tick(sessions, max_chunks=MAX_CHUNKS)
    return time.perf_counter() - begun


def live(recognizer: Recognizer, audio: np.ndarray) -> float:
    """Processor seconds of one session whose audio comes in pieces of 80 ms."""
    session, begun = Session(recognizer, CONFIG), time.process_time()
    for start in range(0, len(audio), PIECE_SAMPLES):
        session.push(audio[start : start + PIECE_SAMPLES])
    session.finish()
    return time.process_time() - begun


def run(
    recording: Annotated[Path, typer.Argument(help="Any sound file that soundfile opens.")],
    minutes: Annotated[float, typer.Option(help="Length that the recording is repeated to.")] = 5.0,
    model: Annotated[Path | None, typer.Option(help="Model folder; the embedded one by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prints times real time for batches of 1 and 8 on 1 and 2 threads, and a live stream's share of a core."""
    audio = np.resize(read_audio(recording), int(minutes * 60 * 16000))
    recognizer, audio_s = load_recognizer(model), len(audio) / 16000
    files(recognizer, audio[: 20 * 16000], 1)  # what is made once: packed weights, positions, the VAD
    figures: dict[str, float] = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for batch in (1, 8):
            name = f"times_real_time_{threads}_threads_batch_{batch}"
            figures[name] = batch * audio_s / files(recognizer, audio, batch)
    torch.set_num_threads(1)
    figures["live_share_of_one_core"] = live(recognizer, audio) / audio_s
    figures["load_average"] = os.getloadavg()[0]
    if as_json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name:36} {value:8.3f}" for name, value in figures.items()))


if __name__ == "__main__":
    typer.run(run)
