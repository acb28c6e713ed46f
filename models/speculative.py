"""Drafts and their verification: several tokens from one forward, and the same tokens as one by one.

Someone guesses what the model will say next; one forward reads the guess, and the model's own choice at each of its
places tells how far it was right. What is committed is only ever the model's choice, so that a guess changes how many
forwards a text takes and never the text. A guess is a tree, so that one forward can test several continuations.

What is right is found before the cache is cropped: the walk along the model's choices ends at an end token or where no
guess has the choice, the tokens that it passed are the matches, and only then the others are forgotten.

Sources: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192), for the
rejection rule; Miao et al., "SpecInfer" (arXiv 2305.09781), for trees; Daliri et al., "Coupling without Communication
and Drafter-Invariant Speculative Decoding" (arXiv 2408.07978), for noise that belongs to a place and not to a draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from models.kv_cache import KvCache
from models.llm import Llm

#: Before the first token of a draft: the place after what has been read.
ROOT = -1


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next.

    Attributes:
        tokens: Those of the tree, a parent before its children.
        parents: For each the index of the token that it would follow, :data:`ROOT` for what has been read.

    Raises:
        ValueError: A parent does not stand before its child.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.parents) != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} tokens have {len(self.parents)} parents")
        if wrong := [i for i, parent in enumerate(self.parents) if not ROOT <= parent < i]:
            raise ValueError(f"token {wrong[0]} cannot follow token {self.parents[wrong[0]]}")

    @staticmethod
    def chain(tokens: Sequence[int]) -> Draft:
        """One continuation."""
        return Draft(tuple(tokens), tuple(range(ROOT, len(tokens) - 1)))

    @property
    def is_chain(self) -> bool:
        """Whether it is one continuation, or none."""
        return all(parent == i - 1 for i, parent in enumerate(self.parents))

    @cached_property
    def children(self) -> dict[tuple[int, int], int]:
        """The first child of a place that has a token, by place and token."""
        found: dict[tuple[int, int], int] = {}
        for i, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            found.setdefault((parent, token), i)
        return found

    def path(self, node: int) -> list[int]:
        """The tokens' indices from the root to a node, both ends included; none for the root itself."""
        path = []
        while node != ROOT:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def without(self, end: int) -> Draft:
        """The draft without a token after which nothing can be foreseen, and without what would follow it."""
        if end not in self.tokens:
            return self
        index, tokens, parents = {ROOT: ROOT}, list[int](), list[int]()
        for i, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if token != end and parent in index:
                index[i] = len(tokens)
                tokens.append(token)
                parents.append(index[parent])
        return Draft(tuple(tokens), tuple(parents))


@dataclass(frozen=True)
class Verified:
    """What one draft has brought.

    Attributes:
        path: Indices of its tokens that were right, in their order.
        tokens: What is committed: these tokens, and the model's choice after the last of them.
    """

    path: tuple[int, ...]
    tokens: tuple[int, ...]


def follow(draft: Draft, choose: Callable[[int], int], end: int | None = None) -> Verified:
    """Goes along the model's choices as long as the draft has them.

    Args:
        draft: The guess.
        choose: The model's choice at a place: after the draft's token of that index, or after what has been read
            (:data:`ROOT`). It is called for the places on the path only, in their order.
        end: Ends the text; nothing that was guessed after it counts.
    """
    node, path, tokens = ROOT, list[int](), list[int]()
    while True:
        token = choose(node)
        tokens.append(token)
        child = None if token == end else draft.children.get((node, token))
        if child is None:
            return Verified(tuple(path), tuple(tokens))
        path.append(child)
        node = child


def read(
    llm: Llm, fed: Sequence[Sequence[int]], drafts: Sequence[Draft], cache: KvCache
) -> tuple[Tensor, KvCache, list[int]]:
    """Reads each row's next tokens, and its draft behind them, in one forward.

    Args:
        llm: The model.
        fed: Decided tokens of each row. A row with a draft has one at least, whose choice the draft is to meet.
        drafts: One for each row.
        cache: The past of the rows.

    Returns:
        The hidden states ``[B, T, d_model]`` of :meth:`models.llm.Llm.hidden`, the draft's after those of the row's
        tokens; the cache, which holds all of both; and how many tokens each row has read.
    """
    sizes = [len(row) + len(draft.tokens) for row, draft in zip(fed, drafts, strict=True)]
    tokens = torch.zeros(len(fed), max(1, *sizes), dtype=torch.int64)
    for b, (row, draft) in enumerate(zip(fed, drafts, strict=True)):
        tokens[b, : sizes[b]] = torch.tensor((*row, *draft.tokens), dtype=torch.int64)
    positions, visible = None, None
    if not all(draft.is_chain for draft in drafts):
        positions, visible = _tree_layout(fed, drafts, cache.next_positions, tokens.shape[1])
    hidden, after = llm.hidden(tokens, torch.tensor(sizes), cache, positions=positions, visible=visible)
    assert after is not None
    return hidden, after, sizes


def _tree_layout(
    fed: Sequence[Sequence[int]], drafts: Sequence[Draft], next_positions: Tensor, T: int
) -> tuple[Tensor, Tensor]:
    """Positions ``int64[B, T]`` and ``visible`` of :meth:`models.llm.Llm.step`: a token of a tree sees its path."""
    positions = next_positions[:, None] + torch.arange(T)
    visible = torch.ones(T, T, dtype=torch.bool).tril().repeat(len(fed), 1, 1)
    for b, (row, draft) in enumerate(zip(fed, drafts, strict=True)):
        first = len(row)
        for i in range(len(draft.tokens)):
            path = draft.path(i)
            positions[b, first + i] = next_positions[b] + first + len(path) - 1
            visible[b, first + i, first:] = False
            visible[b, first + i, [first + node for node in path]] = True
    return positions, visible


def keep(
    cache: KvCache, sizes: Sequence[int], kept: Sequence[int], drafts: Sequence[Draft], paths: Sequence[Sequence[int]]
) -> KvCache:
    """Forgets what was guessed wrong; the rows may have been right to different extents.

    Args:
        cache: After :func:`read`, with ``sizes``. It shares its memory with the result.
        sizes: Tokens that each row has read.
        kept: How many of its decided tokens a row keeps; where it does not keep all, its path is empty.
        drafts: What was guessed.
        paths: The tokens of each row's draft that were right.
    """
    counts = torch.tensor([n + len(path) for n, path in zip(kept, paths, strict=True)])
    before = cache.lengths - torch.tensor(sizes)
    if all(draft.is_chain for draft in drafts):
        return cache.crop(before + counts)
    indices = torch.zeros(len(kept), max(1, int(counts.max())), dtype=torch.int64)
    for b, (n, path) in enumerate(zip(kept, paths, strict=True)):
        first = sizes[b] - len(drafts[b].tokens)
        indices[b, : n + len(path)] = torch.tensor([*range(n), *(first + node for node in path)], dtype=torch.int64)
    return cache.accept(before, indices, counts)


# ------------------------------------------------------------------------------------------------------- sampling


def sampled(logits: Tensor, seed: int, places: Sequence[int], *, temperature: float = 1.0) -> list[int]:
    """Draws a token at each place, with noise that is a function of the seed and the place.

    Each draw is from ``softmax(logits / temperature)`` and independent of the others. Because a place's noise does not
    depend on how it was reached, a draw is a choice like the best token: with :func:`follow`, a draft that does not
    know the noise gives the very tokens that drawing one after another with the same seed gives.

    Args:
        logits: ``float[N, vocab_size]``.
        seed: Of the text.
        places: Index within the text of each of the ``N`` tokens to draw.
        temperature: Above 0.
    """
    scaled = logits.float().cpu() / temperature
    waits = torch.empty(scaled.shape)
    for row, place in enumerate(places):
        # Exponential waiting times with the tokens' probabilities as rates: the first to come is the draw.
        waits[row].exponential_(generator=torch.Generator().manual_seed(_mixed(seed, place)))
    drawn: list[int] = (scaled - waits.log()).argmax(-1).tolist()
    return drawn


def _mixed(seed: int, place: int) -> int:
    """64 bits that look unrelated for neighbouring seeds and places (the finaliser of SplitMix64)."""
    mask = (1 << 64) - 1
    x = (seed * 0x9E3779B97F4A7C15 + (place + 1) * 0xD1B54A32D192ED03) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def reject(
    target: Tensor, proposal: Tensor, drafted: Sequence[int], generator: torch.Generator, end: int | None = None
) -> Verified:
    """The rejection rule, for a chain that was itself drawn: what is committed is distributed as the model's draws.

    A drafted token stays with probability ``min(1, target / proposal)``; in place of the first that does not, one is
    drawn from what the model gives beyond the proposal; after a chain that stays whole, one from the model.

    Args:
        target: ``float[k + 1, vocab_size]`` on the host: the model's probabilities at each place.
        proposal: ``float[k, vocab_size]`` on the host: the probabilities that each drafted token was drawn from.
        drafted: The ``k`` tokens.
        generator: Source of randomness on the host, with the text's seed.
        end: Ends the text, as in :func:`follow`.

    Source: arXiv 2211.17192, algorithm 1.
    """
    tokens: list[int] = []
    for i, token in enumerate(drafted):
        bound = float(target[i, token]) / max(float(proposal[i, token]), 1e-38)
        if float(torch.rand((), generator=generator)) >= bound:
            beyond = (target[i] - proposal[i]).clamp(min=0)
            # Equal distributions reject nothing, but for rounding.
            beyond = beyond if bool(beyond.sum() > 0) else target[i]
            tokens.append(int(torch.multinomial(beyond, 1, generator=generator)))
            return Verified(tuple(range(i)), tuple(tokens))
        tokens.append(token)
        if token == end:
            return Verified(tuple(range(i)), tuple(tokens))
    tokens.append(int(torch.multinomial(target[len(drafted)], 1, generator=generator)))
    return Verified(tuple(range(len(drafted))), tuple(tokens))


# ----------------------------------------------------------------------------------------------------------- ties


@torch.no_grad()
def greedy_gaps(llm: Llm, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """How far each token's logit is below the best one, when the text is read in one forward; 0 for the best.

    In float32 a greedy text has gaps of 0, but for exact ties. In bfloat16 the logits of one forward differ in their
    last bits from those of many, so a text counts as greedy there when its gaps are of the size of that rounding.

    Args:
        llm: The model.
        prompt: At least one token before the text.
        tokens: The text.

    Returns:
        ``float32[len(tokens)]``, 0 or more.
    """
    whole = torch.tensor([[*prompt, *tokens]])
    logits, _ = llm.step(whole[:, :-1], torch.tensor([whole.shape[1] - 1]), None, logits_at=len(tokens))
    logits = logits[0].float()
    return logits.amax(-1) - logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
