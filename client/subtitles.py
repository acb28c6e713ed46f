"""Words with their times become subtitle cues, written as SRT or WebVTT.

Only certain words come in, so a cue is written once and never changed. Cues do not overlap and none is empty.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from streaming.events import TranscriptDelta, TranslationDelta, Word

# What subtitlers ask of a cue: two lines that fit the picture, a second to read it, at most six on screen.
MAX_LINE_CHARACTERS: Final = 42
MIN_CUE_MS: Final = 1_000
MAX_CUE_MS: Final = 6_000
MAX_PAUSE_MS: Final = 1_500


@dataclass(frozen=True)
class Cue:
    """One or two lines of text on the screen from `start_ms` to `end_ms`, of audio since the start."""

    start_ms: int
    end_ms: int
    lines: tuple[str, ...]


class CueMaker:
    """Collects words into cues.

    A cue ends at an endpoint, before a pause of more than 1.5 s, and before the word that would make it
    longer than 6 s or two lines of 42 characters; a single word may be longer. A cue of less than 1 s stays
    on the screen for 1 s, or until the next one begins.
    """

    def __init__(self) -> None:
        """Start with an empty screen."""
        self._words: list[Word] = []
        self._complete = False  # no further word joins these
        self._screen_free_ms = 0

    def push(self, delta: TranscriptDelta | TranslationDelta) -> list[Cue]:
        """Add the words of one delta; return the cues that are now final."""
        cues = []
        for word in delta.words if isinstance(delta, TranscriptDelta) else spread(delta):
            if self._words and (self._complete or not self._fits(word)):
                cues.append(self._close(word.start_ms))
            self._words.append(word)
        self._complete |= delta.endpoint and bool(self._words)  # one pause after another ends nothing
        # A long enough cue does not depend on when the next one begins.
        if self._complete and self._words[-1].end_ms - self._start_ms >= MIN_CUE_MS:
            cues.append(self._close(None))
        return cues

    def finish(self) -> list[Cue]:
        """Return the last cue, if one is open."""
        return [self._close(None)] if self._words else []

    @property
    def _start_ms(self) -> int:
        return max(self._words[0].start_ms, self._screen_free_ms)

    def _fits(self, word: Word) -> bool:
        return (
            word.start_ms - self._words[-1].end_ms <= MAX_PAUSE_MS
            and word.end_ms - self._start_ms <= MAX_CUE_MS
            and max(map(len, _wrap([*self._words, word]))) <= MAX_LINE_CHARACTERS
        )

    def _close(self, next_start_ms: int | None) -> Cue:
        """End the open cue; `next_start_ms` is when the following word begins, if there is one yet."""
        start_ms = self._start_ms
        end_ms = max(self._words[-1].end_ms, start_ms + MIN_CUE_MS)
        if next_start_ms is not None:
            end_ms = min(end_ms, next_start_ms)
        self._screen_free_ms = end_ms = max(end_ms, start_ms + 1)
        cue = Cue(start_ms, end_ms, tuple(_wrap(self._words)))
        self._words = []
        self._complete = False
        return cue


def spread(delta: TranslationDelta) -> list[Word]:
    """The words of a translation, timed as if they were spoken evenly, letter by letter, while their source was."""
    assert delta.source_start_ms is not None and delta.source_end_ms is not None, "subtitles need audio"
    texts = delta.delta.split()
    span_ms, letters = delta.source_end_ms - delta.source_start_ms, sum(map(len, texts)) or 1
    ends = [delta.source_start_ms + span_ms * count // letters for count in accumulate(map(len, texts), initial=0)]
    return [Word(text, start, end, 1.0) for text, start, end in zip(texts, ends, ends[1:], strict=False)]


def _wrap(words: list[Word]) -> list[str]:
    """The words in one line if they fit, else in the two lines of most equal length."""
    parts = [" ".join(word.word.split()) for word in words]
    text = " ".join(parts)
    if len(text) <= MAX_LINE_CHARACTERS or len(parts) == 1:
        return [text]
    splits = [[" ".join(parts[:i]), " ".join(parts[i:])] for i in range(1, len(parts))]
    return min(splits, key=lambda lines: max(map(len, lines)))


def srt_cue(number: int, cue: Cue) -> str:
    """One SubRip cue with its blank line; `number` counts from 1."""
    text = "\n".join(cue.lines).replace("-->", "->")  # SubRip has no escapes
    return f"{number}\n{_clock(cue.start_ms, ',')} --> {_clock(cue.end_ms, ',')}\n{text}\n\n"


VTT_HEADER: Final = "WEBVTT\n\n"
"""What a WebVTT file begins with."""


def vtt_cue(cue: Cue) -> str:
    """One WebVTT cue with its blank line."""
    text = "\n".join(cue.lines).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"{_clock(cue.start_ms, '.')} --> {_clock(cue.end_ms, '.')}\n{text}\n\n"


def _clock(ms: int, separator: str) -> str:
    """Milliseconds as hours, minutes, seconds and thousandths."""
    seconds, thousandths = divmod(ms, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{separator}{thousandths:03}"
