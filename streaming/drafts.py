"""Guesses of what a translation says next, from what it has said: drafts for :mod:`models.speculative`.

A drafter proposes tokens and is told what became of them. It may be wrong, and it may be shared by all sessions: what
it proposes changes how many forwards a text takes and never the text. A write ends at an end token, after which the
speaker decides what follows; so drafts end there too.

The target side of a row is kept as a string with one character for each token: what stands before a place is a slice of
it, and what has been said before is found by searching in it.

- :class:`OldOutput`: what a translation said here that was dropped, because the words behind it have changed.
- :class:`Repetition`: what stood after the last occurrence of the same tokens in the session.
- :class:`NGrams`: what most often follows the last tokens, or a word of the source and the last token, in the training
  set and in what has been said. The surest context decides.
- :class:`Recycling`: the model's own best tokens from where it last had the same token; a chain or a tree.
  (Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling",
  arXiv 2408.08696.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from models.speculative import ROOT, Draft
from streaming.errors import DragomanError

#: Tokens of the target side that a row remembers.
MAX_PAST_TOKENS: Final = 2048
#: Longest context of the n-grams, in tokens.
MAX_ORDER: Final = 3
#: Stands in a context between a token of the source and the last one of the target; no token has its number.
MARK: Final = chr(0x10FFFF)
#: Tokens of the source that a draft may look at.
MAX_SOURCE_TOKENS: Final = 64
#: File of the n-grams of a model's training set, in its folder.
SEED: Final = "drafts.safetensors"
#: How much earlier than expected an old translation may go on, in tokens.
_SHIFT = 3
#: Tokens that may follow a context, of which a store keeps count.
_SUCCESSORS = 4
#: A draft ends before a token that is less probable than this to be reached: it would not pay.
_LEAST_REACHED = 0.005
#: How much of a count is taken for chance, as Kneser and Ney do; about what held-out translations ask for.
_DISCOUNT = 0.8

#: What follows a context most often in the training set, and its share of what does, by context.
Seed = Mapping[str, tuple[int, float]]
#: One row of a training set: source and target of its chunks, ends of writes included.
Ids = Sequence[int] | np.ndarray
Chunks = Sequence[tuple[Ids, Ids]]


def spelled(tokens: Iterable[int]) -> str:
    """Tokens as a string with a character for each."""
    return "".join(map(chr, tokens))


@dataclass(frozen=True)
class Context:
    """Where a draft is to follow.

    Attributes:
        language: What is written.
        past: The target side so far, :func:`spelled`, end tokens included.
        end: The end token.
        source: What is being written upon: the source's tokens since the last write, :func:`spelled`.
        sequence: All that the model has read, or reads before the draft, and still remembers, :func:`spelled`: prompt,
            chunks, and what is open.
        hidden: What the model made of the place before the last token of ``sequence``, ``[d_model]``; None if that is
            not known, as where a write may follow words that have not been read yet.
        former: What a write here said that was dropped, :func:`spelled`, without an end token; empty if there is none.
    """

    language: str
    past: str
    end: int
    source: str = ""
    sequence: str = ""
    hidden: Tensor | None = field(default=None, compare=False)
    former: str = ""


@dataclass(frozen=True)
class Proposal:
    """A draft, and how sure its source is of it.

    Attributes:
        draft: The tokens, without an end token.
        sure: For each the probability that it is right if its parents are, as its source sees it.
        sources: For each the name of the drafter.
    """

    draft: Draft = field(default_factory=Draft)
    sure: tuple[float, ...] = ()
    sources: tuple[str, ...] = ()

    @staticmethod
    def of(source: str, draft: Draft, sure: Sequence[float]) -> Proposal:
        """A proposal of one drafter."""
        return Proposal(draft, tuple(sure), (source,) * len(sure))

    def first(self, k: int) -> Proposal:
        """Its first ``k`` tokens."""
        if k >= len(self.sure):
            return self
        return Proposal(Draft(self.draft.tokens[:k], self.draft.parents[:k]), self.sure[:k], self.sources[:k])

    def after(self, source: str, token: int, sure: float) -> Proposal:
        """The proposal behind one more token, from another source."""
        parents = (ROOT, *(parent + 1 for parent in self.draft.parents))
        return Proposal(Draft((token, *self.draft.tokens), parents), (sure, *self.sure), (source, *self.sources))


@dataclass(frozen=True)
class Outcome:
    """What became of a proposal.

    Attributes:
        context: Where it was to follow.
        accepted: The tokens that the model chose there, whether guessed or not; perhaps with an end token as the last.
        rejected: The proposal's tokens that are not among them.
        top_k: For each token of ``accepted`` the model's best tokens at its place; as many as drafters ask for.
        hidden: What the model made of those places, ``[len(accepted), d_model]``; None if nobody asks for it.
    """

    context: Context
    accepted: tuple[int, ...]
    rejected: tuple[int, ...] = ()
    top_k: tuple[tuple[int, ...], ...] = ()
    hidden: Tensor | None = field(default=None, compare=False)


class Drafter(Protocol):
    """A source of drafts. What it has learnt is its own, bounded, and no part of a session's state."""

    @property
    def name(self) -> str:
        """What its drafts are counted under."""

    @property
    def top_k(self) -> int:
        """How many of the model's best tokens it wants to be told."""

    def propose(self, context: Context, k: int) -> Proposal:
        """At most ``k`` tokens, perhaps none."""

    def observe(self, outcome: Outcome) -> None:
        """Learns from what the model chose."""


@runtime_checkable
class BatchDrafter(Drafter, Protocol):
    """A drafter that computes the drafts of all rows together."""

    def propose_all(self, contexts: Sequence[Context], k: int) -> list[Proposal]:
        """For each context what :meth:`propose` would give."""


@dataclass(frozen=True)
class OldOutput:
    """The translation that was dropped, from where the new one has got in it; it learns nothing.

    As long as the new one says the same, that is its own length. Once they differ, it is the place after the last
    tokens that they have in common, the longest run of them, and of several the next one: a word that was put in or
    left out costs one forward and not the rest of the draft. Upon words that the old one had not read, what is left is
    its end: most often the new one ends alike, with the same full stop.
    ("Self-Speculative Biased Decoding", arXiv 2509.21740, for the first rule, here without its bias.)

    Attributes:
        longest: Tokens that are looked for at most, once the two differ.
    """

    longest: int = 4
    name: str = "old output"
    top_k: int = 0

    def propose(self, context: Context, k: int) -> Proposal:
        """See :class:`Drafter`."""
        written, former = context.past.rpartition(chr(context.end))[2], context.former
        if former.startswith(written):
            at, sure = len(written), 0.75
        elif (at := self._place(written, former)) >= 0:
            sure = 0.55
        else:
            at, sure = max(0, len(former) - 1), 0.45
        tokens = [ord(c) for c in former[at : at + k]]
        return Proposal.of(self.name, Draft.chain(tokens), [sure] * len(tokens))

    def _place(self, written: str, former: str) -> int:
        """Where the old translation goes on after the last tokens of the new one; -1 if it does not have them."""
        for n in range(min(self.longest, len(written)), 0, -1):
            last, near = written[-n:], max(0, len(written) - n - _SHIFT)
            if (at := former.find(last, near)) >= 0 or (at := former.rfind(last)) >= 0:
                return at + n
        return -1

    def observe(self, outcome: Outcome) -> None:
        """See :class:`Drafter`."""


@dataclass(frozen=True)
class Repetition:
    """What a session has said before; it learns nothing, since the context holds it all.

    Attributes:
        longest: Tokens that are looked for at most.
        shortest: Fewer are no reason to expect a repetition.
    """

    longest: int = 6
    shortest: int = 2
    name: str = "repetition"
    top_k: int = 0

    def propose(self, context: Context, k: int) -> Proposal:
        """See :class:`Drafter`."""
        past = context.past
        for n in range(min(self.longest, len(past) - 1), self.shortest - 1, -1):
            if (at := past.rfind(past[-n:], 0, len(past) - 1)) >= 0:
                tokens = [ord(c) for c in past[at + n : at + n + k].partition(chr(context.end))[0]]
                return Proposal.of(self.name, Draft.chain(tokens), [n / (n + 1)] * len(tokens))
        return Proposal()

    def observe(self, outcome: Outcome) -> None:
        """See :class:`Drafter`."""


class _Generations:
    """A map that forgets what has not been asked for or written for long: two halves, of which the older is dropped."""

    def __init__(self, limit: int) -> None:
        self._half = max(1, limit // 2)
        self._young: dict[str, Any] = {}
        self._old: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def get(self, key: str) -> Any:
        """The value, or None; it counts as new again."""
        found = self._young.get(key)
        if found is None and (found := self._old.pop(key, None)) is not None:
            self.put(key, found)
        return found

    def put(self, key: str, value: Any) -> None:
        """Sets a value."""
        if len(self._young) >= self._half and key not in self._young:
            self._young, self._old = {}, self._young
        self._old.pop(key, None)
        self._young[key] = value


class NGrams:
    """What most often follows a context: counts of this engine's sessions over a fixed seed.

    Contexts are the last one, two or three tokens, and each token of the source with the last one.

    Args:
        seeds: What the training set says, for each language.
        max_contexts: Of which counts are kept, for each language.
    """

    name = "n-grams"
    top_k = 0

    def __init__(self, seeds: Mapping[str, Seed] | None = None, *, max_contexts: int = 100_000) -> None:
        self._seeds = dict(seeds or {})
        self._counts: defaultdict[str, _Generations] = defaultdict(lambda: _Generations(max_contexts))

    def propose(self, context: Context, k: int) -> Proposal:
        """See :class:`Drafter`."""
        before, tokens, sure = context.past[-MAX_ORDER:], list[int](), list[float]()
        sources, reached = _sources(context), 1.0
        while len(tokens) < k:
            token, probability = self._next(context.language, _keys(before, sources))
            reached *= probability
            if token < 0 or token == context.end or reached < _LEAST_REACHED:
                break
            tokens.append(token)
            sure.append(probability)
            before = (before + chr(token))[-MAX_ORDER:]
        return Proposal.of(self.name, Draft.chain(tokens), sure)

    def _next(self, language: str, keys: Iterable[str]) -> tuple[int, float]:
        """The most probable token by the surest of the contexts; -1 if there is none."""
        best, counts, seed = (-1, 0.0), self._counts[language], self._seeds.get(language, {})
        for key in keys:
            if (found := counts.get(key)) is not None:
                token = max(found, key=found.__getitem__)
                best = max(best, (token, _discounted(found[token], sum(found.values()))), key=_probability)
            if (seeded := seed.get(key)) is not None:
                best = max(best, seeded, key=_probability)
        return best

    def observe(self, outcome: Outcome) -> None:
        """See :class:`Drafter`."""
        counts, before = self._counts[outcome.context.language], outcome.context.past[-MAX_ORDER:]
        sources = _sources(outcome.context)
        for token in outcome.accepted:
            for key in _keys(before, sources):
                _count(counts, key, token)
            before = (before + chr(token))[-MAX_ORDER:]


def _sources(context: Context) -> list[str]:
    """The first halves of the contexts that look at the source."""
    return [token + MARK for token in dict.fromkeys(context.source[-MAX_SOURCE_TOKENS:])]


def _keys(before: str, sources: Sequence[str]) -> list[str]:
    """The contexts of a place, whose last tokens are ``before``."""
    last = before[-1:]
    return [before[-n:] for n in range(len(before), 0, -1)] + ([source + last for source in sources] if last else [])


def _discounted(count: int, total: int) -> float:
    """Of what came so often: what was seen once is no more than a hint."""
    return (count - _DISCOUNT) / total


def _probability(one: tuple[int, float]) -> float:
    return one[1]


def _count(counts: _Generations, key: str, token: int) -> None:
    """Counts one more; where there is no room for another successor, all lose one (Misra and Gries, 1982)."""
    if (found := counts.get(key)) is None:
        counts.put(key, {token: 1})
    elif token in found or len(found) < _SUCCESSORS:
        found[token] = found.get(token, 0) + 1
    else:
        for other in list(found):
            found[other] -= 1
            if not found[other]:
                del found[other]
        if not found:
            found[token] = 1


class Recycling:
    """The model's best tokens where it last had the same token before: a row of a matrix for each.

    Args:
        branches: How many of the best ones are followed at each depth. Ones make a chain, which alone pays on a CPU.
        max_tokens: Rows that are kept, for each language.
    """

    name = "recycling"

    def __init__(self, branches: Sequence[int] = (1,) * 8, *, max_tokens: int = 50_000) -> None:
        self._branches = tuple(branches)
        self.top_k = max(self._branches)
        self._best: defaultdict[str, _Generations] = defaultdict(lambda: _Generations(max_tokens))

    def propose(self, context: Context, k: int) -> Proposal:
        """See :class:`Drafter`."""
        tokens, parents, best = list[int](), list[int](), self._best[context.language]
        level = [(ROOT, context.past[-1:])]
        for width in self._branches:
            following = []
            for parent, before in level:
                for token in (best.get(before) or ())[:width]:
                    if token != context.end and len(tokens) < k:
                        following.append((len(tokens), chr(token)))
                        tokens.append(token)
                        parents.append(parent)
            level = following
        return Proposal.of(self.name, Draft(tuple(tokens), tuple(parents)), [0.5] * len(tokens))

    def observe(self, outcome: Outcome) -> None:
        """See :class:`Drafter`."""
        best, before = self._best[outcome.context.language], outcome.context.past[-1:]
        for token, top in zip(outcome.accepted, outcome.top_k, strict=False):
            if before:
                best.put(before, top)
            before = chr(token)


# ----------------------------------------------------------------------------------------------------------- seeds


def count_seed(rows: Iterable[Chunks], *, max_contexts: int = 100_000, min_count: int = 3) -> Seed:
    """A seed from a training set.

    Args:
        rows: Of one target language.
        max_contexts: How many contexts are kept: those whose prediction comes true most often, of those that are surer
            than the last tokens, or fewer of them, are.
        min_count: Contexts that are rarer are left out.
    """
    targets, lengths, pairs = list[Any](), list[int](), list[Any]()
    for row in rows:
        targets += [np.asarray(target, np.int64) for _, target in row]
        lengths.append(sum(len(target) for _, target in row))
        pairs += [_with_source(source, target) for source, target in row if len(source) and len(target)]
    if not targets:
        return {}
    flat, index = np.concatenate(targets), np.concatenate([np.arange(length) for length in lengths])
    seed = _Seed(flat, min_count)
    at, shorter = np.arange(len(flat)), np.zeros(len(flat), np.int64)  # places, and the context before each
    for n in range(1, MAX_ORDER + 1):
        at, shorter = at[index[at] >= n], shorter[index[at] >= n]
        if len(at):
            # A context is the next shorter one and the token before it.
            shorter = seed.count(shorter, flat[at - n], n, at)
    if pairs:
        seed.count_pairs(*np.concatenate(pairs, 1))
    return seed.best(max_contexts)


def _with_source(source: Ids, target: Ids) -> np.ndarray:
    """Every token of a chunk's source with each token of its target and the one before, ``int64[3, N]``."""
    sources, tokens = np.unique(np.asarray(source, np.int64))[:MAX_SOURCE_TOKENS], np.asarray(target, np.int64)
    shape = (len(sources), len(tokens))
    # Before the first token is the end of the chunk before, and the last one is an end.
    both = np.broadcast_to(sources[:, None], shape), np.broadcast_to(np.roll(tokens, 1), shape)
    return np.stack([one.reshape(-1) for one in (*both, np.broadcast_to(tokens, shape))])


class _Seed:
    """Contexts that say more than shorter ones, and how many more guesses they get right."""

    def __init__(self, flat: np.ndarray, min_count: int) -> None:
        self._flat, self._min_count = flat, min_count
        self._size = int(flat.max()) + 1
        self._best = np.zeros(1)  # certainty of the surest context, for each of the present order
        self._by_token = np.zeros(self._size)  # and for each last token
        self._found: list[tuple[float, str, tuple[int, float]]] = []

    def count(self, shorter: np.ndarray, older: np.ndarray, n: int, at: np.ndarray) -> np.ndarray:
        """Counts all contexts of ``n`` tokens; the index of each place's context."""
        _, first, contexts = np.unique(shorter * self._size + older, return_index=True, return_inverse=True)

        def spell(i: int) -> str:
            end = int(at[first[i]])
            return spelled(self._flat[end - n : end].tolist())

        self._best = self._add(contexts, self._flat[at], self._best[shorter[first]], spell, 0.05 if n > 1 else -1.0)
        if n == 1:
            self._by_token[older[first]] = self._best
        return contexts

    def count_pairs(self, sources: np.ndarray, before: np.ndarray, following: np.ndarray) -> None:
        """Counts all contexts of a source's token and the last one."""
        keys, contexts = np.unique(sources * self._size + before, return_inverse=True)

        def spell(i: int) -> str:
            source, last = divmod(int(keys[i]), self._size)
            return chr(source) + MARK + chr(last)

        self._add(contexts, following, self._by_token[keys % self._size], spell, 0.1)

    def _add(
        self,
        contexts: np.ndarray,
        following: np.ndarray,
        without: np.ndarray,
        spell: Callable[[int], str],
        margin: float,
    ) -> np.ndarray:
        """Keeps the contexts that are surer by a margin; the certainty of each with what is shorter."""
        total, (token, count) = np.bincount(contexts), _most_common(contexts, following, len(without))
        sure = (count - _DISCOUNT) / total
        keeps = (total >= self._min_count) & (sure > without + margin)
        gain = count - without * total
        for i in np.flatnonzero(keeps).tolist():
            self._found.append((float(gain[i]), spell(i), (int(token[i]), float(sure[i]))))
        return np.where(keeps, sure, without)

    def best(self, contexts: int) -> Seed:
        """Those that gain most."""
        self._found.sort(key=lambda one: (-one[0], one[1]))
        return {context: seeded for _, context, seeded in self._found[:contexts]}


def _most_common(contexts: np.ndarray, tokens: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """For each context the token that follows it most often (of several the largest), and how often."""
    vocabulary = tokens.max() + 1
    pairs, counts = np.unique(contexts * vocabulary + tokens, return_counts=True)
    owners, order = pairs // vocabulary, np.lexsort((counts, pairs // vocabulary))
    last = order[np.searchsorted(owners[order], np.arange(size), side="right") - 1]
    return pairs[last] % vocabulary, counts[last]


def save_seeds(path: Path, seeds: Mapping[str, Seed]) -> None:
    """Writes seeds beside a model.

    For each language and kind of context (``1``, ``2`` and ``3`` tokens, ``source``) there are two arrays: ``tokens``,
    whose rows are a context and what follows it, and ``sure``, in 255ths.
    """
    from safetensors.numpy import save_file

    arrays: dict[str, Any] = {}
    for language, seed in seeds.items():
        kinds: defaultdict[str, list[str]] = defaultdict(list)
        for context in seed:
            kinds["source" if MARK in context else str(len(context))].append(context)
        for kind, contexts in kinds.items():
            rows = np.array([[ord(c) for c in context if c != MARK] + [seed[context][0]] for context in contexts])
            sure = np.array([seed[context][1] for context in contexts])
            arrays[f"{language}.{kind}.tokens"] = rows.astype(np.uint16 if rows.max() < 1 << 16 else np.uint32)
            arrays[f"{language}.{kind}.sure"] = np.floor(sure * 255).astype(np.uint8)
    save_file(arrays, path)


def load_seeds(folder: Path) -> dict[str, dict[str, tuple[int, float]]]:
    """The seeds beside a model; none if the folder has none.

    Raises:
        DragomanError: ``bad_checkpoint`` if the file is not one of :func:`save_seeds`.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not (path := folder / SEED).is_file():
        return {}
    seeds: dict[str, dict[str, tuple[int, float]]] = {}
    try:
        arrays = load_file(path)
        for name in sorted(name for name in arrays if name.endswith(".tokens")):
            language, kind, _ = name.split(".")
            sure = (arrays[name.removesuffix("tokens") + "sure"] / 255).tolist()
            mark = MARK if kind == "source" else ""
            seeds.setdefault(language, {}).update(
                (mark.join(map(chr, row[:-1])), (row[-1], one))
                for row, one in zip(arrays[name].tolist(), sure, strict=True)
            )
    except (SafetensorError, KeyError, ValueError, OverflowError) as error:
        raise DragomanError("bad_checkpoint", f"{path} does not hold n-grams of training targets: {error}") from error
    return seeds
