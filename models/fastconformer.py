"""Cache-aware FastConformer: the encoder as a function of (mel frames, state).

The weights are state-dict compatible with NeMo's cache-aware streaming models (``ConformerEncoder`` with
``dw_striding`` sub-sampling, causal convolutions and ``chunked_limited`` attention), and the numbers are the
same. The way they are computed is not: keys, values and projected positions are cached instead of being
projected again at every step, every convolution keeps the one or eight frames it really needs, and the
look-ahead belongs to a row of a step and not to the model.

Time is laid out in *slots*. Encoder frame ``k`` depends on mel frames up to ``8k``, so the stream is cut into
groups of eight mel frames, ``8k-7 … 8k``, each of which completes one encoder frame; the first group begins
with seven slots that lie before the audio. With this cut each sub-sampling stage halves the slots exactly and
carries one single input frame over to the next step.

Offline and streaming run the same code: offline is one step from an empty state over the whole input.

Sources: Rekesh et al., "Fast Conformer" (arXiv 2305.05084); Noroozi et al., "Stateful Conformer with
Cache-based Inference" (arXiv 2312.17279); relative positions after Dai et al., "Transformer-XL" (§3.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import SUBSAMPLING_FACTOR, EncoderConfig
from models.linear import Convolution, Linear
from models.lookahead import Scheduler
from models.rows import parted

#: Slots of the first group that lie before the first mel frame.
LEADING_SLOTS = SUBSAMPLING_FACTOR - 1
#: Added to the scores of invisible keys; NeMo's value, small enough to vanish in a softmax in any dtype.
MASKED_SCORE = -10000.0
STAGES = 3
#: Up to so many frames, the depthwise convolution is faster as a product and a sum than as a convolution.
SHORT_STEP_FRAMES = 16
#: Projected positions are kept for steps of up to so many frames.
LONG_STEP_FRAMES = 128


class Room(NamedTuple):
    """A state's caches with memory behind them for the frames of a step."""

    attention: Tensor  # [L, 2, B, H, left + T, D/H]
    conv: Tensor  # [L, B, kernel-1 + T, D]


class Caches(NamedTuple):
    """What a state holds on the device; layouts as in :class:`EncoderState`."""

    subsampling: tuple[Tensor, Tensor, Tensor]
    attention: Tensor
    conv: Tensor
    room: Room | None = None

    def first(self, rows: int) -> tuple[Tensor, ...]:
        """Views of the first rows, tensor by tensor."""
        return *(cache[:rows] for cache in self.subsampling), self.attention[:, :, :rows], self.conv[:, :rows]


@dataclass
class EncoderState:
    """The past of a batch of streams; a value that :meth:`FastConformer.step` takes and returns.

    Attributes:
        frames: ``int64[B]``, on the host: encoder frames that each row has produced.
        subsampling: One tensor a stage, the last input frame of each stage:
            ``[B, 1, 1, F0]``, ``[B, C, 1, F1]``, ``[B, C, 1, F2]``.
        attention: ``[L, 2, B, H, left, D/H]``, keys and values, oldest frame first; the last
            ``min(frames, left)`` are real.
        conv: ``[L, B, kernel-1, D]``, the inputs of the depthwise convolution, oldest first.
        room: The last two with memory behind them, which the next step takes. Such a state is good for one step.
    """

    frames: Tensor
    subsampling: tuple[Tensor, Tensor, Tensor]
    attention: Tensor
    conv: Tensor
    room: Room | None = None

    @property
    def caches(self) -> Caches:
        """What is on the device."""
        return Caches(self.subsampling, self.attention, self.conv, self.room)

    @staticmethod
    def cat(states: list[EncoderState], *, room_frames: int = 0) -> EncoderState:
        """One batch of the rows of several states, in their order.

        Args:
            states: At least one.
            room_frames: Frames of a step for which to leave room, so that it need not copy the caches once more.
        """
        if len(states) == 1:
            return states[0]
        first, second, third = (torch.cat([s.subsampling[i] for s in states]) for i in range(STAGES))
        attention, attention_room = _joined([s.attention for s in states], 2, 4, room_frames)
        conv, conv_room = _joined([s.conv for s in states], 1, 2, room_frames)
        return EncoderState(
            frames=torch.cat([s.frames for s in states]),
            subsampling=(first, second, third),
            attention=attention,
            conv=conv,
            room=Room(attention_room, conv_room) if room_frames else None,
        )

    def row(self, index: int) -> EncoderState:
        """A copy of one row, as a state of batch 1; it shares no memory with this one."""
        at = slice(index, index + 1)
        first, second, third = (cache[at].clone() for cache in self.subsampling)
        return EncoderState(
            frames=self.frames[at].clone(),
            subsampling=(first, second, third),
            attention=self.attention[:, :, at].clone(memory_format=torch.contiguous_format),
            conv=self.conv[:, at].clone(memory_format=torch.contiguous_format),
        )

    def rows(self) -> list[EncoderState]:
        """Every row as a state of its own."""
        if len(self.frames) == 1:
            return [self]
        stages = (parted(cache, 0) for cache in self.subsampling)
        caches = zip(*stages, parted(self.attention, 2), parted(self.conv, 1), strict=True)
        return [
            EncoderState(self.frames[i : i + 1].clone(), (first, second, third), attention, conv)
            for i, (first, second, third, attention, conv) in enumerate(caches)
        ]


class LayerWeights(NamedTuple):
    """One layer's weights in the shape the step uses them, read from the modules below."""

    norms: tuple[tuple[Tensor, Tensor], ...]  # ff1, attention, conv, ff2, out, and inside the conv module
    ff1: tuple[Linear, Linear]  # the second halved, as the layer adds only half of it
    ff2: tuple[Linear, Linear]
    qkv: Linear  # queries come out with `u` added and divided by sqrt(D/H)
    out: Linear
    v_minus_u: Tensor  # [H, 1, D/H], divided likewise
    pos: Tensor  # [D, D]
    pointwise1: Linear
    depthwise: tuple[Tensor, Tensor | None]  # [D, kernel]
    pointwise2: Linear
    scheduler: Scheduler | None


class Positions(NamedTuple):
    """One layer's projected positions, from the furthest past to the furthest future one."""

    keys: Tensor  # [H, D/H, cached + 2T - 1]
    bias: Tensor  # [H, 1, cached + 2T - 1]: what they add to every query's score


class StepShape(NamedTuple):
    """What the rows of one step bring: made once, on the device for all layers. A mask that hides nothing is None."""

    frames: Tensor  # int64[B], new frames of each row; on the host, or where `FastConformer.masked` was given lengths
    subsampling_masks: tuple[Tensor | None, ...]  # [B, 1, slots, 1] per stage input and for the last output
    visible: Tensor | None  # [B, 1, T, keys], False where a key is invisible
    bias: Tensor | None  # [B, 1, T, keys], added to the scores
    conv_mask: Tensor | None  # [B, T, 1]
    newest: Tensor | None  # int64[B, 1]: where each row's new frames end; None if all rows bring T


class Replayed(Protocol):
    """What may run steps in the place of :meth:`FastConformer.step`; see :mod:`models.graphs`."""

    def step(
        self, mel: Tensor, state: EncoderState, slots: Tensor, chunk_frames: Tensor
    ) -> tuple[Tensor, EncoderState] | None:
        """Arguments and result are those of :meth:`FastConformer.step`; None if it does not run such a step."""


class FastConformer(nn.Module):
    """The encoder. Parameters carry NeMo's names below ``encoder.``.

    Args:
        config: Shape of the encoder.
        mel_bins: Width of the input features.
        dropout: Probability in training; nothing is dropped in evaluation mode.

    Attributes:
        graphs: Runs the steps of streams that it can run; None for none.
    """

    def __init__(self, config: EncoderConfig, mel_bins: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.mel_bins = mel_bins
        self.dropout = dropout
        self.pre_encode = _Subsampling(mel_bins, config.subsampling_conv_channels, config.d_model)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.n_layers))
        self.graphs: Replayed | None = None
        self._weights: list[LayerWeights] | None = None
        self._positions: dict[tuple[int, int], list[Positions]] = {}
        self._kept_positions: list[Positions] = []

    def freeze(self) -> FastConformer:
        """Prepares for inference on the device where the weights are. Returns itself.

        Weights are fused and packed, projected positions are kept, and gradients end. The layers' own matrices
        are given up, so a frozen encoder cannot be saved or moved.
        """
        self.eval().requires_grad_(False)
        self.pre_encode.freeze()
        self._weights = [layer.weights(frozen=True) for layer in self._conformer_layers()]
        for layer in self._conformer_layers():
            layer.release()
        self._positions.clear()
        self._kept_positions = self._project_positions(self._weights, *self._kept_distances)
        return self

    def init_state(self, batch: int) -> EncoderState:
        """The state of ``batch`` streams that have not begun."""
        c, like = self.config, self.pre_encode.out.weight
        widths = self.pre_encode.widths
        channels = (1, c.subsampling_conv_channels, c.subsampling_conv_channels)
        first, second, third = (like.new_zeros(batch, n, 1, w) for n, w in zip(channels, widths, strict=False))
        cache = (c.n_layers, 2, batch, c.n_heads, c.left_context_frames, c.d_model // c.n_heads)
        return EncoderState(
            frames=torch.zeros(batch, dtype=torch.int64),
            subsampling=(first, second, third),
            attention=like.new_zeros(cache),
            conv=like.new_zeros(c.n_layers, batch, c.conv_kernel_size - 1, c.d_model),
        )

    def step(
        self,
        mel: Tensor,
        state: EncoderState | None,
        *,
        slots: Tensor,
        chunk_frames: Tensor,
        left_frames: Tensor | None = None,
        outputs: list[Tensor] | None = None,
    ) -> tuple[Tensor, EncoderState | None]:
        """Encodes the next frames of each row.

        Args:
            mel: ``[B, 8T, mel_bins]``: for a row that has produced ``k`` frames, slot ``s`` is mel frame
                ``8k - 7 + s``. Slots before the audio and beyond ``slots`` may hold anything.
            state: The past of the rows, or None for whole inputs with neither past nor future.
            slots: ``int64[B]`` on the host: slots of each row that are real (the leading seven of a new
                stream counted in). A row yields ``ceil(slots / 8)`` frames, and only its last step may have
                a number that is not a multiple of eight.
            chunk_frames: ``int64[B]`` on the host: look-ahead + 1 of each row. The frames of a step are cut
                into chunks from its first frame on; a frame sees its own chunk and the left context before it.
            left_frames: ``int64[B]`` on the host: left context of each row of whole inputs, in the place of the
                model's own. Training only.
            outputs: Takes what each layer makes of whole inputs, ``[B, T, d_model]``. Training only.

        Returns:
            Encoder frames ``[B, T, d_model]`` (rows are zero beyond their own frames only where a mask was
            needed; read ``ceil(slots / 8)`` of them) and the state after them (None if ``state`` is None).
        """
        if self.graphs is not None and state is not None:
            replayed = self.graphs.step(mel, state, slots, chunk_frames)
            if replayed is not None:
                return replayed
        cached = 0 if state is None else self.config.left_context_frames
        seen = torch.zeros_like(slots) if state is None else state.frames
        shape = self.shape(mel, seen, slots)
        left = self.config.left_context_frames if left_frames is None else left_frames[:, None, None]
        visible = self._visible(mel.shape[1] // SUBSAMPLING_FACTOR, cached, left, seen, shape.frames, chunk_frames)
        shape = shape._replace(visible=None if visible is None else visible.to(mel.device))
        x, after = self.run(mel, None if state is None else state.caches, shape, outputs)
        return x, None if after is None else EncoderState(seen + shape.frames, *after)

    def _conformer_layers(self) -> Iterator[_Layer]:
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            yield layer

    # ---------------------------------------------------------------------------------------------- one step

    def shape(self, mel: Tensor, seen: Tensor, slots: Tensor) -> StepShape:
        """Lengths and masks of a step, attention's aside; ``seen`` and ``slots`` are on the host."""
        S = mel.shape[1]
        T = S // SUBSAMPLING_FACTOR
        frames = _halved(slots, STAGES)
        uniform = bool((frames == T).all())
        masks: tuple[Tensor | None, ...] = (None,) * (STAGES + 1)
        if bool((seen == 0).any()) or bool((slots != S).any()):
            masks = tuple(mask.to(mel.device) for mask in _subsampling_masks(S, seen, slots))
        return StepShape(
            frames=frames,
            subsampling_masks=masks,
            visible=None,
            bias=None,
            conv_mask=None if uniform else _real_frames(T, frames).to(mel.device),
            newest=None if uniform else frames[:, None].to(mel.device),
        )

    def masked(self, T: int, seen: Tensor, slots: Tensor, chunk_frames: Tensor) -> StepShape:
        """The shape of a step of ``T`` frames from full caches, every mask of it there.

        ``int64[B]`` each, as in :meth:`step`. They may be on any device, where the masks are made without asking for a
        value. A row without slots stays as it was.
        """
        frames, cached = _halved(slots, STAGES), self.config.left_context_frames
        return StepShape(
            frames=frames,
            subsampling_masks=tuple(_subsampling_masks(T * SUBSAMPLING_FACTOR, seen, slots)),
            visible=_visible_keys(T, cached, cached, seen, frames, chunk_frames),
            bias=None,
            conv_mask=_real_frames(T, frames),
            newest=frames[:, None],
        )

    @staticmethod
    def _visible(
        T: int, cached: int, left: int | Tensor, seen: Tensor, frames: Tensor, chunk_frames: Tensor
    ) -> Tensor | None:
        """:func:`_visible_keys` on the host; None if every frame sees every key."""
        if bool((chunk_frames >= T).all() & (frames == T).all() & (seen >= cached).all()):
            return None
        return _visible_keys(T, cached, left, seen, frames, chunk_frames)

    def run(
        self, mel: Tensor, past: Caches | None, shape: StepShape, outputs: list[Tensor] | None = None
    ) -> tuple[Tensor, Caches | None]:
        """What :meth:`step` computes on the device, from lengths and masks to encoder frames and the new caches."""
        weights = self.weights()
        x, subsampling = self.subsample(mel, None if past is None else past.subsampling, shape)
        B, T, D = x.shape
        # The layers see one list of frames, [B * T, D]: only attention and convolution ask which row each is of.
        x = x.reshape(B * T, D)
        cached = 0 if past is None else self.config.left_context_frames
        positions = self.positions(weights, cached + T - 1, cached + 2 * T - 1)
        if past is None:
            for w, p in zip(weights, positions, strict=True):
                x = self.layer(x, w, p, None, shape)
                if outputs is not None:
                    outputs.append(x.view(B, T, D))
            return x.view(B, T, D), None
        # The caches grow by T; those after the step are views of their newest part.
        attention, conv = past.room or (_joined([past.attention], 2, 4, T)[1], _joined([past.conv], 1, 2, T)[1])
        for w, p, *room in zip(weights, positions, attention, conv, strict=True):
            x = self.layer(x, w, p, Room(*room), shape)
        after = Caches(
            subsampling=subsampling,
            attention=_newest(attention, cached, 4, shape.newest, row_dim=2),
            conv=_newest(conv, self.config.conv_kernel_size - 1, 2, shape.newest, row_dim=1),
        )
        return x.view(B, T, D), after

    def weights(self) -> list[LayerWeights]:
        """Every layer's weights as the step reads them."""
        return self._weights or [layer.weights(frozen=False) for layer in self._conformer_layers()]

    def subsample(
        self, mel: Tensor, past: tuple[Tensor, Tensor, Tensor] | None, shape: StepShape
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """``[B, 8T, mel_bins]`` to the first layer's input ``[B, T, d_model]``, and the stages' new past."""
        x, after = self.pre_encode(mel, past, shape)
        if self.config.xscaling:
            x = x * math.sqrt(self.config.d_model)
        return self._drop(x), after

    def layer(self, x: Tensor, w: LayerWeights, positions: Positions, past: Room | None, shape: StepShape) -> Tensor:
        """One Conformer layer: half feed-forward, attention, convolution, half feed-forward, norm.

        ``past`` is the layer's part of the caches, where the frames' own keys, values and inputs are written.
        """
        B, D, H = len(shape.frames), x.shape[1], self.config.n_heads
        T = len(x) // B
        x, qkv = self.enter(x, w)
        new = qkv.view(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)
        query, keys, values = new.unbind()
        if past is not None:
            past.attention[:, :, :, -T:] = new[1:]
            keys, values = past.attention.unbind()
        x = self.add_attention(x, w, self.attend(query, keys, values, positions, shape.visible, shape.bias))
        y = _masked(self.gate_channels(x, w).view(B, T, D), shape.conv_mask)
        if past is None:
            y = F.pad(y, (0, 0, self.config.conv_kernel_size - 1, 0))
        else:
            past.conv[:, -T:] = y
            y = past.conv
        return self.leave(x, w, self.convolve(y, w).reshape(B * T, D))

    # A layer in the steps that the adaptive encoder takes apart; x is a list of frames, [N, D].

    def enter(self, x: Tensor, w: LayerWeights) -> tuple[Tensor, Tensor]:
        """The first half feed-forward, and queries, keys and values, ``[N, 3D]``."""
        hidden = self._drop(w.ff1[0].silu(_norm(x, w.norms[0])))
        x = w.ff1[1].add_to(x, hidden, dropout=self._rate)
        return x, w.qkv(_norm(x, w.norms[1]))

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Positions,
        visible: Tensor | None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Relative-position attention; ``query`` is ``[B, H, T, D/H]``, keys and values ``[B, H, K, D/H]``.

        ``positions`` span the distances from the last query and the first key to the first query and the last
        key. Returns ``[B * T, D]``.
        """
        by_position = self.by_distance(query, positions)
        if query.shape[2] > 1:
            by_position = _relative_shift(by_position)
        return self.mix(query, keys, values, by_position, visible, bias)

    def by_distance(self, query: Tensor, positions: Positions) -> Tensor:
        """What ``positions`` add to the scores of ``query``, ``[B, H, T, positions]``."""
        B, H, T, width = query.shape
        # Heads first: the positions are the same for all rows, and one product a head serves them all.
        of_all_rows = query.transpose(0, 1).reshape(H, B * T, width)
        by_distance = torch.baddbmm(positions.bias, of_all_rows, positions.keys)
        return by_distance.view(H, B, T, -1).transpose(0, 1)

    def mix(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        by_position: Tensor,
        visible: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attention, given what positions add to the scores, ``[B, H, T, K]``; the rest as in :meth:`attend`."""
        B, H, T, width = query.shape
        K = keys.shape[2]
        scores = torch.baddbmm(
            by_position.reshape(B * H, T, K),
            query.reshape(B * H, T, width),
            keys.reshape(B * H, K, width).transpose(1, 2),
        ).float()
        if bias is not None:
            scores = (scores.view(B, H, T, K) + bias).view(B * H, T, K)
        if visible is not None:
            scores = scores.view(B, H, T, K).masked_fill(~visible, MASKED_SCORE).view(B * H, T, K)
        weights = self._drop(torch.softmax(scores, -1).to(query.dtype))
        mixed = torch.bmm(weights, values.reshape(B * H, K, width))
        return mixed.view(B, H, T, width).transpose(1, 2).reshape(B * T, H * width)

    def add_attention(self, x: Tensor, w: LayerWeights, mixed: Tensor) -> Tensor:
        """What attention found, added to the frames."""
        return w.out.add_to(x, mixed, dropout=self._rate)

    def gate_channels(self, x: Tensor, w: LayerWeights) -> Tensor:
        """The convolution module up to the input of its depthwise convolution."""
        return F.glu(w.pointwise1(_norm(x, w.norms[2])), -1)

    def convolve(self, x: Tensor, w: LayerWeights) -> Tensor:
        """The causal depthwise convolution ``[B, kernel - 1 + T, D]`` to ``[B, T, D]``, its norm and activation."""
        kernel, bias = w.depthwise
        size = kernel.shape[1]
        if x.shape[1] - size < SHORT_STEP_FRAMES:
            y = (x.unfold(1, size, 1) * kernel).sum(-1)
            y = y if bias is None else y + bias
        else:
            y = F.conv1d(x.transpose(1, 2), kernel.unsqueeze(1), bias, groups=x.shape[2]).transpose(1, 2)
        return F.silu(_norm(y, w.norms[5]))

    def leave(self, x: Tensor, w: LayerWeights, convolved: Tensor) -> Tensor:
        """The end of the convolution module, the second half feed-forward and the last norm."""
        x = w.pointwise2.add_to(x, convolved, dropout=self._rate)
        hidden = self._drop(w.ff2[0].silu(_norm(x, w.norms[3])))
        x = w.ff2[1].add_to(x, hidden, dropout=self._rate)
        return _norm(x, w.norms[4])

    # --------------------------------------------------------------------------------------------- positions

    def positions(self, weights: list[LayerWeights], first: int, count: int) -> list[Positions]:
        """Every layer's positions for the distances ``first, first - 1, …``, ``count`` of them.

        They do not depend on the stream: a frozen encoder keeps those that steps use.
        """
        furthest, kept = self._kept_distances
        at = slice(furthest - first, furthest - first + count)
        if not self._kept_positions or at.start < 0 or at.stop > kept:
            return self._project_positions(weights, first, count)
        if (first, count) not in self._positions:
            views = [Positions(keys[:, :, at], bias[:, :, at]) for keys, bias in self._kept_positions]
            self._positions[first, count] = views
        return self._positions[first, count]

    @property
    def _kept_distances(self) -> tuple[int, int]:
        furthest = self.config.left_context_frames + LONG_STEP_FRAMES
        return furthest, furthest + 1 + LONG_STEP_FRAMES

    def _project_positions(self, weights: list[LayerWeights], first: int, count: int) -> list[Positions]:
        D, H = self.config.d_model, self.config.n_heads
        table = sinusoidal_positions(first, first - count + 1, D).to(self.pre_encode.out.weight)
        projected = []
        for w in weights:
            keys = F.linear(table, w.pos).view(-1, H, D // H).permute(1, 2, 0).contiguous()
            projected.append(Positions(keys, w.v_minus_u @ keys))
        return projected

    @property
    def _rate(self) -> float:
        return self.dropout if self.training else 0.0

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self._rate) if self._rate else x


def sinusoidal_positions(first: int, last: int, width: int) -> Tensor:
    """Sinusoids ``[first - last + 1, width]`` of the positions ``first, first - 1, …, last`` (fp32).

    Sines stand at even columns, cosines at odd ones (Vaswani et al. 2017, §3.5).
    """
    position = torch.arange(first, last - 1, -1, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * -(math.log(10000.0) / width))
    table = torch.zeros(position.shape[0], width)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)
    return table


def _halved(slots: Tensor, times: int) -> Tensor:
    """Slots after so many stages; half a slot counts as one."""
    return -(-slots // (1 << times))


def _subsampling_masks(width: int, seen: Tensor, slots: Tensor) -> list[Tensor]:
    """Which of ``width`` slots are real, for each stage's input and the last output: ``bool[B, 1, slots, 1]``."""
    masks, begins = [], (seen == 0).long()
    for stage in range(STAGES + 1):
        slot = torch.arange(width >> stage, device=slots.device)
        # Slots [-lead, …] halve with their zero kept in place; see the module's text.
        begin, end = begins * (LEADING_SLOTS >> stage), _halved(slots, stage)
        masks.append(((slot >= begin[:, None]) & (slot < end[:, None]))[:, None, :, None])
    return masks


def _visible_keys(
    T: int, cached: int, left: int | Tensor, seen: Tensor, frames: Tensor, chunk_frames: Tensor
) -> Tensor:
    """``bool[B, 1, T, cached + T]``: which key each new frame sees."""
    query = torch.arange(T, device=seen.device)[None, :, None]
    key = torch.arange(-cached, T, device=seen.device)[None, None, :]
    chunk = chunk_frames[:, None, None]
    start = query // chunk * chunk
    end = torch.minimum(start + chunk, frames[:, None, None])
    oldest = torch.maximum(start - left, -seen.clamp(max=cached)[:, None, None])
    return ((key >= oldest) & (key < end))[:, None]


def _real_frames(T: int, frames: Tensor) -> Tensor:
    """``bool[B, T, 1]``: which frames of each row are real."""
    return (torch.arange(T, device=frames.device) < frames[:, None])[:, :, None]


def _norm(x: Tensor, w: tuple[Tensor, Tensor]) -> Tensor:
    return F.layer_norm(x, w[0].shape, w[0], w[1], 1e-5)


def _relative_shift(x: Tensor) -> Tensor:
    """Row ``t`` of ``[B, H, T, N + T - 1]`` moved left by ``T - 1 - t``: scores by distance become scores by key.

    The same memory read with a row stride that is one shorter (the trick of Transformer-XL, Appendix B,
    without its padding copy).
    """
    B, H, T, W = x.shape
    return x.as_strided((B, H, T, W - T + 1), (x.stride(0), x.stride(1), W - 1, 1), x.storage_offset() + T - 1)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _joined(caches: list[Tensor], row_dim: int, dim: int, room: int) -> tuple[Tensor, Tensor]:
    """The rows of several caches in one, and the same memory with so many more steps along ``dim``."""
    like, shape = caches[0], list(caches[0].shape)
    shape[row_dim], shape[dim] = sum(cache.shape[row_dim] for cache in caches), shape[dim] + room
    roomy = like.new_empty(shape)
    joined = roomy.narrow(dim, 0, like.shape[dim])
    torch.cat(caches, row_dim, out=joined)
    return joined, roomy


def _newest(x: Tensor, length: int, dim: int, newest: Tensor | None, *, row_dim: int = 0) -> Tensor:
    """The last ``length`` steps of each row: ``x`` holds ``length`` old ones along ``dim``, then the new ones.

    ``newest`` (``int64[B, 1]``) says how many of the new ones are real; None: all of them.
    """
    if newest is None:
        return x.narrow(dim, x.shape[dim] - length, length)
    index = newest + torch.arange(length, device=x.device)  # [B, length]
    view, size = [1] * x.dim(), list(x.shape)
    view[row_dim], view[dim] = index.shape
    size[dim] = length
    return x.gather(dim, index.view(view).expand(size))


class _Subsampling(nn.Module):
    """Eight mel frames to one: three causal stride-2 convolutions, the last two depthwise-separable."""

    def __init__(self, mel_bins: int, channels: int, d_model: int) -> None:
        super().__init__()
        self.widths = [mel_bins]
        for _ in range(STAGES):
            self.widths.append(self.widths[-1] // 2 + 1)

        def depthwise() -> nn.Conv2d:
            return _DepthwiseConv2d(channels, channels, 3, stride=2, padding=(0, 2), groups=channels)

        # Positions in the list are NeMo's state-dict names; the ReLUs have no weights.
        self.conv = nn.ModuleList(
            [
                nn.Conv2d(1, channels, 3, stride=2, padding=(0, 2)),
                nn.ReLU(),
                depthwise(),
                nn.Conv2d(channels, channels, 1),
                nn.ReLU(),
                depthwise(),
                nn.Conv2d(channels, channels, 1),
                nn.ReLU(),
            ]
        )
        self.out = nn.Linear(channels * self.widths[-1], d_model)
        self._frozen: list[list[Convolution]] | None = None

    def freeze(self) -> None:
        """Prepares for inference on the device where the weights are."""
        convolutions = [(i, module) for i, module in enumerate(self.conv) if isinstance(module, nn.Conv2d)]
        first, *rest = (Convolution(x, relu=isinstance(self.conv[i + 1], nn.ReLU)) for i, x in convolutions)
        self._frozen = [[first], rest[:2], rest[2:]]

    def forward(
        self, mel: Tensor, past: tuple[Tensor, Tensor, Tensor] | None, shape: StepShape
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """``[B, 8T, mel_bins]`` to ``[B, T, d_model]`` and the last input frame of each stage."""
        x, masks = mel[:, None], shape.subsampling_masks
        modules = list(self.conv)
        stages: Sequence[Sequence[Callable[[Tensor], Tensor]]] = self._frozen or (
            modules[:2],
            modules[2:5],
            modules[5:],
        )
        caches = []
        for i, stage in enumerate(stages):
            x = _masked(x, masks[i])
            before = x.new_zeros(x.shape[0], x.shape[1], 1, x.shape[3]) if past is None else past[i]
            # Causal in time: the carried frame stands left.
            x = torch.cat([before.contiguous(memory_format=torch.channels_last), x], 2)
            per_frame = SUBSAMPLING_FACTOR >> i
            caches.append(_newest(x, 1, 2, None if shape.newest is None else shape.newest * per_frame))
            if i == 0:  # what has one channel stands in either order, and has to say so for the next to keep to it
                x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).copy_(x)
            for module in stage:
                x = module(x)
            # NeMo pads frequency as it pads time, (2, 1). Two on either side make one output too many of an odd width.
            x = x[..., : self.widths[i + 1]]
        x = _masked(x, masks[STAGES])
        B, C, T, W = x.shape
        return self.out(x.transpose(1, 2).reshape(B, T, C * W)), (caches[0], caches[1], caches[2])


class _DepthwiseConv2d(nn.Conv2d):
    """In the weights' own dtype and channels last: on a CPU, bf16 gradients and other layouts take 12 times as long."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.weight.dtype, memory_format=torch.channels_last)
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)


class _Layer(nn.Module):
    """Holds one layer's parameters under NeMo's names; the arithmetic is in :class:`FastConformer`."""

    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.norm_feed_forward1 = nn.LayerNorm(c.d_model)
        self.feed_forward1 = _FeedForward(c)
        self.norm_self_att = nn.LayerNorm(c.d_model)
        self.self_attn = _Attention(c)
        self.norm_conv = nn.LayerNorm(c.d_model)
        self.conv = _Convolution(c)
        self.norm_feed_forward2 = nn.LayerNorm(c.d_model)
        self.feed_forward2 = _FeedForward(c)
        self.norm_out = nn.LayerNorm(c.d_model)
        self.lookahead = Scheduler(c.d_model, c.gate_hidden, c.gate_frames) if c.adaptive else None

    def weights(self, *, frozen: bool) -> LayerWeights:
        """The parameters as the step reads them."""
        attention, conv = self.self_attn, self.conv
        scale = attention.pos_bias_u.shape[1] ** -0.5
        q, k, v = attention.linear_q, attention.linear_k, attention.linear_v
        qkv = torch.cat([q.weight * scale, k.weight, v.weight])
        # (q + u) K + (q + v) P = (q + u) (K + P) + (v - u) P, whose last term belongs to the positions alone.
        u, v_minus_u = attention.pos_bias_u * scale, (attention.pos_bias_v - attention.pos_bias_u) * scale
        none = torch.zeros_like(u.flatten())
        biases = [none if linear.bias is None else linear.bias for linear in (q, k, v)]
        qkv_bias = torch.cat([biases[0] * scale + u.flatten(), *biases[1:]])
        norms = (
            self.norm_feed_forward1,
            self.norm_self_att,
            self.norm_conv,
            self.norm_feed_forward2,
            self.norm_out,
            conv.batch_norm,
        )
        return LayerWeights(
            norms=tuple((norm.weight, norm.bias) for norm in norms),
            ff1=self.feed_forward1.weights(frozen=frozen),
            ff2=self.feed_forward2.weights(frozen=frozen),
            qkv=Linear(qkv, qkv_bias, frozen=frozen),
            out=Linear(attention.linear_out.weight, attention.linear_out.bias, frozen=frozen),
            v_minus_u=v_minus_u[:, None],
            pos=attention.linear_pos.weight,
            pointwise1=Linear(conv.pointwise_conv1.weight[:, :, 0], conv.pointwise_conv1.bias, frozen=frozen),
            depthwise=(conv.depthwise_conv.weight[:, 0], conv.depthwise_conv.bias),
            pointwise2=Linear(conv.pointwise_conv2.weight[:, :, 0], conv.pointwise_conv2.bias, frozen=frozen),
            scheduler=self.lookahead,
        )

    def release(self) -> None:
        """Gives up the matrices that frozen weights have replaced."""
        kept = (self.self_attn.linear_pos, self.conv.depthwise_conv)
        for part in (self.feed_forward1, self.self_attn, self.conv, self.feed_forward2):
            for module in part.modules():
                if isinstance(module, nn.Linear | nn.Conv1d) and module not in kept:
                    module.weight.data = module.weight.data.new_empty(0)


class _FeedForward(nn.Module):
    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(c.d_model, c.d_model * c.ff_expansion_factor, bias=c.use_bias)
        self.linear2 = nn.Linear(c.d_model * c.ff_expansion_factor, c.d_model, bias=c.use_bias)

    def weights(self, *, frozen: bool) -> tuple[Linear, Linear]:
        first = Linear(self.linear1.weight, self.linear1.bias, frozen=frozen)
        return first, Linear(self.linear2.weight, self.linear2.bias, scale=0.5, frozen=frozen)


class _Attention(nn.Module):
    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.linear_q = nn.Linear(c.d_model, c.d_model, bias=c.use_bias)
        self.linear_k = nn.Linear(c.d_model, c.d_model, bias=c.use_bias)
        self.linear_v = nn.Linear(c.d_model, c.d_model, bias=c.use_bias)
        self.linear_out = nn.Linear(c.d_model, c.d_model, bias=c.use_bias)
        self.linear_pos = nn.Linear(c.d_model, c.d_model, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(c.n_heads, c.d_model // c.n_heads))
        self.pos_bias_v = nn.Parameter(torch.zeros(c.n_heads, c.d_model // c.n_heads))


class _Convolution(nn.Module):
    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.pointwise_conv1 = nn.Conv1d(c.d_model, 2 * c.d_model, 1, bias=c.use_bias)
        self.depthwise_conv = nn.Conv1d(c.d_model, c.d_model, c.conv_kernel_size, groups=c.d_model, bias=c.use_bias)
        self.batch_norm = nn.LayerNorm(c.d_model)  # a layer norm; the name is the published models' one
        self.pointwise_conv2 = nn.Conv1d(c.d_model, c.d_model, 1, bias=c.use_bias)
