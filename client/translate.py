"""Lines of text through one translator, several of them at a time in one batch."""

from __future__ import annotations

import json
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, Queue
from typing import BinaryIO, Final, Protocol

from streaming.errors import DragomanError
from streaming.events import Event, TranslationDelta
from streaming.interpreter import translate as step
from streaming.text_session import TextSession

_MAX_WAITING_LINES: Final = 1_000
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # a model may write them; a line may not have them


class Lines:
    """The lines of a text, read ahead on a thread of their own, so that what is there can be told from what is not.

    A line ends with a line feed, perhaps after a carriage return.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        """Begin to read.

        Args:
            stream: UTF-8 text.
            name: What it is called in errors.
        """
        self._queue: Queue[str | DragomanError | OSError | None] = Queue(_MAX_WAITING_LINES)
        self._ended = False
        threading.Thread(target=self._read, args=(stream, name), name="lines", daemon=True).start()

    def take(self, *, wait: bool) -> str | None:
        """The next line; None after the last one, or with `wait` off if there is none yet.

        Raises:
            DragomanError: ``text_unreadable`` with the number of the line that is not UTF-8.
            OSError: The text cannot be read on.
        """
        if self._ended:
            return None
        try:
            line = self._queue.get(block=wait)
        except Empty:
            return None
        if isinstance(line, Exception):
            raise line
        self._ended = line is None
        return line

    def _read(self, stream: BinaryIO, name: str) -> None:
        try:
            for number, line in enumerate(stream, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    sentence = f"{name}, line {number} is not UTF-8 text: convert it first"
                    self._queue.put(DragomanError("text_unreadable", sentence))
                    return
                self._queue.put(text.removesuffix("\n").removesuffix("\r"))
        except OSError as error:
            self._queue.put(error)
        self._queue.put(None)


@dataclass(frozen=True)
class Step:
    """What one step brought for the first line that was not finished.

    Attributes:
        number: Which line, from 1.
        events: What its session told.
        done: Whether this is the line's last step.
    """

    number: int
    events: Sequence[Event]
    done: bool


def translate(lines: Lines, open_session: Callable[[], TextSession], *, batch_size: int) -> Iterator[Step]:
    """Run every line through a session of its own; at most `batch_size` are under way, and share each forward.

    A line that has come is translated before the next one is waited for.

    Args:
        lines: The text.
        open_session: Makes a session.
        batch_size: Lines at a time, at least 1; the translations do not depend on it.

    Yields:
        The steps of the lines, in the order of the lines.

    Raises:
        DragomanError: As of `Lines.take`, after the lines before it.
    """
    under_way: deque[TextSession] = deque()
    number, problem = 1, None
    while True:
        while problem is None and _has_room(under_way, batch_size):
            try:
                line = lines.take(wait=not under_way)
            except (DragomanError, OSError) as error:
                problem = error
                break
            if line is None:
                break
            session = open_session()
            session.write(line)
            session.close_input()
            under_way.append(session)
        if not under_way:
            break
        if ready := [session for session in under_way if session.ready()]:
            step(ready)
        while under_way:
            done = not under_way[0].ready()
            yield Step(number, under_way[0].take_events(), done)
            if not done:
                break
            under_way.popleft()
            number += 1
    if problem is not None:
        raise problem


def _has_room(under_way: Sequence[TextSession], batch_size: int) -> bool:
    """Whether another line may be begun; those that wait for a long one before them are not without number."""
    return len(under_way) < 8 * batch_size and sum(session.ready() for session in under_way) < batch_size


class LineWriter(Protocol):
    """Turns the steps of the lines, as they come, into pieces of text to be written one after another."""

    def push(self, step: Step) -> str:
        """The text that this step adds."""
        ...


class TextLines:
    """A line for each line: its translation, or those into several languages with tabs between them."""

    def __init__(self, languages: Sequence[str]) -> None:
        """Prepare columns for these languages."""
        self._texts = dict.fromkeys(languages, "")

    def push(self, step: Step) -> str:
        """The text that this step adds; of several languages only when all are done."""
        for event in step.events:
            if isinstance(event, TranslationDelta):
                self._texts[event.language] += _CONTROLS.sub(" ", event.delta)
        if len(self._texts) > 1 and not step.done:
            return ""
        text = "\t".join(self._texts.values())
        self._texts = dict.fromkeys(self._texts, "")
        return f"{text}\n" if step.done else text


class JsonLines:
    """The events of the wire, one a line, with the number of the `line` that they belong to."""

    def push(self, step: Step) -> str:
        """The text that this step adds."""
        lines = (json.dumps({**event.to_dict(), "line": step.number}, ensure_ascii=False) for event in step.events)
        return "".join(f"{line}\n" for line in lines)
