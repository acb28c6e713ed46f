"""What a person sees while they speak: the words above, their translations below, and how it goes."""

import math
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol, Self

import numpy as np
from rich.console import Console, RenderableType
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from client.output import OutputFormat, Writer, make_writer
from streaming.events import Event, TranscriptDelta, TranslationDelta

_QUIETEST_DB: Final = -60.0  # left end of the meter
_METER_CELLS: Final = 20
_FALL_DB: Final = 1.5  # of the meter, a block
_MUTED_DB: Final = -75.0
_MUTED_S: Final = 3.0
_MAX_PARAGRAPHS: Final = 100  # more lines than a screen has
_MAX_PARAGRAPH_CHARACTERS: Final = 2_000


class Level:
    """How loud the microphone is.

    Attributes:
        db: The root mean square of what came last, in dB of full scale; it falls slowly, so that an eye can follow.
        clips: Whether full scale was reached in what came last.
        silent_s: For how long nothing but the noise of the electronics has come.
    """

    def __init__(self) -> None:
        """Start in silence."""
        self.db = -math.inf
        self.clips = False
        self.silent_s = 0.0

    def hear(self, pcm: bytes, seconds: float) -> None:
        """Take s16le audio of that length."""
        samples = np.frombuffer(pcm, "<i2").astype(np.float32)
        power = float(np.mean(samples**2)) if len(samples) else 0.0
        db = 10 * math.log10(power / 32768**2) if power else -math.inf
        self.db = max(db, self.db - _FALL_DB)
        self.clips = bool(len(samples)) and float(np.abs(samples).max()) >= 32767
        self.silent_s = self.silent_s + seconds if db < _MUTED_DB else 0.0


@dataclass(frozen=True)
class Status:
    """How it goes.

    Attributes:
        heard_s: Audio that has been taken, in seconds.
        db: The level, in dB of full scale.
        warning: What is wrong with the level, if anything is.
        lag_s: How far the words are behind what computing alone would allow, in seconds.
        dropped_s: Audio that was lost, in seconds.
        ending: Whether the last words are awaited.
    """

    heard_s: float
    db: float
    warning: str
    lag_s: float
    dropped_s: float
    ending: bool


def describe_level(level: Level) -> str:
    """What a speaker should know about the level."""
    if level.silent_s >= _MUTED_S:
        return "no sound: is the microphone muted?"
    return "too loud" if level.clips else ""


def status_line(status: Status, *, ascii_only: bool = False) -> Text:
    """The status in one line."""
    seconds = int(status.heard_s)
    clock = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    share = min(1.0, max(0.0, 1 - status.db / _QUIETEST_DB))
    cells = round(share * _METER_CELLS)
    full, empty = ("#", "-") if ascii_only else ("▮", "▯")
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{clock}  {full * cells}{empty * (_METER_CELLS - cells)}  {status.lag_s:.1f} s behind")
    if status.dropped_s:
        line.append(f"  {status.dropped_s:.1f} s lost", "bold red")
    if status.warning:
        line.append(f"  {status.warning}", "bold yellow")
    line.append("  the last words, Ctrl-C leaves" if status.ending else "  Ctrl-C ends", "dim")
    return line


class Segments:
    """Tells to which segment of the speech each piece of a text belongs."""

    def __init__(self) -> None:
        """Start before the first piece."""
        self._ended = 0

    def of(self, delta: TranscriptDelta | TranslationDelta) -> int:
        """The segment of the next piece of one text, counted from 0."""
        if isinstance(delta, TranscriptDelta):
            return delta.segment
        segment = self._ended
        self._ended += delta.endpoint
        return segment


class SegmentLines:
    """Writes the transcript, or one translation, with a line for each segment that has words."""

    def __init__(self, language: str | None = None) -> None:
        """Write the translation into `language`; None: the transcript."""
        self._language = language
        self._segments = Segments()
        self._segment: int | None = None  # that of the line under way

    def push(self, events: Sequence[Event]) -> str:
        """The text that these events add."""
        return "".join(map(self._add, events))

    def finish(self) -> str:
        """The end of the last line."""
        return "" if self._segment is None else "\n"

    def _add(self, event: Event) -> str:
        if not isinstance(event, TranscriptDelta | TranslationDelta):
            return ""
        if getattr(event, "language", None) != self._language:
            return ""
        segment = self._segments.of(event)
        if segment == self._segment or not event.delta.strip():
            return event.delta
        begin = "" if self._segment is None else "\n"
        self._segment = segment
        return begin + event.delta.lstrip()


class View(Protocol):
    """Shows events and the status while it is entered."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def hear(self, event: Event) -> None:
        """Show what an event adds."""
        ...

    def tell(self, sentence: str) -> None:
        """Tell what has happened to the session."""
        ...

    def frame(self, status: Status) -> RenderableType:
        """What is to be drawn now."""
        ...

    def draw(self, frame: RenderableType) -> None:
        """Draw it; may wait for the terminal, and may be called in any thread."""
        ...


class Lines:
    """The text to standard output, only ever appended to, and the status to standard error if that is a terminal."""

    def __init__(self, writer: Writer) -> None:
        """Show what `writer` makes of the events."""
        self._writer = writer
        self._console = Console(stderr=True, highlight=False)
        self._live: Live | None = None
        # A terminal that shows the text has no room for a line that moves.
        if self._console.is_terminal and not sys.stdout.isatty():
            self._live = _live(self._console, screen=False)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        self._write(self._writer.finish())

    def hear(self, event: Event) -> None:
        """Write what an event adds."""
        self._write(self._writer.push([event]))

    def tell(self, sentence: str) -> None:
        """Write it to standard error at once, above the status."""
        _tell(self._live.console if self._live else self._console, sentence)

    def frame(self, status: Status) -> RenderableType:
        """The status."""
        return status_line(status, ascii_only=self._console.options.ascii_only)

    def draw(self, frame: RenderableType) -> None:
        """Draw it over the last one."""
        if self._live:
            self._live.update(frame, refresh=True)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class _Pane:
    """One growing text, a paragraph for each segment. It remembers what fits on a screen."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._segments = Segments()
        self._segment = 0
        self._paragraphs = deque([""], _MAX_PARAGRAPHS)

    def append(self, delta: TranscriptDelta | TranslationDelta) -> None:
        segment = self._segments.of(delta)
        if segment != self._segment or len(self._paragraphs[-1]) > _MAX_PARAGRAPH_CHARACTERS:
            self._paragraphs.append("")
        self._segment = segment
        self._paragraphs[-1] = (self._paragraphs[-1] + delta.delta).lstrip()

    def last_lines(self, width: int, height: int) -> list[str]:
        """The last lines; where a paragraph is broken does not depend on how much of it fits."""
        lines: list[str] = []
        for paragraph in reversed(self._paragraphs):
            if len(lines) >= height:
                break
            lines = [*_wrapped(paragraph, width), *lines] if paragraph else lines
        return lines[max(0, len(lines) - height) :]


class Panes:
    """The words above and each translation below, on a screen of their own; at the end the whole text is left."""

    def __init__(self, writer: Writer, languages: Sequence[str]) -> None:
        """Show the transcript and these languages; `writer` makes the text that is left behind."""
        self._writer = writer
        self._text: list[str] = []  # all of it, some 100 kB an hour, because the screen is gone at the end
        self._told: deque[str] = deque([], _MAX_PARAGRAPHS)
        self._panes = {"": _Pane("speech"), **{language: _Pane(language) for language in languages}}
        self._console = Console(highlight=False)
        self._live = _live(self._console, screen=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        sys.stdout.write("".join([*self._text, self._writer.finish()]))
        sys.stdout.flush()
        for sentence in self._told:
            _tell(Console(stderr=True, highlight=False), sentence)

    def hear(self, event: Event) -> None:
        """Add what an event says to its pane."""
        self._text.append(self._writer.push([event]))
        if isinstance(event, TranscriptDelta | TranslationDelta):
            language = event.language if isinstance(event, TranslationDelta) else ""
            self._panes[language].append(event)

    def tell(self, sentence: str) -> None:
        """Show it above the status until there is another one, and leave it behind at the end."""
        self._told.append(sentence)

    def frame(self, status: Status) -> RenderableType:
        """The panes, of equal height, over the status."""
        width, height = self._console.size
        told = list(self._told)[-1:]
        each = max(3, (height - 1 - len(told)) // len(self._panes))  # two lines of it are the border
        screen = Layout()
        panels = []
        for pane in self._panes.values():
            lines = pane.last_lines(max(1, width - 4), each - 2)
            panels.append(Layout(Panel(Text("\n".join(lines)), title=pane.title, title_align="left"), size=each))
        panels += [
            Layout(Text(sentence, "bold yellow", no_wrap=True, overflow="ellipsis"), size=1) for sentence in told
        ]
        line = status_line(status, ascii_only=self._console.options.ascii_only)
        screen.split_column(*panels, Layout(line, minimum_size=1))
        return screen

    def draw(self, frame: RenderableType) -> None:
        """Draw it over the last one."""
        self._live.update(frame, refresh=True)


def make_view(output_format: OutputFormat, languages: Sequence[str]) -> View:
    """Panes where text goes to a terminal, lines elsewhere; one language alone needs no words of the other above it."""
    panes = output_format is OutputFormat.TXT and sys.stdout.isatty() and not Console().is_dumb_terminal
    if output_format is OutputFormat.TXT and not (languages and panes) and len(languages) < 2:
        writer: Writer = SegmentLines(languages[0] if languages else None)
    else:
        writer = make_writer(output_format, "microphone", languages, bilingual=True)
    return Panes(writer, languages) if panes else Lines(writer)


def _tell(console: Console, sentence: str) -> None:
    console.print(Text(f"dragoman: {sentence}"), soft_wrap=True)


def _live(console: Console, *, screen: bool) -> Live:
    return Live(
        Text(),
        console=console,
        screen=screen,
        transient=not screen,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )


@lru_cache(maxsize=4 * _MAX_PARAGRAPHS)
def _wrapped(paragraph: str, width: int) -> tuple[str, ...]:
    return tuple(line.plain.rstrip() for line in Text(paragraph).wrap(Console(width=width), width))
