"""Drafters: what they propose is what they have seen, ends where a write does, and takes bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.speculative import ROOT, Draft
from streaming.drafts import (
    MARK,
    MAX_ORDER,
    SEED,
    Context,
    Drafter,
    NGrams,
    OldOutput,
    Outcome,
    Proposal,
    Recycling,
    Repetition,
    _keys,
    count_seed,
    load_seeds,
    save_seeds,
    spelled,
)
from streaming.errors import DragomanError

END = 3
few = settings(max_examples=50, deadline=None)
texts = st.lists(st.integers(0, 6), max_size=60)


def at(past: Sequence[int], language: str = "es", source: Sequence[int] = ()) -> Context:
    return Context(language, spelled(past), END, spelled(source))


def learn(drafter: Drafter, text: Sequence[int], language: str = "es", top_k: int = 2) -> None:
    """As a session does: some tokens at a time."""
    for start in range(0, len(text), 3):
        accepted = tuple(text[start : start + 3])
        best = tuple((token, *(t for t in range(7) if t != token))[:top_k] for token in accepted)
        drafter.observe(Outcome(at(text[:start], language), accepted, (), best))


DRAFTERS = [Repetition, NGrams, Recycling, lambda: Recycling((2, 2, 1))]


@few
@given(text=texts, k=st.integers(0, 5), which=st.sampled_from(range(len(DRAFTERS))))
def test_a_proposal_is_short_ends_before_the_end_and_is_of_tokens_that_were_seen(
    text: list[int], k: int, which: int
) -> None:
    drafter = DRAFTERS[which]()
    learn(drafter, text)
    proposal = drafter.propose(at(text), k)
    assert len(proposal.draft.tokens) == len(proposal.sure) <= k
    assert END not in proposal.draft.tokens
    assert all(0 < sure <= 1 for sure in proposal.sure)
    assert set(proposal.sources) <= {drafter.name} and len(proposal.sources) == len(proposal.sure)
    assert drafter.propose(at(text), k) == proposal
    if which < 2:
        assert set(proposal.draft.tokens) <= set(text)
    assert not drafter.propose(at([]), k).draft.tokens


@pytest.mark.parametrize(
    ("former", "written", "drafted"),
    [
        ([4, 5, 6, 7], [], [4, 5, 6, 7]),  # from its beginning
        ([4, 5, 6, 7], [4, 5], [6, 7]),  # as far as it says the same
        ([4, 5, 6, 7], [4, 9, 5], [6, 7]),  # one was put in
        ([4, 5, 6, 7], [4, 6], [7]),  # one was left out
        ([4, 5, 4, 6, 7], [9, 4, 5], [4, 6, 7]),  # the longest of what they have in common
        ([4, 5, 8, 8, 8, 4, 6], [9, 9, 9, 9, 9, 4], [6]),  # the one that comes next
        ([4, 5, 6, 7], [4, 5, 9], [7]),  # nothing known: it may end alike
        ([4, 5], [4, 5], []),  # no more
        ([], [4], []),
    ],
)
def test_an_old_output_goes_on_where_the_new_one_has_got(
    former: list[int], written: list[int], drafted: list[int]
) -> None:
    for past in ([], [4, 5, 6, END]):
        context = replace(at([*past, *written]), former=spelled(former))
        proposal = OldOutput().propose(context, 9)
        assert proposal.draft == Draft.chain(drafted) and len(proposal.sure) == len(drafted)
        assert OldOutput().propose(context, 1).draft == Draft.chain(drafted[:1])


@few
@given(text=texts, k=st.integers(1, 5))
def test_a_repetition_is_what_a_search_by_hand_finds(text: list[int], k: int) -> None:
    expected: list[int] = []
    for n in range(6, 1, -1):
        starts = [i for i in range(len(text) - n) if n < len(text) and text[i : i + n] == text[-n:]]
        if starts:
            follows = text[starts[-1] + n : starts[-1] + n + k]
            expected = follows[: follows.index(END)] if END in follows else follows
            break
    assert list(Repetition().propose(at(text), k).draft.tokens) == expected


@few
@given(text=st.lists(st.sampled_from([1, 2, END]), max_size=60))
def test_n_grams_are_those_that_counting_by_hand_finds(text: list[int]) -> None:
    """With as few tokens as have room, nothing is forgotten; the surest of all orders is proposed."""
    drafter = NGrams()
    learn(drafter, text)
    best = 0.0
    for n in range(1, min(MAX_ORDER, len(text)) + 1):
        counts = Counter(text[i + n] for i in range(len(text) - n) if text[i : i + n] == text[-n:])
        if counts:
            best = max(best, (counts.most_common(1)[0][1] - 0.8) / counts.total())
    proposal = drafter.propose(at(text), 1)
    if proposal.sure:
        assert proposal.sure[0] == pytest.approx(best)
    else:
        token, probability = drafter._next("es", _keys(spelled(text)[-MAX_ORDER:], []))
        assert (token, probability) == (-1, 0.0) if best == 0 else (token == END and probability == pytest.approx(best))


def test_sessions_teach_each_other_within_a_language() -> None:
    drafter = NGrams()
    learn(drafter, [5, 6, 4, 5, 6, 4], "es")
    assert drafter.propose(at([0, 5]), 2).draft == Draft.chain([6, 4])
    assert not drafter.propose(at([0, 5], "de"), 2).draft.tokens


def test_what_was_not_used_for_long_is_forgotten_and_the_store_is_bounded() -> None:
    drafter = NGrams(max_contexts=100)
    learn(drafter, [5, 6])
    for i in range(40):
        drafter.propose(at([5]), 1)  # asked for again and again
        learn(drafter, [10 + 2 * i, 11 + 2 * i])
    assert drafter.propose(at([5]), 1).draft == Draft.chain([6])
    learn(drafter, [100 + i for i in range(300)])
    assert len(drafter._counts["es"]) <= 100
    assert not drafter.propose(at([5]), 1).draft.tokens


def test_a_new_habit_replaces_an_old_one() -> None:
    drafter = NGrams()
    for token in (10, 11, 12, 13, 14, 15, 16, 17, 17, 17, 17):
        drafter.observe(Outcome(at([5]), (token,)))
    assert drafter.propose(at([5]), 1).draft == Draft.chain([17])


def test_recycling_follows_the_models_own_best_tokens() -> None:
    drafter = Recycling((2, 2, 1))
    assert drafter.top_k == 2
    drafter.observe(Outcome(at([9]), (1, 2), (), ((1, 4), (2, END))))
    # After 9 the model liked 1 and 4; after 1 it liked 2 and the end. Nothing is known after 4 and 2.
    assert drafter.propose(at([9]), 9).draft == Draft((1, 4, 2), (ROOT, ROOT, 0))
    assert drafter.propose(at([9]), 2).draft == Draft((1, 4), (ROOT, ROOT))
    drafter.observe(Outcome(at([9]), (4,), (), ((4, 1),)))
    assert drafter.propose(at([9]), 1).draft == Draft.chain([4])


def test_recycling_is_bounded_and_of_each_language_by_itself() -> None:
    drafter = Recycling(max_tokens=100)
    drafter.observe(Outcome(at([5]), (6,), (), ((6, 7),)))
    drafter.observe(Outcome(at([5], "de"), (8,), (), ((8, 9),)))
    assert drafter.propose(at([1, 5]), 1).draft == Draft.chain([6])  # another session's past
    assert drafter.propose(at([5], "de"), 1).draft == Draft.chain([8])
    for token in range(10, 400):
        drafter.observe(Outcome(at([token]), (token + 1,), (), ((token + 1, 1),)))
    assert len(drafter._best["es"]) <= 100 and not drafter.propose(at([5]), 1).draft.tokens
    assert drafter.propose(at([5], "de"), 1).draft == Draft.chain([8])


# ----------------------------------------------------------------------------------------------------------- seeds


def test_a_seed_says_what_the_training_targets_say_and_comes_back_from_its_file(tmp_path: Path) -> None:
    texts = [[1, 2, END, 1, 2, 5, 6, END]] * 4 + [[4, 2, END]] * 9
    seed = count_seed([[((), text)] for text in texts])
    # After 1 always 2; after 2 mostly the end; after 1 2, unlike after 2 alone, the end or 5.
    assert seed[spelled([1])] == (2, pytest.approx(7.2 / 8))
    assert seed[spelled([2])][0] == END
    assert seed[spelled([5])] == (6, pytest.approx(3.2 / 4))
    assert NGrams({"es": seed}).propose(at([1]), 3).draft == Draft.chain([2])
    save_seeds(tmp_path / SEED, {"es": seed, "de": {}})
    loaded = load_seeds(tmp_path)
    assert loaded.keys() == {"es"} and loaded["es"].keys() == seed.keys()
    for context, (token, sure) in loaded["es"].items():
        assert token == seed[context][0] and 0 <= seed[context][1] - sure < 1 / 255


def test_the_source_tells_what_the_last_token_cannot(tmp_path: Path) -> None:
    """The article is followed by the noun of the source."""
    rows = [[((20, 30 + noun), [1, 10 + noun, END]), ((20, 31 + noun), [1, 11 + noun, END])] for noun in range(5)] * 4
    seed = count_seed(rows)
    assert seed[chr(33) + MARK + chr(1)] == (13, pytest.approx(7.2 / 8))
    assert chr(20) + MARK + chr(1) not in seed  # is with every noun
    save_seeds(tmp_path / SEED, {"es": seed})
    drafter = NGrams(load_seeds(tmp_path))
    for noun in range(6):
        assert drafter.propose(at([END, 1], source=[20, 30 + noun]), 1).draft == Draft.chain([10 + noun])
    learnt = NGrams()
    for noun in (1, 2, 3, 2, 1, 3):
        learnt.observe(Outcome(at([1], source=[20, 30 + noun]), (10 + noun,)))
    assert learnt.propose(at([1], source=[32, 20]), 1).draft == Draft.chain([12])


def test_what_sessions_say_overrules_a_weaker_seed() -> None:
    drafter = NGrams({"es": {spelled([1]): (2, 0.6)}})
    learn(drafter, [1, 5])
    assert drafter.propose(at([1]), 1).draft == Draft.chain([2])
    for _ in range(3):
        learn(drafter, [1, 5])
    assert drafter.propose(at([1]), 1).draft == Draft.chain([5])


def test_a_seed_keeps_the_contexts_that_help_most() -> None:
    texts = [[((), [1, 2] * 20)], [((), [4, 5] * 3)]]
    assert set(count_seed(texts, max_contexts=2)) == {spelled([1]), spelled([2])}
    assert spelled([4]) in count_seed(texts, max_contexts=5)


def test_no_seed_and_a_broken_one(tmp_path: Path) -> None:
    assert load_seeds(tmp_path) == {}
    (tmp_path / SEED).write_bytes(b"nothing")
    with pytest.raises(DragomanError, match="does not hold n-grams of training targets") as error:
        load_seeds(tmp_path)
    assert error.value.code == "bad_checkpoint"


def test_a_proposal_behind_another_token_and_its_beginning() -> None:
    tree = Proposal.of("x", Draft((1, 4, 2), (ROOT, ROOT, 0)), [0.5, 0.4, 0.3])
    behind = tree.after("y", 9, 0.8)
    assert behind == Proposal(Draft((9, 1, 4, 2), (ROOT, 0, 0, 1)), (0.8, 0.5, 0.4, 0.3), ("y", "x", "x", "x"))
    assert behind.first(2) == Proposal(Draft.chain([9, 1]), (0.8, 0.5), ("y", "x"))
    assert behind.first(4) is behind and not behind.first(0).draft.tokens
