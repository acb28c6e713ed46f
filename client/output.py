"""The four forms in which a transcript leaves: text, JSON lines, SRT and WebVTT."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol

from client.subtitles import VTT_HEADER, Cue, CueMaker, srt_cue, vtt_cue
from streaming.errors import DragomanError
from streaming.events import Event, TranscriptDelta

STDIN: Final = "-"
"""The name that stands for standard input."""


class OutputFormat(StrEnum):
    """How a transcript is written; the value is the suffix of such a file too."""

    TXT = "txt"
    JSONL = "jsonl"
    SRT = "srt"
    VTT = "vtt"


class Writer(Protocol):
    """Turns the events of one session, as they come, into pieces of text to be written one after another."""

    def push(self, events: Sequence[Event]) -> str:
        """The text that these events add."""
        ...

    def finish(self) -> str:
        """The text that ends it."""
        ...


def make_writer(output_format: OutputFormat, name: str) -> Writer:
    """A writer of the given format; JSON lines carry `name` as their ``file``."""
    match output_format:
        case OutputFormat.TXT:
            return _TextWriter()
        case OutputFormat.JSONL:
            return _JsonlWriter(name)
        case OutputFormat.SRT | OutputFormat.VTT:
            return _SubtitleWriter(output_format)


class _TextWriter:
    """The transcript in one line."""

    def __init__(self) -> None:
        self._begun = False

    def push(self, events: Sequence[Event]) -> str:
        text = "".join(event.delta for event in events if isinstance(event, TranscriptDelta))
        if not self._begun:
            text = text.lstrip()  # the space that keeps the first word from what is not there
            self._begun = bool(text)
        return text

    def finish(self) -> str:
        return "\n"


class _JsonlWriter:
    """The events of the wire, one a line."""

    def __init__(self, name: str) -> None:
        self._name = name

    def push(self, events: Sequence[Event]) -> str:
        lines = (json.dumps({**event.to_dict(), "file": self._name}, ensure_ascii=False) for event in events)
        return "".join(f"{line}\n" for line in lines)

    def finish(self) -> str:
        return ""


class _SubtitleWriter:
    """Cues, each written when no later word can change it."""

    def __init__(self, output_format: OutputFormat) -> None:
        self._is_srt = output_format is OutputFormat.SRT
        self._cues = CueMaker()
        self._written = 0

    def push(self, events: Sequence[Event]) -> str:
        deltas = (event for event in events if isinstance(event, TranscriptDelta))
        return "".join(self._write(cue) for delta in deltas for cue in self._cues.push(delta))

    def finish(self) -> str:
        text = "".join(map(self._write, self._cues.finish()))
        return text if self._written or self._is_srt else VTT_HEADER

    def _write(self, cue: Cue) -> str:
        self._written += 1
        if self._is_srt:
            return srt_cue(self._written, cue)
        return (VTT_HEADER if self._written == 1 else "") + vtt_cue(cue)


class OrderedOutput:
    """Transcripts that grow at the same time, written in the order of their recordings.

    The first unfinished one is written as it grows; what is later waits in memory. Of several texts, each
    begins with the name of its recording. With a folder, each has a file of its own, once it is done.
    """

    def __init__(
        self,
        names: Sequence[str],
        output_format: OutputFormat,
        folder: Path | None,
        write: Callable[[str], object],
    ) -> None:
        """Prepare the output, and the folder.

        Args:
            names: The recordings.
            output_format: How their transcripts are written.
            folder: Where to put a file for each, if not everything is for `write`.
            write: Takes each piece of text as it is due.

        Raises:
            DragomanError: ``output_ambiguous`` when two transcripts would have the same file name, or when
                several subtitle files would have to share one stream.
        """
        several = len(names) > 1
        self._paths = None if folder is None else _paths(names, output_format, folder)
        if folder is None and several and output_format in (OutputFormat.SRT, OutputFormat.VTT):
            raise DragomanError(
                "output_ambiguous",
                f"{len(names)} recordings do not fit in one {output_format} file: add --output DIR",
            )
        named = several and folder is None and output_format is OutputFormat.TXT
        self._headings = [f"{name}: " if named else "" for name in names]
        self._writers = [make_writer(output_format, name) for name in names]
        self._texts = [""] * len(names)
        self._begun = [False] * len(names)
        self._done = [False] * len(names)
        self._current = 0
        self._write = write

    def add(self, index: int, events: Sequence[Event]) -> None:
        """Add what recording `index` told, and write what is due."""
        self._append(index, self._writers[index].push(events))
        self._release()

    def end(self, index: int, *, failed: bool) -> None:
        """End the transcript of recording `index`; one that failed without a word leaves nothing behind."""
        self._done[index] = True
        if self._begun[index] or not failed:
            self._append(index, self._writers[index].finish())
            if self._paths is not None:
                self._paths[index].write_text(self._texts[index], encoding="utf-8")
                self._texts[index] = ""
        self._release()

    def _append(self, index: int, text: str) -> None:
        if text and not self._begun[index]:
            self._begun[index] = True
            text = self._headings[index] + text
        self._texts[index] += text

    def _release(self) -> None:
        while self._paths is None and self._current < len(self._texts):
            if text := self._texts[self._current]:
                self._write(text)
                self._texts[self._current] = ""
            if not self._done[self._current]:
                return
            self._current += 1


def _paths(names: Sequence[str], output_format: OutputFormat, folder: Path) -> list[Path]:
    """A file in `folder` for each recording; standard input is called ``stdin``."""
    stems = ["stdin" if name == STDIN else Path(name).stem for name in names]
    paths = [folder / f"{stem}.{output_format}" for stem in stems]
    for path, count in Counter(paths).items():
        if count > 1:
            raise DragomanError(
                "output_ambiguous", f"{count} recordings would be written to {path}: use one folder for each"
            )
    folder.mkdir(parents=True, exist_ok=True)
    return paths
