"""A session without audio: words in, translations out.

    session = TextSession(load_translator(folder), ["es"])
    for event in session.push("where the words come from") + session.finish(): ...

Several sessions advance as one batch with :func:`streaming.interpreter.translate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from models.translator import AnyTranslator
from streaming.errors import DragomanError
from streaming.events import Event, SessionClosed
from streaming.glossary import check_glossary
from streaming.interpreter import UNNUMBERED, Interpretation, Portion, Teller, TimedWord, translate
from streaming.speculation import Speculation


class TextSession(Teller):
    """Words of one source to growing translations. Its events are :class:`TranslationDelta`, without times.

    Args:
        translator: The model; shared, never changed.
        languages: Languages to translate into, at least one.
        latency: One of :data:`models.translator.LATENCIES`.
        glossary: Terms whose translations are fixed: ``{term: {language: translation}}``.
        speculation: Of the engine, shared by its sessions; None for none. It changes no event.

    Raises:
        DragomanError: ``unsupported_language``, ``unsupported_latency`` or ``bad_glossary``.
    """

    def __init__(
        self,
        translator: AnyTranslator,
        languages: Sequence[str],
        latency: str = "medium",
        glossary: Mapping[str, Mapping[str, str]] | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        if not languages:
            raise DragomanError("unsupported_language", "a text session needs a language to translate into")
        check_glossary(glossary or {})
        super().__init__(Interpretation.begin(translator, languages, latency, glossary or {}, speculation))
        self._closed = False

    def push(self, text: str) -> list[Event]:
        """Takes complete words, with white space between them, and returns what is written upon them.

        Raises:
            DragomanError: ``session_closed``.
        """
        self.write(text)
        return self._drain()

    def end_segment(self) -> list[Event]:
        """Ends a sentence or paragraph: what has been read so far is written upon."""
        self.write("", closes=True)
        return self._drain()

    def finish(self) -> list[Event]:
        """Ends the text and returns the last events, :class:`SessionClosed` at their end."""
        self.close_input()
        return self._drain()

    def write(self, text: str, *, closes: bool = False) -> None:
        """Takes words and computes nothing; ``closes`` if a segment ends with them."""
        if self._closed:
            raise DragomanError("session_closed", "words came after the end of the session; open a new one")
        for portion in self._portions(Portion(tuple(map(TimedWord, text.split())))):
            self._emit(portion)
        if closes:
            self._emit(Portion(closes=True))

    def close_input(self) -> None:
        """Ends the text; the next steps write what is left."""
        if self._closed:
            raise DragomanError("session_closed", "the session has ended already; open a new one")
        self._closed = True
        self._emit(SessionClosed(UNNUMBERED, 0))

    def ready(self) -> bool:
        """Whether a step would advance this session."""
        return self.translates

    def take_events(self) -> list[Event]:
        """The events since the last call."""
        events, self._events = self._events, ()
        return list(events)

    def _drain(self) -> list[Event]:
        while self.ready():
            translate([self])
        return self.take_events()
