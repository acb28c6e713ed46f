"""The adaptive encoder: steps equal the whole, rows are independent, and reach is the truth about the future."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.adaptive import FrontierState, encode_whole, init_state, step
from models.fastconformer import FastConformer
from tests import tiny

GATES = 3


def encoder(seed: int = 0, layers: int = 3) -> FastConformer:
    return tiny.net(tiny.config(layers=layers, gates=GATES), seed).encoder.freeze()


def random_mel(slots: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, -(-slots // 8) * 8, 80, generator=generator) * 3 - 6


def whole(net: FastConformer, mel: Tensor, slots: int, cap: int) -> tuple[Tensor, Tensor]:
    out = encode_whole(net, mel, slots=torch.tensor([slots]), max_lookahead_frames=torch.tensor([cap]))
    frames = -(-slots // 8)
    return out.encoded[0, :frames], out.reach[0, :frames]


class Stream:
    """One row that is fed as a test says."""

    def __init__(self, net: FastConformer, slots: int, cap: int, seed: int) -> None:
        self.net, self.slots, self.cap, self.mel = net, slots, cap, random_mel(slots, seed)
        self.state = init_state(net, 1)
        self.frames, self.fed = -(-slots // 8), 0
        self.encoded: list[Tensor] = []
        self.reach: list[int] = []

    def result(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self.encoded), torch.tensor(self.reach)


def advance(net: FastConformer, streams: list[Stream], counts: list[int]) -> None:
    counts = [min(n, s.frames - s.fed) for n, s in zip(counts, streams, strict=True)]
    mel = torch.randn(len(streams), 8 * max(counts), 80)  # what lies beyond a row's frames must not matter
    for b, (s, n) in enumerate(zip(streams, counts, strict=True)):
        mel[b, : 8 * n] = s.mel[0, 8 * s.fed : 8 * (s.fed + n)]
    out, state = step(
        net,
        mel,
        FrontierState.cat([s.state for s in streams]),
        slots=torch.tensor([min(8 * n, s.slots - 8 * s.fed) for s, n in zip(streams, counts, strict=True)]),
        max_lookahead_frames=torch.tensor([[s.cap] * max(counts) for s in streams]),
        ended=torch.tensor([s.fed + n == s.frames for s, n in zip(streams, counts, strict=True)]),
    )
    for b, (s, n) in enumerate(zip(streams, counts, strict=True)):
        s.state, s.fed = state.row(b), s.fed + n
        s.encoded.append(out.encoded[b, : len(out.reach[b])])
        s.reach += out.reach[b]
        if s.fed < s.frames:  # as soon as possible, and not before
            assert all(r < s.fed for r in s.reach)


@settings(max_examples=40, deadline=None)
@given(
    slots=st.integers(8, 500),
    cap=st.integers(0, 9),
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    seed=st.integers(0, 5),
)
def test_steps_equal_the_whole(slots: int, cap: int, counts: list[int], seed: int) -> None:
    net = encoder(seed)
    stream, sizes, size = Stream(net, slots, cap, seed), iter(counts), counts[0]
    while stream.fed < stream.frames:
        size = next(sizes, size)
        advance(net, [stream], [size])
    encoded, reach = stream.result()
    expected, expected_reach = whole(net, stream.mel, slots, cap)
    torch.testing.assert_close(encoded, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(reach, expected_reach)


def test_each_frame_runs_when_its_reach_has_come() -> None:
    net = encoder()
    stream = Stream(net, 8 * 60, 9, 0)
    ran: list[int] = []
    while stream.fed < stream.frames:
        advance(net, [stream], [1])
        ran += [stream.fed - 1] * (len(stream.reach) - len(ran))
    assert ran == stream.reach
    delays = {r - i for i, r in enumerate(stream.reach[:-9])}
    assert len(delays) > 3  # the gates do decide


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_rows_do_not_depend_on_each_other(data: st.DataObject) -> None:
    net = encoder()
    shapes = data.draw(st.lists(st.tuples(st.integers(8, 160), st.integers(0, 9)), min_size=1, max_size=4))
    streams = [Stream(net, slots, cap, i) for i, (slots, cap) in enumerate(shapes)]
    while waiting := [s for s in streams if s.fed < s.frames]:
        part = data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True))
        advance(net, part, [data.draw(st.integers(1, 6)) for _ in part])
    for s in streams:
        encoded, reach = s.result()
        expected, expected_reach = whole(net, s.mel, s.slots, s.cap)
        torch.testing.assert_close(encoded, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(reach, expected_reach)


@settings(max_examples=20, deadline=None)
@given(caps=st.lists(st.integers(0, 9), min_size=2, max_size=6), seed=st.integers(0, 3))
def test_the_cap_may_change_while_the_stream_runs(caps: list[int], seed: int) -> None:
    """The cap belongs to the frames that enter under it, however they are cut into steps."""

    def run(counts: list[int]) -> tuple[Tensor, Tensor]:
        stream = Stream(net, 8 * 8 * len(caps), 0, seed)
        for cap in caps:
            stream.cap = cap
            for n in counts:
                advance(net, [stream], [n])
        return stream.result()

    net = encoder(seed)
    (one, reach), (other, other_reach) = run([8]), run([1, 3, 2, 2])
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert torch.equal(reach, other_reach)
    deadline = torch.tensor([8 * k + i + cap for k, cap in enumerate(caps) for i in range(8)]).cummax(0).values
    assert (reach <= deadline).all()


@settings(max_examples=15, deadline=None)
@given(slot=st.integers(7, 319), cap=st.integers(0, 9), seed=st.integers(0, 5))
def test_the_future_beyond_its_reach_changes_nothing_bit_for_bit(slot: int, cap: int, seed: int) -> None:
    net, mel = encoder(seed), random_mel(320, seed)
    before, reach = whole(net, mel, 320, cap)
    changed = mel.clone()
    changed[:, slot] += 5.0
    after, reach_after = whole(net, changed, 320, cap)
    unaware = int((reach < slot // 8).sum())
    assert torch.equal(after[:unaware], before[:unaware])
    assert torch.equal(reach_after[:unaware], reach[:unaware])
    assert not torch.equal(after[unaware:], before[unaware:])


@pytest.mark.parametrize("open_", [True, False])
def test_gates_all_open_or_all_closed_are_the_plain_encoders(open_: bool) -> None:
    """Open: every layer sees R frames ahead. Closed, or with a cap of 0: the causal encoder."""
    config = tiny.config(layers=3, gates=GATES)
    net = tiny.net(config).encoder
    for layer in net.layers:
        layer.lookahead.scores.weight.data.zero_()
        layer.lookahead.scores.bias.data.fill_(2.0 if open_ else -2.0)
    net.freeze()
    mel, slots = random_mel(320, 3), torch.tensor([320])
    ahead = torch.arange(40) - torch.arange(40)[:, None]
    visible = (ahead >= -28) & (ahead <= (GATES if open_ else 0))
    net._visible = lambda *_: visible[None, None]  # type: ignore[method-assign]
    plain, _ = net.step(mel, None, slots=slots, chunk_frames=torch.tensor([1]))
    encoded, reach = whole(net, mel, 320, 3 * GATES)
    torch.testing.assert_close(encoded, plain[0], atol=1e-5, rtol=1e-5)
    assert reach.tolist() == [min(39, i + 3 * GATES * open_) for i in range(40)]


def test_a_cap_of_0_is_causal() -> None:
    net, mel = encoder(), random_mel(320, 4)
    encoded, reach = whole(net, mel, 320, 0)
    causal, _ = net.step(mel, None, slots=torch.tensor([320]), chunk_frames=torch.tensor([1]))
    torch.testing.assert_close(encoded, causal[0], atol=1e-5, rtol=1e-5)
    assert reach.tolist() == list(range(40))


def test_training_without_noise_is_inference_and_with_noise_it_learns() -> None:
    net = tiny.net(tiny.config(layers=2, gates=GATES)).encoder.train()
    mel, rows = random_mel(200, 5), dict(slots=torch.tensor([200]), max_lookahead_frames=torch.tensor([6]))
    with torch.no_grad():
        hard = encode_whole(net, mel, **rows)
    assert torch.equal(hard.soft_reach, hard.reach.float())
    still = encode_whole(net, mel, **rows)
    torch.testing.assert_close(still.encoded, hard.encoded, atol=1e-5, rtol=1e-5)
    assert torch.equal(still.soft_reach, still.reach.float())
    torch.manual_seed(0)
    noisy = encode_whole(net, mel, noise=1.0, **rows)
    assert not torch.equal(noisy.reach, hard.reach)
    noisy.encoded.square().sum().backward()
    for layer in net.layers:
        assert layer.lookahead.scores.weight.grad.abs().sum() > 0


def test_a_copied_row_continues_identically() -> None:
    net = encoder()
    streams = [Stream(net, 8 * 30, 5, i) for i in range(3)]
    advance(net, streams, [13, 13, 13])
    one = streams[1]
    kept, before = one.state.row(0), len(one.encoded)
    advance(net, [one], [17])
    first = torch.cat(one.encoded[before:])
    again = Stream(net, 8 * 30, 5, 1)
    again.fed, again.state = 13, kept
    advance(net, [again], [17])
    assert torch.equal(first, torch.cat(again.encoded))


@pytest.mark.parametrize("frames", [1, 20])
def test_a_step_leaves_the_state_that_it_started_from_as_it_was(frames: int) -> None:
    """Unless that is given up; the numbers are the same."""
    net = encoder()
    streams = [Stream(net, 8 * 60, cap, i) for i, cap in enumerate((9, 2))]
    advance(net, streams, [11, 7])
    state, mel = FrontierState.cat([s.state for s in streams]), torch.randn(2, 8 * frames, 80)

    def again(*, consume: bool) -> tuple[list[Tensor], list[tuple[int, ...]], FrontierState]:
        out, after = step(
            net, mel, state, slots=torch.tensor([8 * frames] * 2), max_lookahead_frames=torch.full((2, frames), 5),
            ended=torch.tensor([False, False]), consume=consume,
        )  # fmt: skip
        tensors = [out.encoded, after.attention, after.waiting, after.conv, *after.subsampling]
        return [t.clone() for t in tensors], out.reach, after

    first, reach, after = again(consume=False)
    for consume in (False, True):
        tensors, reach_again, after_again = again(consume=consume)
        assert all(torch.equal(a, b) for a, b in zip(first, tensors, strict=True))
        assert reach == reach_again and after.frontiers == after_again.frontiers


def test_memory_of_the_past_is_bounded() -> None:
    net, state, sizes = encoder(), init_state(encoder(), 1), set()
    for k in range(60):
        _, state = step(
            net, random_mel(8, k), state,
            slots=torch.tensor([8]), max_lookahead_frames=torch.tensor([[9]]), ended=torch.tensor([False]),
        )  # fmt: skip
        sizes.add(sum(t.numel() for t in (state.attention, state.waiting, state.conv)))
        assert all(len(layer.waiting) <= GATES for layer in state.frontiers[0].layers)
    assert len(sizes) == 1 and state.frontiers[0].fed == 60
