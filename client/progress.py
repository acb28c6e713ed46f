"""What a person sees of a transcription under way: the words as they are decided, and how fast it goes."""

import sys
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Self, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track
from rich.text import Text

_Item = TypeVar("_Item")


def counted(items: Sequence[_Item]) -> Iterable[_Item]:
    """The items one by one; on a terminal's standard error, a bar tells how many are done."""
    console = Console(stderr=True)
    return track(items, "", console=console, transient=True, disable=not console.is_terminal)


class Display:
    """Results go to standard output, and a progress bar to standard error when that is a terminal.

    When both are the terminal they share it: full lines scroll up, and below them stand the line that is
    being written and the bar.
    """

    def __init__(self, recordings: int) -> None:
        """Look at where the outputs go; nothing is drawn before the display is entered.

        Args:
            recordings: How many recordings there will be.
        """
        self._recordings = recordings
        self._read_s: dict[int, float] = {}
        self._durations_s: dict[int, float] = {}
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._bar = Progress(
            BarColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn(), console=self._console
        )
        self._task = self._bar.add_task("", total=None, status="")
        self._line = ""
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self._console, redirect_stdout=False)
        self._shares_screen = self._live is not None and sys.stdout.isatty()
        self._started_s = time.monotonic()

    def __enter__(self) -> Self:
        self._started_s = time.monotonic()
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._line:
            self.write("\n")
        if self._live:
            self._live.stop()

    def advance(self, index: int, read_s: float, duration_s: float | None, note: str = "") -> None:
        """Tell how many seconds of recording `index` are read, how long it is where that is known, and a note."""
        self._read_s[index] = read_s
        if duration_s is not None:
            self._durations_s[index] = duration_s
        total_s = None
        if self._durations_s:  # those not yet opened are taken to be as long as the others are on average
            total_s = sum(self._durations_s.values()) / len(self._durations_s) * self._recordings
        done_s = sum(self._read_s.values())
        speed = done_s / max(time.monotonic() - self._started_s, 1e-3)
        clock = "/".join(str(timedelta(seconds=round(s))) for s in (done_s, total_s) if s is not None)
        status = f"{clock}, {speed:.1f}x real time{note}"
        self._bar.update(self._task, completed=done_s, total=total_s, status=status)

    def skip(self) -> None:
        """Tell that one recording will not be read."""
        self._recordings -= 1

    def write(self, text: str) -> None:
        """Write a piece of the result."""
        if not self._shares_screen:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._console.print(line)
        *full, last = Text(self._line).wrap(self._console, self._console.width) or [Text()]
        for wrapped in full:
            self._console.print(wrapped)
        if full:
            self._line = last.plain

    def _render(self) -> Group:
        return Group(Text(self._line), self._bar) if self._line else Group(self._bar)
