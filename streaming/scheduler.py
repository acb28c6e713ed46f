"""The engine: one thread that computes for all sessions, and takes those that have enough audio into one batch.

    client's side: put → inbox → engine: write, tick → outbox → client's side

Both queues are bounded: the client's side reads no more until `Stream.has_room`, and the engine computes nothing for
a session whose events nobody takes.

The work of one step is bounded, too, so that nobody waits long for others. Live sessions come first, and among equals
who has waited longest; sessions whose audio came faster than it could be spoken get what is left.
"""

import copy
import ctypes
import itertools
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, NamedTuple, Self

import torch

from models.graphs import ROW_BUCKETS
from models.recognizer import Recognizer
from models.translator import AnyTranslator
from streaming.audio import AudioFormat
from streaming.errors import DragomanError
from streaming.events import (
    ErrorEvent,
    Event,
    SessionClosed,
    SessionUpdated,
    TranscriptDelta,
    TranslationDelta,
)
from streaming.interpreter import translate_ahead
from streaming.messages import DEFAULTS, CloseCode, Command, LookaheadChange, SessionMessage
from streaming.session import Session, SessionConfig, tick
from streaming.speculation import Speculation

_MAX_WAITING_S: Final = 30  # audio that waits for the engine before the client is no longer read from
_MAX_WAITING_MESSAGES: Final = 1_000
MAX_WAITING_EVENTS: Final = 256
"""Events that wait for the client before the engine leaves it alone."""
_SWITCH_INTERVAL_S: Final = 0.0005
_KEPT_MEMORY_BYTES: Final = 512 << 20  # free, in the hands of the C library
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h
_MAX_MESSAGES: Final = 64  # messages of a session that one step takes in
_MAX_PIECE_S: Final = 1  # audio of a message that is taken in at once
_UPLOAD_S: Final = 2.0  # by how much audio is ahead of the clock that cannot be spoken
_PAUSE_S: Final = 2.0  # without a message, after which nobody speaks
_LATE_S: Final = 5.0  # how long a session may lag by more than it should

logger = logging.getLogger(__name__)


def prepare_process() -> None:
    """Set up a process in which an engine runs.

    An engine gives Python's lock away with each of its many small operations, and waits for it for as long as the
    switch interval, which is ten times as long by default. And each of its steps needs the same large blocks of memory:
    glibc would give them back to the system after every step, and a sixth of the next one would be page faults.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)  # the others are too small for large blocks
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_MEMORY_BYTES)


@dataclass(frozen=True)
class EngineBounds:
    """How much one step takes.

    A CPU's time for a step grows with its rows, so its bounds keep a step short. A GPU takes as many rows as its graphs
    have at most, eight times a CPU's, and the bounds of sessions that can wait grow as much; none of that is measured.
    Its chunks stay: several of a session at once make a longer step, for which there is no graph.

    Attributes:
        rows: Sessions that one step advances.
        chunks: Chunks of all sessions in one step, where nobody speaks.
        uploads: Sessions beside those in which somebody speaks that one step advances, by a chunk each.
        ahead: Sessions that are translated ahead together.
    """

    rows: int = 32
    chunks: int = 16
    uploads: int = 4
    ahead: int = 4

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """Those of a kind of device."""
        return cls(rows=ROW_BUCKETS[-1], uploads=32, ahead=32) if device.type == "cuda" else cls()


class _Arrival(NamedTuple):
    """Audio that came in."""

    audio_ms: float  # the session's, with this
    at_s: float  # the clock when it came
    due_s: float  # and when it would be over, were it spoken from then on


class Stream:
    """One client's session: its queues on the client's side, its state on the engine's.

    Args:
        notify: Called on any thread when something was told, or when there is room for messages again.
    """

    def __init__(self, notify: Callable[[], object]) -> None:
        # The engine's:
        self.session: Session | None = None
        self.fork: Session | None = None  # the session as if its audio ended here, while that is computed for a flush
        self.failure: DragomanError | None = None  # what the session ends with after that
        self.number = 0  # counts the sessions of an engine
        self.served = 0  # the step that advanced it last
        # Of both sides:
        self.inbox: deque[SessionMessage] = deque()
        self.outbox: deque[Event | CloseCode] = deque()
        self.declared = False  # the client has said what it will send
        self.ended = False  # no more audio is taken
        self.over = False  # nothing more is to be computed
        self._notify = notify
        self._put_bytes = self._put_messages = 0  # counted on the client's side
        self._taken_bytes = self._taken_messages = 0  # counted on the engine's
        self._max_waiting_bytes = 0
        self._format = AudioFormat()
        self._heard_bytes = 0
        self._arrivals: deque[_Arrival] = deque()
        self._began_s: float | None = None  # the clock when the first audio came
        self._heard_s: float | None = None  # and the last
        self._due_s = 0.0

    @property
    def busy(self) -> bool:
        """Whether a step would advance it, so that it takes nothing in; the engine's."""
        return self.fork is not None or (self.session is not None and self.session.ready())

    @property
    def row(self) -> Session | None:
        """What a step would advance."""
        return self.fork or self.session

    @row.setter
    def row(self, advanced: Session) -> None:
        if self.fork is None:
            self.session = advanced
        else:
            self.fork = advanced

    def is_upload(self, now_s: float) -> bool:
        """Whether its audio has come faster than it could be spoken."""
        if self._began_s is None:
            return False
        return self._heard_bytes / self.bytes_per_s - (now_s - self._began_s) > _UPLOAD_S

    def speaks(self, now_s: float) -> bool:
        """Whether audio came a moment ago."""
        return self._heard_s is not None and now_s - self._heard_s < _PAUSE_S

    @property
    def waiting_bytes(self) -> int:
        """Audio that waits for the engine."""
        return self._put_bytes - self._taken_bytes

    @property
    def has_room(self) -> bool:
        """Whether more may come; what comes when all is over is passed over."""
        waiting_messages = self._put_messages - self._taken_messages
        full = self.waiting_bytes > self._max_waiting_bytes or waiting_messages > _MAX_WAITING_MESSAGES
        return self.over or not full

    def put(self, message: SessionMessage) -> None:
        """Queue a message for the engine, after the defaults if it is the first; called on the client's side."""
        if isinstance(message, SessionConfig):
            self.declared = True
            self._format = message.audio
            self._max_waiting_bytes = _MAX_WAITING_S * self.bytes_per_s
        elif not self.declared:
            self.put(DEFAULTS)
        if isinstance(message, bytes):
            self._arrive(len(message))
        self.ended |= message is Command.CLOSE
        self._put_bytes += _size(message)
        self._put_messages += 1
        self.inbox.append(message)

    def finish(self, code: str, message: str) -> None:
        """End the audio with an error, unless it has ended; the last words still come. Called on the client's side."""
        if not self.ended and not self.over:
            self.tell(ErrorEvent(0, code, message))
            self.put(Command.CLOSE)

    def _arrive(self, size_bytes: int) -> None:
        now_s = time.monotonic()
        self._began_s = now_s if self._began_s is None else self._began_s
        self._heard_s = now_s
        self._heard_bytes += size_bytes
        self._due_s = max(now_s, self._due_s) + size_bytes / self.bytes_per_s
        self._arrivals.append(_Arrival(1000 * self._heard_bytes / self.bytes_per_s, now_s, self._due_s))

    @property
    def bytes_per_s(self) -> int:
        """Of the audio as the client sends it."""
        return self._format.sample_rate_hz * self._format.bytes_per_sample

    def lag_s(self, now_s: float) -> float:
        """Audio that is here, would be over by now at the pace of speech, and is not decided.

        A file that a client sends at once lags no more than the same file spoken would. Called on the engine's thread.
        """
        if self.session is None:
            return 0.0
        due_ms = max((arrival.audio_ms for arrival in self._arrivals.copy() if arrival.due_s <= now_s), default=0.0)
        return max(0.0, due_ms - self.session.decided_ms) / 1000

    def timed(self, events: Sequence[Event]) -> list[Event]:
        """Write into deltas how long the audio that they needed has been here; called on the engine's thread."""
        now, timed, arrivals = time.monotonic(), list(events), self._arrivals.copy()  # more may come meanwhile
        for i, event in enumerate(events):
            if isinstance(event, TranscriptDelta | TranslationDelta) and event.emitted_ms is not None:
                needed_ms = event.emitted_ms
                arrived = next((a.at_s for a in arrivals if a.audio_ms >= needed_ms), now)
                timed[i] = replace(event, backlog_ms=round(1000 * (now - arrived)))
        decided_ms = self.session.decided_ms if self.session else 0
        while self._arrivals and self._arrivals[0].audio_ms < decided_ms:
            self._arrivals.popleft()
        return timed

    def take(self) -> SessionMessage:
        """The next message for the engine, on whose thread this is called; of audio, what may be taken in at once."""
        message, messages, most = self.inbox.popleft(), 1, _MAX_PIECE_S * self.bytes_per_s
        if isinstance(message, bytes):
            pieces, size = [message], len(message)
            # Of floats, what can be read is told before what cannot: a piece stays as it came.
            joins = self._format.encoding == "s16le"
            while joins and size < most and self.inbox and isinstance(piece := self.inbox[0], bytes):
                pieces.append(piece)
                size += len(piece)
                messages += 1
                self.inbox.popleft()
            message = b"".join(pieces)
            if size > most:
                message, rest = message[:most], message[most:]
                messages -= 1
                self.inbox.appendleft(rest)
        self.taken = (self._taken_bytes + _size(message), self._taken_messages + messages)
        return message

    @property
    def taken(self) -> tuple[int, int]:
        """What the engine has taken so far: bytes of audio, and messages of any kind."""
        return self._taken_bytes, self._taken_messages

    @taken.setter
    def taken(self, sizes: tuple[int, int]) -> None:
        was_full = not self.has_room
        self._taken_bytes, self._taken_messages = sizes
        if was_full:
            self._notify()

    def hand_over(self) -> list[SessionMessage]:
        """All messages that wait, for an engine with a stream of its own, which tells what it takes."""
        messages: list[SessionMessage] = []
        while self.inbox:
            messages.append(self.inbox.popleft())
        self._arrivals.clear()
        return messages

    def tell(self, *told: Event | CloseCode) -> None:
        """Queue events for the client, and at last the code to close with; called on any thread."""
        if told:
            self.outbox.extend(told)
            self._notify()

    def fail(self, code: str, message: str, close_code: CloseCode) -> None:
        """End the session with an error; called on any thread."""
        self.over = True
        self.tell(ErrorEvent(0, code, message), close_code)


def _size(message: SessionMessage) -> int:
    return len(message) if isinstance(message, bytes) else 0


class Streams:
    """What there is to tell of the sessions of an engine, or of several."""

    @property
    def streams(self) -> list[Stream]:
        """The sessions."""
        raise NotImplementedError

    @property
    def sessions(self) -> int:
        """How many sessions there are."""
        return len(self.streams)

    @property
    def waiting_bytes(self) -> int:
        """Audio that waits for the engine."""
        return sum(stream.waiting_bytes for stream in self.streams)

    @property
    def waiting_events(self) -> int:
        """Events that wait for their clients."""
        return sum(len(stream.outbox) for stream in self.streams)

    def end_all(self, code: str, message: str, close_code: CloseCode) -> None:
        """End every session with the same error."""
        for stream in self.streams:
            stream.fail(code, message, close_code)


class Engine(Streams):
    """The one thread that computes, for all sessions together; `start` begins.

    Args:
        recognizer: The model.
        translator: What translates, if sessions may ask for it.
        speculation: Shared by the sessions; None for none.
        slots: Sessions that there may be.
        describe: The settings of a session as its client is told them.
        ticked: Told of each step: how many sessions it advanced, and the seconds that it took.
        ahead: Whether to translate what has not been told yet while there is nothing else to do.
        max_lag_s: Seconds that a session may be behind before the newest that lags is ended; None for no limit.
        bounds: Of a step; None for those of the recogniser's device.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        translator: AnyTranslator | None,
        speculation: Speculation | None,
        *,
        slots: int,
        describe: Callable[[SessionConfig], dict[str, Any]],
        ticked: Callable[[int, float], object],
        ahead: bool = False,
        max_lag_s: float | None = None,
        bounds: EngineBounds | None = None,
    ) -> None:
        self._recognizer = recognizer
        self.bounds = EngineBounds.of(recognizer.device) if bounds is None else bounds
        self._translator = translator
        self._speculation = speculation
        self._describe = describe
        self._ticked = ticked
        self._ahead = ahead
        self._max_lag_s = max_lag_s
        self._late_since_s: dict[Stream, float] = {}
        self._slots: list[Stream | None] = [None] * slots
        self._numbers = itertools.count(1)
        self._steps = 0
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def streams(self) -> list[Stream]:
        """The sessions, in the order of their slots."""
        return [stream for stream in self._slots if stream is not None]

    def add(self, stream: Stream) -> None:
        """Begin to work for a session.

        Raises:
            ValueError: Every slot is taken.
        """
        stream.number = next(self._numbers)
        self._slots[self._slots.index(None)] = stream

    def remove(self, stream: Stream) -> None:
        """Forget a session."""
        self._slots[self._slots.index(stream)] = None

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    def wake(self) -> None:
        """Tell that there may be something to do: a message came in, or room for events."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread after its present step."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait()
            self._wake.clear()
            while not self._stopping and self.step():
                pass

    def step(self) -> bool:
        """Take in what has come and make one step for those that are ready; False if there was nothing to do."""
        streams = [s for s in self.streams if not s.over and len(s.outbox) < MAX_WAITING_EVENTS]
        self._steps += 1
        rows, max_chunks = self._choose(streams, time.monotonic())
        if rows:
            began_s = time.perf_counter()
            self._together(rows, partial(self._tick, max_chunks=max_chunks))
            self._ticked(len(rows), time.perf_counter() - began_s)
        for stream in streams:
            self._guard(stream, self._collect)
        self._relieve(streams)
        is_fed = any(stream.inbox and not stream.over for stream in streams)
        return bool(rows) or is_fed or (self._ahead and self._translate_ahead(streams))

    def _choose(self, streams: Sequence[Stream], now_s: float) -> tuple[list[Stream], int]:
        """Take in messages; the sessions that a step is to advance then, and by how many chunks at most."""
        uploads, live = list[Stream](), list[Stream]()
        for stream in streams:
            (uploads if stream.is_upload(now_s) else live).append(stream)
        bounds = self.bounds
        rows = self._ready(live, bounds.rows)
        if any(stream.speaks(now_s) for stream in live):
            return rows + self._ready(uploads, min(bounds.uploads, bounds.rows - len(rows))), 1
        rows += self._ready(uploads, bounds.rows - len(rows))
        return rows, max(1, bounds.chunks // max(1, len(rows)))

    def _ready(self, streams: Sequence[Stream], most: int) -> list[Stream]:
        """At most so many sessions that a step would advance, when they have taken in what has come for them."""
        ready: list[Stream] = []
        for stream in sorted(streams, key=lambda stream: stream.served):
            if len(ready) < most:
                self._guard(stream, self._feed)
                if stream.busy and not stream.over:
                    ready.append(stream)
        return ready

    def _tick(self, streams: Sequence[Stream], max_chunks: int) -> None:
        for stream in streams:
            stream.served = self._steps
        # On copies, which cost nothing: of a step that fails halfway, nothing remains.
        rows = [copy.copy(stream.row) for stream in streams if stream.row is not None]
        tick(rows, max_chunks=max_chunks)
        for stream, row in zip(streams, rows, strict=True):
            stream.row = row

    def _relieve(self, streams: Sequence[Stream]) -> None:
        """Where one session has lagged for too long, end the newest that lags: the others get its share."""
        if self._max_lag_s is None:
            return
        now_s = time.monotonic()
        lags_s = {s: s.lag_s(now_s) for s in streams if not s.over}
        late = [s for s, lag_s in lags_s.items() if lag_s > self._max_lag_s]
        self._late_since_s = {s: self._late_since_s.get(s, now_s) for s in late}
        if any(now_s - since_s >= _LATE_S for since_s in self._late_since_s.values()):
            # The oldest is late first. One that came after it and will soon be as late goes before it.
            newest = max((s for s in lags_s if lags_s[s] > self._max_lag_s / 2), key=lambda s: s.number)
            sentence = f"the service is overloaded, and this session {lags_s[newest]:.1f} s behind:"
            newest.fail("overloaded", f"{sentence} connect again in a while", CloseCode.TRY_AGAIN_LATER)
            self._late_since_s = {}  # it takes a while to see what that did for the others

    def _translate_ahead(self, streams: Sequence[Stream]) -> bool:
        """One forward for a few sessions, so short that what comes meanwhile hardly waits; False if none is needed."""
        expecting = [s for s in streams if not s.over and s.session is not None and s.session.expects]
        return self._together(expecting[: self.bounds.ahead], _ahead)

    def _feed(self, stream: Stream) -> None:
        """Hand over messages until the session can make a step, or has taken in enough at once."""
        for _ in range(_MAX_MESSAGES):
            if stream.busy or not stream.inbox:
                return
            message = stream.take()
            if isinstance(message, SessionConfig):
                stream.session = Session(self._recognizer, message, self._translator, self._speculation)
                stream.tell(self._updated(message))
                continue
            session = stream.session
            assert session is not None, "the first message declares the session"
            if isinstance(message, bytes):
                try:
                    session.write(message)
                except DragomanError as error:  # what was said before is told before that
                    stream.failure = error
                    stream.fork = session.begin_flush()
            elif isinstance(message, LookaheadChange):
                self._change(stream, session, message)
            elif message is Command.FLUSH:
                stream.fork = session.begin_flush()
            else:
                session.close_input()

    def _change(self, stream: Stream, session: Session, change: LookaheadChange) -> None:
        try:
            session.set_max_lookahead_ms(change.max_lookahead_ms)
        except DragomanError as error:
            stream.tell(ErrorEvent(0, error.code, str(error)))
        else:
            stream.tell(self._updated(session.config))

    def _updated(self, config: SessionConfig) -> SessionUpdated:
        return SessionUpdated(self._describe(config), 0)

    def _collect(self, stream: Stream) -> None:
        """Tell what has become certain, and with it perhaps the end of a flush or of the session."""
        if stream.session is None or stream.over:
            return
        events = stream.session.take_events()
        if stream.fork is not None and not stream.fork.ready():
            events += stream.session.end_flush(stream.fork)
            stream.fork = None
        stream.tell(*stream.timed(events))
        if stream.fork is None and stream.failure is not None:
            raise stream.failure
        if any(isinstance(event, SessionClosed) for event in events):
            stream.over = True
            stream.tell(CloseCode.NORMAL_CLOSURE)

    def _together(self, streams: list[Stream], work: Callable[[list[Stream]], bool | None]) -> bool:
        """Do some work for all in one batch; if it fails, for each alone, so that none ends by another's fault."""
        try:
            return bool(work(streams))
        except Exception:
            for stream in streams:
                self._guard(stream, lambda stream: work([stream]))
            return True

    def _guard(self, stream: Stream, work: Callable[[Stream], object]) -> None:
        """Do some work for a session; what goes wrong in it ends this one and no other."""
        try:
            work(stream)
        except DragomanError as error:
            stream.fail(error.code, str(error), CloseCode.INVALID_DATA)
        except Exception:
            logger.exception("a session ends with an internal error")
            message = "the server failed while it worked on this session: connect again"
            stream.fail("internal_error", message, CloseCode.INTERNAL_ERROR)


def _ahead(streams: Sequence[Stream]) -> bool:
    return translate_ahead([stream.session for stream in streams if stream.session is not None])
