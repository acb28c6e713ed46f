"""Steps of a few fixed shapes, captured as CUDA graphs and replayed.

A streaming step is a thousand small kernels, and a GPU is done with most of them before the host has launched the next.
A graph launches them all at once. What it replays is fixed: the kernels, their shapes and the memory that they work in.
So a step is computed in memory of its own, for a number of rows and of new frames or tokens that is rounded up, and all
that tells rows apart (lengths, masks, positions) is made on the device from numbers that are copied there. Rows and
frames that nobody brought are hidden as the padding of any batch is. What a step returns is copied out and stays. Steps
that are too large for the shapes here run as they would without graphs.

Capturing is a function from a computation to its replay, :data:`Capture`: everything else works without a GPU, too.

Source: "CUDA Graphs" in PyTorch's notes on CUDA semantics, for warming up, static memory and shared pools.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Final, Generic, NamedTuple, TypeVar, cast
from weakref import WeakValueDictionary, proxy

import torch
from torch import Tensor

from models.config import SUBSAMPLING_FACTOR
from models.fastconformer import LONG_STEP_FRAMES, EncoderState, FastConformer
from models.kv_cache import KvCache
from models.llm import Llm, StepShape
from models.llm_config import RopeConfig

#: Rows of a step.
ROW_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: New tokens of each row in a language model's step: one, a word or a draft. Prompts are longer, and rare.
TOKEN_BUCKETS: Final = (1, 2, 4, 8, 16)
#: Graphs of a model at the same time, those used last. An encoder of five chunk sizes has 45.
MAX_GRAPHS: Final = 64
#: A language model's past is copied into the memory of the graph. Beyond this size, that takes as long as it saves.
MAX_PAST_BYTES: Final = 256 * 2**20
_MIN_KEYS: Final = 128
_WARM_UP: Final = 3

#: Computes in memory that does not move, without a value from the host and without giving one to it.
Compute = Callable[[], Tensor]
#: Prepares to compute the same again and again. What the replay returns, the next one overwrites.
Capture = Callable[[Compute], Compute]

_capturing = Lock()  # PyTorch captures one graph at a time
logger = logging.getLogger(__name__)
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class CudaCapture:
    """Captures on a GPU. All graphs of one share their working memory, as one runs after the other.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def __call__(self, compute: Compute) -> Compute:
        """Captures; see :data:`Capture`.

        Raises:
            RuntimeError: There is not enough memory, or the computation cannot be captured.
        """
        with _capturing, torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):  # libraries choose kernels and make workspaces at the first calls
                for _ in range(_WARM_UP):
                    compute()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the GPU meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                output = compute()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class Kept(Generic[K, V]):
    """Values by key, made when they are first asked for; the least recently used go.

    What cannot be made, for want of memory perhaps, is None from then on.

    Args:
        most: How many are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[K, V | None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K, make: Callable[[], V]) -> V | None:
        """The value of a key."""
        if key not in self._values:
            # The new one first: capturing waits until the GPU has done what the old one was asked for.
            self._values[key] = _tried(key, make)
            while len(self._values) > self._most:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]


def _tried(key: Hashable, make: Callable[[], V]) -> V | None:
    try:
        return make()
    except RuntimeError as error:
        logger.warning("there is no graph for steps of %s, which run without: %s", key, error)
        return None


def bucket(count: int, sizes: Sequence[int]) -> int | None:
    """The first of some ascending sizes that holds so many; None if none does."""
    return next((size for size in sizes if size >= count), None)


# ------------------------------------------------------------------------------------------------------- the encoder


class EncoderGraphs:
    """Steps of an encoder that looks ahead in chunks: a graph for each number of rows and each chunk size.

    Args:
        encoder: Frozen.
        capture: Prepares a replay.
        most: Graphs that are kept.
    """

    def __init__(self, encoder: FastConformer, capture: Capture, *, most: int = MAX_GRAPHS) -> None:
        sizes = sorted({frames + 1 for frames in encoder.config.lookahead_frames})
        self._encoder = cast(FastConformer, proxy(encoder))  # it has these, and is to go when nobody else has it
        self._capture = capture
        self._frames = [size for size in sizes if size <= LONG_STEP_FRAMES]
        self._graphs: Kept[tuple[int, int], _EncoderGraph] = Kept(most)
        self._states: WeakValueDictionary[int, EncoderState] = WeakValueDictionary()
        self._lock = Lock()  # a model may be shared by threads, and its graphs' memory is one

    def __len__(self) -> int:
        return len(self._graphs)

    @torch.no_grad()
    def step(
        self, mel: Tensor, state: EncoderState, slots: Tensor, chunk_frames: Tensor
    ) -> tuple[Tensor, EncoderState] | None:
        """:meth:`FastConformer.step`; None if there is no graph for such a step."""
        rows, T = bucket(mel.shape[0], ROW_BUCKETS), bucket(mel.shape[1] // SUBSAMPLING_FACTOR, self._frames)
        if rows is None or T is None:
            return None
        with self._lock:
            graph = self._graphs.get((rows, T), functools.partial(self._make, rows, T))
            return None if graph is None else graph(mel, state, slots, chunk_frames)

    def _make(self, rows: int, T: int) -> _EncoderGraph:
        state = self._states.get(rows)
        if state is None:  # one for all steps of so many rows
            with torch.inference_mode(False):
                state = self._states[rows] = self._encoder.init_state(rows)
        return _EncoderGraph(self._encoder, self._capture, state, T)


class _EncoderGraph:
    """The step of ``T`` frames of as many rows as a state has, which is where it finds and leaves its caches."""

    def __init__(self, encoder: FastConformer, capture: Capture, state: EncoderState, T: int) -> None:
        rows, device = len(state.frames), state.conv.device
        self._state = state  # held, as others share it only as long as somebody does
        with torch.inference_mode(False):
            self._mel = state.conv.new_zeros(rows, T * SUBSAMPLING_FACTOR, encoder.mel_bins)
            self._lengths = _padded(rows, [torch.zeros(0)] * 3).to(device)

        def compute() -> Tensor:
            shape = encoder.masked(T, *self._lengths.unbind())
            encoded, after = encoder.run(self._mel, state.caches, shape)
            assert after is not None
            for cache, new in zip(state.caches.first(rows), after.first(rows), strict=True):
                cache.copy_(new)
            return encoded

        self._replay = capture(compute)

    def __call__(
        self, mel: Tensor, state: EncoderState, slots: Tensor, chunk_frames: Tensor
    ) -> tuple[Tensor, EncoderState]:
        B, S, _ = mel.shape
        caches = self._state.caches.first(B)
        for cache, old in zip(caches, state.caches.first(B), strict=True):
            cache.copy_(old)
        self._mel.zero_()  # a mask cannot hide a NaN of other rows
        self._mel[:B, :S].copy_(mel)
        self._lengths.copy_(_padded(len(self._mel), [state.frames, slots, chunk_frames]))
        encoded, frames = self._replay()[:B, : S // SUBSAMPLING_FACTOR].clone(), -(-slots // SUBSAMPLING_FACTOR)
        first, second, third, attention, conv = (cache.clone(memory_format=torch.contiguous_format) for cache in caches)
        return encoded, EncoderState(state.frames + frames, (first, second, third), attention, conv)


def _padded(rows: int, lengths: Sequence[Tensor]) -> Tensor:
    """Frames seen, slots and chunk sizes of all rows, ``int64[3, rows]``; those without a stream bring nothing."""
    padded = torch.tensor([[0], [0], [1]]).repeat(1, rows)
    padded[:, : len(lengths[0])] = torch.stack(list(lengths))
    return padded


# ------------------------------------------------------------------------------------------------ the language model


class FixedStep:
    """A language model's forward of fixed shape, in which nothing depends on a value on the host.

    Args:
        llm: The model, frozen.
        memory: ``[L, 2, B, H_kv, capacity, D_h]``, as in :class:`models.kv_cache.KvCache`; written in place.
        T: New tokens of each row.
    """

    def __init__(self, llm: Llm, memory: Tensor, T: int) -> None:
        c, device, B, capacity = llm.config, llm.device, memory.shape[2], memory.shape[4]
        self._llm, self._memory = llm, memory
        ropes = {c.layer_rope(i) for i in range(c.n_layers)}
        self._windows = {c.window(i) for i in range(c.n_layers)}
        with torch.inference_mode(False):
            self._tokens = torch.zeros(B, T, dtype=torch.int64, device=device)
            self._past = torch.zeros(2, B, dtype=torch.int64, device=device)  # lengths and next positions
            self._key_positions = torch.zeros(B, capacity, dtype=torch.int64, device=device)
            self._new = torch.arange(T, device=device)
            self._slots = torch.arange(capacity, device=device)
            self._rows = torch.arange(B, device=device)[:, None]
            self._frequencies: dict[RopeConfig, Tensor] = {
                rope: rope.frequencies(c.head_dim).to(device) for rope in ropes
            }

    def load(self, tokens: Tensor, lengths: Tensor, next_positions: Tensor, key_positions: Tensor) -> None:
        """What is read next, as in :class:`models.kv_cache.KvCache`; rows and tokens that are left out mean nothing.

        Args:
            tokens: ``int64[≤ B, ≤ T]``, anywhere.
            lengths: ``int64[≤ B]``: tokens before them, at most capacity - T.
            next_positions: ``int64[≤ B]``.
            key_positions: ``int64[≤ B, ≤ capacity]``.
        """
        rows, T = tokens.shape
        self._tokens[:rows, :T].copy_(tokens)
        self._past.zero_()
        self._past[:, :rows].copy_(torch.stack([lengths, next_positions]))
        if any(self._windows):
            self._key_positions[:rows, : key_positions.shape[1]].copy_(key_positions)

    def compute(self) -> Tensor:
        """:meth:`models.llm.Llm.hidden` of all rows, ``[B, T, d_model]``; the memory then holds their tokens."""
        lengths, next_positions = self._past.unbind()
        positions, slots = next_positions[:, None] + self._new, lengths[:, None] + self._new
        rotations = {}
        for rope, frequency in self._frequencies.items():
            angle = (positions.float()[:, :, None] * frequency)[:, :, None]
            rotations[rope] = (angle.cos(), angle.sin())
        see = self._slots <= slots[:, :, None]
        # Padding sees itself, too: attention over nothing at all would be NaN.
        key_positions = self._key_positions.scatter(1, slots, positions)
        behind = positions[:, :, None] - key_positions[:, None]
        masks: dict[int, Tensor | None] = {
            window: self._llm.folded(see & (behind < window) if window else see) for window in self._windows
        }
        shape = StepShape(rotations, masks, len(self._slots), 0, (self._rows, slots))
        return self._llm.run(self._tokens, self._memory, shape)


class LlmGraphs:
    """Steps of a language model: a graph for each number of rows, of new tokens and of slots of the past.

    A cache is a value, and its memory is not the graph's, so the past is copied in and what is new is copied out.

    Args:
        llm: Frozen.
        capture: Prepares a replay.
        most: Graphs that are kept.
        max_past_bytes: Of a graph's past; steps behind a larger one are not run.
    """

    def __init__(
        self, llm: Llm, capture: Capture, *, most: int = MAX_GRAPHS, max_past_bytes: int = MAX_PAST_BYTES
    ) -> None:
        self._llm = cast(Llm, proxy(llm))
        self._capture, self._max_past_bytes = capture, max_past_bytes
        self._graphs: Kept[tuple[int, int, int], _LlmGraph] = Kept(most)
        self._memories: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._graphs)

    @torch.no_grad()
    def hidden(self, tokens: Tensor, cache: KvCache) -> Tensor | None:
        """Reads ``int64[B, T]`` behind a cache with room for them, whose memory takes them in.

        Returns:
            As :meth:`models.llm.Llm.hidden`, ``[B, T, d_model]``; None if there is no graph for such a step.
        """
        B, T = tokens.shape
        rows, new = bucket(B, ROW_BUCKETS), bucket(T, TOKEN_BUCKETS)
        if rows is None or new is None:
            return None
        keys = max(_MIN_KEYS, 1 << (int(cache.lengths.max()) + new - 1).bit_length())
        one_key = cache.memory[:, :, 0, :, 0]
        if rows * keys * one_key.numel() * one_key.element_size() > self._max_past_bytes:
            return None
        with self._lock:
            graph = self._graphs.get((rows, new, keys), functools.partial(self._make, rows, new, keys))
            return None if graph is None else graph.hidden(tokens, cache)

    def _make(self, rows: int, T: int, keys: int) -> _LlmGraph:
        c = self._llm.config
        held = self._memories.get(rows * keys)
        if held is None:  # one for all pasts of the same size
            with torch.inference_mode(False):
                held = self._memories[rows * keys] = self._llm.init_state(rows, capacity=keys).memory.flatten()
        memory = held.view(c.n_layers, 2, rows, c.n_kv_heads, keys, c.head_dim)
        step = FixedStep(self._llm, memory, T)
        return _LlmGraph(held, memory, step, self._capture(step.compute))


class _LlmGraph(NamedTuple):
    """One shape's step, and its past as it is shared and as the step sees it."""

    held: Tensor
    memory: Tensor  # [L, 2, rows, H_kv, keys, D_h]
    step: FixedStep
    replay: Compute

    def hidden(self, tokens: Tensor, cache: KvCache) -> Tensor:
        """As :meth:`LlmGraphs.hidden`."""
        B, T = tokens.shape
        memory, past = self.memory, min(self.memory.shape[4], cache.capacity)
        memory[:, :, :B, :, :past].copy_(cache.memory[:, :, :, :, :past])
        memory[:, :, :B, :, past:].zero_()  # a mask cannot hide a NaN of other rows
        self.step.load(tokens, cache.lengths, cache.next_positions, cache.positions[:, :past])
        hidden = self.replay()[:B, :T].clone()
        row = torch.arange(B, device=tokens.device)[:, None]
        slots = (cache.lengths[:, None] + torch.arange(T)).to(tokens.device)
        cache.memory[:, :, row, :, slots] = memory[:, :, row, :, slots]
        return hidden
