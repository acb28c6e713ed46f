"""Gates and reach: what a frame waits for, soft and hard."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.lookahead import (
    Place,
    asked_frames,
    attention_bias,
    disturbed,
    leading_positive,
    log_gates,
    run_ready,
    settle,
    soft_reach,
    straight_through,
)


def naive_reach(asked: list[list[int]], cap: int) -> list[list[int]]:
    """Reach of every layer, frame by frame, as the module's text says it."""
    T = len(asked[0])
    before, layers = list(range(T)), []
    for row in asked:
        after: list[int] = []
        for i, r in enumerate(row):
            deadline = i + cap
            wanted = before[i + r] if i + r < T else T - 1
            after.append(max([min(wanted, deadline), *after[-1:]]))
        layers.append(after)
        before = after
    return layers


@st.composite
def decisions(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    T, R = draw(st.integers(1, 14)), draw(st.integers(1, 4))
    row = st.lists(st.integers(0, R), min_size=T, max_size=T)
    return draw(st.lists(row, min_size=1, max_size=4)), R


def hard_gates(asked: Tensor, R: int) -> Tensor:
    return torch.where(torch.arange(R) < asked[..., None], 0.0, -torch.inf)


@settings(max_examples=80, deadline=None)
@given(decisions(), st.integers(0, 10))
def test_reach_is_that_of_the_definition(drawn: tuple[list[list[int]], int], cap: int) -> None:
    layers, R = drawn
    T = len(layers[0])
    reach = torch.arange(T)[None]
    deadline, whole = reach + cap, torch.tensor([T])
    for asked, expected in zip(layers, naive_reach(layers, cap), strict=True):
        reach = settle(torch.tensor([asked]), reach, deadline, frames=whole, gates=R).reach
        assert reach[0].tolist() == expected


@settings(max_examples=80, deadline=None)
@given(decisions(), st.integers(0, 10), st.lists(st.integers(0, 4), max_size=8))
def test_a_stream_decides_what_whole_inputs_do(drawn: tuple[list[list[int]], int], cap: int, counts: list[int]) -> None:
    """However its frames arrive, and each frame as soon as it can."""
    layers, R = drawn
    before = list(range(len(layers[0])))
    for asked, expected in zip(layers, naive_reach(layers, cap), strict=True):
        places = [Place(a, reach, i + cap) for i, (a, reach) in enumerate(zip(asked, before, strict=True))]
        queue, ran, at = [], [], 0
        for count in [*counts, len(places)]:
            queue += places[at : at + count]
            at = min(at + count, len(places))
            fed = len(places) if at == len(places) else places[at].reach  # no more than the next frame's, exclusive
            now = run_ready(queue, ran[-1][1] if ran else 0, fed, ended=at == len(places))
            queue = queue[len(now) :]
            ran += now
            assert len(queue) <= R
        assert not queue and [reach for _, reach in ran] == expected
        before_, cap_ = torch.tensor([before]), torch.arange(len(before))[None] + cap
        whole = settle(torch.tensor([asked]), before_, cap_, frames=torch.tensor([len(before)]), gates=R)
        assert [taken for taken, _ in ran] == whole.taken[0].tolist()
        before = expected


@settings(max_examples=80, deadline=None)
@given(decisions())
def test_soft_reach_of_gates_of_0_and_1_is_the_hard_one(drawn: tuple[list[list[int]], int]) -> None:
    layers, R = drawn
    T = len(layers[0])
    soft = torch.arange(T + 3)[None].float()  # three frames of padding
    for asked, expected in zip(layers, naive_reach(layers, 10**6), strict=True):
        gates = hard_gates(torch.tensor([asked + [R] * 3]), R)
        soft = soft_reach(gates, soft, torch.tensor([T]))
        assert soft[0, :T].tolist() == expected


@given(st.lists(st.lists(st.floats(-4, 4), min_size=3, max_size=3), min_size=1, max_size=6))
def test_gates_of_training_decide_as_inference_and_learn_as_sigmoids(rows: list[list[float]]) -> None:
    scores = (torch.tensor(rows).round(decimals=2) + 0.005).requires_grad_()  # none on the fence
    gates = straight_through(scores)
    open_ = gates.exp().round().sum(-1).long()
    assert torch.equal(open_, asked_frames(scores))
    assert open_.tolist() == [leading_positive(row) for row in scores.tolist()]
    (through,) = torch.autograd.grad(gates.sum(), scores)
    (soft,) = torch.autograd.grad(log_gates(scores).sum(), scores)
    assert torch.equal(through, soft)
    assert (log_gates(scores).diff(dim=-1) <= 0).all()


def test_disturbed_scores_are_positive_as_often_as_their_sigmoids_say() -> None:
    torch.manual_seed(0)
    scores = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0])
    often = (disturbed(scores.expand(40_000, 5), 1.0) > 0).float().mean(0)
    torch.testing.assert_close(often, scores.sigmoid(), atol=0.01, rtol=0)
    assert torch.equal(disturbed(scores, 0.0), scores)


def test_bias_falls_on_the_future_only() -> None:
    gates = log_gates(torch.randn(2, 5, 2))
    bias = attention_bias(gates, 5)[:, 0]
    for i in range(5):
        assert (bias[:, i, : i + 1] == 0).all()
        for j in (1, 2):
            if i + j < 5:
                assert torch.equal(bias[:, i, i + j], gates[:, i, j - 1])


def test_a_cost_of_reach_closes_gates() -> None:
    scores = torch.full((1, 12, 3), 1.0, requires_grad=True)
    soft_reach(straight_through(scores), torch.arange(12)[None].float(), torch.tensor([12])).sum().backward()
    assert scores.grad is not None
    assert (scores.grad[0, :9] >= 0).all() and scores.grad.sum() > 0
