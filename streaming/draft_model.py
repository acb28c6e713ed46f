"""Drafts of a second language model that has the translator's tokens: a smaller one, or the same with layers left out.

The model reads what the translator has read and writes on by itself, as long as it is sure. Where the translator has
gone along with it, its own past stays true; where it has not, that is cut off and read anew. Whose session a past
belongs to is not asked: a row takes up the past with which it has most in common.

A draft costs a forward of the second model for each of its tokens, so that it pays only where that model is several
times cheaper and still mostly right. :func:`search_layers` finds out what leaving layers out would bring.

Sources: Leviathan et al. (arXiv 2211.17192), for the draft model; Xia et al., "SWIFT: On-the-Fly Self-Speculative
Decoding for LLM Inference Acceleration" (arXiv 2410.06916), §3 and §4, for the search on the model's own output and for
the end of a draft where its model is not sure; Entezari Zarch et al., "DEL" (arXiv 2504.05598), §3, for what is
maximised, tokens for each unit of cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from models.kv_cache import KvCache
from models.llm import Llm, load_llm
from models.speculative import Draft
from models.tokenizer import Tokenizer, load_tokenizer
from models.translator import Translator
from streaming.drafts import Context, Outcome, Proposal, spelled
from streaming.errors import DragomanError

#: Pasts that are kept, those of the rows that are drafted for included.
MAX_ROWS: Final = 64
#: Least probability that a drafted token has.
MIN_PROBABILITY: Final = 0.4
#: Longest draft that the search for layers thinks of.
_LONGEST: Final = 8


@dataclass
class _Pasts:
    """What the model has read for some rows: their tokens, :func:`spelled`, and the cache that holds them."""

    tokens: list[str]
    cache: KvCache


class DraftModel:
    """A :class:`streaming.drafts.BatchDrafter` that asks a language model.

    Args:
        llm: The model, frozen. Its tokens mean what the translator's mean; :func:`load_draft_model` makes sure of it.
        translator: Whose text is drafted.
        min_probability: A draft ends before a token that the model finds less probable.
        max_rows: How many pasts are kept; the oldest go.
        name: What its drafts are counted under.

    Raises:
        DragomanError: ``unsupported_model`` if the model has too few tokens.

    Attributes:
        forwards: How many the model has made.
        read_tokens: How many tokens it has read in them.
    """

    top_k = 0

    def __init__(
        self,
        llm: Llm,
        translator: Translator,
        *,
        min_probability: float = MIN_PROBABILITY,
        max_rows: int = MAX_ROWS,
        name: str = "draft model",
    ) -> None:
        size, wanted = llm.config.vocab_size, translator.tokenizer.size
        if size < wanted:
            raise _unsupported(f"the draft model has {size} tokens, the translator {translator.name!r} {wanted}")
        self.name = name
        self.forwards = self.read_tokens = 0
        self._llm, self._min_probability, self._max_rows = llm, min_probability, max_rows
        # A model's vocabulary may be padded beyond its tokenizer's.
        self._masks = torch.ones(2, size, dtype=torch.bool)
        for mask, own in zip(self._masks, (translator.unwritable, translator.unable_to_begin), strict=True):
            mask[:wanted] = own[:wanted].cpu()
        self._masks = self._masks.to(llm.device)
        self._endpoint, self._marks = spelled(translator.endpoint), translator.marks
        self._kept: list[_Pasts] = []

    @property
    def rows(self) -> int:
        """How many pasts it keeps."""
        return sum(len(pasts.tokens) for pasts in self._kept)

    def propose(self, context: Context, k: int) -> Proposal:
        """See :class:`streaming.drafts.Drafter`."""
        return self.propose_all([context], k)[0]

    def propose_all(self, contexts: Sequence[Context], k: int) -> list[Proposal]:
        """See :class:`streaming.drafts.BatchDrafter`."""
        asked = [context for context in contexts if context.sequence]
        drafts = iter(self._drafts(asked, k) if asked and k > 0 else [([], [])] * len(asked))
        found = [next(drafts) if context.sequence else ([], []) for context in contexts]
        return [Proposal.of(self.name, Draft.chain(tokens), sure) for tokens, sure in found]

    def observe(self, outcome: Outcome) -> None:
        """See :class:`streaming.drafts.Drafter`; the next context tells it all."""

    @torch.no_grad()
    def _drafts(self, contexts: Sequence[Context], k: int) -> list[tuple[list[int], list[float]]]:
        """The tokens of each row's draft, and their probabilities."""
        sequences, ends = [context.sequence for context in contexts], [context.end for context in contexts]
        kept, cache = self._taken(sequences)
        hidden, cache = self._read([sequence[n:] for sequence, n in zip(sequences, kept, strict=True)], cache)
        # Upon an endpoint alone only marks are written.
        closing = [context.source == self._endpoint != "" for context in contexts]
        begins = [context.past[-1:] in ("", chr(context.end)) for context in contexts]
        begins = [begin and not closed for begin, closed in zip(begins, closing, strict=True)]
        drafts: list[tuple[list[int], list[float]]] = [([], []) for _ in contexts]
        going = list(range(len(contexts)))
        for i in range(k):
            masks = self._masks[torch.tensor([int(i == 0 and begin) for begin in begins], device=hidden.device)]
            chosen, probabilities = _best(self._llm, hidden, masks)
            going = [b for b in going if chosen[b] != ends[b] and probabilities[b] >= self._min_probability]
            going = [b for b in going if not closing[b] or chosen[b] in self._marks]
            for b in going:
                drafts[b][0].append(chosen[b])
                drafts[b][1].append(probabilities[b])
            if not going or i + 1 == k:
                break
            for b in going:
                sequences[b] += chr(chosen[b])
            hidden, cache = self._read([chr(chosen[b]) if b in going else "" for b in range(len(contexts))], cache)
        self._keep(_Pasts(sequences, cache))
        return drafts

    def _read(self, fed: Sequence[str], cache: KvCache) -> tuple[Tensor, KvCache]:
        """Reads tokens of each row, perhaps none; what the model makes of the last of each, ``[B, d_model]``."""
        counts = torch.tensor([len(row) for row in fed])
        tokens = torch.zeros(len(fed), int(counts.max()), dtype=torch.int64)
        for b, row in enumerate(fed):
            tokens[b, : len(row)] = torch.tensor([ord(c) for c in row], dtype=torch.int64)
        hidden, after = self._llm.hidden(tokens, counts, cache)
        assert after is not None
        self.forwards += 1
        self.read_tokens += int(counts.sum())
        return hidden[torch.arange(len(fed)), (counts - 1).clamp(min=0)], after

    # ------------------------------------------------------------------------------------------------- the pasts

    def _taken(self, sequences: Sequence[str]) -> tuple[list[int], KvCache]:
        """Takes the pasts that fit best out of the store, one for each row, cut to what they have in common.

        Returns:
            How many of each row's tokens the cache holds, not all of them; and the cache.
        """
        places = self._matched(sequences)
        used = {place[0] for place in places if place is not None}
        if len(used) == 1 and len(self._kept[at := used.pop()].tokens) == len(places):
            # All rows but few are those of the last time; the others' pasts have gone on without them.
            rest = iter(sorted(set(range(len(places))) - {place[1] for place in places if place is not None}))
            rows = [next(rest) if place is None else place[1] for place in places]
            if rows == list(range(len(rows))):
                pasts = self._kept.pop(at)
                return self._cut(sequences, pasts.tokens, pasts.cache)
        found: dict[tuple[int, int], KvCache] = {}
        taken = set(places)
        split: list[_Pasts] = []
        for at, pasts in enumerate(self._kept):
            if not any((at, row) in taken for row in range(len(pasts.tokens))):
                split.append(pasts)
                continue
            for row, (tokens, cache) in enumerate(zip(pasts.tokens, pasts.cache.rows(), strict=True)):
                if (at, row) in taken:
                    found[at, row] = cache
                else:
                    split.append(_Pasts([tokens], cache))
        tokens_of = ["" if place is None else self._kept[place[0]].tokens[place[1]] for place in places]
        caches = [self._llm.init_state(1) if place is None else found[place] for place in places]
        self._kept = split
        return self._cut(sequences, tokens_of, KvCache.cat(caches))

    def _matched(self, sequences: Sequence[str]) -> list[tuple[int, int] | None]:
        """For each row the past, no past twice, that has most tokens in common with it; None if all lose most."""
        free = {(at, row): tokens for at, pasts in enumerate(self._kept) for row, tokens in enumerate(pasts.tokens)}
        places: list[tuple[int, int] | None] = []
        for sequence in sequences:
            best, place = 0, None
            for candidate, tokens in free.items():
                if sequence.startswith(tokens[: best + 1]) and len(tokens) > best:
                    common = common_prefix(sequence, tokens)
                    if 2 * common > len(tokens):
                        best, place = common, candidate
            places.append(place)
            if place is not None:
                del free[place]
        return places

    @staticmethod
    def _cut(sequences: Sequence[str], tokens: Sequence[str], cache: KvCache) -> tuple[list[int], KvCache]:
        """The last token of a row is read in any case: what follows it is asked for."""
        pairs = zip(sequences, tokens, strict=True)
        kept = [min(common_prefix(sequence, known), len(sequence) - 1) for sequence, known in pairs]
        return kept, cache.crop(torch.tensor(kept))

    def _keep(self, pasts: _Pasts) -> None:
        """Puts pasts into the store; the oldest leave it."""
        self._kept.append(pasts)
        while len(self._kept) > 1 and self.rows > self._max_rows:
            del self._kept[0]
        if self.rows > self._max_rows:
            self._kept.clear()


def common_prefix(a: str, b: str) -> int:
    """How many characters two strings have in common from their beginnings on."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _best(llm: Llm, hidden: Tensor, masks: Tensor) -> tuple[list[int], list[float]]:
    """The best tokens at some places that are not masked, and their probabilities among these."""
    logits = llm.logits(hidden).float().masked_fill(masks, -torch.inf)
    best, tokens = logits.max(-1)
    probabilities = (best - logits.logsumexp(-1)).exp()
    return tokens.tolist(), probabilities.tolist()


def load_draft_model(
    folder: Path, translator: Translator, *, device: str = "cpu", dtype: str = "float32"
) -> DraftModel:
    """Reads a model folder as a draft model for a translator.

    Args:
        folder: In the layout of :func:`models.llm.load_llm`, with a tokenizer; ``"translation"`` is not needed.
        translator: Whose text is drafted.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``float32`` or ``bfloat16``.

    Raises:
        DragomanError: As :func:`models.llm.load_llm` and :func:`models.tokenizer.load_tokenizer`;
            ``unsupported_model`` if the two models' tokenizers differ.
    """
    require_same_tokens(load_tokenizer(folder), translator, folder)
    return DraftModel(load_llm(folder, device=device, dtype=dtype), translator, name=f"draft model {folder.name}")


def require_same_tokens(tokenizer: Tokenizer, translator: Translator, folder: Path) -> None:
    """Makes sure that every id stands for the same in a draft model and in a translator.

    Raises:
        DragomanError: ``unsupported_model`` with the first id that does not.
    """
    own, advice = translator.tokenizer, "; a draft model must have the translator's tokenizer"
    if tokenizer.size != own.size:
        raise _unsupported(
            f"{folder} has a tokenizer of {tokenizer.size} pieces, the translator {translator.name!r} one of"
            f" {own.size}{advice}"
        )
    for token in range(own.size):
        if tokenizer.bytes_of(token) != own.bytes_of(token) or (token in tokenizer.controls) != (token in own.controls):
            raise _unsupported(
                f"token {token} is {tokenizer.bytes_of(token)!r} for {folder} and {own.bytes_of(token)!r} for the"
                f" translator {translator.name!r}{advice}"
            )
    if tokenizer.controls and translator.policy == "interleaved":
        for symbol in ("<|end-of-read|>", "<|end-of-write|>"):
            if tokenizer.id_of(symbol) != own.id_of(symbol):
                raise _unsupported(
                    f"{symbol} is token {tokenizer.id_of(symbol)} for {folder} and {own.id_of(symbol)} for the"
                    f" translator {translator.name!r}{advice}"
                )


def _unsupported(sentence: str) -> DragomanError:
    return DragomanError("unsupported_model", sentence)


# ------------------------------------------------------------------------------------------------- leaving layers out


class Written(NamedTuple):
    """What a model has written, with all that it had read.

    Attributes:
        tokens: The sequence.
        begin: Index of the first token of the write; it and those after it are the model's own choice.
    """

    tokens: tuple[int, ...]
    begin: int


class Listener:
    """A drafter that proposes nothing and keeps the last writes of its engine, for :func:`search_layers`.

    It hears them all where drafts have a fixed length: a controller soon leaves a drafter alone that brings nothing.

    Args:
        limit: How many are kept.
    """

    name, top_k = "listener", 0

    def __init__(self, limit: int = 32) -> None:
        self.writes: list[Written] = []
        self._limit = limit

    def propose(self, context: Context, k: int) -> Proposal:
        """See :class:`streaming.drafts.Drafter`."""
        return Proposal()

    def observe(self, outcome: Outcome) -> None:
        """See :class:`streaming.drafts.Drafter`."""
        if not outcome.accepted:
            return
        context = outcome.context
        written = len(context.past.rpartition(chr(context.end))[2])
        tokens = (*map(ord, context.sequence), *outcome.accepted)
        begin = len(context.sequence) - written
        # A write comes in several pieces, of which the last has all.
        self.writes = [w for w in self.writes if w.begin != begin or tokens[: len(w.tokens)] != w.tokens]
        self.writes = [*self.writes, Written(tokens, begin)][-self._limit :]


@dataclass(frozen=True)
class Skipped:
    """Layers that are left out, and what that is worth.

    Attributes:
        layers: Their indices.
        matches: Share of the model's own tokens that it chooses without them too.
        cost: Of a forward without them, in forwards with all.
        tokens: Longest draft at which ``speedup`` is highest; 0 if no draft pays.
        speedup: Tokens for each unit of time, in those of the model alone: ``1 + α + … + α^k`` tokens for
            ``1 + k cost`` forwards, if the ``k`` drafted tokens are read for nothing. The controller's figure is lower.
    """

    layers: tuple[int, ...]
    matches: float
    cost: float
    tokens: int
    speedup: float

    @staticmethod
    def of(layers: Sequence[int], matches: float, cost: float) -> Skipped:
        """With the length of draft that suits them."""
        rates = [sum(matches**i for i in range(k + 1)) / (1 + k * cost) for k in range(_LONGEST + 1)]
        return Skipped(tuple(sorted(layers)), matches, cost, rates.index(max(rates)), max(rates))


@torch.no_grad()
def search_layers(
    translator: Translator, writes: Sequence[Written], *, overhead: float = 0.0, batch: int = 8
) -> list[Skipped]:
    """What leaving out one layer, two and more would bring, on what the translator itself has written.

    Layers go one after another, each time the one without which most of the model's own tokens are still chosen; the
    first and the last stay. That takes ``L² / 2`` readings of the text, where SWIFT draws sets at random and fits a
    model to their scores.

    Args:
        translator: An interleaved one.
        writes: Of a :class:`Listener`.
        overhead: What a forward takes beside its layers, as a share of the whole: embedding, output, Python.
        batch: Writes that are read at a time.

    Returns:
        For each number of layers, from one left out on, the best set found.
    """
    llm = translator.llm
    left, skipped, found = list(range(1, llm.config.n_layers - 1)), list[int](), list[Skipped]()
    while left:
        scores = [_matches(translator, llm.without([*skipped, layer]), writes, batch) for layer in left]
        best = max(range(len(left)), key=scores.__getitem__)
        skipped.append(left.pop(best))
        cost = overhead + (1 - overhead) * (1 - len(skipped) / llm.config.n_layers)
        found.append(Skipped.of(skipped, scores[best], cost))
    return found


def _matches(translator: Translator, llm: Llm, writes: Sequence[Written], batch: int) -> float:
    """Share of the translator's tokens that a model chooses too, each with the translator's own before it."""
    right = total = 0
    for start in range(0, len(writes), batch):
        some = writes[start : start + batch]
        counts = torch.tensor([len(one.tokens) - 1 for one in some])
        tokens = torch.zeros(len(some), int(counts.max()), dtype=torch.int64)
        for b, one in enumerate(some):
            tokens[b, : len(one.tokens) - 1] = torch.tensor(one.tokens[:-1])
        hidden, _ = llm.hidden(tokens, counts, None)
        places = [(b, i) for b, one in enumerate(some) for i in range(one.begin - 1, len(one.tokens) - 1)]
        begins = torch.tensor([i == some[b].begin - 1 for b, i in places], device=hidden.device)
        rows, columns = torch.tensor(places, device=hidden.device).T
        masks = torch.where(begins[:, None], translator.unable_to_begin, translator.unwritable)
        chosen, _ = _best(llm, hidden[rows, columns], masks)
        right += sum(token == some[b].tokens[i + 1] for token, (b, i) in zip(chosen, places, strict=True))
        total += len(places)
    return right / max(1, total)
