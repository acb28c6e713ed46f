"""The adaptive encoder: a FastConformer whose layers decide how far each frame looks ahead.

A cell is one frame in one layer. It is computed once, as soon as the frames that it asked for are there
(:mod:`models.lookahead` says when that is), so each layer has a frontier of its own: behind it frames have run, before
it some wait for their future. :func:`step` moves the frontiers of a batch of streams; :func:`encode_whole` computes the
same numbers for whole inputs at once, and with soft gates it is the forward pass of training.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.fastconformer import FastConformer, LayerWeights
from models.lookahead import asked_frames, attention_bias, log_gates, settle, soft_reach


class Whole(NamedTuple):
    """Whole inputs, encoded.

    Attributes:
        encoded: ``[B, T, d_model]``.
        reach: ``int64[B, T]``, the audio frame that each frame waits for if the gates are taken as they stand.
        soft_reach: ``float[B, T]``, its expectation under soft gates.
    """

    encoded: Tensor
    reach: Tensor
    soft_reach: Tensor


def encode_whole(
    encoder: FastConformer,
    mel: Tensor,
    *,
    slots: Tensor,
    max_lookahead_frames: Tensor,
    temperature: float | None = None,
) -> Whole:
    """Encodes whole inputs.

    Args:
        encoder: Weights with gates.
        mel: ``[B, 8T, mel_bins]``, as in :meth:`FastConformer.step`.
        slots: ``int64[B]`` on the host, real slots.
        max_lookahead_frames: ``int64[B]`` on the host, each row's cap on the reach, 0 and above.
        temperature: Of soft gates; None for the hard decision.
    """
    shape = encoder.shape(mel, torch.zeros_like(slots), slots)
    weights = encoder.weights()
    x, _ = encoder.subsample(mel, None, shape)
    B, T, D = x.shape
    config, frames, frame = encoder.config, shape.frames.to(x.device), torch.arange(T, device=x.device)
    ahead = frame - frame[:, None]
    reach = frame.expand(B, T)
    soft = reach.float()
    deadline = reach + max_lookahead_frames.to(x.device)[:, None]
    ended = torch.ones_like(frames, dtype=torch.bool)
    x = x.reshape(B * T, D)
    for w, positions in zip(weights, encoder.positions(weights, T - 1, 2 * T - 1), strict=True):
        assert w.scheduler is not None
        scores = w.scheduler(x).view(B, T, -1)
        settled = settle(
            asked_frames(scores), reach, deadline, arrived=frames, fed=frames, ended=ended, frames=config.gate_frames
        )
        gates = log_gates(scores, temperature or 1.0)
        furthest = settled.taken if temperature is None else settled.within.clamp(max=config.gate_frames)
        visible = (ahead >= -config.left_context_frames) & (ahead <= furthest[:, :, None])
        bias = None if temperature is None else attention_bias(gates, T)
        x = encoder.layer(x, w, positions, None, shape._replace(visible=visible[:, None], bias=bias))
        soft = soft_reach(gates, soft, frames)
        reach = settled.when.cummax(1).values
    return Whole(x.view(B, T, D), reach, soft)


@dataclass
class FrontierState:
    """The past of a batch of streams, a value that :func:`step` takes and returns.

    The integer tensors live on the host. A layer's window is the left context before its frontier, then the
    frames that wait, at most R.

    Attributes:
        fed: ``int64[B]``, audio frames that have entered.
        deadline: ``int64[B]``, the latest deadline that a frame was given.
        subsampling: The last input frame of each sub-sampling stage, as in :class:`EncoderState`.
        attention: ``[L, 2, B, H, left + R, D/H]``, keys and values of the window.
        waiting: ``[L, B, R, 2D]``, of the frames that wait: what attention will be added to, and their queries.
        conv: ``[L, B, kernel-1, D]``, the inputs of the depthwise convolution, oldest first.
        places: ``int64[L, B, R, 3]``, of the frames that wait: how many frames they asked for, the reach of their
            inputs, their deadline.
        waiting_frames: ``int64[L, B]``.
        done: ``int64[L, B]``, frames that have run.
        passed: ``int64[L, B]``, the furthest reach of those.
    """

    fed: Tensor
    deadline: Tensor
    subsampling: tuple[Tensor, Tensor, Tensor]
    attention: Tensor
    waiting: Tensor
    conv: Tensor
    places: Tensor
    waiting_frames: Tensor
    done: Tensor
    passed: Tensor

    @property
    def frames(self) -> Tensor:
        """``int64[B]``: encoder frames that each row has produced."""
        return self.done[-1]

    @staticmethod
    def cat(states: list[FrontierState]) -> FrontierState:
        """One batch of the rows of several states, in their order."""
        if len(states) == 1:
            return states[0]
        first, second, third = (torch.cat([s.subsampling[i] for s in states]) for i in range(3))
        joined = {name: torch.cat([getattr(s, name) for s in states], dim) for name, dim in _ROW_DIMS.items()}
        return FrontierState(subsampling=(first, second, third), **joined)

    def row(self, index: int) -> FrontierState:
        """A copy of one row, as a state of batch 1; it shares no memory with this one."""
        first, second, third = (cache[index : index + 1].clone() for cache in self.subsampling)
        own = {
            name: getattr(self, name).narrow(dim, index, 1).clone(memory_format=torch.contiguous_format)
            for name, dim in _ROW_DIMS.items()
        }
        return FrontierState(subsampling=(first, second, third), **own)

    def rows(self) -> list[FrontierState]:
        """Every row as a state of its own."""
        return [self] if len(self.fed) == 1 else [self.row(i) for i in range(len(self.fed))]


#: Which dimension of a state's tensors counts the rows.
_ROW_DIMS = {
    "fed": 0, "deadline": 0, "attention": 2, "waiting": 1, "conv": 1, "places": 1, "waiting_frames": 1, "done": 1,
    "passed": 1,
}  # fmt: skip
assert {field.name for field in fields(FrontierState)} == {*_ROW_DIMS, "subsampling"}


def init_state(encoder: FastConformer, batch: int) -> FrontierState:
    """The state of ``batch`` streams that have not begun."""
    c, start = encoder.config, encoder.init_state(batch)
    like, window = start.conv, c.left_context_frames + c.gate_frames
    integers = torch.zeros(c.n_layers, batch, dtype=torch.int64)
    return FrontierState(
        fed=torch.zeros(batch, dtype=torch.int64),
        deadline=torch.zeros(batch, dtype=torch.int64),
        subsampling=start.subsampling,
        attention=like.new_zeros(c.n_layers, 2, batch, c.n_heads, window, c.d_model // c.n_heads),
        waiting=like.new_zeros(c.n_layers, batch, c.gate_frames, 2 * c.d_model),
        conv=start.conv,
        places=torch.zeros(c.n_layers, batch, c.gate_frames, 3, dtype=torch.int64),
        waiting_frames=integers,
        done=integers.clone(),
        passed=integers.clone(),
    )


class Output(NamedTuple):
    """What a step made.

    Attributes:
        encoded: ``[B, T, d_model]``, zero beyond a row's frames.
        frames: ``int64[B]`` on the host, new frames of each row, 0 … T.
        reach: ``int64[B, T]`` on the host, the audio frame that each of them waited for.
    """

    encoded: Tensor
    frames: Tensor
    reach: Tensor


class _Cells(NamedTuple):
    """The frames that enter a layer, row by row."""

    x: Tensor  # [N, D]
    rows: Tensor  # int64[N]
    columns: Tensor  # int64[N], place among the row's
    frames: Tensor  # int64[B], how many of each row
    reach: Tensor  # int64[N]
    deadline: Tensor  # int64[N]


@torch.inference_mode()
def step(
    encoder: FastConformer,
    mel: Tensor,
    state: FrontierState,
    *,
    slots: Tensor,
    max_lookahead_frames: Tensor,
    ended: Tensor,
) -> tuple[Output, FrontierState]:
    """Takes the next audio of each row and runs every cell that has become ready.

    Args:
        encoder: Frozen weights with gates.
        mel: ``[B, 8A, mel_bins]``, A at least 1, as in :meth:`FastConformer.step`.
        state: The past of the rows.
        slots: ``int64[B]`` on the host, real slots of each row.
        max_lookahead_frames: ``int64[B, A]`` on the host, the cap of each frame that enters now, 0 and above. A smaller
            one than before shortens the wait as fast as the frames before it allow.
        ended: ``bool[B]`` on the host, whether this is a row's last audio.
    """
    shape = encoder.shape(mel, state.fed, slots)
    x, subsampling = encoder.subsample(mel, state.subsampling, shape)
    number = state.fed[:, None] + torch.arange(x.shape[1])
    deadline = torch.maximum(number + max_lookahead_frames, state.deadline[:, None]).cummax(1).values
    rows, columns = _cells(shape.frames)
    cells = _Cells(x[rows, columns], rows, columns, shape.frames, number[rows, columns], deadline[rows, columns])
    fed, weights = state.fed + shape.frames, encoder.weights()
    parts = []
    for layer in range(len(weights)):
        cells, after = _layer_step(encoder, weights, layer, cells, state, fed, ended)
        parts.append(after)
    names = ("attention", "waiting", "conv", "places", "waiting_frames", "done", "passed")
    stacked = {name: torch.stack(part) for name, part in zip(names, zip(*parts, strict=True), strict=True)}
    latest = _last(deadline, shape.frames, state.deadline)
    return _dense(cells), FrontierState(fed=fed, deadline=latest, subsampling=subsampling, **stacked)


def _layer_step(
    encoder: FastConformer,
    weights: list[LayerWeights],
    layer: int,
    new: _Cells,
    state: FrontierState,
    fed: Tensor,
    ended: Tensor,
) -> tuple[_Cells, tuple[Tensor, ...]]:
    """One layer's part of a step: the frames that leave it, and its part of the state."""
    c, w = encoder.config, weights[layer]
    B, D, H, R, left = len(fed), c.d_model, c.n_heads, c.gate_frames, c.left_context_frames
    grow, waiting = int(new.frames.max()), state.waiting_frames[layer]
    at = waiting[new.rows] + new.columns
    attention = F.pad(state.attention[layer], (0, 0, 0, grow))
    held = F.pad(state.waiting[layer], (0, 0, 0, grow))
    places = F.pad(state.places[layer], (0, 0, 0, grow))
    if len(new.x):
        assert w.scheduler is not None
        x, qkv = encoder.enter(new.x, w)
        asked = asked_frames(w.scheduler(new.x)).cpu()
        attention[:, new.rows, :, left + at] = qkv.view(-1, 3, H, D // H)[:, 1:]
        held[new.rows, at] = torch.cat([x, qkv[:, :D]], 1)
        places[new.rows, at] = torch.stack([asked, new.reach, new.deadline], 1)
    arrived = waiting + new.frames
    settled = settle(*places.unbind(-1), arrived=arrived, fed=fed, ended=ended, frames=R)
    slot = torch.arange(places.shape[1])
    ready = (settled.known & (slot < arrived[:, None])).long().cumprod(1).sum(1)
    reach = torch.maximum(settled.when.cummax(1).values, state.passed[layer][:, None])
    rows, columns = _cells(ready)
    conv, passed = state.conv[layer], state.passed[layer]
    x = new.x[:0]
    if len(rows):
        T = int(ready.max())
        key = torch.arange(attention.shape[3]) - left
        query, oldest = slot[:T, None], -state.done[layer].clamp(max=left)
        visible = (key >= query - left) & (key <= query + settled.taken[:, :T, None]) & (key >= oldest[:, None, None])
        queries = held[:, :T, D:].view(B, T, H, D // H).transpose(1, 2)
        positions = encoder.positions(weights, left + T - 1, attention.shape[3] + T - 1)[layer]
        mixed = encoder.attend(queries, attention[0], attention[1], positions, visible[:, None].to(x.device))
        flat = rows * T + columns
        x = encoder.add_attention(held[rows, columns, :D], w, mixed[flat])
        conv = F.pad(conv, (0, 0, 0, T))
        conv[rows, c.conv_kernel_size - 1 + columns] = encoder.gate_channels(x, w)
        x = encoder.leave(x, w, encoder.convolve(conv, w).reshape(B * T, D)[flat])
        conv = _from(conv, ready, c.conv_kernel_size - 1, 1)
        passed = _last(reach, ready, passed)
    after = (
        _from(attention, ready, left + R, 3, row_dim=1),
        _from(held, ready, R, 1),
        conv,
        _from(places, ready, R, 1),
        arrived - ready,
        state.done[layer] + ready,
        passed,
    )
    return _Cells(x, rows, columns, ready, reach[rows, columns], places[rows, columns, 2]), after


def _cells(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Row and place of every cell if the rows have so many: ``int64[N]`` each, row by row."""
    rows, columns = (torch.arange(int(frames.max())) < frames[:, None]).nonzero(as_tuple=True)
    return rows, columns


def _last(x: Tensor, count: Tensor, before: Tensor) -> Tensor:
    """Entry ``count - 1`` of each row of ``[B, n]``, or what was ``before`` if there is none."""
    return torch.where(count > 0, x.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0], before)


def _from(x: Tensor, start: Tensor, length: int, dim: int, *, row_dim: int = 0) -> Tensor:
    """``length`` entries of each row along ``dim``, from the row's ``start`` on; what lies beyond is not read."""
    first, *others = start.tolist()
    if all(other == first for other in others) and first + length <= x.shape[dim]:
        return x.narrow(dim, first, length)
    index = (start[:, None] + torch.arange(length)).clamp(max=x.shape[dim] - 1).to(x.device)
    view, size = [1] * x.dim(), list(x.shape)
    view[row_dim], view[dim], size[dim] = len(start), length, length
    return x.gather(dim, index.view(view).expand(size))


def _dense(cells: _Cells) -> Output:
    """The frames that left the last layer, a row each."""
    B, T = len(cells.frames), int(cells.frames.max())
    encoded = cells.x.new_zeros(B, T, cells.x.shape[1])
    reach = torch.zeros(B, T, dtype=torch.int64)
    encoded[cells.rows, cells.columns] = cells.x
    reach[cells.rows, cells.columns] = cells.reach
    return Output(encoded, cells.frames, reach)
