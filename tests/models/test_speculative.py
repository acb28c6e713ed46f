"""Verification: whatever is guessed, what is committed is what one token after the other would have been."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.kv_cache import KvCache
from models.llm import Llm
from models.speculative import ROOT, Draft, Verified, follow, greedy_gaps, keep, read, reject, sampled
from tests.models.test_llm import SHAPES, VOCAB, fresh, frozen, sequence, shapes, whole

END = 7
few = settings(max_examples=20, deadline=None)


@cache
def expected(shape: str, prompt: tuple[int, ...], n: int, seed: int | None) -> list[int]:
    return one_by_one(frozen(shape), prompt, n, seed)


def one_by_one(net: Llm, prompt: Sequence[int], n: int, seed: int | None = None) -> list[int]:
    """Whole sequences from the start for each token; up to an end token."""
    text: list[int] = []
    while len(text) < n and END not in text:
        logits = whole(net, torch.tensor([*prompt, *text]))[-1:]
        text.append(int(logits.argmax()) if seed is None else sampled(logits, seed, [len(text)])[0])
    return text


def guess(lies: random.Random, coming: Sequence[int], *, tree: bool) -> Draft:
    """A draft that knows what comes and lies about it at random."""
    size = lies.randint(0, 6)
    parents = [lies.randint(ROOT, i - 1) if tree else i - 1 for i in range(size)]
    depths, tokens = {ROOT: 0}, []
    for i, parent in enumerate(parents):
        depths[i] = depths[parent] + 1
        true = coming[depths[i] - 1] if depths[i] <= len(coming) else 0
        tokens.append(true if lies.random() < 0.7 else lies.randrange(VOCAB))
    return Draft(tuple(tokens), tuple(parents))


def speculate(
    net: Llm, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], lies: random.Random, *,
    tree: bool = False, seed: int | None = None, n: int,
) -> tuple[list[list[int]], KvCache, int]:  # fmt: skip
    """All rows in common forwards; each stands still when its text has ended, while the others go on."""
    past, fed, forwards = net.init_state(len(prompts), capacity=4), [list(p) for p in prompts], 0
    out: list[list[int]] = [[] for _ in prompts]
    while any(fed):
        drafts = [
            guess(lies, text[len(o) :], tree=tree).without(END) if row and lies.random() < 0.9 else Draft()
            for row, text, o in zip(fed, texts, out, strict=True)
        ]
        drafts = [draft if row else Draft() for row, draft in zip(fed, drafts, strict=True)]
        hidden, past, sizes = read(net, fed, drafts, past)
        logits, forwards, found = net.logits(hidden), forwards + 1, list[Verified]()
        for b, (row, draft) in enumerate(zip(fed, drafts, strict=True)):
            choose = chooser(logits[b, max(0, len(row) - 1) :], draft, seed, len(out[b]))
            found.append(follow(draft, choose, END) if row else Verified((), ()))
        past = keep(past, sizes, [len(row) for row in fed], drafts, [one.path for one in found])
        for b, one in enumerate(found):
            out[b] += one.tokens
            fed[b] = list(one.tokens[-1:]) if one.tokens and END not in one.tokens and len(out[b]) < n else []
    return out, past, forwards


def chooser(logits: torch.Tensor, draft: Draft, seed: int | None, place: int) -> Callable[[int], int]:
    """The best token, or the one that is drawn, at each place of a draft; the first logits are the root's."""

    def choose(node: int) -> int:
        one = logits[node + 1][None]
        return int(one.argmax()) if seed is None else sampled(one, seed, [place + len(draft.path(node))])[0]

    return choose


@few
@given(
    shape=shapes,
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    lies=st.randoms(use_true_random=False),
    tree=st.booleans(),
    seed=st.sampled_from([None, 1, 2]),
)
def test_any_guess_gives_the_tokens_that_come_one_by_one(
    shape: str, lengths: list[int], lies: random.Random, tree: bool, seed: int | None
) -> None:
    """Greedy and drawn with a seed; chains and trees; rows that are right to different extents."""
    net, n = frozen(shape), 14
    prompts = [sequence(length, 10 + i).tolist() for i, length in enumerate(lengths)]
    texts = [expected(shape, tuple(prompt), n, seed) for prompt in prompts]
    out, past, _ = speculate(net, prompts, texts, lies, tree=tree, seed=seed, n=n)
    for prompt, text, got, length in zip(prompts, texts, out, past.lengths.tolist(), strict=True):
        assert got[:n] == text
        assert got.count(END) == (END in text) and (END not in got or got[-1] == END)
        assert length == len(prompt) + len(got) - 1  # all but the last, which has not been read
    assert past.lengths.tolist() == past.next_positions.tolist()
    # What is left in the cache is what reading the texts leaves.
    follows, _ = net.step(torch.tensor([o[-1:] for o in out]), torch.ones(len(out), dtype=torch.int64), past)
    for row, prompt, text in zip(follows, prompts, out, strict=True):
        torch.testing.assert_close(row[-1], whole(net, torch.tensor(prompt + text))[-1], atol=1e-5, rtol=1e-5)


def test_a_true_guess_takes_one_forward() -> None:
    net, prompt = frozen(), sequence(5, 3).tolist()
    text = one_by_one(net, prompt, 9)
    hidden, past, sizes = read(net, [prompt], [Draft.chain(text[:-1])], net.init_state(1))
    logits = net.logits(hidden)
    got = follow(Draft.chain(text[:-1]), lambda node: int(logits[0, len(prompt) + node].argmax()))
    assert list(got.tokens) == text and len(got.path) == 8
    assert keep(past, sizes, [5], [Draft.chain(text[:-1])], [got.path]).lengths.tolist() == [13]


def test_nothing_counts_after_an_end_though_it_was_guessed() -> None:
    choices = [3, END, 5, 6]
    got = follow(Draft.chain([3, END, 5]), lambda node: choices[node + 1], END)
    assert got == Verified((0,), (3, END))
    assert follow(Draft.chain([3, END, 5]), lambda node: choices[node + 1]) == Verified((0, 1, 2), (3, END, 5, 6))


def test_a_draft_without_an_end_has_nothing_of_what_followed_it() -> None:
    draft = Draft((1, END, 2, 3, 4), (ROOT, 0, 1, 0, 2))
    assert draft.without(END) == Draft((1, 3), (ROOT, 0))
    assert Draft.chain([END, 1]).without(END) == Draft()
    assert Draft.chain([1, 2]).without(END) == Draft.chain([1, 2])


def test_a_row_may_keep_less_than_it_has_read() -> None:
    net, tokens = frozen(), sequence(6, 1).tolist()
    for draft in (Draft.chain([1, 2]), Draft((1, 2), (ROOT, ROOT))):
        _, past, sizes = read(net, [tokens, tokens[:2]], [draft, Draft()], net.init_state(2))
        past = keep(past, sizes, [3, 2], [draft, Draft()], [(), ()])
        assert past.lengths.tolist() == past.next_positions.tolist() == [3, 2]


def test_what_is_no_tree_is_refused() -> None:
    with pytest.raises(ValueError, match="token 1 cannot follow token 1"):
        Draft((1, 2), (ROOT, 1))
    with pytest.raises(ValueError, match="2 tokens have 1 parents"):
        Draft((1, 2), (ROOT,))


# ------------------------------------------------------------------------------------------------- distributions


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Of counts against probabilities, in standard deviations from its mean."""
    n = counts.sum()
    freedom = len(counts) - 1
    return float((((counts - n * expected) ** 2) / (n * expected)).sum() - freedom) / (2 * freedom) ** 0.5


def test_noise_of_a_place_draws_from_the_models_distribution() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
    n = 8000
    drawn = sampled(logits.expand(n, -1), 5, range(n), temperature=0.7)
    assert abs(chi_square(torch.bincount(torch.tensor(drawn), minlength=5), (logits / 0.7).softmax(-1))) < 4
    assert drawn[100:110] == sampled(logits.expand(10, -1), 5, range(100, 110), temperature=0.7)
    assert drawn != sampled(logits.expand(n, -1), 6, range(n), temperature=0.7)


def test_neighbouring_places_and_seeds_are_independent() -> None:
    logits, n = torch.zeros(4000, 3), 4000
    draws = torch.tensor([sampled(logits, seed, range(n)) for seed in (1, 2)])
    for a, b in ((draws[0, 1:], draws[0, :-1]), (draws[0], draws[1])):
        assert abs(chi_square(torch.bincount(a * 3 + b, minlength=9), torch.full((9,), 1 / 9))) < 4


@pytest.mark.parametrize("k", [1, 2])
def test_the_rejection_rule_leaves_the_models_distribution(k: int) -> None:
    """Pairs of tokens from a model of which each token depends on the one before, against a proposal far from it."""
    V, n, generator = 4, 12_000, torch.Generator().manual_seed(3)
    model, other = (torch.randn(V + 1, V, generator=generator).mul(s).softmax(-1) for s in (1.0, 1.5))
    counts = torch.zeros(V * V)
    for _ in range(n):
        text: list[int] = []
        while len(text) < 2:
            drafted, before = list[int](), [V, *text][-1]
            for _ in range(k):
                drafted.append(int(torch.multinomial(other[[before, *drafted][-1]], 1, generator=generator)))
            places = [before, *drafted]
            text += reject(model[places], other[places[:-1]], drafted, generator).tokens
        counts[text[0] * V + text[1]] += 1
    assert abs(chi_square(counts, (model[V, :, None] * model[:V]).flatten())) < 4


def test_the_rejection_rule_ends_where_the_text_does_and_accepts_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.full((3, 10), 0.1)
    got = reject(target, target[:2], [END, 3], generator, END)
    assert got == Verified((), (END,))
    for _ in range(50):
        assert reject(target, target[:2], [2, 3], generator).path == (0, 1)


# ----------------------------------------------------------------------------------------------------------- ties


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bf16_what_differs_is_tied(shape: str) -> None:
    """Every token of a speculative text is the plain model's best one up to the rounding of the logits."""
    net = fresh(shape).bfloat16().freeze()
    prompts = [sequence(4, 20 + i).tolist() for i in range(3)]
    texts = [one_by_one(net, prompt, 24) for prompt in prompts]
    out, _, _ = speculate(net, prompts, texts, random.Random(1), tree=True, n=24)
    for prompt, text in zip(prompts, out, strict=True):
        top = whole(net, torch.tensor(prompt + text)).float().abs().max()
        assert greedy_gaps(net, prompt, text).max() <= 8 * top * torch.finfo(torch.bfloat16).eps


def test_a_text_that_is_not_greedy_has_a_gap_where_it_is_not() -> None:
    net, prompt = frozen(), sequence(5, 3).tolist()
    text = one_by_one(net, prompt, 8)
    assert greedy_gaps(net, prompt, text).max() < 1e-5
    text[4] = (text[4] + 1) % VOCAB
    gaps = greedy_gaps(net, prompt, text)
    assert gaps[:4].max() < 1e-5 < gaps[4]
