"""Translation of what has not been told yet, while there is nothing else to do.

A recogniser holds a word back until the next one begins, and the end of a segment until the speaker has been silent
for long enough. Meanwhile the machine is often idle: it can already translate as if the word had been told as it
stands, and in a pause, as if the segment had ended with it. When the word comes so, what was written is there, and no
forward is left; when it does not, nothing was told, and what was written is a draft (:class:`streaming.drafts.
OldOutput`).

It is lossless without being verified: what is taken over is the state that reading the word would have led to, by the
same steps. Both branches append to the cache of the state that they begin with, behind its tokens, so that to drop
them is to forget them (:class:`models.kv_cache.KvCache`); only a batch of several sessions moves them elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streaming.translation import Interleaved, TranslatedChunk, TranslationState


@dataclass(frozen=True)
class Branch:
    """A state, and what was written on the way to it.

    Attributes:
        state: Perhaps busy.
        chunks: In their order.
    """

    state: TranslationState
    chunks: tuple[TranslatedChunk, ...] = ()


@dataclass(frozen=True)
class Ahead:
    """What follows a state that has nothing to do, if a word comes; a value.

    Attributes:
        word: What is guessed to come; empty for no word, so that only an end can.
        heard: What follows the word.
        ended: What follows ``heard`` if a segment ends there; None as long as that is not expected.
    """

    word: str
    heard: Branch
    ended: Branch | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """The word, if there is one."""
        return (self.word,) if self.word else ()

    @property
    def open(self) -> Branch:
        """The branch that is worked on."""
        return self.heard if self.ended is None else self.ended

    @property
    def busy(self) -> bool:
        """Whether a forward would advance it."""
        return self.open.state.busy

    def after(self, state: TranslationState, chunks: Sequence[TranslatedChunk]) -> Ahead:
        """What a step with the open branch's state has made of it."""
        branch = Branch(state, (*self.open.chunks, *chunks))
        return replace(self, heard=branch) if self.ended is None else replace(self, ended=branch)


def expecting(
    interpreter: Interleaved, state: TranslationState, ahead: Ahead | None, word: str, *, ends: bool
) -> Ahead:
    """What to translate ahead; computes nothing.

    Args:
        interpreter: What translates.
        state: With nothing to do.
        ahead: What was expected before; it is gone on with if the word is the same.
        word: What may come next; empty for nothing.
        ends: Whether a segment may end there.
    """
    if ahead is None or ahead.word != word:
        state = state if ahead is None else _without(interpreter, state, ahead)
        ahead = Ahead(word, Branch(interpreter.feed(state, (word,) if word else ())))
    if ends and ahead.ended is None and not ahead.busy:
        ahead = replace(ahead, ended=Branch(interpreter.feed(ahead.heard.state, (), closes=True)))
    return ahead


def told(
    interpreter: Interleaved, state: TranslationState, ahead: Ahead, words: Sequence[str], *, closes: bool
) -> tuple[Branch, Ahead | None]:
    """What a state becomes when words are told: what was translated ahead, if that was upon these.

    Args:
        interpreter: What translates.
        state: The one from which ``ahead`` began.
        ahead: What was expected.
        words: What has come.
        closes: Whether a segment ends with it.

    Returns:
        What has become true, and what is still ahead of it.
    """
    n = len(ahead.words)
    if tuple(words[:n]) != ahead.words:
        return Branch(interpreter.feed(_without(interpreter, state, ahead), words, closes=closes)), None
    heard, ended = ahead.heard, ahead.ended
    if len(words) > n:
        state = heard.state if ended is None else interpreter.recalling(heard.state, ended.state, ended.chunks)
        return Branch(interpreter.feed(state, words[n:], closes=closes), heard.chunks), None
    if not closes:
        return heard, None if ended is None else Ahead("", Branch(heard.state), ended)
    if ended is None:
        ended = Branch(interpreter.feed(heard.state, (), closes=True))
    own = heard.chunks
    if not interpreter.translator.endpoint:
        # What the model wrote of itself upon the last word is what it would have been made to write.
        own = tuple(replace(chunk, endpoint=True) for chunk in own)
    return Branch(ended.state, own + ended.chunks), None


def _without(interpreter: Interleaved, state: TranslationState, ahead: Ahead) -> TranslationState:
    """The state without what was expected, but with what was written upon it as drafts."""
    chunks = ahead.heard.chunks + (() if ahead.ended is None else ahead.ended.chunks)
    return interpreter.recalling(state, ahead.open.state, chunks)
