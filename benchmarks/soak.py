"""An hour of sessions that come and go: do memory or lag grow, is a word lost or said twice?

    python -m benchmarks.soak samples/jfk.flac --minutes 60

The real server runs in a process of its own. At each of eight seats one session follows another: a recording that
begins and ends somewhere, at the pace of speech, translated or not, with a pause of some seconds after it. Every third
one loses its connection on the way, and goes on over another one. What each session was told is compared with what the
same audio is told in a session alone. The lag of an event is the time since the audio that it needed was there; in
those that lost their connection it is not counted, as the loss is in it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, TypedDict

import numpy as np
import typer

from benchmarks.load import alone, family, service, told
from benchmarks.speed import PIECE_SAMPLES, read_audio
from client.connection import connect, exchange
from models.checkpoint import load_recognizer
from models.translator import EMBEDDED_TRANSLATOR, load_translator
from streaming.audio import SAMPLE_RATE_HZ
from streaming.events import Event, TranscriptDelta, TranslationDelta

LANGUAGES: Final = ((), ("es",), (), ("es", "de"))
LENGTHS_S: Final = (12.0, 25.0, 40.0, 70.0)
MAX_PAUSE_S: Final = 5.0
LOSES_EVERY: Final = 3


@dataclass(frozen=True)
class Script:
    """What one session says, and what it is told alone."""

    audio: np.ndarray
    languages: tuple[str, ...]
    expected: list[Event]


@dataclass
class Tally:
    """What has been seen in a minute."""

    sessions: int = 0
    losses: int = 0
    words: int = 0
    wrong: int = 0
    lags_ms: list[float] = field(default_factory=list)


class Minute(TypedDict):
    """A minute of the service.

    Attributes:
        minute: Its number.
        resident_mb: Memory of the server's processes after it.
        sessions: Those that ended in it.
        losses: How many of these had lost their connection.
        words: What they were told, in all languages.
        wrong: How many of these sessions were not told what they are told alone.
        p50_ms: Of the lag; None without an event.
        p95_ms: Of the lag.
        load_average: Of the machine.
    """

    minute: int
    resident_mb: float
    sessions: int
    losses: int
    words: int
    wrong: int
    p50_ms: float | None
    p95_ms: float | None
    load_average: float


def scripts(audio: np.ndarray, count: int) -> list[Script]:
    """Recordings from a place of their own on, in several lengths and languages."""
    recognizer, translator = load_recognizer(), load_translator(EMBEDDED_TRANSLATOR)
    made = []
    for i in range(count):
        languages, length_s = LANGUAGES[i % len(LANGUAGES)], LENGTHS_S[(i + i // 4) % len(LENGTHS_S)]
        cut = np.resize(np.roll(audio, -i * len(audio) // count), int(length_s * SAMPLE_RATE_HZ))
        made.append(Script(cut, languages, alone(recognizer, translator, cut, languages)))
    return made


async def converse(url: str, script: Script, tallies: list[Tally], *, loses: bool) -> None:
    """One session at the pace of speech."""
    clock = asyncio.get_running_loop().time
    pcm = np.rint(script.audio * 32767).astype("<i2")
    events: list[Event] = []
    async with connect(url, languages=script.languages) as session:
        begin_s, length_ms = clock(), 1000 * len(pcm) / SAMPLE_RATE_HZ

        async def send() -> None:
            lost_at = random.randrange(len(pcm)) // PIECE_SAMPLES if loses else -1
            for number, start in enumerate(range(0, len(pcm), PIECE_SAMPLES)):
                piece = pcm[start : start + PIECE_SAMPLES]
                await asyncio.sleep(begin_s + (start + len(piece)) / SAMPLE_RATE_HZ - clock())
                if number == lost_at:
                    session._connection.transport.abort()
                await session.send(piece.tobytes())
            await session.finish()

        def hear(event: Event) -> None:
            events.append(event)
            if isinstance(event, TranscriptDelta | TranslationDelta) and event.emitted_ms is not None:
                tally = tallies[-1]
                tally.words += len(event.delta.split())
                if not loses and event.emitted_ms < length_ms:
                    tally.lags_ms.append(1000 * (clock() - begin_s) - event.emitted_ms)

        await exchange(session, send(), hear)
    tally = tallies[-1]
    tally.sessions += 1
    tally.losses += loses
    tally.wrong += told(events) != script.expected


async def seat(url: str, known: Sequence[Script], tallies: list[Tally], until_s: float, number: int) -> None:
    """One session after another."""
    await asyncio.sleep(number)
    count = number
    while asyncio.get_running_loop().time() < until_s:
        count += 1
        await converse(url, random.choice(known), tallies, loses=count % LOSES_EVERY == 0)
        await asyncio.sleep(random.uniform(0, MAX_PAUSE_S))


async def soak(url: str, pid: int, known: Sequence[Script], seats: int, minutes: int) -> list[Minute]:
    """Keeps the seats taken, and prints each minute."""
    clock = asyncio.get_running_loop().time
    began_s = clock()
    seen, tallies = list[Minute](), [Tally()]
    async with asyncio.TaskGroup() as tasks:
        for number in range(seats):
            tasks.create_task(seat(url, known, tallies, began_s + 60 * minutes, number))
        for minute in range(1, minutes + 1):
            await asyncio.sleep(began_s + 60 * minute - clock())
            seen.append(_minute(minute, tallies[-1], pid))
            tallies.append(Tally())
            show(seen[-1])
    seen.append(_minute(minutes + 1, tallies[-1], pid))  # those that were still speaking
    show(seen[-1])
    return seen


def _minute(number: int, tally: Tally, pid: int) -> Minute:
    p50, p95 = np.percentile(tally.lags_ms, (50, 95)).tolist() if tally.lags_ms else (None, None)
    pages = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in family(pid))
    return Minute(
        minute=number,
        resident_mb=pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        sessions=tally.sessions,
        losses=tally.losses,
        words=tally.words,
        wrong=tally.wrong,
        p50_ms=p50,
        p95_ms=p95,
        load_average=os.getloadavg()[0],
    )


def show(minute: Minute) -> None:
    """Prints a line."""
    p50_ms, p95_ms = minute["p50_ms"], minute["p95_ms"]
    lag = "no events" if p95_ms is None else f"lag p50 {p50_ms:4.0f} ms  p95 {p95_ms:5.0f} ms"
    print(
        f"minute {minute['minute']:3}  {minute['resident_mb']:6.1f} MB  {lag}  {minute['sessions']:3} sessions ended,"
        f" {minute['losses']} after a loss, {minute['wrong']} not as alone  {minute['words']:5} words"
        f"  load {minute['load_average']:.1f}",
        flush=True,
    )


def run(
    recording: Annotated[Path, typer.Argument(help="Any sound file that soundfile opens.")],
    minutes: Annotated[int, typer.Option(min=1, help="How long.")] = 60,
    seats: Annotated[int, typer.Option(help="Sessions at the same time.")] = 8,
    variants: Annotated[int, typer.Option(help="Different sessions.")] = 16,
    engines: Annotated[int, typer.Option(help="Engines of the service.")] = 1,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON at the end.")] = False,
) -> None:
    """Prints memory and lag over time, and how many sessions were not told what they are told alone."""
    random.seed(seed)
    known = scripts(read_audio(recording), variants)
    with service(seats + 2, "--engines", str(engines)) as (url, pid):
        seen = asyncio.run(soak(url, pid, known, seats, minutes))
    first = seen[min(5, minutes) - 1]
    last = seen[-2]
    print(
        f"{sum(m['sessions'] for m in seen)} sessions, {sum(m['losses'] for m in seen)} after a loss of the connection,"
        f" {sum(m['wrong'] for m in seen)} not as alone; resident {first['resident_mb']:.1f} MB after minute"
        f" {first['minute']}, {last['resident_mb']:.1f} MB after minute {last['minute']}"
        f" ({last['resident_mb'] / first['resident_mb']:.3f})"
    )
    if as_json:
        print(json.dumps(seen))


if __name__ == "__main__":
    typer.run(run)
