"""The adaptive encoder: a FastConformer whose layers decide how far each frame looks ahead.

A cell is one frame in one layer. It is computed once, as soon as the frames that it asked for are there
(:mod:`models.lookahead` says when that is), so each layer has a frontier of its own: behind it frames have run, before
it some wait for their future. :func:`step` moves the frontiers of a batch of streams; :func:`encode_whole` computes the
same numbers for whole inputs at once, and with disturbed scores it is the forward pass of training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.fastconformer import MASKED_SCORE, FastConformer, LayerWeights
from models.lookahead import (
    Place,
    asked_frames,
    attention_bias,
    disturbed,
    leading_positive,
    run_ready,
    settle,
    soft_reach,
    straight_through,
)

#: So many frames of a row enter a layer at once; its rings have room for them.
BLOCK_FRAMES = 8


class Whole(NamedTuple):
    """Whole inputs, encoded.

    Attributes:
        encoded: ``[B, T, d_model]``.
        reach: ``int64[B, T]``, the audio frame that each frame waits for.
        soft_reach: ``float[B, T]``, the same with gradients.
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
    noise: float = 0.0,
) -> Whole:
    """Encodes whole inputs.

    Args:
        encoder: Weights with gates.
        mel: ``[B, 8T, mel_bins]``, as in :meth:`FastConformer.step`.
        slots: ``int64[B]`` on the host, real slots.
        max_lookahead_frames: ``int64[B]`` on the host, each row's cap on the reach, 0 and above.
        noise: In training, how much the schedulers' scores are disturbed; see :mod:`models.lookahead`.
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
    x = x.reshape(B * T, D)
    for w, positions in zip(weights, encoder.positions(weights, T - 1, 2 * T - 1), strict=True):
        assert w.scheduler is not None
        scores = disturbed(w.scheduler(x).view(B, T, -1), noise)
        settled = settle(asked_frames(scores), reach, deadline, frames=frames, gates=config.gate_frames)
        gates = straight_through(scores)
        visible = (ahead >= -config.left_context_frames) & (ahead <= settled.taken[:, :, None])
        bias = attention_bias(gates, T) if torch.is_grad_enabled() else None  # of what is visible it is 0
        x = encoder.layer(x, w, positions, None, shape._replace(visible=visible[:, None], bias=bias))
        soft = torch.minimum(soft_reach(gates, soft, frames), deadline.float())
        reach = settled.reach
    return Whole(x.view(B, T, D), reach, soft)


class Progress(NamedTuple):
    """How far one layer of one stream is.

    Attributes:
        done: Frames that have run.
        passed: The furthest reach of those.
        waiting: The frames that wait, oldest first, at most R.
    """

    done: int = 0
    passed: int = 0
    waiting: tuple[Place, ...] = ()


class Frontier(NamedTuple):
    """How far one stream is.

    Attributes:
        fed: Audio frames that have entered.
        deadline: The latest deadline that one of them was given.
        layers: Of every layer.
    """

    fed: int
    deadline: int
    layers: tuple[Progress, ...]


@dataclass
class FrontierState:
    """The past of a batch of streams, a value that :func:`step` takes and returns.

    What belongs to a frame lies in rings: frame ``i`` of a layer in slot ``i`` modulo the ring's length. So rows whose
    frontiers differ are one tensor, and nothing is ever moved.

    Attributes:
        frontiers: One a row, on the host.
        subsampling: The last input frame of each sub-sampling stage, as in :class:`EncoderState`.
        attention: ``[L, 2, B, H, left + R + BLOCK_FRAMES, D/H]``, keys and values.
        waiting: ``[L, B, R + BLOCK_FRAMES, 2D]``, what attention will be added to, and queries.
        conv: ``[L, B, kernel - 1 + R + BLOCK_FRAMES, D]``, the inputs of the depthwise convolution.
    """

    frontiers: tuple[Frontier, ...]
    subsampling: tuple[Tensor, Tensor, Tensor]
    attention: Tensor
    waiting: Tensor
    conv: Tensor

    @property
    def frames(self) -> list[int]:
        """Encoder frames that each row has produced."""
        return [frontier.layers[-1].done for frontier in self.frontiers]

    @staticmethod
    def cat(states: list[FrontierState]) -> FrontierState:
        """One batch of the rows of several states, in their order; of one state, itself."""
        if len(states) == 1:
            return states[0]
        first, second, third = (torch.cat([s.subsampling[i] for s in states]) for i in range(3))
        return FrontierState(
            frontiers=tuple(frontier for s in states for frontier in s.frontiers),
            subsampling=(first, second, third),
            attention=torch.cat([s.attention for s in states], 2),
            waiting=torch.cat([s.waiting for s in states], 1),
            conv=torch.cat([s.conv for s in states], 1),
        )

    def row(self, index: int) -> FrontierState:
        """A copy of one row, as a state of batch 1; it shares no memory with this one."""
        at = slice(index, index + 1)
        first, second, third = (cache[at].clone() for cache in self.subsampling)
        return FrontierState(
            frontiers=self.frontiers[at],
            subsampling=(first, second, third),
            attention=self.attention[:, :, at].clone(memory_format=torch.contiguous_format),
            waiting=self.waiting[:, at].clone(memory_format=torch.contiguous_format),
            conv=self.conv[:, at].clone(memory_format=torch.contiguous_format),
        )

    def rows(self) -> list[FrontierState]:
        """Every row as a state of its own."""
        return [self] if len(self.frontiers) == 1 else [self.row(i) for i in range(len(self.frontiers))]


def init_state(encoder: FastConformer, batch: int) -> FrontierState:
    """The state of ``batch`` streams that have not begun."""
    c, start = encoder.config, encoder.init_state(batch)
    like, ahead = start.conv, c.gate_frames + BLOCK_FRAMES
    width = c.d_model // c.n_heads
    return FrontierState(
        frontiers=(Frontier(0, 0, (Progress(),) * c.n_layers),) * batch,
        subsampling=start.subsampling,
        attention=like.new_zeros(c.n_layers, 2, batch, c.n_heads, c.left_context_frames + ahead, width),
        waiting=like.new_zeros(c.n_layers, batch, ahead, 2 * c.d_model),
        conv=like.new_zeros(c.n_layers, batch, c.conv_kernel_size - 1 + ahead, c.d_model),
    )


class Output(NamedTuple):
    """What a step made.

    Attributes:
        encoded: ``[B, T, d_model]``, zero beyond a row's frames.
        reach: Of each row, the audio frame that each of its new frames waited for.
    """

    encoded: Tensor
    reach: list[tuple[int, ...]]


class _Cell(NamedTuple):
    """A frame that enters a layer."""

    row: int
    reach: int
    deadline: int


class _Cells(NamedTuple):
    """The frames that enter a layer, those of a row in their order."""

    x: Tensor  # [N, D]
    cells: list[_Cell]


class _Run(NamedTuple):
    """A frame that runs in a layer."""

    row: int
    column: int  # its place among the row's
    number: int
    taken: int  # how many frames ahead it sees


@torch.inference_mode()
def step(
    encoder: FastConformer,
    mel: Tensor,
    state: FrontierState,
    *,
    slots: Tensor,
    max_lookahead_frames: Tensor,
    ended: Tensor,
    consume: bool = False,
) -> tuple[Output, FrontierState]:
    """Takes the next audio of each row and runs every cell that has become ready.

    On a GPU the host waits for each layer once, to read what the frames that entered it ask for.

    Args:
        encoder: Frozen weights with gates.
        mel: ``[B, 8A, mel_bins]``, A at least 1, as in :meth:`FastConformer.step`.
        state: The past of the rows.
        slots: ``int64[B]`` on the host, real slots of each row.
        max_lookahead_frames: ``int64[B, A]`` on the host, the cap of each frame that enters now, 0 and above. A smaller
            one than before shortens the wait as fast as the frames before it allow.
        ended: ``bool[B]`` on the host, whether this is a row's last audio.
        consume: Whether ``state`` is given up, so that its memory may become that of the state after the step.
    """
    shape = encoder.shape(mel, torch.tensor([frontier.fed for frontier in state.frontiers]), slots)
    x, subsampling = encoder.subsample(mel, state.subsampling, shape)
    B, A, D = x.shape
    cells, fed, deadlines = [], [], []
    for row, (frames, caps) in enumerate(zip(shape.frames.tolist(), max_lookahead_frames.tolist(), strict=True)):
        start, deadline, _ = state.frontiers[row]
        for number in range(start, start + frames):
            deadline = max(deadline, number + caps[number - start])
            cells.append(_Cell(row, number, deadline))
        fed.append(start + frames)
        deadlines.append(deadline)
    x = x.reshape(B * A, D)
    if len(cells) < B * A:
        x = x.index_select(0, _on(x.device, [c.row * A + c.reach - state.frontiers[c.row].fed for c in cells])[0])
    if not consume:
        state = replace(
            state, attention=state.attention.clone(), waiting=state.waiting.clone(), conv=state.conv.clone()
        )
    known = list(zip(fed, ended.tolist(), strict=True))
    progress = [list(frontier.layers) for frontier in state.frontiers]
    new = _Cells(x, cells)
    for layer in range(encoder.config.n_layers):
        new = _layer_step(encoder, layer, new, state, progress, known)
    frontiers = tuple(Frontier(n, d, tuple(p)) for n, d, p in zip(fed, deadlines, progress, strict=True))
    return _dense(new, B), replace(state, frontiers=frontiers, subsampling=subsampling)


def _layer_step(
    encoder: FastConformer,
    layer: int,
    new: _Cells,
    state: FrontierState,
    progress: list[list[Progress]],
    known: list[tuple[int, bool]],
) -> _Cells:
    """One layer's part of a step.

    Args:
        encoder: As in :func:`step`.
        layer: Number of the layer.
        new: The frames that enter it.
        state: Memory of this step's own; the layer's part is written to.
        progress: Of each row and layer; brought up to date.
        known: Of each row, audio frames that have entered the encoder, and whether no more will.

    Returns:
        The frames that leave it.
    """
    *early, last = _pieces(new)
    # Before the last piece is there, nobody can say which frames do not come in time.
    parts = [_piece_step(encoder, layer, piece, state, progress, [(0, False)] * len(known)) for piece in early]
    parts.append(_piece_step(encoder, layer, last, state, progress, known))
    if not early:
        return parts[0]
    return _Cells(torch.cat([part.x for part in parts]), [cell for part in parts for cell in part.cells])


def _pieces(new: _Cells) -> list[_Cells]:
    """Frames that enter a layer, cut so that no row has more in a piece than the rings have room for."""
    if len(new.cells) <= BLOCK_FRAMES:
        return [new]
    seen: defaultdict[int, int] = defaultdict(int)
    pieces: defaultdict[int, list[int]] = defaultdict(list)
    for i, (row, _, _) in enumerate(new.cells):
        pieces[seen[row] // BLOCK_FRAMES].append(i)
        seen[row] += 1
    if len(pieces) == 1:
        return [new]
    return [
        _Cells(new.x.index_select(0, *_on(new.x.device, piece)), [new.cells[i] for i in piece])
        for _, piece in sorted(pieces.items())
    ]


def _piece_step(
    encoder: FastConformer,
    layer: int,
    new: _Cells,
    state: FrontierState,
    progress: list[list[Progress]],
    known: list[tuple[int, bool]],
) -> _Cells:
    """:func:`_layer_step` for at most ``BLOCK_FRAMES`` frames of each row."""
    if not new.cells and not any(of[layer].waiting for of in progress):
        return new
    w, queues = encoder.weights()[layer], [list(of[layer].waiting) for of in progress]
    if new.cells:
        assert w.scheduler is not None
        scores = w.scheduler(new.x)
        x, qkv = encoder.enter(new.x, w)
        entered = []
        for (row, reach, deadline), asked in zip(new.cells, map(leading_positive, scores.tolist()), strict=True):
            entered.append((row, progress[row][layer].done + len(queues[row])))
            queues[row].append(Place(asked, reach, deadline))
        _store(state, layer, entered, x, qkv)
    runs, left = [], []
    for row, (queue, (fed, ended)) in enumerate(zip(queues, known, strict=True)):
        if not queue:
            continue
        done, passed, _ = progress[row][layer]
        ran = run_ready(queue, passed, fed, ended=ended)
        for column, (taken, passed) in enumerate(ran):
            runs.append(_Run(row, column, done + column, taken))
            left.append(_Cell(row, passed, queue[column].deadline))
        progress[row][layer] = Progress(done + len(ran), passed, tuple(queue[len(ran) :]))
    return _Cells(_run(encoder, w, layer, runs, state) if runs else new.x[:0], left)


def _store(state: FrontierState, layer: int, entered: list[tuple[int, int]], x: Tensor, qkv: Tensor) -> None:
    """Writes the frames (row, number) that enter a layer into its rings."""
    attention, waiting = state.attention[layer], state.waiting[layer]
    _, _, H, ring, width = attention.shape
    room = waiting.shape[1]
    rows, slots, places = _on(
        x.device,
        [row for row, _ in entered],
        [number % ring for _, number in entered],
        [row * room + number % room for row, number in entered],
    )
    attention[:, rows, :, slots] = qkv.view(-1, 3, H, width)[:, 1:]
    waiting.view(-1, 2 * H * width).index_copy_(0, places, torch.cat([x, qkv[:, : H * width]], 1))


def _run(encoder: FastConformer, w: LayerWeights, layer: int, runs: list[_Run], state: FrontierState) -> Tensor:
    """Takes the frames that run, ``runs`` row by row, through the rest of a layer: ``[M, D]``."""
    kernel, conv = encoder.config.conv_kernel_size, state.conv[layer]
    _, room, D = conv.shape
    x, mixed = _attend(encoder, layer, runs, state)
    x = encoder.add_attention(x, w, mixed)
    slots, windows = _on(
        conv.device,
        [row * room + number % room for row, _, number, _ in runs],
        [row * room + (number - ago) % room for row, _, number, _ in runs for ago in reversed(range(kernel))],
    )
    ring = conv.view(-1, D).index_copy_(0, slots, encoder.gate_channels(x, w))
    convolved = encoder.convolve(ring.index_select(0, windows).view(len(runs), -1, D), w)
    return encoder.leave(x, w, convolved.view(-1, D))


def _attend(encoder: FastConformer, layer: int, runs: list[_Run], state: FrontierState) -> tuple[Tensor, Tensor]:
    """The frames that run and what attention finds for them, ``[M, D]`` each."""
    c, (keys, values), waiting = encoder.config, state.attention[layer], state.waiting[layer]
    B, H, ring, width = keys.shape
    D, room, left = H * width, waiting.shape[1], c.left_context_frames
    # All rows have as many queries as the one with the most; those that are too many are dropped again.
    T = 1 + max(run.column for run in runs)
    padded = [_Run(0, 0, 0, 0)] * (B * T)
    for run in runs:
        padded[run.row * T + run.column] = run
    queries, lines, real = _on(
        waiting.device,
        [row * room + number % room for row, _, number, _ in padded],
        [(i if i < left else left + i % ring) * (c.gate_frames + 1) + taken for _, _, i, taken in padded],
        [row * T + column for row, column, _, _ in runs],
    )
    frames = waiting.view(-1, 2 * D).index_select(0, queries)
    query = frames[:, D:].view(B, T, H, width).transpose(1, 2)
    positions = encoder.positions(encoder.weights(), left, left + 1 + c.gate_frames)[layer]
    by_distance = F.pad(encoder.by_distance(query, positions), (0, 1), value=MASKED_SCORE)
    column = _columns(left, c.gate_frames, waiting.device).index_select(0, lines).view(B, 1, T, ring)
    mixed = encoder.mix(query, keys, values, by_distance.gather(3, column.expand(-1, H, -1, -1)))
    x = frames[:, :D]
    return (x, mixed) if len(runs) == B * T else (x.index_select(0, real), mixed.index_select(0, real))


@cache
def _columns(left: int, gates: int, device: torch.device) -> Tensor:
    """Which column of the positions belongs to each slot of the ring of keys, line by line, ``int64[lines, ring]``.

    A query has the line ``i * (gates + 1) + r`` if it sees ``r`` frames ahead; ``i`` is its number below ``left``, and
    ``left`` plus its slot from there on. Slots that it does not see have the column behind the last.
    """
    ring = left + gates + BLOCK_FRAMES
    query, taken = torch.arange(left + ring)[:, None, None], torch.arange(gates + 1)[:, None]
    ahead = (torch.arange(ring) - torch.where(query < left, query, query - left)) % ring
    behind = ring - ahead
    past = torch.where(behind <= query.clamp(max=left), left - behind, left + gates + 1)
    return torch.where(ahead <= taken, left + ahead, past).view(-1, ring).to(device)


def _on(device: torch.device, *indices: Sequence[int]) -> Sequence[Tensor]:
    """Lists of indices on the device, in one transfer."""
    packed = torch.tensor(list(chain.from_iterable(indices))).to(device, non_blocking=True)
    return packed.split_with_sizes([len(index) for index in indices])


def _dense(left: _Cells, B: int) -> Output:
    """The frames that left the last layer, a row each."""
    reach: list[list[int]] = [[] for _ in range(B)]
    columns = []
    for cell in left.cells:
        columns.append(len(reach[cell.row]))
        reach[cell.row].append(cell.reach)
    T, D = max(map(len, reach)), left.x.shape[1]
    encoded = left.x.new_zeros(B * T, D)
    if left.cells:
        places = [cell.row * T + column for cell, column in zip(left.cells, columns, strict=True)]
        (at,) = _on(encoded.device, places)
        encoded.index_copy_(0, at, left.x)
    return Output(encoded.view(B, T, D), [tuple(row) for row in reach])
