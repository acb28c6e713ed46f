"""How many live speakers the service holds: sessions at the pace of speech, and how far behind they are told.

    python -m benchmarks.load samples/jfk.flac --sessions 8 --sessions 16 --sessions 32
    python -m benchmarks.load samples/jfk.flac --to es
    python -m benchmarks.load samples/jfk.flac --nemo

The real server runs in a process of its own; each session is a real connection that sends the recording, from a place
of its own on, in pieces of 80 ms when their time has come. The lag of an event is the time since the audio that it
needed was there. A number of sessions is held if 95 of 100 events are told within `HELD_MS`. Every session's events are
compared with those of the same audio in a session alone.

With ``--nemo``, the same load is also put on NeMo 3.0.0's own streaming pipeline with the same weights, in this process
and without sockets, in chunks of the largest look-ahead: whenever it is free, it takes the next chunk of every stream
that has one. Both have all cores that they want; our service, as many engines as ``--engines`` says.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer
from websockets.asyncio.client import connect

from benchmarks.nemo_reference import Shape, of_folder
from benchmarks.speed import PIECE_SAMPLES, read_audio
from models.checkpoint import EMBEDDED_MODEL, load_recognizer
from models.config import FRAME_SAMPLES
from models.recognizer import Recognizer
from models.translator import EMBEDDED_TRANSLATOR, Translator, load_translator
from streaming.audio import SAMPLE_RATE_HZ
from streaming.events import Event, SessionClosed, TranscriptDelta, TranslationDelta, parse_event
from streaming.session import Session, SessionConfig

HELD_MS: Final = 1000.0
"""Lag that 95 of 100 events of a held session do not exceed."""
_GRACE_S: Final = 60.0
_STAGGER_S: Final = 1.0


@dataclass(frozen=True)
class Level:
    """What one number of sessions was like.

    Attributes:
        engine: Which one.
        sessions: At the same time.
        events: Deltas that were told while the speakers spoke.
        p50_ms: Of their lag; None without any.
        p95_ms: Of their lag.
        identical: Whether every session was told what it would have been told alone; None where that is not compared.
        cores: Processor seconds that the engine took for each second.
        load_average: Of the machine, after it.
    """

    engine: str
    sessions: int
    events: int
    p50_ms: float | None
    p95_ms: float | None
    identical: bool | None
    cores: float
    load_average: float

    @property
    def held(self) -> bool:
        """Whether the sessions were told in time."""
        return self.p95_ms is not None and self.p95_ms <= HELD_MS and self.identical is not False


@dataclass(frozen=True)
class Heard:
    """What one session was told, and how long after the audio for it was there, in ms; None after the audio's end."""

    events: tuple[Event, ...]
    lags_ms: tuple[float | None, ...]


# ------------------------------------------------------------------------------------------------------- our service


@contextmanager
def service(sessions: int, *options: str) -> Iterator[tuple[str, int]]:
    """A server process; its URL and process id."""
    command = [sys.executable, "-m", "client.cli", "serve", "--port", "0", "--max-sessions", str(sessions), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield listening(process), process.pid
    finally:
        process.terminate()
        process.wait(_GRACE_S)


def listening(process: subprocess.Popen[str]) -> str:
    """Where a server says that it listens; what else it says is read, too, or it would wait for its reader one day.

    Raises:
        RuntimeError: It has ended instead.
    """
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"listening at (\S+)", line):
            threading.Thread(target=deque, args=(process.stderr, 0), daemon=True).start()
            return found[1]
    raise RuntimeError(f"the server has ended with {process.wait()} before it listened")


async def speak(url: str, audio: np.ndarray, begin_s: float, languages: Sequence[str]) -> Heard:
    """One session at the pace of speech, from a moment of the loop's clock on."""
    clock, events, lags = asyncio.get_running_loop().time, list[Event](), list[float | None]()
    pcm, length_ms = np.rint(audio * 32767).astype("<i2"), 1000 * len(audio) / SAMPLE_RATE_HZ
    declared = {
        "audio": {
            "input": {"format": {"type": "audio/pcm", "rate": SAMPLE_RATE_HZ}},
            "output": {"languages": list(languages)},
        }
    }
    async with connect(url, compression=None, ping_interval=None, open_timeout=_GRACE_S) as connection:

        async def send() -> None:
            await connection.send(json.dumps({"type": "session.update", "session": declared}))
            for start in range(0, len(pcm), PIECE_SAMPLES):
                piece = pcm[start : start + PIECE_SAMPLES]
                await asyncio.sleep(begin_s + (start + len(piece)) / SAMPLE_RATE_HZ - clock())
                await connection.send(piece.tobytes())
            await connection.send(json.dumps({"type": "session.close"}))

        sender = asyncio.create_task(send())
        async for message in connection:
            event = parse_event(message)
            events.append(event)
            if isinstance(event, TranscriptDelta | TranslationDelta) and event.emitted_ms is not None:
                late = event.emitted_ms >= length_ms
                lags.append(None if late else 1000 * (clock() - begin_s) - event.emitted_ms)
        await sender
    return Heard(tuple(events), tuple(lags))


def told(events: Sequence[Event]) -> list[Event]:
    """What does not depend on the clock, on the session's number or on how a confidence of 0.695 is rounded."""
    kept = [event for event in events if isinstance(event, TranscriptDelta | TranslationDelta | SessionClosed)]
    return [_bare(event) for event in kept]


def _bare(event: TranscriptDelta | TranslationDelta | SessionClosed) -> Event:
    if isinstance(event, SessionClosed):
        return replace(event, seq=0)
    if isinstance(event, TranscriptDelta):
        # In fp32, sums over batches of other sizes differ in the last bits.
        event = replace(event, words=tuple(replace(word, confidence=0.0) for word in event.words))
    return replace(event, seq=0, backlog_ms=None)


def alone(
    recognizer: Recognizer, translator: Translator | None, audio: np.ndarray, languages: Sequence[str]
) -> list[Event]:
    """What a session is told that has the engine to itself."""
    session = Session(recognizer, SessionConfig(languages=tuple(languages)), translator)
    pcm = np.rint(audio * 32767).astype("<i2").tobytes()
    # As clients read them: on the wire, confidences are rounded.
    return told([parse_event(event.to_json()) for event in session.push(pcm) + session.finish()])


def ours(
    audios: Sequence[np.ndarray], languages: Sequence[str], known: dict[int, list[Event]], engines: int, dtype: str
) -> Level:
    """The load on our service; ``known`` is what each recording says alone."""
    with service(len(audios), "--engines", str(engines), "--dtype", dtype) as (url, pid):

        async def speakers() -> tuple[list[Heard], float]:
            """What they were told, and the cores that the service took from their first word on."""
            clock = asyncio.get_running_loop().time
            begin_s = clock() + 1.0 + 0.02 * len(audios)
            offsets = [_STAGGER_S * i / len(audios) for i in range(len(audios))]
            talks = [speak(url, audio, begin_s + at, languages) for audio, at in zip(audios, offsets, strict=True)]
            talking = asyncio.gather(*talks)
            await asyncio.sleep(begin_s - clock())
            cpu = _cpu_seconds(pid)
            heard = await talking
            return heard, (_cpu_seconds(pid) - cpu) / (clock() - begin_s)

        asyncio.run(_warm(url, audios[0], languages, engines))
        heard, cores = asyncio.run(speakers())
    lags = [lag for one in heard for lag in one.lags_ms if lag is not None]
    identical = all(told(one.events) == known[i] for i, one in enumerate(heard))
    return _level("dragoman", len(audios), lags, identical, cores)


async def _warm(url: str, audio: np.ndarray, languages: Sequence[str], engines: int) -> None:
    """One session of each engine as fast as it goes, for what is made once."""
    begun_s = asyncio.get_running_loop().time() - _GRACE_S
    await asyncio.gather(*(speak(url, audio[: 4 * SAMPLE_RATE_HZ], begun_s, languages) for _ in range(engines)))


def family(pid: int) -> list[int]:
    """A process, and those that it has started, and so on."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    started = [int(child) for thread in threads for child in thread.read_text().split()]
    return [pid, *(one for child in started for one in family(child))]


def _cpu_seconds(pid: int) -> float:
    """Of a process and of those that it has started."""
    stats = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split() for one in family(pid)]
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")


def _level(engine: str, sessions: int, lags: Sequence[float], identical: bool | None, cores: float) -> Level:
    p50, p95 = np.percentile(lags, (50, 95)).tolist() if lags else (None, None)
    return Level(engine, sessions, len(lags), p50, p95, identical, cores, os.getloadavg()[0])


# -------------------------------------------------------------------------------------------------------------- NeMo


def nemo(archive: Path, shape: Shape, audios: Sequence[np.ndarray], dtype: str) -> Level:
    """The load on NeMo's pipeline. A step's lag counts for each of its streams, whether it brought text or not."""
    from nemo.collections.asr.inference.streaming.framing.request import Frame
    from nemo.collections.asr.inference.streaming.framing.request_options import ASRRequestOptions

    from benchmarks.pipeline import nemo_pipeline

    lookahead_frames = max(shape.lookahead_frames)
    pipeline = nemo_pipeline(archive, shape, lookahead_frames, len(audios), dtype)
    chunk = (lookahead_frames + 1) * FRAME_SAMPLES
    chunks = [len(audio) // chunk for audio in audios]

    def frame(stream: int, k: int) -> Any:
        samples = torch.from_numpy(audios[stream][k * chunk : (k + 1) * chunk])
        options = ASRRequestOptions() if k == 0 else None
        return Frame(samples, stream, is_first=k == 0, is_last=k + 1 == chunks[stream], options=options)

    pipeline.open_session()
    for k in range(chunks[0]):  # what is made once
        pipeline.transcribe_step([frame(0, k)])
    pipeline.close_session()
    pipeline.open_session()
    next_chunk, lags = [0] * len(audios), list[float]()
    begin, cpu = time.monotonic() + 0.1, time.process_time()
    offsets = [_STAGGER_S * i / len(audios) for i in range(len(audios))]
    while pending := [i for i in range(len(audios)) if next_chunk[i] < chunks[i]]:
        due = {i: begin + offsets[i] + (next_chunk[i] + 1) * chunk / SAMPLE_RATE_HZ for i in pending}
        if (wait := min(due.values()) - time.monotonic()) > 0:
            time.sleep(wait)
        ready = [i for i in pending if due[i] <= time.monotonic()]
        pipeline.transcribe_step([frame(i, next_chunk[i]) for i in ready])
        now = time.monotonic()
        for i in ready:
            lags.append(1000 * (now - due[i]))
            next_chunk[i] += 1
    cores = (time.process_time() - cpu) / (time.monotonic() - begin)
    pipeline.close_session()
    return _level("nemo", len(audios), lags, None, cores)


# --------------------------------------------------------------------------------------------------------- the curve


def recordings(audio: np.ndarray, sessions: int, seconds: float) -> list[np.ndarray]:
    """For each session the recording from a place of its own on, repeated to a length."""
    return [
        np.resize(np.roll(audio, -i * len(audio) // sessions), int(seconds * SAMPLE_RATE_HZ)) for i in range(sessions)
    ]


def show(level: Level) -> None:
    """Prints a line of the curve."""
    lag = "no events" if level.p95_ms is None else f"lag p50 {level.p50_ms:6.0f} ms  p95 {level.p95_ms:6.0f} ms"
    same = "" if level.identical is None else f"  identical {level.identical}"
    print(
        f"{level.engine:9} {level.sessions:4} sessions  {lag}  {'held' if level.held else 'NOT held'}{same}"
        f"  {level.cores:.2f} cores  load {level.load_average:.1f}",
        flush=True,
    )


def measure(
    audio: np.ndarray,
    counts: Sequence[int],
    seconds: float,
    languages: Sequence[str],
    *,
    engines: int,
    dtype: str,
    beside_nemo: bool,
    stop: bool,
) -> list[Level]:
    """The curve of our service and, if asked for, NeMo's; each goes on up to the first number that it does not hold."""
    levels: list[Level] = []
    with ExitStack() as stack:
        runs = list[Callable[[Sequence[np.ndarray]], Level]]()
        known: dict[int, dict[int, list[Event]]] = {}
        if beside_nemo:
            reference = of_folder(EMBEDDED_MODEL)
            archive = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.nemo"
            reference.save_nemo(archive)
            runs.append(lambda audios: nemo(archive, reference.shape, audios, dtype))
        recognizer = load_recognizer(dtype=dtype)
        translator = load_translator(EMBEDDED_TRANSLATOR, dtype=dtype) if languages else None

        def own(audios: Sequence[np.ndarray]) -> Level:
            found = known.setdefault(len(audios), {})
            for i, one in enumerate(audios):
                found[i] = alone(recognizer, translator, one, languages)
            return ours(audios, languages, found, engines, dtype)

        for run in [own, *runs]:
            for count in counts:
                levels.append(run(recordings(audio, count, seconds)))
                show(levels[-1])
                if stop and not levels[-1].held:
                    break
    return levels


def run(
    recording: Annotated[Path, typer.Argument(help="Any sound file that soundfile opens.")],
    sessions: Annotated[list[int] | None, typer.Option(help="Sessions at the same time; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(help="Length of each.")] = 30.0,
    to: Annotated[str | None, typer.Option(metavar="LANGUAGE", help="Translate into this language.")] = None,
    engines: Annotated[int, typer.Option(help="Engines of our service.")] = 1,
    dtype: Annotated[str, typer.Option(help="What is computed in; by NeMo with autocast.")] = "float32",
    beside_nemo: Annotated[bool, typer.Option("--nemo", help="NeMo's pipeline with the same weights beside.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Go on after a number that is not held.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON at the end.")] = False,
) -> None:
    """Prints lag over the number of sessions."""
    counts = sessions or [1, 2, 4, 8, 12, 16, 24, 32, 48, 64]
    languages = () if to is None else (to,)
    audio, stop = read_audio(recording), not every
    levels = measure(
        audio, counts, seconds, languages, engines=engines, dtype=dtype, beside_nemo=beside_nemo, stop=stop
    )
    if as_json:
        print(json.dumps([asdict(level) | {"held": level.held} for level in levels]))


if __name__ == "__main__":
    typer.run(run)
