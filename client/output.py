"""The four forms in which transcripts and translations leave: text, JSON lines, SRT and WebVTT."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol

from client.subtitles import VTT_HEADER, Cue, CueMaker, srt_cue, vtt_cue
from streaming.errors import DragomanError
from streaming.events import Event, TranscriptDelta, TranslationDelta

STDIN: Final = "-"
"""The name that stands for standard input."""


class OutputFormat(StrEnum):
    """How a text is written; the value is the suffix of such a file too."""

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


def make_writer(
    output_format: OutputFormat, name: str, languages: Sequence[str] = (), *, bilingual: bool = False
) -> Writer:
    """A writer of the given format.

    Args:
        output_format: The form. JSON lines have all events.
        name: What JSON lines carry as their ``file``.
        languages: Which translations are written; none: the transcript. Text in several languages is written as if
            it were `bilingual`.
        bilingual: Whether text has the transcript too, each piece of a translation under what it translates.

    Raises:
        DragomanError: ``output_ambiguous`` when subtitles in several languages would have to share one stream.
    """
    language = languages[0] if languages else None
    match output_format:
        case OutputFormat.TXT:
            return _InterleavedWriter() if bilingual or len(languages) > 1 else _TextWriter(language)
        case OutputFormat.JSONL:
            return _JsonlWriter(name)
        case OutputFormat.SRT | OutputFormat.VTT:
            if len(languages) > 1:
                raise DragomanError(
                    "output_ambiguous",
                    f"{len(languages)} languages do not fit in one {output_format} file: transcribe with --output DIR,"
                    " or ask for one language",
                )
            return _SubtitleWriter(output_format, language)


def _deltas(events: Sequence[Event], language: str | None) -> list[TranscriptDelta] | list[TranslationDelta]:
    """What the events add to the translation into a language; without one, to the transcript."""
    if language is None:
        return [event for event in events if isinstance(event, TranscriptDelta)]
    return [event for event in events if isinstance(event, TranslationDelta) and event.language == language]


class _TextWriter:
    """The transcript, or one translation, in one line."""

    def __init__(self, language: str | None) -> None:
        self._language = language
        self._begun = False

    def push(self, events: Sequence[Event]) -> str:
        text = "".join(event.delta for event in _deltas(events, self._language))
        if not self._begun:
            text = text.lstrip()  # the space that keeps the first word from what is not there
            self._begun = bool(text)
        return text

    def finish(self) -> str:
        return "\n"


class _InterleavedWriter:
    """Transcript and translations below each other: a new line whenever another of them goes on."""

    def __init__(self) -> None:
        self._language: str | None = None  # whose line it is; "" is the speaker's

    def push(self, events: Sequence[Event]) -> str:
        pieces = []
        for event in events:
            if isinstance(event, TranscriptDelta):
                pieces.append(self._go_on("", event.delta))
            elif isinstance(event, TranslationDelta):
                pieces.append(self._go_on(event.language, event.delta))
        return "".join(pieces)

    def finish(self) -> str:
        return "\n"

    def _go_on(self, language: str, delta: str) -> str:
        if language == self._language or not delta.strip():
            return delta if delta.strip() else ""
        begin = "" if self._language is None else "\n"
        self._language = language
        return begin + (f"    {language}  " if language else "") + delta.lstrip()


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

    def __init__(self, output_format: OutputFormat, language: str | None) -> None:
        self._is_srt = output_format is OutputFormat.SRT
        self._language = language
        self._cues = CueMaker()
        self._written = 0

    def push(self, events: Sequence[Event]) -> str:
        deltas = _deltas(events, self._language)
        return "".join(self._write(cue) for delta in deltas for cue in self._cues.push(delta))

    def finish(self) -> str:
        text = "".join(map(self._write, self._cues.finish()))
        return text if self._written or self._is_srt else VTT_HEADER

    def _write(self, cue: Cue) -> str:
        self._written += 1
        if self._is_srt:
            return srt_cue(self._written, cue)
        return (VTT_HEADER if self._written == 1 else "") + vtt_cue(cue)


@dataclass
class _Document:
    """One text under way."""

    writer: Writer
    heading: str = ""
    path: Path | None = None
    waiting: str = ""
    begun: bool = False
    done: bool = False

    def append(self, text: str) -> None:
        if text and not self.begun:
            self.begun = True
            text = self.heading + text
        self.waiting += text


class OrderedOutput:
    """Texts that grow at the same time, written in the order of their recordings.

    The first unfinished one is written as it grows; what is later waits in memory. Of several texts, each
    begins with the name of its recording. With a folder, each has a file of its own, once it is done, and so has
    each translation: ``talk.srt``, ``talk.es.srt``.
    """

    def __init__(
        self,
        names: Sequence[str],
        output_format: OutputFormat,
        folder: Path | None,
        write: Callable[[str], object],
        languages: Sequence[str] = (),
        *,
        bilingual: bool = False,
    ) -> None:
        """Prepare the output, and the folder.

        Args:
            names: The recordings.
            output_format: How their texts are written.
            folder: Where to put files, if not everything is for `write`.
            write: Takes each piece of text as it is due.
            languages: Which translations there are.
            bilingual: As of `make_writer`, for what goes to `write`.

        Raises:
            DragomanError: ``output_ambiguous`` when two texts would have the same file name, or when several
                subtitle files would have to share one stream.
        """
        self._write = write
        self._current = 0
        if folder is not None:
            streams = [[]] if output_format is OutputFormat.JSONL else [[], *([language] for language in languages)]
            paths = _paths(names, output_format, folder, streams)
            self._documents = [
                [_Document(make_writer(output_format, name, stream), path=next(paths)) for stream in streams]
                for name in names
            ]
            return
        if len(names) > 1 and output_format in (OutputFormat.SRT, OutputFormat.VTT):
            raise DragomanError(
                "output_ambiguous",
                f"{len(names)} recordings do not fit in one {output_format} file: add --output DIR",
            )
        named = len(names) > 1 and output_format is OutputFormat.TXT
        self._documents = [
            [_Document(make_writer(output_format, name, languages, bilingual=bilingual), f"{name}: " if named else "")]
            for name in names
        ]

    def add(self, index: int, events: Sequence[Event]) -> None:
        """Add what recording `index` told, and write what is due."""
        for document in self._documents[index]:
            document.append(document.writer.push(events))
        self._release()

    def end(self, index: int, *, failed: bool) -> None:
        """End the texts of recording `index`; one that failed without a word leaves nothing behind."""
        for document in self._documents[index]:
            document.done = True
            if document.begun or not failed:
                document.append(document.writer.finish())
                if document.path is not None:
                    document.path.write_text(document.waiting, encoding="utf-8")
                    document.waiting = ""
        self._release()

    def _release(self) -> None:
        while self._current < len(self._documents):
            for document in self._documents[self._current]:
                if document.waiting and document.path is None:
                    self._write(document.waiting)
                    document.waiting = ""
                if not document.done:
                    return
            self._current += 1


def _paths(
    names: Sequence[str], output_format: OutputFormat, folder: Path, streams: Sequence[Sequence[str]]
) -> Iterator[Path]:
    """A file in `folder` for each stream of each recording; standard input is called ``stdin``."""
    stems = ["stdin" if name == STDIN else Path(name).stem for name in names]
    paths = [folder / ".".join([stem, *stream, output_format]) for stem in stems for stream in streams]
    for path, count in Counter(paths).items():
        if count > 1:
            raise DragomanError(
                "output_ambiguous", f"{count} recordings would be written to {path}: use one folder for each"
            )
    folder.mkdir(parents=True, exist_ok=True)
    return iter(paths)
