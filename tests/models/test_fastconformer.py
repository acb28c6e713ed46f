"""The encoder: streaming equals offline, rows are independent, and the future stays out of sight."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.fastconformer import EncoderState, FastConformer, _norm
from tests import tiny

LOOKAHEADS = [0, 1, 3, 6]


def encoder(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> FastConformer:
    return tiny.net(seed=seed).to(dtype).encoder.freeze()


def random_mel(slots: int, seed: int) -> Tensor:
    """Log-mel in slots, padded to whole frames with noise that must not matter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, -(-slots // 8) * 8, 80, generator=generator) * 3 - 6


def offline(net: FastConformer, mel: Tensor, slots: int, lookahead: int) -> Tensor:
    y, state = net.step(mel, None, slots=torch.tensor([slots]), chunk_frames=torch.tensor([lookahead + 1]))
    assert state is None
    return y[0, : -(-slots // 8)]


def streamed(net: FastConformer, mel: Tensor, slots: int, lookahead: int, chunks: list[int]) -> Tensor:
    """Steps of several chunks each, as ``chunks`` says, the last number repeated."""
    state, done, out, frames = net.init_state(1), 0, [], -(-slots // 8)
    sizes = iter(chunks)
    size = chunks[0]
    while done < frames:
        size = next(sizes, size)
        n = min(size * (lookahead + 1), frames - done)
        part = mel[:, 8 * done : 8 * (done + n)]
        real = torch.tensor([min(8 * n, slots - 8 * done)])
        y, state = net.step(part, state, slots=real, chunk_frames=torch.tensor([lookahead + 1]))
        out.append(y[0, :n])
        done += n
    return torch.cat(out)


@settings(max_examples=30, deadline=None)
@given(
    slots=st.integers(8, 700),
    lookahead=st.sampled_from(LOOKAHEADS),
    chunks=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    seed=st.integers(0, 5),
)
def test_streaming_equals_offline(slots: int, lookahead: int, chunks: list[int], seed: int) -> None:
    net, mel = encoder(seed), random_mel(slots, seed)
    expected = offline(net, mel, slots, lookahead)
    torch.testing.assert_close(streamed(net, mel, slots, lookahead, chunks), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_rows_do_not_depend_on_each_other(data: st.DataObject) -> None:
    """Random batches of streams of any length and look-ahead; each row as it is alone, its last step included."""
    net = encoder()
    rows = data.draw(st.lists(st.tuples(st.integers(8, 200), st.sampled_from(LOOKAHEADS)), min_size=1, max_size=5))
    mels = [random_mel(slots, i) for i, (slots, _) in enumerate(rows)]
    states, done = [net.init_state(1) for _ in rows], [0] * len(rows)
    got: list[list[Tensor]] = [[] for _ in rows]
    while any(8 * d < s for d, (s, _) in zip(done, rows, strict=True)):
        waiting = [i for i, (s, _) in enumerate(rows) if 8 * done[i] < s]
        part = data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True))
        counts = [min(rows[i][1] + 1, -(-rows[i][0] // 8) - done[i]) for i in part]
        mel = torch.randn(len(part), 8 * max(counts), 80)  # what lies beyond a row's frames must not matter
        for b, (i, n) in enumerate(zip(part, counts, strict=True)):
            mel[b, : 8 * n] = mels[i][0, 8 * done[i] : 8 * (done[i] + n)]
        y, state = net.step(
            mel,
            EncoderState.cat([states[i] for i in part]),
            slots=torch.tensor([min(8 * n, rows[i][0] - 8 * done[i]) for i, n in zip(part, counts, strict=True)]),
            chunk_frames=torch.tensor([rows[i][1] + 1 for i in part]),
        )
        for b, (i, n) in enumerate(zip(part, counts, strict=True)):
            states[i] = state.row(b)
            got[i].append(y[b, :n])
            done[i] += n
    for i, (slots, lookahead) in enumerate(rows):
        alone = offline(net, mels[i], slots, lookahead)
        torch.testing.assert_close(torch.cat(got[i]), alone, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_look_ahead_may_change_at_every_step(data: st.DataObject) -> None:
    """A stream of mixed chunks equals the one-shot forward in which each frame sees its own chunk."""
    net, frames = encoder(), 40
    mel = random_mel(8 * frames, 1)
    state, done, out = net.init_state(1), 0, []
    bounds = []
    while done < frames:
        n = min(data.draw(st.sampled_from(LOOKAHEADS)) + 1, frames - done)
        y, state = net.step(
            mel[:, 8 * done : 8 * (done + n)],
            state,
            slots=torch.tensor([8 * n]),
            chunk_frames=torch.tensor([n]),
        )
        bounds += [(done, done + n)] * n
        out.append(y[0])
        done += n
    visible = torch.zeros(frames, frames, dtype=torch.bool)
    for i, (start, end) in enumerate(bounds):
        visible[i, max(0, start - net.config.left_context_frames) : end] = True
    net._visible = lambda *_: visible[None, None]  # type: ignore[method-assign]
    y, _ = net.step(mel, None, slots=torch.tensor([8 * frames]), chunk_frames=torch.tensor([1]))
    torch.testing.assert_close(torch.cat(out), y[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_future_beyond_the_look_ahead_changes_nothing(lookahead: int) -> None:
    """Bit for bit: frames whose chunk ends before mel frame m do not know m."""
    net, frames, chunk = encoder(), 28, lookahead + 1
    mel = random_mel(8 * frames, 2)
    before = offline(net, mel, 8 * frames, lookahead)
    for slot in range(7, 8 * frames, 13):  # slot s is mel frame s - 7 and belongs to encoder frame s // 8
        changed = mel.clone()
        changed[:, slot] += 5.0
        after = offline(net, changed, 8 * frames, lookahead)
        same = slot // 8 // chunk * chunk
        assert torch.equal(after[:same], before[:same])
        assert not torch.equal(after[same:], before[same:])


def test_a_copied_row_continues_identically() -> None:
    net, mel = encoder(), random_mel(8 * 30, 3).expand(3, -1, -1)
    full = torch.full((3,), 16 * 8)
    chunk = torch.full((3,), 2)
    _, state = net.step(mel[:, : 16 * 8], net.init_state(3), slots=full, chunk_frames=chunk)
    copied = state.row(1)
    rest = mel[:1, 16 * 8 :]
    one = dict(slots=torch.tensor([14 * 8]), chunk_frames=torch.tensor([2]))
    first, _ = net.step(rest, copied, **one)
    copied.attention.zero_()
    second, _ = net.step(rest, state.row(1), **one)
    assert torch.equal(first, second)


def test_cache_of_the_past_is_bounded() -> None:
    net = encoder()
    state = net.init_state(1)
    sizes = set()
    for k in range(60):
        _, state = net.step(random_mel(8, k), state, slots=torch.tensor([8]), chunk_frames=torch.tensor([1]))
        sizes.add(sum(t.numel() for t in (state.attention, state.conv, *state.subsampling)))
    assert len(sizes) == 1
    assert int(state.frames) == 60


def test_frozen_weights_need_no_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the CPU's packed products are not to be had, as on a GPU, the same encoder gives the same frames."""
    mel = random_mel(8 * 30, 5)
    expected = offline(encoder(), mel, 8 * 30, 3)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.testing.assert_close(offline(encoder(), mel, 8 * 30, 3), expected, atol=1e-5, rtol=1e-5)


def test_training_mode_and_frozen_encoder_agree() -> None:
    mel = random_mel(8 * 30, 6)
    learning = tiny.net().encoder.train()
    y, _ = learning.step(mel, None, slots=torch.tensor([240]), chunk_frames=torch.tensor([4]))
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning.parameters())
    torch.testing.assert_close(y[0].detach(), offline(encoder(), mel, 240, 3), atol=1e-5, rtol=1e-5)


def test_bf16_stays_close_to_fp32() -> None:
    slots = 8 * 40
    mel = random_mel(slots, 4)
    full = offline(encoder(), mel, slots, 6)
    half = offline(encoder(dtype=torch.bfloat16), mel.bfloat16(), slots, 6)
    assert half.dtype == torch.bfloat16
    error = (half.float() - full).abs().mean() / full.abs().mean()
    assert error < 0.05


def test_rows_in_bf16_change_each_other_less_than_rounding_does() -> None:
    net, mel = encoder(dtype=torch.bfloat16), random_mel(8 * 28, 4).bfloat16().view(4, 56, 80)
    chunk, slots = torch.tensor([1, 2, 4, 7]), torch.full((4,), 56)
    together, state = net.step(mel, net.init_state(4), slots=slots, chunk_frames=chunk)
    assert state is not None and {state.attention.dtype, state.conv.dtype, together.dtype} == {torch.bfloat16}
    for row in range(4):
        at = slice(row, row + 1)
        alone, _ = net.step(mel[at], net.init_state(1), slots=slots[at], chunk_frames=chunk[at])
        exact, _ = encoder().step(mel[at].float(), encoder().init_state(1), slots=slots[at], chunk_frames=chunk[at])
        rounding = (alone.float() - exact).abs().mean()
        assert (together[at].float() - alone.float()).abs().mean() < rounding < 0.05 * exact.abs().mean()


def test_norms_in_bf16_are_computed_in_float32() -> None:
    x = 100.0 + torch.randn(5, 512, generator=torch.Generator().manual_seed(0))
    x, w = x.bfloat16(), (torch.ones(512).bfloat16(), torch.zeros(512).bfloat16())
    exact = _norm(x.float(), (w[0].float(), w[1].float()))
    torch.testing.assert_close(_norm(x, w).float(), exact.bfloat16().float(), atol=0.02, rtol=0.01)


def test_in_training_a_row_may_remember_less_and_every_layer_can_be_looked_at() -> None:
    net, mel = tiny.net().encoder.eval(), torch.cat([random_mel(160, 1), random_mel(160, 2)])
    rows = {"slots": torch.tensor([160, 160]), "chunk_frames": torch.tensor([2, 2])}
    outputs: list[Tensor] = []
    encoded, _ = net.step(mel, None, **rows, left_frames=torch.tensor([4, 8]), outputs=outputs)
    assert len(outputs) == net.config.n_layers and torch.equal(outputs[-1], encoded)
    for row, left in enumerate((4, 8)):
        other = tiny.net().encoder.eval()
        other.config = dataclasses.replace(other.config, left_context_frames=left, lookahead_frames=(1,))
        alone, _ = other.step(mel[row : row + 1], None, slots=torch.tensor([160]), chunk_frames=torch.tensor([2]))
        torch.testing.assert_close(encoded[row], alone[0], atol=1e-5, rtol=1e-5)
