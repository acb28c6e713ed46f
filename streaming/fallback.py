"""Interpreting with a language model that was not trained to: a policy decides from outside when it writes.

The model is asked through its chat template to translate the words of the present segment, and its answer is begun
with what has been shown of it. Every new word changes the middle of that sequence, so that all behind it is read again;
the past before it stays in the cache. A segment is translated alone, without those before it.

- *wait-k*: after word ``n`` of a segment, the translation may have ``n - k + 1`` words; at the segment's end, all. From
  the latency ``low`` to ``high``, ``k`` is 3, 4, 5, 7 or 9. (Ma et al., "STACL", arXiv 1810.08398, §3.)
- *local agreement*: after every 1, 2, 3, 4 or 6 words the whole translation is made, and what it has in common with
  the one before is shown, up to the end of a word. (Liu et al., "Low-Latency Sequence-to-Sequence Speech Recognition
  and Translation by Partial Hypothesis Selection", arXiv 2005.11185, §3.)

At the latency ``offline`` nothing is written before a segment ends. A segment that has as many tokens as a quarter of
the context is ended by force. A translation ends at a control token of the model, at 25 tokens more than twice those of
its source, and where it loops (:func:`streaming.translation.looping`). The glossary has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Final

import torch

from models.kv_cache import KvCache
from models.tokenizer import UNSPACED, begins_word, decode
from models.translator import AnyTranslator, Direction, Latency, Policy, Translator
from streaming.glossary import Glossary
from streaming.translation import BatchState, SourceWord, TranslatedChunk, looping, source_words, stepped

#: Words that wait-k waits for.
WAIT_WORDS: Final[Mapping[Latency, int]] = {
    "low": 3, "low-medium": 4, "medium": 5, "medium-high": 7, "high": 9,
}  # fmt: skip
#: Words after which local agreement makes its next translation.
AGREEMENT_WORDS: Final[Mapping[Latency, int]] = {
    "low": 1, "low-medium": 2, "medium": 3, "medium-high": 4, "high": 6,
}  # fmt: skip


@dataclass(frozen=True)
class FallbackRow:
    """The past of one direction, without its cache.

    Attributes:
        direction: What it translates.
        queue: Words that have not been read.
        segment: Words of the segment that have been read.
        words: How many words have been read in all.
        told: How many of them had been read when something was shown last.
        closes: Whether the segment ends with its last word.
        shown: Tokens of the segment's translation that have been shown.
        draft: Tokens that are to follow them; None while the row reads.
        previous: Local agreement: the last whole translation of the segment.
        cached: Tokens in the cache.
        begun: Whether it has shown anything.
    """

    direction: Direction
    queue: tuple[SourceWord, ...] = ()
    segment: tuple[SourceWord, ...] = ()
    words: int = 0
    told: int = 0
    closes: bool = False
    shown: tuple[int, ...] = ()
    draft: tuple[int, ...] | None = None
    previous: tuple[int, ...] = ()
    cached: tuple[int, ...] = ()
    begun: bool = False

    @property
    def busy(self) -> bool:
        """Whether a step would advance it."""
        return bool(self.queue) or self.draft is not None

    @property
    def source_tokens(self) -> int:
        """Tokens of the segment's words."""
        return sum(len(word.ids) for word in self.segment)

    def sequence(self) -> tuple[int, ...]:
        """What the model has to have read before it goes on with the translation."""
        source = tuple(token for word in self.segment for token in word.ids)
        return self.direction.prompt + source + self.direction.answer + self.shown + (self.draft or ())


@dataclass(frozen=True)
class ByPolicy:
    """What decides from outside when a plain language model writes, whoever runs the model.

    Attributes:
        translator: The model; shared, never changed.
    """

    translator: AnyTranslator

    @property
    def policy(self) -> Policy:
        """Who decides when to write."""
        return self.translator.policy

    def fed(
        self, rows: Sequence[FallbackRow], words: Sequence[str], *, closes: bool = False
    ) -> tuple[FallbackRow, ...]:
        """The rows with words in their queues; see :meth:`streaming.translation.Interleaved.feed`."""
        new = source_words(self.translator, words, closes=closes)
        return tuple(_fed(row, new, closes=closes) for row in rows)

    def read(self, row: FallbackRow) -> FallbackRow:
        """Reads words, which costs nothing, up to the one after which the row has to write."""
        limit = self.translator.config.max_context_tokens // 4
        while row.draft is None and row.queue:
            word, *queue = row.queue
            row = replace(row, queue=tuple(queue), segment=(*row.segment, word), words=row.words + 1)
            closes = word.closes or row.source_tokens >= limit
            if row.source_tokens and (closes or self._writes_after(row)):
                row = replace(row, draft=(), closes=closes)
        return row

    def _writes_after(self, row: FallbackRow) -> bool:
        read, latency = len(row.segment), row.direction.latency
        if latency == "offline":
            return False
        if self.policy == "wait-k":
            return read >= WAIT_WORDS[latency]
        return read % AGREEMENT_WORDS[latency] == 0

    def after_token(
        self, row: FallbackRow, draft: tuple[int, ...], token: int | None
    ) -> tuple[FallbackRow, TranslatedChunk | None]:
        """The row with one more token, or if the write ends before or with it, with what it shows.

        Args:
            row: A row that writes.
            draft: What it is to show so far.
            token: What the model adds; None if it ends its answer.
        """
        controls = self.translator.tokenizer.controls
        if token is not None and token not in controls and not self._is_enough(row, draft, token):
            draft = (*draft, token)
            whole = row.shown + draft
            if not (loop := looping(whole)) and len(whole) < 2 * row.source_tokens + 25:
                return replace(row, draft=draft), None
            draft = draft[: max(0, len(draft) - loop)]
        if self.policy == "local-agreement" and not row.closes:
            whole = row.shown + draft
            draft, row = self._agreed(row, draft), replace(row, previous=whole)
        return self._showing(row, draft)

    def _is_enough(self, row: FallbackRow, draft: tuple[int, ...], token: int) -> bool:
        """Wait-k: whether the token would begin a word more than is allowed."""
        if not self._begins_word(row, row.shown + draft, token):
            return False
        left = self.words_left(row, draft)
        return left is not None and left <= 0

    def words_left(self, row: FallbackRow, draft: tuple[int, ...]) -> int | None:
        """Words that the open write may still begin; None where the policy does not bound them."""
        if self.policy != "wait-k" or row.closes:
            return None
        whole = row.shown + draft
        begun = sum(self._begins_word(row, whole[:i], whole[i]) for i in range(len(whole)))
        return len(row.segment) - WAIT_WORDS[row.direction.latency] + 1 - begun

    def _agreed(self, row: FallbackRow, draft: tuple[int, ...]) -> tuple[int, ...]:
        """What a draft has in common with the translation before, up to where both begin a word, or end."""
        whole = row.shown + draft
        n = _common(whole, row.previous)
        while n > len(row.shown) and any(
            n < len(one) and not self._begins_word(row, one[:n], one[n]) for one in (whole, row.previous)
        ):
            n -= 1
        return whole[len(row.shown) : n]

    def _begins_word(self, row: FallbackRow, before: tuple[int, ...], token: int) -> bool:
        return begins_word(self.translator.tokenizer, row.direction.target, before, token)

    def _showing(self, row: FallbackRow, ids: tuple[int, ...]) -> tuple[FallbackRow, TranslatedChunk | None]:
        """The row when these tokens are shown, and their chunk, if there is anything to tell."""
        row = replace(row, draft=None)
        if not ids and not row.closes:
            return row, None
        text = decode(self.translator.tokenizer, ids)
        if not row.begun:
            text = text.lstrip()
        elif text and not row.shown and row.direction.target not in UNSPACED and not text[0].isspace():
            text = " " + text  # an answer begins without the space that parts it from the segment before
        first_word = min(row.told, row.words - 1)
        chunk = TranslatedChunk(0, row.direction.target, text, ids, first_word, row.words - 1, row.closes)
        row = replace(row, shown=row.shown + ids, told=row.words, begun=row.begun or bool(text))
        if row.closes:
            row = replace(row, segment=(), shown=(), previous=(), closes=False)
        return row, chunk


FallbackState = BatchState[FallbackRow]


@dataclass(frozen=True)
class Fallback(ByPolicy):
    """Runs a plain language model under a policy; a :class:`streaming.interpreter.Interpreter`.

    Attributes:
        translator: The model; shared, never changed.
    """

    translator: Translator

    def init_state(self, directions: Sequence[Direction], glossary: Glossary | None = None) -> FallbackState:
        """The state of one session, which has read nothing; the glossary has no effect."""
        rows = tuple(FallbackRow(direction) for direction in directions)
        return FallbackState(rows, self.translator.llm.init_state(len(rows)))

    def feed(self, state: FallbackState, words: Sequence[str], *, closes: bool = False) -> FallbackState:
        """Queues words for every row; see :meth:`streaming.translation.Interleaved.feed`."""
        return replace(state, rows=self.fed(state.rows, words, closes=closes))

    def ready(self, state: FallbackState) -> bool:
        """Whether a step would advance any row."""
        return state.busy

    def problem(self, state: FallbackState) -> None:
        """Nothing ends a translation but its session."""

    def step(
        self, states: Sequence[FallbackState], *, max_forwards: int = 1
    ) -> tuple[list[list[TranslatedChunk]], list[FallbackState]]:
        """Advances the rows of several sessions; see :meth:`streaming.translation.Interleaved.step`."""
        return stepped(states, self._forward, max_forwards)

    def _forward(self, state: FallbackState) -> tuple[list[tuple[int, TranslatedChunk]], FallbackState]:
        state = replace(state, rows=tuple(self.read(row) for row in state.rows))
        if all(row.draft is None for row in state.rows):
            return [], state
        tokens, cache = self._next_tokens(state)
        rows, finished = [], []
        for b, (row, token) in enumerate(zip(state.rows, tokens, strict=True)):
            if row.draft is not None:
                row, chunk = self.after_token(replace(row, cached=row.sequence()), row.draft, token)
                if chunk is not None:
                    finished.append((b, chunk))
            rows.append(row)
        return finished, FallbackState(tuple(rows), cache)

    @torch.no_grad()
    def _next_tokens(self, state: FallbackState) -> tuple[list[int], KvCache]:
        """The most probable token after each row's sequence; rows that read are passed over."""
        lengths, plans = state.cache.lengths.tolist(), []
        for b, row in enumerate(state.rows):
            sequence = row.sequence() if row.draft is not None else row.cached
            if row.draft is not None:
                lengths[b] = min(_common(sequence, row.cached), len(sequence) - 1)
            plans.append(sequence[lengths[b] :])
        counts = torch.tensor([len(plan) for plan in plans])
        tokens = torch.zeros(len(plans), int(counts.max()), dtype=torch.int64)
        for b, plan in enumerate(plans):
            tokens[b, : len(plan)] = torch.tensor(plan, dtype=torch.int64)
        logits, cache = self.translator.llm.step(tokens, counts, state.cache.crop(torch.tensor(lengths)))
        assert cache is not None
        return logits[:, -1, : self.translator.tokenizer.size].argmax(-1).tolist(), cache


def _fed(row: FallbackRow, new: tuple[SourceWord, ...], *, closes: bool) -> FallbackRow:
    if new or not closes:
        return replace(row, queue=row.queue + new)
    if row.queue:
        return replace(row, queue=(*row.queue[:-1], replace(row.queue[-1], closes=True)))
    if not row.source_tokens:
        return row
    return replace(row, draft=row.draft or (), closes=True)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of the first tokens are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
