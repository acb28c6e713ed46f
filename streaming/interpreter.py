"""From the words of a session to the translations that it tells: the same for speech and for text.

What turns words into chunks of translation stands behind :class:`Interpreter`, so that a session does not know whether
a model decides itself when to write, a policy decides for it, or another machine does either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from models.translator import Direction, Policy, Translator
from streaming.errors import DragomanError
from streaming.events import Event, SessionClosed, TranscriptDelta, TranslationDelta
from streaming.fallback import Fallback
from streaming.glossary import Glossary
from streaming.speculation import Speculation
from streaming.translation import Interleaved, TranslatedChunk

#: The ``seq`` of an event that has not been told yet.
UNNUMBERED = -1
#: Forwards of one tick: few, so that no session waits long for another's write.
FORWARDS_PER_TICK = 4


class Interpreter(Protocol):
    """Words in, chunks of translation out; its states are values, with one row for each target language.

    Interpreters that are equal advance their sessions together.
    """

    @property
    def policy(self) -> Policy:
        """Who decides when to write."""

    def init_state(self, directions: Sequence[Direction], glossary: Glossary | None = None) -> Any:
        """The state of a session that has read nothing."""

    def feed(self, state: Any, words: Sequence[str], *, closes: bool = False) -> Any:
        """Queues words for every row; ``closes`` if a segment ends with them, so that a write must follow."""

    def ready(self, state: Any) -> bool:
        """Whether a step would advance any row."""

    def step(
        self, states: Sequence[Any], *, max_forwards: int = 1
    ) -> tuple[list[list[TranslatedChunk]], Sequence[Any]]:
        """Advances several sessions by a bounded amount of work; each one's chunks, and the states."""


def interpreter_for(translator: Translator, speculation: Speculation | None = None) -> Interpreter:
    """What runs a translator under its policy; with speculation if the model decides itself when to write."""
    if translator.policy == "interleaved":
        return Interleaved(translator, speculation)
    return Fallback(translator)


class TimedWord(NamedTuple):
    """A source word with its place in the audio, if there is audio; see :class:`TranslationDelta`."""

    word: str
    start_ms: int | None = None
    end_ms: int | None = None
    emitted_ms: int | None = None


@dataclass(frozen=True)
class Interpretation:
    """The translating part of one session; a value.

    Attributes:
        interpreter: What translates.
        state: Its state.
        words: Words that some row has not written upon yet, and the one before them.
        first: Index of the first of them, from the session's start.
        unread: For each row, the index of the first word that it has not written upon.
    """

    interpreter: Interpreter
    state: Any
    unread: tuple[int, ...]
    words: tuple[TimedWord, ...] = ()
    first: int = 0

    @classmethod
    def begin(
        cls,
        translator: Translator | None,
        languages: Sequence[str],
        latency: str,
        glossary: Mapping[str, Mapping[str, str]],
        speculation: Speculation | None = None,
    ) -> Interpretation | None:
        """An interpretation into these languages that has read nothing; None for no languages.

        Those of the same translator and speculation advance together.

        Raises:
            DragomanError: ``unsupported_language`` if the model does not know one, one stands there twice, or there
                is no model; ``unsupported_latency``.
        """
        if not languages:
            return None
        if translator is None:
            raise DragomanError(
                "unsupported_language",
                f"a translation into {', '.join(languages)} was asked for and no translator is loaded; load one, or"
                " ask for the transcript only",
            )
        if len(set(languages)) < len(languages):
            raise DragomanError("unsupported_language", f"a language is asked for twice in {', '.join(languages)}")
        directions = [translator.direction(language, latency) for language in languages]
        interpreter = interpreter_for(translator, speculation)
        return cls(interpreter, interpreter.init_state(directions, glossary), (0,) * len(directions))

    @property
    def ready(self) -> bool:
        """Whether there is something to translate."""
        return self.interpreter.ready(self.state)

    def fed(self, words: Sequence[TimedWord], *, closes: bool) -> Interpretation:
        """The interpretation with more words at its end; ``closes`` if a segment ends with them."""
        state = self.interpreter.feed(self.state, [word.word for word in words], closes=closes)
        return replace(self, state=state, words=(*self.words, *words))

    def after(self, state: Any, chunks: Sequence[TranslatedChunk]) -> tuple[list[TranslationDelta], Interpretation]:
        """What a step has brought: events whose ``seq`` is still to be given, and the interpretation."""
        deltas, unread = [], list(self.unread)
        for chunk in chunks:
            unread[chunk.row] = chunk.last_word + 1
            if chunk.delta or chunk.endpoint:
                first, last = self.words[chunk.first_word - self.first], self.words[chunk.last_word - self.first]
                deltas.append(
                    TranslationDelta(
                        seq=UNNUMBERED,
                        delta=chunk.delta,
                        language=chunk.language,
                        source_words=(chunk.first_word, chunk.last_word),
                        endpoint=chunk.endpoint,
                        source_start_ms=first.start_ms,
                        source_end_ms=last.end_ms,
                        emitted_ms=last.emitted_ms,
                    )
                )
        first_kept = max(0, min(unread) - 1)  # at its end, a segment may be written upon once more
        words = self.words[first_kept - self.first :]
        return deltas, replace(self, state=state, unread=tuple(unread), words=words, first=first_kept)


def advance(interpretations: Sequence[Interpretation]) -> list[tuple[list[TranslationDelta], Interpretation]]:
    """Advances interpretations in common batches; for each its events and what it has become."""
    results: dict[int, tuple[list[TranslationDelta], Interpretation]] = {}
    for interpreter in {one.interpreter for one in interpretations}:
        at = [i for i, one in enumerate(interpretations) if one.interpreter == interpreter]
        states = [interpretations[i].state for i in at]
        chunks, after = interpreter.step(states, max_forwards=FORWARDS_PER_TICK)
        for i, found, state in zip(at, chunks, after, strict=True):
            results[i] = interpretations[i].after(state, found)
    return [results[i] for i in range(len(interpretations))]


class Teller:
    """What sessions of speech and of text have in common: events told in order, translations between them.

    Words that have been told are translated before anything after them is told, so that the order of the events does
    not depend on how the input came.

    Args:
        interpretation: The translating part at its beginning; None for none.
    """

    def __init__(self, interpretation: Interpretation | None) -> None:
        self._interpretation = interpretation
        # What waits until the words before it are translated. None: a segment has ended without further words.
        self._untold: tuple[Event | Sequence[TimedWord] | None, ...] = ()
        self._events: tuple[Event, ...] = ()
        self._seq = 0

    @property
    def policy(self) -> Policy | None:
        """Who decides when a translation is written; None without translation."""
        return None if self._interpretation is None else self._interpretation.interpreter.policy

    @property
    def translates(self) -> bool:
        """Whether there is something to translate."""
        return self._interpretation is not None and self._interpretation.ready

    def _emit(self, event: Event | Sequence[TimedWord] | None) -> None:
        self._untold = (*self._untold, event)
        self._tell_on()

    def _tell_on(self) -> None:
        """Tells what waits, up to words that have to be translated first."""
        while self._untold and not self.translates:
            event = self._untold[0]
            if isinstance(event, SessionClosed):  # the last words may have closed no segment
                self._feed((), closes=True)
                if self.translates:
                    return
            self._untold = self._untold[1:]
            if event is None:
                self._feed((), closes=True)
            elif isinstance(event, TranscriptDelta):
                self._tell(event)
                words = [TimedWord(w.word, w.start_ms, w.end_ms, event.emitted_ms) for w in event.words]
                self._feed(words, closes=event.endpoint)
            elif isinstance(event, Sequence):
                self._feed(event, closes=False)
            else:
                self._tell(event)

    def _feed(self, words: Sequence[TimedWord], *, closes: bool) -> None:
        if self._interpretation is not None:
            self._interpretation = self._interpretation.fed(words, closes=closes)

    def _tell(self, event: Event) -> None:
        self._events = (*self._events, replace(event, seq=self._seq))
        self._seq += 1

    def _translated(self, deltas: Sequence[TranslationDelta], after: Interpretation) -> None:
        self._interpretation = after
        for delta in deltas:
            self._tell(delta)
        self._tell_on()


def translate(sessions: Sequence[Teller]) -> None:
    """Advances the translations of sessions, of speech or of text, by a step of common batches."""
    waiting = [(one, one._interpretation) for one in sessions if one.translates]
    results = advance([interpretation for _, interpretation in waiting if interpretation is not None])
    for (one, _), (deltas, after) in zip(waiting, results, strict=True):
        one._translated(deltas, after)
