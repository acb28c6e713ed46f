"""A client of the service that sends a recording at the pace of speech."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any, Final

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from client.files import AudioSource
from client.output import Writer
from streaming.audio import SAMPLE_RATE_HZ, AudioNormalizer, Samples
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, SessionClosed, parse_event

# 100 ms a message: well below a look-ahead that matters, and few messages.
_MESSAGE_SAMPLES: Final = SAMPLE_RATE_HZ // 10


async def stream(
    source: AudioSource,
    url: str,
    writer: Writer,
    *,
    pace: float | None,
    session: Mapping[str, Any],
    token: str | None = None,
) -> None:
    """Send a recording to the service and print what comes back, until the service has told everything.

    Ctrl-C ends the audio; a second one does not wait for the last words.

    Args:
        source: The audio; it is sent as 16 kHz mono s16le.
        url: The service, ``ws://`` or ``wss://``.
        writer: Form of what is printed to standard output.
        pace: Speed of sending in times real time; None sends as fast as the service takes it.
        session: Fields of ``session.update``; the audio format is added to them.
        token: Secret of the service, if it asks for one.

    Raises:
        DragomanError: The service cannot be reached, refuses the client, reports an error or goes away; or
            the recording cannot be read to its end.
    """
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        # The answer to a ping waits behind audio that the service has not read yet: it would tell nothing.
        async with connect(url, additional_headers=headers, compression=None, ping_interval=None) as connection:
            sender = asyncio.create_task(_send(connection, source, pace, session))
            printer = asyncio.create_task(_print_events(connection, writer))
            done, unfinished = await asyncio.wait({sender, printer}, return_when=asyncio.FIRST_EXCEPTION)
            for task in unfinished:
                task.cancel()
            for task in done:
                task.result()
    except InvalidStatus as error:
        body = (error.response.body or b"").decode(errors="replace").strip()
        raise DragomanError("refused", f"the service refused the connection: {body or error}") from None
    except (InvalidURI, InvalidHandshake) as error:
        raise DragomanError("unreachable", f"{url} is not the service: {error}") from None
    except (OSError, TimeoutError) as error:
        raise DragomanError(
            "unreachable", f"no service answers at {url} ({error}): start one with dragoman serve"
        ) from None
    if source.problem is not None:
        raise DragomanError("file_damaged", source.problem)


async def _send(
    connection: ClientConnection, source: AudioSource, pace: float | None, session: Mapping[str, Any]
) -> None:
    """Declare the session, send the audio when its time has come, close the session."""
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        interrupted.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    audio = {**session.get("audio", {}), "input": {"format": {"type": "audio/pcm", "rate": SAMPLE_RATE_HZ}}}
    with suppress(ConnectionClosed):  # the printer finds out why
        await connection.send(json.dumps({"type": "session.update", "session": {**session, "audio": audio}}))
        started_s = loop.time()
        sent_samples = 0
        async for message in _messages(source):
            sent_samples += len(message)
            if pace is not None:
                # From the start, not from the last message: delays do not add up.
                due_s = started_s + sent_samples / SAMPLE_RATE_HZ / pace
                with suppress(TimeoutError):
                    await asyncio.wait_for(interrupted.wait(), max(0.0, due_s - loop.time()))
            if interrupted.is_set():
                break
            await connection.send(message.tobytes())
        await connection.send(json.dumps({"type": "session.close"}))


async def _messages(source: AudioSource) -> AsyncIterator[np.ndarray[Any, np.dtype[np.int16]]]:
    """The recording as 16 kHz int16, at most 100 ms at a time; decoded outside of the event loop."""
    normalizer = AudioNormalizer(source.format)
    blocks = source.blocks(source.format.sample_rate_hz // 10)
    at_end = False
    while not at_end:
        block = await asyncio.to_thread(next, blocks, None)
        at_end = block is None
        samples = _to_int16(normalizer.finish() if block is None else normalizer.push(block))
        for start in range(0, len(samples), _MESSAGE_SAMPLES):
            yield samples[start : start + _MESSAGE_SAMPLES]


def _to_int16(samples: Samples) -> np.ndarray[Any, np.dtype[np.int16]]:
    """Full scale 1 -> little-endian int16, clipped."""
    return np.clip(np.rint(samples * 32768), -32768, 32767).astype("<i2")


async def _print_events(connection: ClientConnection, writer: Writer) -> None:
    """Print events until the session is closed.

    Raises:
        DragomanError: The service reports an error, or the connection ends before the session.
    """
    begun = False
    try:
        async for frame in connection:
            event = parse_event(frame)
            if text := writer.push([event]):
                begun = True
                _print(text)
            if isinstance(event, ErrorEvent):
                raise DragomanError(event.code, f"the service reports: {event.message}")
            if isinstance(event, SessionClosed):
                begun = True
                return
    except ConnectionClosed:
        pass
    finally:
        if begun:
            _print(writer.finish())
    reason = connection.close_reason or f"code {connection.close_code}"
    raise DragomanError("connection_lost", f"the connection ended before the transcript did ({reason})")


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
