"""Engines in processes of their own, as if they were one: for a CPU with more cores than one Python can use.

    client's side: stream.put → inbox → pipe → engine's process: inbox → engine → outbox → pipe → stream.tell

A session stays with the engine where it began, the one that had the fewest then. Both of its queues stay bounded: what
an engine has not taken in counts as waiting, and so does what a client has not taken. An engine that dies ends its
sessions with an error, and a new one takes its place.
"""

import atexit
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Final, NamedTuple

import torch

from streaming.errors import DragomanError
from streaming.events import Event
from streaming.messages import CloseCode, SessionMessage
from streaming.scheduler import MAX_WAITING_EVENTS, Engine, Stream, Streams, prepare_process

_GATHERING_S: Final = 0.01  # between two batches through a pipe, whose cost hardly depends on their size
_RESTART_S: Final = 1.0
_STOP_S: Final = 30.0  # for the present step of an engine

Ticked = Callable[[int, float], object]

logger = logging.getLogger(__name__)


class _Forth(NamedTuple):
    """Of one session, on the way to its engine."""

    number: int
    messages: list[SessionMessage]
    taken_events: int  # so far, of what the engine has told
    removed: bool  # it is to be forgotten


class _Back(NamedTuple):
    """Of one session, on the way back."""

    number: int
    told: list[Event | CloseCode]
    taken_bytes: int  # so far, of what it was sent
    taken_messages: int


class _Told(NamedTuple):
    """What comes back at once."""

    streams: list[_Back]
    ticks: list[tuple[int, float]]


# --------------------------------------------------------------------------------------------- in the engine's process


class _Mirror(Stream):
    """A session's queues in the engine's process.

    Attributes:
        sent_events: How many events are on their way to the client or with it.
        taken_events: How many of them the client has taken.
    """

    def __init__(self, notify: Callable[[], object]) -> None:
        super().__init__(notify)
        self.sent_events = self.taken_events = 0
        self._reported = (0, 0)

    def take(self) -> SessionMessage:
        """As any stream's; the other process is told, since the client waits there."""
        message = super().take()
        self._notify()
        return message

    def back(self, number: int) -> _Back | None:
        """What the other process does not know yet; None if there is nothing."""
        told: list[Event | CloseCode] = []
        while self.outbox and self.sent_events - self.taken_events < MAX_WAITING_EVENTS:
            told.append(self.outbox.popleft())
            self.sent_events += 1
        taken = self.taken
        if not told and taken == self._reported:
            return None
        self._reported = taken
        return _Back(number, told, *taken)


class _Worker:
    """The engine's process: what it does beside computing."""

    def __init__(self, connection: Connection, make: Callable[[Ticked], Engine]) -> None:
        self._connection = connection
        self._changed = threading.Event()
        self._ticks: list[tuple[int, float]] = []
        self._mirrors: dict[int, _Mirror] = {}
        self._engine = make(self._ticked)

    def run(self) -> None:
        """Work until the other process has ended or says so."""
        self._engine.start()
        self._connection.send(None)  # the models are loaded
        threading.Thread(target=self._tell, name="teller", daemon=True).start()
        with suppress(EOFError, OSError):
            while (batch := self._connection.recv()) is not None:
                for forth in batch:
                    self._take(forth)
                self._engine.wake()
                self._changed.set()
        self._engine.stop()

    def _ticked(self, rows: int, duration_s: float) -> None:
        self._ticks.append((rows, duration_s))
        self._changed.set()

    def _take(self, forth: _Forth) -> None:
        mirror = self._mirrors.get(forth.number)
        if mirror is None:
            mirror = self._mirrors[forth.number] = _Mirror(self._changed.set)
            self._engine.add(mirror)
        mirror.taken_events = forth.taken_events
        for message in forth.messages:
            mirror.put(message)
        if forth.removed:
            mirror.over = True
            self._engine.remove(self._mirrors.pop(forth.number))

    def _tell(self) -> None:
        with suppress(OSError):
            while True:
                self._changed.wait()
                self._changed.clear()
                found = [mirror.back(number) for number, mirror in self._mirrors.copy().items()]
                ticks, self._ticks = self._ticks, []
                streams = [back for back in found if back is not None]
                if streams or ticks:
                    self._connection.send(_Told(streams, ticks))
                time.sleep(_GATHERING_S)


def _work(connection: Connection, make: Callable[[Ticked], Engine], threads: int) -> None:
    # A terminal's Ctrl-C reaches all processes: the server's tells this one when it is no longer needed.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(threads)
    prepare_process()
    _Worker(connection, make).run()


# --------------------------------------------------------------------------------------------- in the server's process


class _Far:
    """What the server's process knows of a session whose engine is elsewhere."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.removed = False
        self._told_events = self._reported = 0

    def forth(self, number: int) -> _Forth | None:
        """What its engine does not know yet; None if there is nothing."""
        messages = self.stream.hand_over()
        # In the outbox there may also be what the server itself has to tell: then it is a few less.
        taken = max(self._reported, self._told_events - len(self.stream.outbox))
        if not messages and not self.removed and taken == self._reported:
            return None
        self._reported = taken
        return _Forth(number, messages, taken, self.removed)

    def hear(self, back: _Back) -> None:
        """Take what its engine has told."""
        self.stream.taken = (back.taken_bytes, back.taken_messages)
        self.stream.over |= any(isinstance(item, CloseCode) for item in back.told)
        self.stream.tell(*back.told)
        self._told_events += len(back.told)


class EngineProcess:
    """One engine in a process of its own; its interface is an engine's.

    Args:
        make: Makes the engine, in its process; can be pickled.
        ticked: Told of each of its steps, on a thread of this object's.
        threads: Threads that the engine computes with.
    """

    def __init__(self, make: Callable[[Ticked], Engine], ticked: Ticked, *, threads: int) -> None:
        self._make, self._ticked, self._threads = make, ticked, threads
        self._lock = threading.Lock()
        self._numbers: dict[Stream, int] = {}
        self._fars: dict[int, _Far] = {}
        self._next = 0
        self._changed = threading.Event()
        self._started = threading.Event()
        self._stopping = False
        self._process: multiprocessing.process.BaseProcess | None = None
        self._thread = threading.Thread(target=self._run, name="engine process", daemon=True)

    @property
    def pid(self) -> int | None:
        """Of the process that there is now."""
        return self._process.pid if self._process is not None else None

    @property
    def streams(self) -> list[Stream]:
        """Its sessions."""
        return list(self._numbers.copy())

    def start(self) -> None:
        """Begin to compute, once the models are loaded.

        Raises:
            DragomanError: ``engine_failed``.
        """
        self._thread.start()
        atexit.register(self.stop)  # before Python waits for the process
        self._started.wait()
        if self.pid is None:
            raise DragomanError("engine_failed", "an engine's process ended before its models were loaded: see above")

    def add(self, stream: Stream) -> None:
        """Begin to work for a session."""
        with self._lock:
            self._next += 1
            self._numbers[stream] = self._next
            self._fars[self._next] = _Far(stream)

    def remove(self, stream: Stream) -> None:
        """Forget a session."""
        with self._lock:
            far = self._fars.get(self._numbers.pop(stream))
            if far is not None:  # none if it has died
                far.removed = True
        self._changed.set()

    def wake(self) -> None:
        """Tell that there may be something to do."""
        self._changed.set()

    def stop(self) -> None:
        """End the process after its present step."""
        self._stopping = True
        self._changed.set()
        self._thread.join()
        atexit.unregister(self.stop)

    def _run(self) -> None:
        """Start the process, hear what it tells, and start another where it dies."""
        context = multiprocessing.get_context("spawn")
        while not self._stopping:
            connection, other = context.Pipe()
            process = context.Process(target=_work, args=(other, self._make, self._threads), daemon=True)
            process.start()
            other.close()
            with suppress(EOFError, OSError):
                connection.recv()
                self._process = process
                self._started.set()
                threading.Thread(target=self._send, args=(connection,), name="sender", daemon=True).start()
                while True:
                    self._hear(connection.recv())
            self._ended(process, connection)
            if not self._started.is_set():
                self._started.set()
                return

    def _ended(self, process: multiprocessing.process.BaseProcess, connection: Connection) -> None:
        with self._lock:  # what is added from now on is for the next process
            connection.close()
            lost = [far.stream for far in self._fars.values() if not far.removed]
            self._fars = {}
        process.join(_STOP_S if self._stopping else 1.0)
        process.kill()  # it does not tell any more
        if self._stopping:
            return
        logger.error("an engine's process has died; %d sessions end with it, and another one starts", len(lost))
        for stream in lost:
            if not stream.over:
                sentence = "the engine of this session has died: connect again"
                stream.fail("internal_error", sentence, CloseCode.INTERNAL_ERROR)
        time.sleep(_RESTART_S)

    def _send(self, connection: Connection) -> None:
        with suppress(OSError):
            while True:
                self._changed.wait()
                self._changed.clear()
                if self._stopping:
                    connection.send(None)
                    return
                batch = self._batch(connection)
                if batch is None:
                    break
                if batch:
                    connection.send(batch)
                time.sleep(_GATHERING_S)
        self._changed.set()  # for the next process

    def _batch(self, connection: Connection) -> list[_Forth] | None:
        """What a process does not know yet; None if it has died, and is not to be told."""
        with self._lock:
            if connection.closed:
                return None
            found = [far.forth(number) for number, far in self._fars.items()]
            self._fars = {number: far for number, far in self._fars.items() if not far.removed}
        return [forth for forth in found if forth is not None]

    def _hear(self, told: _Told) -> None:
        for rows, duration_s in told.ticks:
            self._ticked(rows, duration_s)
        for back in told.streams:
            far = self._fars.get(back.number)
            if far is not None:
                far.hear(back)


class Engines(Streams):
    """Several engines as one; its interface is an engine's.

    Args:
        make: Makes an engine, in its process; can be pickled.
        count: How many.
        ticked: Told of each step of each, on any thread.
    """

    def __init__(self, make: Callable[[Ticked], Engine], count: int, *, ticked: Ticked) -> None:
        threads = max(1, (os.cpu_count() or count) // count)
        self.processes = [EngineProcess(make, ticked, threads=threads) for _ in range(count)]
        self._of: dict[Stream, EngineProcess] = {}

    @property
    def streams(self) -> list[Stream]:
        """The sessions."""
        return list(self._of)

    def start(self) -> None:
        """Begin to compute, once the models are loaded.

        Raises:
            DragomanError: ``engine_failed``.
        """
        with ThreadPoolExecutor(len(self.processes)) as pool:
            list(pool.map(EngineProcess.start, self.processes))

    def add(self, stream: Stream) -> None:
        """Begin to work for a session, where there are fewest."""
        process = min(self.processes, key=lambda process: len(process.streams))
        self._of[stream] = process
        process.add(stream)

    def remove(self, stream: Stream) -> None:
        """Forget a session."""
        self._of.pop(stream).remove(stream)

    def wake(self) -> None:
        """Tell that there may be something to do: a message came in, or room for events."""
        for process in self.processes:
            process.wake()

    def stop(self) -> None:
        """End the processes after their present steps."""
        for process in self.processes:
            process.stop()
