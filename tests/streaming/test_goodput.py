"""The controller: costs and acceptance are found from measurements, and the choice is the best of all lengths."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.speculative import ROOT, Draft
from streaming.drafts import Context, Outcome, Proposal
from streaming.goodput import EXPLORE_EVERY, Acceptance, Asking, Cost, Goodput, Shape, _advances, calibrated
from streaming.speculation import Speculation, Wish
from tests import tiny


def machine(shape: Shape) -> float:
    """A machine that has a fixed cost, and a step after three tokens."""
    return 2e-3 + 2e-4 * shape.rows * shape.tokens + 1e-6 * shape.rows * shape.keys + 1e-3 * (shape.tokens > 3)


def run_on(cost: Cost, steps: int, *, stalls: float = 0.0, seed: int = 0) -> None:
    chance = random.Random(seed)
    for _ in range(steps):
        shape = Shape(chance.choice([1, 4, 16]), chance.randint(1, 6), chance.randint(20, 500))
        stalled = 20.0 if chance.random() < stalls else 1.0
        cost.measured(shape, machine(shape) * chance.uniform(0.95, 1.05) * stalled)


@pytest.mark.parametrize("stalls", [0.0, 0.15])
def test_a_cost_is_found_though_forwards_stall(stalls: float) -> None:
    cost = Cost()
    run_on(cost, 3000, stalls=stalls)
    for shape in (Shape(1, 1, 200), Shape(1, 3, 200), Shape(1, 4, 200), Shape(4, 2, 300), Shape(16, 5, 100)):
        assert cost.seconds(shape) == pytest.approx(machine(shape), rel=0.2)


def test_a_shape_that_was_never_measured_lies_on_the_line() -> None:
    cost = Cost()
    run_on(cost, 2000)
    for shape in (Shape(8, 2, 200), Shape(16, 12, 200)):
        assert cost.seconds(shape) == pytest.approx(machine(shape), rel=0.35)
    assert Cost().seconds(Shape(1, 2, 9)) > Cost().seconds(Shape(1, 1, 9)) > 0


shapes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 900))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(shapes, st.floats(1e-6, 9)), max_size=90))
def test_whatever_was_measured_costs_are_positive(measured: list[tuple[tuple[int, int, int], float]]) -> None:
    cost = Cost()
    for shape, seconds in measured:
        cost.measured(Shape(*shape), seconds)
        assert cost.seconds(Shape(*shape)) > 0 and cost.seconds(Shape(3, 3, 3)) > 0


def test_a_slower_machine_is_noticed() -> None:
    cost = Cost()
    run_on(cost, 2000)
    for _ in range(200):
        cost.measured(Shape(1, 2, 100), 0.05)
    assert cost.seconds(Shape(1, 2, 100)) == pytest.approx(0.05, rel=0.25)


def test_the_cost_of_a_real_model_grows_with_the_batch() -> None:
    cost = calibrated(tiny.translator(0).llm, rows=(1, 64), repeats=2)
    assert cost.seconds(Shape(64, 9, 128)) > cost.seconds(Shape(1, 1, 128)) > 0


def test_acceptance_is_of_guesses_whose_parents_were_right() -> None:
    acceptance = Acceptance()
    tree = Proposal(Draft((1, 4, 2, 5), (ROOT, ROOT, 0, 2)), (0.5, 0.5, 0.9, 0.9), ("a", "b", "a", "a"))
    for _ in range(1000):
        acceptance.observe(tree, [0])  # its child was wrong, and the child's child was never asked for
    assert acceptance.probability("a", 0.5) > 0.98
    assert acceptance.probability("b", 0.5) < 0.02
    assert acceptance.probability("a", 0.95) == pytest.approx(0.0, abs=0.02)
    assert acceptance.probability("c", 0.3) == pytest.approx(0.3)
    gains = acceptance.gains(tree)
    assert gains[0] > 0.98 and gains[3] == pytest.approx(gains[2] * acceptance.probability("a", 0.9))
    for _ in range(9000):
        acceptance.observe(tree, [1])
    assert acceptance.probability("a", 0.5) < 0.1 and acceptance.probability("b", 0.5) > 0.9


def chain(sure: list[float], source: str = "a") -> Proposal:
    return Proposal.of(source, Draft.chain(range(len(sure))), sure)


def test_a_draft_ends_where_it_costs_more_than_it_brings() -> None:
    goodput = Goodput()
    run_on(goodput.cost, 3000)
    sure = chain([0.9] * 6)
    [alone] = goodput.choose([[sure]], [1], 100)
    assert len(alone.sure) > 3
    assert not goodput.choose([[chain([0.01] * 6)]], [1], 100)[0].sure
    # What has to be read anyway makes room for drafts of the others.
    doubtful = chain([0.3] * 4)
    short = goodput.choose([[doubtful], []], [1, 1], 100)
    free = goodput.choose([[doubtful], []], [1, 9], 100)
    assert len(free[0].sure) == 4 > len(short[0].sure)


def test_rows_that_stand_still_do_not_speak_against_a_draft() -> None:
    goodput = Goodput()
    run_on(goodput.cost, 3000)
    [draft, *_] = goodput.choose([[chain([0.4])], [], [], []], [1, 0, 0, 0], 100)
    assert len(draft.sure) == 1
    [draft, *_] = goodput.choose([[chain([0.4])], [], [], []], [1, 1, 1, 1], 100)
    assert not draft.sure


def test_the_best_source_is_the_one_that_was_right() -> None:
    goodput = Goodput()
    a, b = chain([0.5, 0.5], "a"), chain([0.5, 0.5], "b")
    for _ in range(100):
        goodput.acceptance.observe(a, [])
        goodput.acceptance.observe(b, [0, 1])
    [chosen] = goodput.choose([[a, b]], [1], 100)
    assert set(chosen.sources) == {"b"}


def test_drafts_go_as_the_load_rises_and_come_back_as_it_falls() -> None:
    goodput = Goodput()
    for rows in (1, 64):
        for tokens in range(1, 6):
            for _ in range(20):  # a machine whose forward is all computation once it has 64 rows
                seconds = 1e-3 + (1e-6 if rows == 1 else 1e-4) * rows * tokens
                goodput.cost.measured(Shape(rows, tokens, 100), seconds)
    for rows, lengths in ((1, {4}), (64, {0}), (1, {4})):
        drafts = goodput.choose([[chain([0.5] * 4)]] * rows, [1] * rows, 100)
        assert {len(one.sure) for one in drafts} == lengths


def test_the_next_length_is_tried_now_and_then() -> None:
    goodput = Goodput()
    lengths = [len(goodput.choose([[chain([0.001] * 3)]], [1], 9)[0].sure) for _ in range(8 * EXPLORE_EVERY)]
    assert sum(map(bool, lengths)) == 8 and set(lengths) == {0, 1}
    goodput = Goodput()
    run_on(goodput.cost, 3000)
    sure = chain([0.99, 0.99, 0.001, 0.001])
    lengths = [len(goodput.choose([[sure]], [1], 100)[0].sure) for _ in range(8 * EXPLORE_EVERY)]
    assert lengths.count(1) == lengths.count(3) == 4 and lengths.count(2) == len(lengths) - 8


def test_a_draft_fills_the_room_beside_a_longer_row() -> None:
    """What is padding otherwise costs nothing."""
    goodput = Goodput()
    run_on(goodput.cost, 3000)
    drafts = goodput.choose([[chain([0.4] * 6)], [chain([0.4] * 6)], []], [1, 3, 2], 100)
    assert len(drafts[0].sure) == len(drafts[1].sure) + 2


#: Of each row the tokens that it reads, those given of its draft, and the draft's probabilities.
rows_ = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 1), st.lists(st.floats(0.01, 1), max_size=4)).map(
        lambda row: row if row[0] else (0, 0, [])
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(rows_)
def test_what_a_width_brings_is_summed_over_the_rows(rows: list[tuple[int, int, list[float]]]) -> None:
    """Against a sum for each width and each length that was asked for by itself."""
    decided, given_, gains = [n for n, _, _ in rows], [free for _, free, _ in rows], [gain for _, _, gain in rows]
    least, brought = _advances(gains, decided, given_)
    assert least == max(decided)
    assert least + len(brought[0]) - 1 == max(n + len(gain) for n, gain in zip(decided, gains, strict=True))
    for asked, some in enumerate(brought):
        for more, one in enumerate(some):
            assert one == pytest.approx(
                sum(1 + sum(gain[: min(free + asked, max(0, least + more - n))]) for n, free, gain in rows if n)
            )


@settings(max_examples=60, deadline=None)
@given(rows_, st.integers(0, 4))
def test_a_draft_tells_what_a_shorter_one_would_have_saved(
    rows: list[tuple[int, int, list[float]]], asked: int
) -> None:
    """As if the drafters had been asked for no more."""
    goodput, shorter = Goodput(), Goodput()
    run_on(goodput.cost, 300)
    shorter.cost = goodput.cost
    decided, given_ = [n for n, _, _ in rows], [free for _, free, _ in rows]
    goodput.choose([[chain(gain)] for _, _, gain in rows], decided, 50, given=given_)
    shorter.choose([[chain(gain[: free + asked])] for _, free, gain in rows], decided, 50, given=given_)
    assert goodput.saved[min(asked, len(goodput.saved) - 1)] == pytest.approx(shorter.saved[-1])


# ------------------------------------------------------------------------------------------------------- asking


def asked(
    asking: Asking, steps: int, saved: Callable[[int], float], takes: Callable[[int], float], rows: int = 1
) -> list[int]:
    """The lengths that were asked for."""
    lengths = []
    for _ in range(steps):
        lengths.append(length := asking.length(rows, 4))
        asking.learned(rows, 4, [saved(k) for k in range(length + 1)], takes(length))
    return lengths


@pytest.mark.parametrize("best", range(5))
def test_the_length_that_saves_most_is_asked_for(best: int) -> None:
    """After tokens that save more than asking for them takes come others that do not."""
    chance, asking = random.Random(best), Asking()

    def saved(k: int) -> float:
        return size * (4e-4 * min(k, best) + 1e-4 * max(0, k - best))

    lengths = []
    for _ in range(6000):
        size = 2 * chance.random()
        lengths += asked(asking, 1, saved, lambda k: 2e-4 * k * chance.uniform(0.5, 1.5))
    assert set(lengths[:20]) == {4}
    assert lengths[3000:].count(best) > 0.97 * 3000
    assert set(lengths[3000:]) == {best, 4}


def test_lengths_that_are_not_best_are_not_tried() -> None:
    assert set(asked(Asking(), 3000, lambda k: 1e-3 * min(k, 2), lambda k: 1e-4 * k)) == {4, 2}


def test_a_drafter_that_never_pays_is_seldom_asked() -> None:
    """Its trials become rare, so that they cost little, though each costs a lot."""
    asking = Asking()
    lengths = asked(asking, 10_000, lambda k: 0.0, lambda k: 5e-3 * k)
    assert sum(map(bool, lengths[1000:])) < 0.01 * 9000
    # And once it pays, it is asked again.
    lengths = asked(asking, 30_000, lambda k: 5e-3 * k, lambda k: 1e-3)
    assert lengths[-4000:].count(4) > 0.9 * 4000


def test_each_load_has_its_own_length() -> None:
    asking = Asking()
    lengths: dict[int, list[int]] = {1: [], 16: []}
    for _ in range(100):
        lengths[1] += asked(asking, 7, lambda k: 1e-3 * k, lambda k: 0.0, 1)
        lengths[16] += asked(asking, 7, lambda k: 1e-3 * k, lambda k: 2e-3 * k, 16)
    assert lengths[1][350:].count(4) > 0.9 * 350 and lengths[16][350:].count(0) > 0.9 * 350


class Costly:
    """A drafter that takes longer for each token than its guesses are worth, or not so long."""

    name, top_k = "costly", 0

    def __init__(self) -> None:
        self.asked, self.taught = list[int](), 0

    def propose(self, context: Context, k: int) -> Proposal:
        self.asked.append(k)
        return Proposal.of(self.name, Draft.chain([7] * k), [0.7] * k)

    def observe(self, outcome: Outcome) -> None:
        self.taught += 1


@pytest.mark.parametrize("token_s", [1e-5, 4e-3])
def test_a_drafter_is_asked_and_taught_only_if_its_time_comes_back(token_s: float) -> None:
    drafter, context = Costly(), Context("es", "a", 3)
    cost = Cost()
    run_on(cost, 3000)
    speculation = Speculation([drafter], max_tokens=3, cost=cost)
    for _ in range(3000):
        before = len(drafter.asked)
        [proposal] = speculation.propose([Wish(context)], [1], 100, begin_write=9)
        outcome = Outcome(context, (7,)) if speculation.learning else None
        speculation.observe(Wish(context), proposal, range(len(proposal.sure)), outcome)
        shape = Shape(1, 1 + len(proposal.sure), 100 + len(proposal.sure))
        speculation.took(shape, machine(shape), token_s * sum(drafter.asked[before:]))
    assert drafter.taught == len(drafter.asked)
    assert len(drafter.asked) > 2800 if token_s < 1e-4 else len(drafter.asked) < 200
