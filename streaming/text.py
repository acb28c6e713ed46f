"""Pieces to words and segments, append-only.

A word is emitted when its last piece is certain: when the next word begins, at an endpoint, or at a flush.
An endpoint is soft: it closes a segment of the text and resets nothing that later words depend on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import sentencepiece

from models.config import FRAME_MS
from streaming.events import Word
from streaming.transducer import Token

WORD_BOUNDARY = "▁"
#: A "word" that never ends is cut here, so that memory stays bounded whatever the recogniser does.
MAX_PIECES_PER_WORD = 64
#: If voice activity contradicts the recogniser's silence, it is asked again after so many frames, …
RECHECK_FRAMES = 5
#: … and after so many times the endpoint's silence it is not believed any longer.
PATIENCE = 3


@dataclass(frozen=True)
class EmittedWord:
    """A certain word.

    Attributes:
        delta: What it adds to the transcript verbatim, its leading space included.
        word: The word with its times and confidence.
    """

    delta: str
    word: Word


@dataclass(frozen=True)
class FlushGuard:
    """What a mid-stream flush has shown already, and the continuing stream must not show again.

    Attributes:
        until_frame: Frames before this one were covered by the flush.
        padded_until_frame: The flush went on into silence up to here; late pieces may come in between.
        expected: Pieces that the flush decided and the stream has not repeated yet.
        agrees: Whether the stream has repeated the flush's pieces so far.
        open: Whether the guard still has to see the first new piece.
    """

    until_frame: int
    padded_until_frame: int
    expected: tuple[int, ...]
    agrees: bool = True
    open: bool = True


@dataclass(frozen=True)
class TextState:
    """The past of one transcript.

    Attributes:
        pending: Pieces of the word that may still grow.
        silent_from_frame: Frame after the last piece.
        recheck_frame: No endpoint before this frame.
        segment: Number of the segment in progress.
        segment_words: Words emitted in it.
        words: Words emitted in all.
        guard: Set by a flush.
    """

    pending: tuple[Token, ...] = ()
    silent_from_frame: int = 0
    recheck_frame: int = 0
    segment: int = 0
    segment_words: int = 0
    words: int = 0
    guard: FlushGuard | None = None


class WordAssembler:
    """Turns one row's pieces into words.

    Args:
        tokenizer: The recogniser's SentencePiece model.
        endpoint_silence_frames: Frames without a piece that make an endpoint.
    """

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor, endpoint_silence_frames: int) -> None:
        self._tokenizer = tokenizer
        self._silence = endpoint_silence_frames

    def add(self, tokens: list[Token], state: TextState) -> tuple[list[EmittedWord], TextState]:
        """Takes a chunk's pieces; returns the words that they complete."""
        words: list[EmittedWord] = []
        for token in tokens:
            guard, shown = self._pass_guard(token, state.guard)
            state = replace(state, guard=guard, silent_from_frame=token.frame + 1, recheck_frame=0)
            if not shown:
                continue
            if state.pending and (self._begins_word(token) or len(state.pending) >= MAX_PIECES_PER_WORD):
                more, state = self.close_word(state)
                words += more
            state = replace(state, pending=(*state.pending, token))
        return words, state

    def close_word(self, state: TextState) -> tuple[list[EmittedWord], TextState]:
        """Declares the pending word complete."""
        pieces = state.pending
        state = replace(state, pending=())
        text = self._tokenizer.decode([token.piece for token in pieces]).strip()
        if not text:
            return [], state
        space = " " if state.words and self._begins_word(pieces[0]) else ""
        probability = math.exp(sum(math.log(max(token.probability, 1e-9)) for token in pieces) / len(pieces))
        # Encoder frame k is the audio up to k * 80 ms.
        start_ms = max(0, pieces[0].frame - 1) * FRAME_MS
        word = Word(text, start_ms, max(start_ms, pieces[-1].frame * FRAME_MS), probability)
        state = replace(state, words=state.words + 1, segment_words=state.segment_words + 1)
        return [EmittedWord(space + text, word)], state

    def suspects_endpoint(self, end_frame: int, state: TextState) -> bool:
        """Whether pieces suggest that the segment ends with the frames before ``end_frame``, so that one has to listen.

        Args:
            end_frame: Frames decoded so far.
            state: After :meth:`add` of all pieces before ``end_frame``.
        """
        silence = end_frame - state.silent_from_frame
        return bool(state.pending) and silence >= self._silence and end_frame >= state.recheck_frame

    def at_endpoint(self, end_frame: int, state: TextState, *, silent: bool) -> tuple[bool, TextState]:
        """Whether a segment that is suspected to end does so.

        Args:
            end_frame: As in :meth:`suspects_endpoint`.
            state: Likewise.
            silent: What the voice activity detector says. If it hears somebody, patience has an end.
        """
        if silent or end_frame - state.silent_from_frame >= PATIENCE * self._silence:
            return True, state
        return False, replace(state, recheck_frame=end_frame + RECHECK_FRAMES)

    def _begins_word(self, token: Token) -> bool:
        piece: str = self._tokenizer.id_to_piece(token.piece)
        return piece.startswith(WORD_BOUNDARY)

    def _pass_guard(self, token: Token, guard: FlushGuard | None) -> tuple[FlushGuard | None, bool]:
        """Whether a piece is new after a flush; pieces that the flush has shown are dropped."""
        if guard is None:
            return None, True
        repeated = bool(guard.expected) and token.piece == guard.expected[0]
        if token.frame < guard.until_frame or (
            guard.open and guard.agrees and repeated and token.frame < guard.padded_until_frame
        ):
            return replace(guard, expected=guard.expected[1:], agrees=guard.agrees and repeated), False
        # The tail of a word that was cut by the flush is new text only if its beginning was shown as it is.
        whole = self._begins_word(token) or (guard.open and guard.agrees and not guard.expected)
        return (None, True) if whole else (replace(guard, open=False), False)


def close_segment(state: TextState) -> TextState:
    """The state after an endpoint or a flush."""
    return replace(state, segment=state.segment + 1, segment_words=0)
