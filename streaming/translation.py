"""Words to translation: a language model that reads and writes in one sequence, and decides itself when to write.

    <prompt>  source words … <|end-of-read|> target … <|end-of-write|>  source words … <|end-of-read|> …

After each source word the model writes if it finds ``<|end-of-read|>`` probable enough. It then writes greedily up to
``<|end-of-write|>``. What is written is shown, and never taken back. The sequence consists of ids from end to end;
nothing is encoded twice, and what was read stays in the cache.

One forward takes a few words of the rows that read and one token of those that write. A row that decides to write
after an earlier one of its words forgets the later ones again and reads them after the write: its output is that of
reading word by word, and no row's depends on the others. With :class:`streaming.speculation.Speculation`, the forward
also takes a draft of what a row writes next, or of what it will write after its words; where the model's choices go
along with the draft, the row has advanced by several tokens at once, and all else of the draft is forgotten.

- *A write is forced* after a word that closes a segment, or after the endpoint, a symbol that a model may read behind
  it, and after so many tokens without a write as a quarter of the context. At the latency ``offline`` no other write
  happens.
- *A write upon an endpoint alone*, when all words have been written upon, ends before the first token that is no mark:
  what was shown is closed, and no word is added that nobody said.
- *A write ends*, though the model would go on, at a cap of :func:`write_cap` tokens, and when the last tokens repeat
  (:func:`looping`), of which one repetition is kept.
- *Context is bounded*: when a row's tokens exceed the model's ``max_context_tokens``, its oldest chunks leave the cache
  until three quarters are left, and the prompt moves up to them, so that the sequence looks to the model as a shorter
  one does. If no chunk may stay, the row begins anew.
- *A row that is stuck*, because :data:`STUCK_CHUNKS` chunks in a row said the same, or nothing, upon words that were
  not the same, begins anew too: what it has written must not be what it goes on writing.
- *Glossary*: a term is due in the chunk in which its last word was read. If the finished chunk does not have it, the
  write goes back to the place at which the term costs the model least, takes it as if the model had written it, and
  goes on from there. Places are those at which the model itself began a word, or ended; the cost of a place is how much
  less likely the term's first token was there than the model's own choice. Terms for which a write has no room left
  are not written.

Source of the format: Fu et al., EAST (arXiv 2504.09570), §3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from models.kv_cache import KvCache
from models.speculative import ROOT, Draft, follow, keep, read
from models.tokenizer import begins_word, decode
from models.translator import AnyTranslator, Direction, Policy, Translator
from streaming.drafts import MAX_PAST_TOKENS, Context, Outcome, Proposal, spelled
from streaming.errors import DragomanError
from streaming.glossary import MAX_TERM_WORDS, Glossary, Term, Terms, occurring, terms, word_key
from streaming.goodput import Shape, clock
from streaming.speculation import Speculation, Wish

#: Words of a row that one forward reads, so that little is read in vain when an early one leads to a write.
MAX_WORDS_PER_FORWARD = 8
#: What a write may have at most, whatever was read and is due.
MAX_WRITE_TOKENS = 256
#: Positions beyond this one are not exact enough; a row that gets here begins anew with its next chunk.
MAX_POSITION = 1 << 17
#: Chunks that say the same upon different words before their row begins anew.
STUCK_CHUNKS = 3
#: The longest repetition that counts as a loop, in tokens.
MAX_LOOP_PERIOD = 16
#: A choice that no draft has.
NOTHING = -1


class _Place(Enum):
    """What may stand at a place of a write: anything, what begins a word, or only marks, upon an endpoint alone."""

    GO_ON = 0
    BEGIN = 1
    CLOSE = 2


@dataclass(frozen=True)
class TranslatedChunk:
    """What one write has added to the text of one language.

    Attributes:
        row: Row of the session's state.
        language: What it is written in.
        delta: Text to append verbatim.
        ids: Its tokens, ``<|end-of-write|>`` left out.
        first_word: Index, from the session's start, of the first source word that was read since the write before.
        last_word: Index of the last one that had been read.
        endpoint: Whether the last one closed a segment.
    """

    row: int
    language: str
    delta: str
    ids: tuple[int, ...]
    first_word: int
    last_word: int
    endpoint: bool


@dataclass(frozen=True)
class SourceWord:
    """A word on its way into a row.

    Attributes:
        ids: Its tokens, perhaps none.
        key: The word as the glossary sees it.
        closes: Whether it closes a segment.
        is_endpoint: Whether it is no word, but what stands at a segment's end for a model that reads that.
    """

    ids: tuple[int, ...]
    key: str
    closes: bool = False
    is_endpoint: bool = False


@dataclass(frozen=True)
class DueTerm:
    """A term that the open write has to have.

    Attributes:
        term: The entry.
        cost: Of the best place so far, in nats.
        place: Tokens of the write that stand before that place.
    """

    term: Term
    cost: float = float("inf")
    place: int = 0


@dataclass(frozen=True)
class OpenWrite:
    """A write that is not finished, and not shown.

    Attributes:
        closes: Whether the word before it closed a segment.
        cap: Tokens that it may have.
        ids: Its tokens so far.
        due: Terms that it has to have.
    """

    closes: bool
    cap: int
    ids: tuple[int, ...] = ()
    due: tuple[DueTerm, ...] = ()


@dataclass(frozen=True)
class Row:
    """The past of one direction, without its cache.

    Attributes:
        direction: What it translates.
        terms: Its glossary.
        pending: Tokens that are decided and that the model has not read yet; at first the prompt.
        queue: Words that have not been read.
        read: Words that have been read since the last write.
        words: How many words have been read in all.
        before: Keys of the last words before ``read``.
        pairs: Tokens of each finished chunk that is still in the context, oldest first.
        recent: What the last of them read and wrote, at most :data:`STUCK_CHUNKS`.
        write: The open write; None while the row reads.
        begun: Whether it has shown anything.
        closed: Whether a segment ends with the last word.
        past: Target side of the finished chunks, for drafts (:mod:`streaming.drafts`).
        history: All tokens of the finished chunks that are still in the context, for drafts.
        former: Tokens of a translation of what is not finished yet that was dropped, for drafts.
        hidden: What the model made of the place before the last decided token of the open write, for drafts.
    """

    direction: Direction
    terms: Terms
    pending: tuple[int, ...]
    queue: tuple[SourceWord, ...] = ()
    read: tuple[SourceWord, ...] = ()
    words: int = 0
    before: tuple[str, ...] = ()
    pairs: tuple[int, ...] = ()
    recent: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    write: OpenWrite | None = None
    begun: bool = False
    closed: bool = True
    past: str = ""
    history: str = ""
    former: str = field(default="", compare=False)
    hidden: Tensor | None = field(default=None, compare=False)

    @property
    def busy(self) -> bool:
        """Whether a forward would advance it."""
        return bool(self.queue) or self.write is not None

    @property
    def stuck(self) -> bool:
        """Whether the last chunks said the same upon different words."""
        sources, targets = ({chunk[side] for chunk in self.recent} for side in (0, 1))
        return len(self.recent) == STUCK_CHUNKS and len(targets) == 1 and len(sources) > 1

    @property
    def context(self) -> int:
        """Tokens of the prompt and of the finished chunks."""
        return len(self.direction.prompt) + sum(self.pairs)

    @property
    def unread_tokens(self) -> int:
        """Tokens that were read since the last write."""
        return sum(len(word.ids) for word in self.read)


class AnyRow(Protocol):
    """What batches have to know of a row."""

    @property
    def busy(self) -> bool:
        """Whether a forward would advance it."""


R = TypeVar("R", bound=AnyRow)


@dataclass(frozen=True)
class BatchState(Generic[R]):
    """The past of one session's rows; a value. Its cache's ownership rule holds for it (:class:`KvCache`).

    Attributes:
        rows: One for each target language.
        cache: Their tokens.
    """

    rows: tuple[R, ...]
    cache: KvCache

    @property
    def busy(self) -> bool:
        """Whether a forward would advance any row."""
        return any(row.busy for row in self.rows)

    @staticmethod
    def cat(states: Sequence[BatchState[R]]) -> BatchState[R]:
        """One batch of the rows of several states; a single one is returned as it is."""
        if len(states) == 1:
            return states[0]
        return BatchState(
            tuple(row for state in states for row in state.rows), KvCache.cat([state.cache for state in states])
        )

    def split(self, sizes: Sequence[int]) -> list[BatchState[R]]:
        """The reverse of :meth:`cat`: states of so many rows each, which share no memory."""
        if len(sizes) == 1:
            return [self]
        states, start = [], 0
        for size in sizes:
            end = start + size
            states.append(BatchState(self.rows[start:end], self.cache.part(start, end)))
            start = end
        return states


TranslationState = BatchState[Row]


@dataclass(frozen=True)
class _Plan:
    """What one forward reads of one row.

    Attributes:
        tokens: The ids.
        asks: Indices of those after which an answer is needed.
        words: For a row that reads: each word's number of tokens up to its end, and whether a write must follow it;
            None for "if the model says so".
        proposal: What is guessed to follow; after words it begins with ``<|end-of-read|>``.
    """

    tokens: tuple[int, ...] = ()
    asks: tuple[int, ...] = ()
    words: tuple[tuple[int, bool | None], ...] = ()
    proposal: Proposal = Proposal()

    @property
    def draft(self) -> Draft:
        """What is guessed to follow the tokens."""
        return self.proposal.draft

    @property
    def asked(self) -> tuple[int, ...]:
        """Indices after which an answer is needed, in the tokens and the draft behind them."""
        n = len(self.tokens)
        return (*self.asks, *range(n, n + len(self.draft.tokens)))


@dataclass(frozen=True)
class _Answers:
    """What the model said, for each position that was asked about.

    Attributes:
        end_of_read: Its probability.
        choices: The best token that may be written.
        logits: ``float32[N, vocab_size]``.
        best: The best tokens that may be written, as many as the drafters want.
        hidden: ``[N, d_model]``.
        all_read: ``[B, T, d_model]``, of all that the rows have read.
    """

    end_of_read: list[float]
    choices: list[int]
    logits: Tensor
    best: list[list[int]]
    hidden: Tensor
    all_read: Tensor


@dataclass(frozen=True)
class _Followed:
    """What a forward has made of a row.

    Attributes:
        row: The row.
        kept: Its tokens in the cache, if the draft's right ones stand together.
        decided: How many of the plan's tokens it has kept.
        path: The draft's tokens that were right; None if the draft's place was not reached.
        chosen: Indices of the answers that were taken as tokens.
        chunk: The chunk, if one is finished.
    """

    row: Row
    kept: int
    decided: int = 0
    path: tuple[int, ...] | None = ()
    chosen: tuple[int, ...] = ()
    chunk: TranslatedChunk | None = None


@dataclass(frozen=True)
class Interleaved:
    """Reads and writes with a model that was trained on interleaved text; a :class:`streaming.interpreter.Interpreter`.

    Attributes:
        translator: The model; shared, never changed.
        speculation: Guesses what comes, so that it takes fewer forwards; None for a token at a time. The same is
            written with and without.
    """

    translator: Translator
    speculation: Speculation | None = None

    @property
    def policy(self) -> Policy:
        """Who decides when to write."""
        return self.translator.policy

    def init_state(self, directions: Sequence[Direction], glossary: Glossary | None = None) -> TranslationState:
        """The state of one session, which has read nothing: a row for each direction.

        Args:
            directions: At least one, from :meth:`Translator.direction`.
            glossary: As :func:`streaming.glossary.check_glossary` passes it.
        """
        rows = tuple(Row(d, terms(glossary or {}, d.target, self.translator), pending=d.prompt) for d in directions)
        return TranslationState(rows, self.translator.llm.init_state(len(rows)))

    def feed(self, state: TranslationState, words: Sequence[str], *, closes: bool = False) -> TranslationState:
        """Queues words for every row, and computes nothing.

        Args:
            state: The past.
            words: Complete source words, without white space.
            closes: Whether a segment ends with them, or without any, with what was read before; a write follows.
        """
        new = source_words(self.translator, words, closes=False)
        return replace(state, rows=tuple(self._fed(row, new, closes=closes) for row in state.rows))

    def ready(self, state: TranslationState) -> bool:
        """Whether a step would advance any row."""
        return state.busy

    def problem(self, state: TranslationState) -> None:
        """Nothing ends a translation but its session."""

    def revise(self, state: TranslationState, dropped: int, words: Sequence[str]) -> TranslationState:
        """Replaces the last source words by others; only what is behind them is read again.

        Args:
            state: The past, which must not be used any more.
            dropped: How many of the last words to drop, of those that were fed.
            words: Words to come in their place.

        Raises:
            DragomanError: ``already_translated`` if one of them has been written upon, and shown.
        """
        free = min(map(_open_words, state.rows))
        if dropped > free:
            raise DragomanError(
                "already_translated",
                f"the last {dropped} words cannot be revised: only the last {free} of an open segment have not been"
                " translated yet, and what is shown is never taken back",
            )
        rows, lengths = [], []
        for row, length in zip(state.rows, state.cache.lengths.tolist(), strict=True):
            row, kept = _without_last(row, dropped, length)
            rows.append(row)
            lengths.append(kept)
        return self.feed(TranslationState(tuple(rows), state.cache.crop(torch.tensor(lengths))), words)

    def recalling(
        self, state: TranslationState, dropped: TranslationState, chunks: Sequence[TranslatedChunk]
    ) -> TranslationState:
        """The state with a translation in mind that went on from it and is dropped: drafts of the next one.

        Args:
            state: What is gone on with.
            dropped: What is not.
            chunks: Those that were finished on the way to it.
        """
        rows = []
        for b, (row, other) in enumerate(zip(state.rows, dropped.rows, strict=True)):
            former = spelled(token for chunk in chunks if chunk.row == b for token in chunk.ids)
            former += "" if other.write is None else spelled(other.write.ids)
            rows.append(replace(row, former=former or row.former))
        return replace(state, rows=tuple(rows))

    def step(
        self, states: Sequence[TranslationState], *, max_forwards: int = 1
    ) -> tuple[list[list[TranslatedChunk]], list[TranslationState]]:
        """Advances the rows of several sessions in common forwards.

        Args:
            states: Those of the sessions; one may have nothing to do.
            max_forwards: How many forwards to run at most. The result of repeated steps does not depend on it.

        Returns:
            For each session the chunks that were finished, in their order, and the states.
        """
        return stepped(states, self._forward, max_forwards)

    # ------------------------------------------------------------------------------------------------ one forward

    @torch.no_grad()
    def _forward(self, state: TranslationState) -> tuple[list[tuple[int, TranslatedChunk]], TranslationState]:
        begun, plans = clock(self.translator.device), [self._plan(row) for row in state.rows]
        wishes, plans = self._with_drafts(state, plans)
        drafted = clock(self.translator.device)
        answers, cache, sizes = self._ask(state, plans)
        followed, asked = list[_Followed](), 0
        for b, (row, plan, length) in enumerate(zip(state.rows, plans, state.cache.lengths.tolist(), strict=True)):
            followed.append(self._followed(b, row, plan, answers, asked, length))
            asked += len(plan.asked)
        drafts, paths = [plan.draft for plan in plans], [one.path or () for one in followed]
        cache = keep(cache, sizes, [one.decided for one in followed], drafts, paths)
        cache = cache.crop(torch.tensor([one.kept for one in followed]))
        after = TranslationState(tuple(one.row for one in followed), cache)
        finished = [(b, one.chunk) for b, one in enumerate(followed) if one.chunk is not None]
        if self.speculation is not None:
            done = clock(self.translator.device)
            for wish, plan, one in zip(wishes, plans, followed, strict=True):
                self._learn(wish, plan, one, answers)
            shape = Shape(len(plans), max(1, *sizes), int(state.cache.lengths.max()) + max(sizes))
            asking_s = drafted - begun + clock(self.translator.device) - done
            self.speculation.took(shape, done - drafted, asking_s)
        return finished, self._bounded(after, [b for b, _ in finished])

    # ----------------------------------------------------------------------------------------------------- drafts

    def _with_drafts(self, state: TranslationState, plans: list[_Plan]) -> tuple[list[Wish | None], list[_Plan]]:
        """What the rows could take as drafts, and the plans with those that they get."""
        if self.speculation is None:
            return [None] * len(plans), plans
        wishes = [self._wish(row, plan) for row, plan in zip(state.rows, plans, strict=True)]
        decided, keys = [len(plan.tokens) for plan in plans], int(state.cache.lengths.max())
        proposals = self.speculation.propose(wishes, decided, keys, begin_write=self.translator.end_of_read)
        pairs = zip(plans, proposals, strict=True)
        return wishes, [replace(plan, proposal=one) if one.sure else plan for plan, one in pairs]

    def _wish(self, row: Row, plan: _Plan) -> Wish | None:
        """Where a draft could follow: after an open write, or after the last word that is read, if a write may too."""
        language, end, past = row.direction.target, self.translator.end_of_write, row.past
        words = row.read + row.queue[: len(plan.words)]
        source = "".join([spelled(word.ids) for word in words])
        sequence = spelled(row.direction.prompt) + row.history + source + chr(self.translator.end_of_read)
        if row.write is not None:
            ids = spelled(row.write.ids)
            return Wish(Context(language, past + ids, end, source, sequence + ids, row.hidden, row.former))
        if not plan.words or plan.words[-1][1] is False:
            return None
        context = Context(language, past, end, source, sequence, former=row.former)
        return Wish(context, len(words), plan.words[-1][1] is True)

    def _followed(self, b: int, row: Row, plan: _Plan, answers: _Answers, at: int, length: int) -> _Followed:
        """What row ``b`` becomes by its answers, which begin at ``at``, and how far its draft was right."""
        reads, decided, chosen, chunk = row.write is None, len(plan.tokens), list[int](), None
        if reads:
            if not plan.words:
                return _Followed(row, length)
            row, decided = self._after_read(row, plan, answers.end_of_read[at : at + len(plan.asks)])
            if row.write is not None and decided:
                row = replace(row, hidden=answers.all_read[b, decided - 1])
            if decided < len(plan.tokens):
                return _Followed(row, length + decided, decided, None)
        length += decided

        def choose(node: int) -> int:
            nonlocal row, length, chunk
            length += node != ROOT
            if node != ROOT or not reads:
                assert row.write is not None
                chosen.append(at + len(plan.asks) + node)
                before = length
                row, length, chunk = self._after_write(row, row.write, answers, chosen[-1])
                if length < before:
                    return NOTHING
            return row.pending[0] if row.write is not None and len(row.pending) == 1 else NOTHING

        path = follow(plan.draft, choose).path
        return _Followed(row, length, decided, path, tuple(chosen), chunk)

    def _learn(self, wish: Wish | None, plan: _Plan, one: _Followed, answers: _Answers) -> None:
        """Tells the drafters what the model chose."""
        if self.speculation is None or wish is None or one.path is None:
            return
        outcome = None
        if self.speculation.learning and one.chosen:
            first, last = one.chosen[0], one.chosen[-1]
            rejected = (token for i, token in enumerate(plan.draft.tokens) if i not in one.path)
            outcome = Outcome(
                wish.context,
                tuple(answers.choices[i] for i in one.chosen),
                tuple(rejected),
                tuple(tuple(answers.best[i]) for i in one.chosen) if answers.best else (),
                # A slice where the places stand together takes less time, and this happens at each forward.
                answers.hidden[slice(first, last + 1) if last - first < len(one.chosen) else list(one.chosen)],
            )
        self.speculation.observe(wish, plan.proposal, one.path, outcome)

    # ------------------------------------------------------------------------------------------------- the forward

    def _plan(self, row: Row) -> _Plan:
        """What a row reads next: its open write's last token, or words up to one after which it must write."""
        if row.write is not None:
            return _Plan(row.pending, (len(row.pending) - 1,))
        if not row.queue:
            return _Plan()  # what is pending is read with the next word
        tokens, asks, words, unread = row.pending, [], [], row.unread_tokens
        for word in row.queue[:MAX_WORDS_PER_FORWARD]:
            tokens, unread = tokens + word.ids, unread + len(word.ids)
            must: bool | None = (word.closes or unread >= self._max_unread_tokens(row)) and unread > 0
            if not must and word.ids and row.direction.latency != "offline":
                must = None
                asks.append(len(tokens) - 1)
            words.append((len(tokens), must))
            if must:
                break
        return _Plan(tokens, tuple(asks), tuple(words))

    def _ask(self, state: TranslationState, plans: list[_Plan]) -> tuple[_Answers, KvCache, list[int]]:
        """Reads what is planned in one forward; also the cache and how many tokens each row has read."""
        t = self.translator
        all_read, cache, sizes = read(
            t.llm, [plan.tokens for plan in plans], [plan.draft for plan in plans], state.cache
        )
        asks = [(b, index) for b, plan in enumerate(plans) for index in plan.asked]
        if not asks:
            return _Answers([], [], all_read, [], all_read, all_read), cache, sizes
        rows, indices = torch.tensor(asks, device=all_read.device).T
        hidden = all_read[rows, indices]
        logits = t.llm.logits(hidden).float()
        places = [_place(state.rows[b], plans[b], index) for b, index in asks]
        begins = torch.tensor([place is _Place.BEGIN for place in places], device=hidden.device)
        masked = logits.masked_fill(torch.where(begins[:, None], t.unable_to_begin, t.unwritable), -torch.inf)
        end_of_read = (logits[:, t.end_of_read] - logits.logsumexp(-1)).exp()
        top_k = 0 if self.speculation is None else self.speculation.top_k
        best = masked.topk(top_k).indices.tolist() if top_k else []
        choices = [
            t.end_of_write if place is _Place.CLOSE and choice not in t.marks else choice
            for place, choice in zip(places, masked.argmax(-1).tolist(), strict=True)
        ]
        return _Answers(end_of_read.tolist(), choices, logits, best, hidden, all_read), cache, sizes

    # ---------------------------------------------------------------------------------------------------- reading

    def _fed(self, row: Row, new: tuple[SourceWord, ...], *, closes: bool) -> Row:
        if new:
            row = replace(row, queue=row.queue + new, closed=False)
        if not closes or row.closed:
            return row
        row, endpoint = replace(row, closed=True), self.translator.endpoint
        if endpoint:
            return replace(row, queue=(*row.queue, SourceWord(endpoint, "", closes=True, is_endpoint=True)))
        if row.queue:
            return replace(row, queue=(*row.queue[:-1], replace(row.queue[-1], closes=True)))
        if row.write is not None:
            return replace(row, write=replace(row.write, closes=True))
        if not row.unread_tokens:
            return row
        return self._writing(replace(row, read=(*row.read[:-1], replace(row.read[-1], closes=True))))

    def _max_unread_tokens(self, row: Row) -> int:
        return max(1, (self.translator.config.max_context_tokens - len(row.direction.prompt)) // 4)

    def _after_read(self, row: Row, plan: _Plan, probabilities: list[float]) -> tuple[Row, int]:
        """The row after its words, up to the first after which it writes, and how many tokens that are."""
        direction = row.direction
        answers, threshold = iter(probabilities), self.translator.config.threshold(direction.target, direction.latency)
        for i, (tokens, must) in enumerate(plan.words):
            writes = next(answers) >= threshold if must is None else must
            if writes or i + 1 == len(plan.words):
                read = row.read + row.queue[: i + 1]
                count = row.words + _count(row.queue[: i + 1])
                row = replace(row, read=read, queue=row.queue[i + 1 :], words=count, pending=())
                return (self._writing(row) if writes else row), tokens
        raise AssertionError("a row that reads has a word to read")

    def _writing(self, row: Row) -> Row:
        """The row at the beginning of a write."""
        keys = row.before + _word_keys(row.read)
        due = tuple(map(DueTerm, occurring(row.terms, keys, len(row.before))))
        write = OpenWrite(row.read[-1].closes, write_cap(row.unread_tokens), due=due)
        return replace(row, write=write, pending=(*row.pending, self.translator.end_of_read))

    # ---------------------------------------------------------------------------------------------------- writing

    def _after_write(
        self, row: Row, write: OpenWrite, answers: _Answers, at: int
    ) -> tuple[Row, int, TranslatedChunk | None]:
        """The row after one more token, how many tokens it then has in the cache, and the chunk if it is finished."""
        token, begin = answers.choices[at], row.context + row.unread_tokens + 1
        ids, cached = write.ids, len(write.ids)
        if write.due:
            write = replace(write, due=self._priced(row.direction.target, write, token, answers.logits[at]))
        if token != self.translator.end_of_write:
            ids = (*ids, token)
            loop = looping(ids)
            if not loop and len(ids) < write.cap:
                write = replace(write, ids=ids)
                return replace(row, write=write, pending=(token,), hidden=answers.hidden[at]), begin + cached, None
            ids = ids[: len(ids) - loop]
        missing = self._missing(write, ids)
        if missing is not None:
            row, kept = _with_term(row, write, ids, missing)
            return row, begin + kept, None
        kept = min(cached, len(ids))
        row, chunk = self._shown(row, write, ids)
        return replace(row, pending=(*ids[kept:], self.translator.end_of_write)), begin + kept, chunk

    def _missing(self, write: OpenWrite, ids: tuple[int, ...]) -> DueTerm | None:
        """The first term that a finished write should have, does not have, and can hold."""
        text = decode(self.translator.tokenizer, ids) if write.due else ""
        for due in write.due:
            fits = min(due.place, len(ids)) + len(due.term.ids) < MAX_WRITE_TOKENS
            if fits and not due.term.stands_in(text):
                return due
        return None

    def _priced(self, target: str, write: OpenWrite, token: int, logits: Tensor) -> tuple[DueTerm, ...]:
        """The terms that are due, when this is also a place for them."""
        t = self.translator
        if token != t.end_of_write and not begins_word(t.tokenizer, target, write.ids, token):
            return write.due
        first = torch.tensor([due.term.ids[0] for due in write.due], device=logits.device)
        costs = (logits[token] - logits[first]).tolist()
        place = len(write.ids)
        return tuple(
            replace(due, cost=cost, place=place) if cost < due.cost else due
            for due, cost in zip(write.due, costs, strict=True)
        )

    def _shown(self, row: Row, write: OpenWrite, ids: tuple[int, ...]) -> tuple[Row, TranslatedChunk]:
        text = decode(self.translator.tokenizer, ids)
        delta = text if row.begun else text.lstrip(" ")
        last_word = row.words - 1
        first_word = min(row.words - _count(row.read), last_word)  # upon an endpoint alone it is the word before that
        chunk = TranslatedChunk(0, row.direction.target, delta, ids, first_word, last_word, write.closes)
        source = tuple(token for word in row.read for token in word.ids)
        said = spelled(ids)
        row = replace(
            row,
            read=(),
            recent=(*row.recent, (source, ids))[-STUCK_CHUNKS:],
            before=(row.before + _word_keys(row.read))[-(MAX_TERM_WORDS - 1) :],
            pairs=(*row.pairs, row.unread_tokens + len(ids) + 2),
            write=None,
            begun=row.begun or bool(delta),
            past=(row.past + spelled((*ids, self.translator.end_of_write)))[-MAX_PAST_TOKENS:],
            history=row.history + spelled((*source, self.translator.end_of_read, *ids, self.translator.end_of_write)),
            former=row.former.removeprefix(said) if row.former.startswith(said) else "",
            hidden=None,
        )
        return row, chunk

    # ---------------------------------------------------------------------------------------------------- context

    def _bounded(self, state: TranslationState, finished: list[int]) -> TranslationState:
        """Lets old chunks go where a row has finished one and has too many."""
        rows, limit = list(state.rows), self.translator.config.max_context_tokens
        keep_first, start = [0] * len(rows), [0] * len(rows)
        moved = []
        for b in finished:
            row, lost = rows[b], 0
            anew = row.stuck or int(state.cache.next_positions[b]) >= MAX_POSITION
            if not anew and row.context <= limit:
                continue
            while row.pairs and (anew or row.context > limit * 3 // 4):
                first = row.pairs[0]
                lost, row = lost + first, replace(row, pairs=row.pairs[1:], history=row.history[first:])
            if row.pairs:
                keep_first[b] = len(row.direction.prompt)
                start[b] = keep_first[b] + lost
                moved.append(b)
            else:
                start[b] = int(state.cache.lengths[b])
                row = replace(row, pending=row.direction.prompt, recent=())
            rows[b] = row
        if not any(start):
            return state
        cache = state.cache.evict(torch.tensor(keep_first), torch.tensor(start))
        cache.next_positions[cache.lengths == 0] = 0
        for b in moved:
            self._move_prompt(cache, b, rows[b].direction.prompt)
        return TranslationState(tuple(rows), cache)

    def _move_prompt(self, cache: KvCache, b: int, prompt: tuple[int, ...]) -> None:
        """Reads the prompt again, right before the oldest chunk, into a cache that nobody shares."""
        if not (n := len(prompt)):
            return
        first = int(cache.positions[b, n]) - n
        llm, positions = self.translator.llm, first + torch.arange(n)[None]
        empty = llm.init_state(1, capacity=n)
        _, fresh = llm.hidden(torch.tensor([prompt]), torch.tensor([n]), empty, positions=positions)
        assert fresh is not None
        cache.memory[:, :, b, :, :n] = fresh.memory[:, :, 0, :, :n]
        cache.positions[b, :n] = positions[0]


def _place(row: Row, plan: _Plan, index: int) -> _Place:
    """Where in a write that is which follows a token of a plan."""
    if row.write is None:
        read = row.read + row.queue[: len(plan.words)]
        first = index == len(plan.tokens) and bool(plan.draft.tokens)
    else:
        read = row.read
        first = not row.write.ids and index < len(plan.tokens)
    if read and not any(word.ids for word in read if not word.is_endpoint):
        return _Place.CLOSE
    return _Place.BEGIN if first else _Place.GO_ON


def stepped(
    states: Sequence[BatchState[R]],
    forward: Callable[[BatchState[R]], tuple[list[tuple[int, TranslatedChunk]], BatchState[R]]],
    max_forwards: int,
) -> tuple[list[list[TranslatedChunk]], list[BatchState[R]]]:
    """Advances the rows of several sessions as one batch; see :meth:`Interleaved.step`.

    Args:
        states: Those of the sessions.
        forward: Advances a batch; the chunks that this has finished with their rows in the batch, and the state.
        max_forwards: How many to run at most.
    """
    state = BatchState.cat(states)
    owners = [(i, row) for i, one in enumerate(states) for row in range(len(one.rows))]
    chunks: list[list[TranslatedChunk]] = [[] for _ in states]
    for _ in range(max_forwards):
        if not state.busy:
            break
        finished, state = forward(state)
        for batch_row, chunk in finished:
            owner, row = owners[batch_row]
            chunks[owner].append(replace(chunk, row=row))
    return chunks, state.split([len(one.rows) for one in states])


def source_words(translator: AnyTranslator, words: Sequence[str], *, closes: bool) -> tuple[SourceWord, ...]:
    """Words as a translator's rows take them; ``closes`` if the last of them closes a segment."""
    last = len(words) - 1
    return tuple(
        SourceWord(translator.encode_word(word), word_key(word), closes and i == last) for i, word in enumerate(words)
    )


def _count(words: Sequence[SourceWord]) -> int:
    return sum(not word.is_endpoint for word in words)


def _word_keys(words: Sequence[SourceWord]) -> tuple[str, ...]:
    return tuple(word.key for word in words if not word.is_endpoint)


def _open_words(row: Row) -> int:
    """How many words may still be revised: those that are not written upon, since the last endpoint."""
    waiting = (row.read + row.queue)[::-1]
    return next((i for i, word in enumerate(waiting) if word.is_endpoint), len(waiting))


def write_cap(source_tokens: int) -> int:
    """Tokens that a write may have upon so many tokens read."""
    return min(MAX_WRITE_TOKENS, 2 * source_tokens + 25)


def looping(ids: Sequence[int]) -> int:
    """How many of the last tokens only repeat what stands before them; 0 if they are no loop.

    A loop is a run of at most :data:`MAX_LOOP_PERIOD` tokens that stands three times at the end, a run of one token
    eight times and one of two tokens four times.
    """
    for period in range(1, min(MAX_LOOP_PERIOD, len(ids) // 3) + 1):
        length = period * max(3, -(-8 // period))
        if len(ids) >= length and all(ids[-i] == ids[-i - period] for i in range(1, length - period + 1)):
            return length - period
    return 0


def _with_term(row: Row, write: OpenWrite, ids: tuple[int, ...], missing: DueTerm) -> tuple[Row, int]:
    """The row when a term has been forced into its write, and the write's tokens that remain in the cache."""
    place = min(missing.place, len(ids))
    due = tuple(DueTerm(other.term) for other in write.due if other is not missing)
    forced = missing.term.ids
    write = OpenWrite(write.closes, write.cap + len(forced), ids[:place] + forced, due)
    return replace(row, write=write, pending=forced, hidden=None), place


def _without_last(row: Row, dropped: int, length: int) -> tuple[Row, int]:
    """A row without its last words, of which none is written upon, and the tokens it keeps in the cache."""
    queued = min(dropped, len(row.queue))
    row = replace(row, queue=row.queue[: len(row.queue) - queued])
    if not (unread := dropped - queued):
        return row, length
    read = row.read[: len(row.read) - unread]
    former = row.former if row.write is None else spelled(row.write.ids)
    row = replace(row, read=read, words=row.words - unread, write=None, pending=(), former=former, hidden=None)
    return row, row.context + row.unread_tokens
