"""From the words of a session to the translations that it tells: the same for speech and for text.

What turns words into chunks of translation stands behind :class:`Interpreter`, so that a session does not know whether
a model decides itself when to write, a policy decides for it, or another machine does either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from models.translator import AnyTranslator, Direction, Policy, Translator
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, Event, SessionClosed, TranscriptDelta, TranslationDelta
from streaming.fallback import Fallback
from streaming.glossary import Glossary
from streaming.preemptive import Ahead, expecting, told
from streaming.remote import Remote, RemoteTranslator
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

    def problem(self, state: Any) -> DragomanError | None:
        """Why nothing more will be translated; such a state is never ready. None if all is well."""

    def step(
        self, states: Sequence[Any], *, max_forwards: int = 1
    ) -> tuple[list[list[TranslatedChunk]], Sequence[Any]]:
        """Advances several sessions by a bounded amount of work; each one's chunks, and the states."""


def interpreter_for(translator: AnyTranslator, speculation: Speculation | None = None) -> Interpreter:
    """What runs a translator under its policy; with speculation if the model decides itself when to write."""
    if isinstance(translator, RemoteTranslator):
        return Remote(translator)
    assert isinstance(translator, Translator)
    if translator.policy == "interleaved":
        return Interleaved(translator, speculation)
    return Fallback(translator)


class TimedWord(NamedTuple):
    """A source word with its place in the audio, if there is audio; see :class:`TranslationDelta`."""

    word: str
    start_ms: int | None = None
    end_ms: int | None = None
    emitted_ms: int | None = None


class Portion(NamedTuple):
    """Words that have been told, and that are translated together.

    Attributes:
        words: Perhaps none.
        closes: Whether a segment ends with them.
        emitted_ms: When this was told, if there is audio.
    """

    words: tuple[TimedWord, ...] = ()
    closes: bool = False
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
        held: Chunks upon a portion that some row still translates. Of several languages, the one that was asked for
            first is told first, whichever is written first.
        ahead: What has been translated upon words that have not been told; None for nothing.
    """

    interpreter: Interpreter
    state: Any
    unread: tuple[int, ...]
    words: tuple[TimedWord, ...] = ()
    first: int = 0
    held: tuple[TranslatedChunk, ...] = ()
    ahead: Ahead | None = None

    @classmethod
    def begin(
        cls,
        translator: AnyTranslator | None,
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

    @property
    def problem(self) -> DragomanError | None:
        """Why nothing more will be translated; None if all is well."""
        return self.interpreter.problem(self.state)

    @property
    def several(self) -> bool:
        """Whether there are several languages, so that words come one by one."""
        return len(self.unread) > 1

    def fed(self, portion: Portion) -> tuple[list[TranslationDelta], Interpretation]:
        """The interpretation with more words at its end, and what has been translated of them ahead."""
        words = [word.word for word in portion.words]
        timed = (*self.words, *portion.words)
        if timed and portion.emitted_ms is not None:  # what is written upon the end of a segment is written then
            timed = (*timed[:-1], timed[-1]._replace(emitted_ms=portion.emitted_ms))
        fed = replace(self, words=timed, ahead=None)
        if self.ahead is None:
            return [], replace(fed, state=self.interpreter.feed(self.state, words, closes=portion.closes))
        assert isinstance(self.interpreter, Interleaved)
        branch, ahead = told(self.interpreter, self.state, self.ahead, words, closes=portion.closes)
        return replace(fed, ahead=ahead).after(branch.state, branch.chunks)

    def expecting(self, word: str, *, ends: bool) -> Interpretation:
        """The interpretation, which has nothing to do, with a guess of what comes; see :mod:`streaming.preemptive`."""
        if not isinstance(self.interpreter, Interleaved):
            return self
        return replace(self, ahead=expecting(self.interpreter, self.state, self.ahead, word, ends=ends))

    def after(self, state: Any, chunks: Sequence[TranslatedChunk]) -> tuple[list[TranslationDelta], Interpretation]:
        """What a step has brought: events whose ``seq`` is still to be given, and the interpretation."""
        if self.several:
            chunks = (*self.held, *chunks)
            if self.interpreter.ready(state):
                return [], replace(self, state=state, held=chunks)
            chunks = sorted(chunks, key=lambda chunk: chunk.row)
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
        return deltas, replace(self, state=state, unread=tuple(unread), words=words, first=first_kept, held=())


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


def _advance_ahead(interpretations: Sequence[Interpretation], max_forwards: int) -> list[Interpretation]:
    """Advances what is translated ahead, in common batches."""
    results: dict[int, Interpretation] = {}
    for interpreter in {one.interpreter for one in interpretations}:
        at = {i: one.ahead for i, one in enumerate(interpretations) if one.interpreter == interpreter and one.ahead}
        chunks, after = interpreter.step([one.open.state for one in at.values()], max_forwards=max_forwards)
        for (i, one), found, state in zip(at.items(), chunks, after, strict=True):
            results[i] = replace(interpretations[i], ahead=one.after(state, found))
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
        # What waits until the words before it are translated.
        self._untold: tuple[Event | Portion, ...] = ()
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

    @property
    def tail(self) -> str:
        """The word that has begun and may still grow, as it stands; empty if there is none. It has not been told."""
        return ""

    @property
    def pausing(self) -> bool:
        """Whether a segment may be about to end. Where nothing tells, it always may."""
        return True

    def _emit(self, event: Event | Portion) -> None:
        self._untold = (*self._untold, event)
        self._tell_on()

    def _tell_on(self) -> None:
        """Tells what waits, up to words that have to be translated first."""
        while self._untold and not self.translates:
            event = self._untold[0]
            if isinstance(event, SessionClosed):  # the last words may have closed no segment
                self._feed(Portion(closes=True))
                if self.translates:
                    return
            self._untold = self._untold[1:]
            if isinstance(event, Portion):
                self._feed(event)
                continue
            self._tell(event)
            if isinstance(event, TranscriptDelta):
                words = tuple(TimedWord(w.word, w.start_ms, w.end_ms, event.emitted_ms) for w in event.words)
                told = Portion(words, event.endpoint, event.emitted_ms)
                self._untold = (*self._portions(told), *self._untold)

    def _portions(self, told: Portion) -> list[Portion]:
        """What is told at once, its words one by one if there are several languages.

        Which of these is told first must not depend on how many words came at once.
        """
        if not told.words and not told.closes:
            return []
        if len(told.words) < 2 or self._interpretation is None or not self._interpretation.several:
            return [told]
        *before, last = told.words
        return [*(Portion((word,)) for word in before), told._replace(words=(last,))]

    def _feed(self, portion: Portion) -> None:
        if self._interpretation is not None:
            deltas, self._interpretation = self._interpretation.fed(portion)
            for delta in deltas:
                self._tell(delta)

    def _tell(self, event: Event) -> None:
        self._events = (*self._events, replace(event, seq=self._seq))
        self._seq += 1

    @property
    def expects(self) -> bool:
        """Whether there is something to translate ahead."""
        return self._expecting() is not None

    def _expecting(self) -> Interpretation | None:
        """The interpretation with something to translate ahead; None if there is nothing."""
        if self._interpretation is None or self._untold or self.translates:
            return None
        guess = self._interpretation.expecting(self.tail, ends=self.pausing)
        return guess if guess.ahead is not None and guess.ahead.busy else None

    def _translated(self, deltas: Sequence[TranslationDelta], after: Interpretation) -> None:
        self._interpretation = after
        for delta in deltas:
            self._tell(delta)
        if (problem := after.problem) is not None:  # from here on, what is told is not translated
            self._interpretation = None
            self._tell(ErrorEvent(UNNUMBERED, problem.code, f"{problem}: nothing more is translated"))
        self._tell_on()


def translate(sessions: Sequence[Teller]) -> None:
    """Advances the translations of sessions, of speech or of text, by a step of common batches."""
    waiting = [(one, one._interpretation) for one in sessions if one.translates]
    results = advance([interpretation for _, interpretation in waiting if interpretation is not None])
    for (one, _), (deltas, after) in zip(waiting, results, strict=True):
        one._translated(deltas, after)


def translate_ahead(sessions: Sequence[Teller], *, max_forwards: int = 1) -> bool:
    """Translates ahead for sessions that have nothing else to do: a bounded step, in common batches.

    What they tell does not depend on it, only how soon; see :mod:`streaming.preemptive`. A caller that has anything
    else to do does that first.

    Args:
        sessions: Sessions that are not ready.
        max_forwards: How many to run at most.

    Returns:
        Whether there was anything to translate.
    """
    waiting = [(one, guess) for one in sessions if (guess := one._expecting()) is not None]
    for (one, _), after in zip(waiting, _advance_ahead([guess for _, guess in waiting], max_forwards), strict=True):
        one._interpretation = after
    return bool(waiting)
