"""Steps in fixed memory are the steps that they stand for, whoever shares the memory, and never ask the host."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, cast
from unittest.mock import create_autospec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import graphs
from models.fastconformer import EncoderState, FastConformer
from models.graphs import Compute, CudaCapture, EncoderGraphs, FixedStep, Kept, LlmGraphs, bucket
from models.kv_cache import KvCache
from models.llm import Llm
from models.llm_config import LlmConfig, RopeConfig
from models.recognizer import RecognizerNet
from streaming.encoder import EncoderStream, encode
from streaming.translation import Interleaved
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
SIZES = [1, 2, 4, 7]
VOCAB = 50
SHAPES = {
    "plain": LlmConfig(VOCAB, d_model=24, d_ff=40, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8),
    "everything": LlmConfig(
        VOCAB, d_model=24, d_ff=40, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, windows=(6, 0, 40),
        local_rope=RopeConfig(theta=50.0), activation="gelu_tanh", tied=False, qk_norm=True, post_norms=True,
        embedding_scale=2.3, attention_softcap=3.0,
    ),
}  # fmt: skip
few = settings(max_examples=12, deadline=None)


def again(compute: Compute) -> Compute:
    """A stand-in for a capture: computes in the same memory and answers in the same memory."""
    compute()
    with torch.inference_mode(False), torch.no_grad():
        output = compute().clone()

    def replay() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return output.copy_(compute())

    return replay


def once(compute: Compute) -> Compute:
    """A capture that keeps only what it has found, as a GPU's does."""
    output = compute()
    return lambda: output


@cache
def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> FastConformer:
    return tiny.net(seed=seed).to(dtype).encoder.freeze()


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


# ------------------------------------------------------------------------------------------------------- the encoder


class Watched:
    """The steps of an encoder beside their replays: both from the states that they have left."""

    def __init__(self, encoder: FastConformer, most: int) -> None:
        self.encoder, self.graphs = encoder, EncoderGraphs(encoder, again, most=most)
        self.replayed = 0

    def __call__(
        self, mel: Tensor, pasts: list[tuple[EncoderState, EncoderState]], slots: Tensor, chunk: Tensor
    ) -> list[tuple[EncoderState, EncoderState]]:
        eager, replayed = (EncoderState.cat([pair[i] for pair in pasts]) for i in (0, 1))
        expected, after = self.encoder.step(mel, eager, slots=slots, chunk_frames=chunk)
        held = [cache.clone() for cache in replayed.caches.first(len(slots))]
        found = self.graphs.step(mel, replayed, slots, chunk)
        for before, now in zip(held, replayed.caches.first(len(slots)), strict=True):
            assert torch.equal(before, now), "a step changes no state that it was given"
        assert found is not None and after is not None
        self.replayed += 1
        got, now = found
        for row, count in enumerate((-(-slots // 8)).tolist()):
            close(got[row, :count], expected[row, :count])
        assert torch.equal(now.frames, after.frames)
        for mine, theirs in zip(now.caches.first(len(slots)), after.caches.first(len(slots)), strict=True):
            assert mine.is_contiguous() and mine.shape == theirs.shape
            close(mine, theirs)
        return list(zip(after.rows(), now.rows(), strict=True))


@few
@given(seed=st.integers(0, 5), most=st.sampled_from([1, 2, 64]), data=st.data())
def test_replayed_steps_are_the_eager_ones(seed: int, most: int, data: st.DataObject) -> None:
    """Streams that begin, end and pause as they like, with chunks of any size; graphs that go and come back."""
    encoder, step = net(seed), Watched(net(seed), most)
    streams = data.draw(st.integers(1, 5))
    pasts = [(encoder.init_state(1), encoder.init_state(1)) for _ in range(streams)]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(data.draw(st.integers(1, 8))):
        part = data.draw(st.lists(st.sampled_from(range(streams)), min_size=1, unique=True))
        T = data.draw(st.integers(1, 7))
        slots = torch.tensor([data.draw(st.integers(1, 8 * T)) for _ in part])
        chunk = torch.tensor([data.draw(st.sampled_from([*SIZES, 15])) for _ in part])
        mel = torch.randn(len(part), 8 * T, 80, generator=generator) * 3 - 6
        for stream, past in zip(part, step(mel, [pasts[i] for i in part], slots, chunk), strict=True):
            pasts[stream] = past
            if data.draw(st.sampled_from([False, False, True])):  # ends, and another begins in its place
                pasts[stream] = (encoder.init_state(1), encoder.init_state(1))
    assert 1 <= len(step.graphs) <= most


def test_a_state_lives_on_while_others_step() -> None:
    encoder, steps = net(), EncoderGraphs(net(), again)
    one = dict(slots=torch.tensor([16]), chunk_frames=torch.tensor([2]))
    encoded, kept = steps.step(torch.randn(1, 16, 80), encoder.init_state(1), **one)  # type: ignore[misc]
    before = encoded.clone(), *(cache.clone() for cache in kept.caches.first(1))
    steps.step(torch.randn(1, 16, 80), encoder.init_state(1), **one)
    assert len(steps) == 1
    for held, now in zip(before, (encoded, *kept.caches.first(1)), strict=True):
        assert torch.equal(held, now)


def test_a_broken_row_leaves_nothing_in_the_memory_that_the_next_one_finds() -> None:
    encoder, steps = net(), EncoderGraphs(net(), again)
    lengths = torch.full((2,), 32), torch.full((2,), 4)
    steps.step(torch.full((2, 32, 80), torch.nan), encoder.init_state(2), *lengths)
    mel = torch.randn(2, 24, 80)
    lengths = torch.full((2,), 24), torch.full((2,), 4)
    expected, _ = encoder.step(mel, encoder.init_state(2), slots=lengths[0], chunk_frames=lengths[1])
    found = steps.step(mel, encoder.init_state(2), *lengths)
    assert found is not None and len(steps) == 1
    close(found[0], expected)


def test_a_step_too_large_for_the_graphs_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "ROW_BUCKETS", (1, 2))
    encoder = tiny.net().encoder.freeze()
    for B, T, replays in ((3, 1, False), (1, 8, False), (2, 7, True)):
        steps = EncoderGraphs(encoder, again)
        mel, lengths = torch.randn(B, 8 * T, 80), (torch.full((B,), 8 * T), torch.full((B,), 7))
        assert (steps.step(mel, encoder.init_state(B), *lengths) is not None) is replays
        encoder.graphs = None
        expected, _ = encoder.step(mel, encoder.init_state(B), slots=lengths[0], chunk_frames=lengths[1])
        encoder.graphs = steps
        got, state = encoder.step(mel, encoder.init_state(B), slots=lengths[0], chunk_frames=lengths[1])
        close(got, expected)
        assert state is not None and state.frames.tolist() == [T] * B and len(steps) == replays
        whole, none = encoder.step(mel, None, slots=lengths[0], chunk_frames=lengths[1])
        assert none is None and whole.shape == expected.shape


@few
@given(seed=st.integers(0, 3), lookaheads=st.lists(st.sampled_from([0, 1, 3, 6]), min_size=1, max_size=4))
def test_streams_are_encoded_as_without_graphs(seed: int, lookaheads: list[int]) -> None:
    """In inference mode, with tails of any length."""
    encoder = tiny.net(seed=seed).encoder.freeze()

    def run(replayed: bool) -> list[Tensor]:
        encoder.graphs = EncoderGraphs(encoder, again) if replayed else None
        mel = torch.randn(len(lookaheads), 12, 8, 80, generator=torch.Generator().manual_seed(seed))
        streams = [
            EncoderStream.begin(encoder, r).extended(mel[i, : 12 - i], 8 * (12 - i) - i, ended=True)
            for i, r in enumerate(lookaheads)
        ]
        pieces: list[list[Tensor]] = [[] for _ in streams]
        while active := [i for i, stream in enumerate(streams) if stream.ready_frames(1)]:
            frames, done, after = encode(encoder, [streams[i] for i in active])
            for i, row, item, stream in zip(active, frames, done, after, strict=True):
                pieces[i].append(row[: item.frames])
                streams[i] = stream
        return [torch.cat(row) for row in pieces]

    for got, expected in zip(run(True), run(False), strict=True):
        close(got, expected)


def test_bf16_is_replayed_in_bf16() -> None:
    encoder = net(dtype=torch.bfloat16)
    mel, lengths = torch.randn(3, 16, 80).bfloat16(), (torch.tensor([16, 9, 8]), torch.tensor([2, 2, 1]))
    expected, _ = encoder.step(mel, encoder.init_state(3), slots=lengths[0], chunk_frames=lengths[1])
    found = EncoderGraphs(encoder, again).step(mel, encoder.init_state(3), *lengths)
    assert found is not None
    got, state = found
    assert {got.dtype, *(cache.dtype for cache in state.caches.first(3))} == {torch.bfloat16}
    assert (got - expected)[0].abs().mean() < 0.02 * expected[0].abs().mean()


def test_a_model_goes_with_its_graphs() -> None:
    encoder, model = tiny.net().encoder.freeze(), tiny.translation_llm().freeze()
    encoder.graphs, model.graphs = EncoderGraphs(encoder, once), LlmGraphs(model, once)
    one = torch.tensor([1])
    encoder.step(torch.zeros(1, 8, 80), encoder.init_state(1), slots=8 * one, chunk_frames=one)
    model.hidden(torch.zeros(1, 1, dtype=torch.int64), one, model.init_state(1))
    assert len(encoder.graphs) == len(model.graphs) == 1
    left = weakref.ref(encoder), weakref.ref(model)
    gc.disable()
    try:
        del encoder, model
        assert [one() for one in left] == [None, None]
    finally:
        gc.enable()


def test_what_cannot_be_captured_runs_without_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    def fails(compute: Compute) -> Compute:
        raise torch.OutOfMemoryError("CUDA out of memory")

    steps, one = EncoderGraphs(net(), fails), (torch.tensor([8]), torch.tensor([1]))
    for _ in range(2):
        assert steps.step(torch.zeros(1, 8, 80), net().init_state(1), *one) is None
    model, one_token = llm("plain"), torch.zeros(1, 1, dtype=torch.int64)
    assert LlmGraphs(model, fails).hidden(one_token, model.init_state(1)) is None
    assert [record.getMessage() for record in caplog.records] == [
        "there is no graph for steps of (1, 1), which run without: CUDA out of memory",
        "there is no graph for steps of (1, 1, 128), which run without: CUDA out of memory",
    ]


def test_threads_may_share_an_encoder() -> None:
    encoder, mels = net(), torch.randn(12, 1, 16, 80)
    one = torch.tensor([16]), torch.tensor([2])
    expected = [encoder.step(mel, encoder.init_state(1), slots=one[0], chunk_frames=one[1])[0] for mel in mels]
    steps = EncoderGraphs(encoder, again)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda mel: steps.step(mel, encoder.init_state(1), *one), mels))
    for got, alone in zip(found, expected, strict=True):
        assert got is not None
        close(got[0], alone)


def test_a_capture_warms_up_on_the_stream_on_which_it_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, with the signatures of PyTorch."""
    cuda, done = torch.cuda, list[str]()
    for name in ("device", "stream", "Stream", "CUDAGraph", "current_stream", "graph_pool_handle", "graph"):
        monkeypatch.setattr(cuda, name, create_autospec(getattr(cuda, name)))
    where, graph = cast(Any, cuda), cast(Any, cuda).CUDAGraph.return_value
    where.stream.return_value.__enter__.side_effect = lambda: done.append("warm up")
    where.graph.return_value.__enter__.side_effect = lambda: done.append("capture")
    graph.replay.side_effect = lambda: done.append("replay")

    def compute() -> Tensor:
        done.append("compute")
        return torch.zeros(1)

    capture = CudaCapture(torch.device("cuda", 1))
    replay = capture(compute)
    assert done == ["warm up", *["compute"] * 3, "capture", "compute"]
    assert replay() is replay() and done[-2:] == ["replay", "replay"]
    side, pool = where.Stream.return_value, where.graph_pool_handle.return_value
    assert where.stream.call_args.args == (side,) and where.device.call_args.args == (torch.device("cuda", 1),)
    assert where.graph.call_args.args == (graph, pool, side)
    capture(compute)
    assert where.graph.call_args.args[1] is pool and where.graph_pool_handle.call_count == 1


def test_the_least_recently_used_go() -> None:
    kept, made = Kept[int, int](2), list[int]()

    def value(key: int) -> int:
        made.append(key)
        return -key

    for key in (1, 2, 1, 3, 1, 2):
        assert kept.get(key, partial(value, key)) == -key
    assert made == [1, 2, 3, 2] and len(kept) == 2
    assert [bucket(n, (1, 2, 4)) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, None]


# ------------------------------------------------------------------------------------------------ the language model


@cache
def llm(shape: str) -> Llm:
    torch.manual_seed(1)
    net = Llm(SHAPES[shape])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net.freeze()


def reads(model: Llm, replayed: LlmGraphs | None, tokens: Tensor, counts: Tensor, cache: KvCache) -> Any:
    model.graphs = replayed
    try:
        return model.hidden(tokens, counts, cache)
    finally:
        model.graphs = None


def same(got: KvCache, expected: KvCache) -> None:
    assert torch.equal(got.lengths, expected.lengths) and torch.equal(got.next_positions, expected.next_positions)
    for row, n in enumerate(expected.lengths.tolist()):
        assert torch.equal(got.positions[row, :n], expected.positions[row, :n])
        close(got.memory[:, :, row, :, :n], expected.memory[:, :, row, :, :n])


@few
@given(shape=st.sampled_from(list(SHAPES)), most=st.sampled_from([1, 64]), data=st.data())
def test_replayed_tokens_are_the_eager_ones(shape: str, most: int, data: st.DataObject) -> None:
    """Rows that read, forget and evict as they like, in batches of any of them; memory that grows."""
    model, steps = llm(shape), LlmGraphs(llm(shape), again, most=most)
    rows = data.draw(st.integers(1, 4))
    pasts = [(model.init_state(1, capacity=5), model.init_state(1, capacity=5)) for _ in range(rows)]
    for _ in range(data.draw(st.integers(1, 7))):
        part = data.draw(st.lists(st.sampled_from(range(rows)), min_size=1, unique=True))
        T = data.draw(st.sampled_from([1, 1, 2, 3, 5, 16]))
        counts = torch.tensor([data.draw(st.integers(0, T)) for _ in part])
        tokens = torch.randint(0, VOCAB, (len(part), T))
        eager, mine = (KvCache.cat([pasts[i][k] for i in part]) for k in (0, 1))
        expected, eager = reads(model, None, tokens, counts, eager)
        got, mine = reads(model, steps, tokens, counts, mine)
        for row, count in enumerate(counts.tolist()):
            close(got[row, :count], expected[row, :count])
        same(mine, eager)
        change = data.draw(st.sampled_from(["nothing", "crop", "evict"]))
        if change == "crop":
            lengths = (eager.lengths - 2).clamp(min=0)
            eager, mine = eager.crop(lengths), mine.crop(lengths)
        elif change == "evict":
            keep, start = eager.lengths // 4, eager.lengths // 2
            eager, mine = eager.evict(keep, start), mine.evict(keep, start)
        for i, one, other in zip(part, eager.rows(), mine.rows(), strict=True):
            pasts[i] = (one, other)
    assert 1 <= len(steps) <= most


def test_hidden_states_live_on_and_a_large_past_or_a_tree_is_read_without_graphs() -> None:
    model, one = llm("plain"), torch.tensor([1])
    steps = LlmGraphs(model, again)
    first, cache = reads(model, steps, torch.tensor([[3]]), one, model.init_state(1))
    held = first.clone()
    reads(model, steps, torch.tensor([[4]]), one, cache)
    assert torch.equal(first, held) and len(steps) == 1
    token = 2 * 2 * 2 * 8 * 4  # bytes
    small = LlmGraphs(model, again, max_past_bytes=128 * token)
    assert small.hidden(torch.zeros(1, 1, dtype=torch.int64), model.init_state(1)) is not None
    assert small.hidden(torch.zeros(2, 1, dtype=torch.int64), model.init_state(2)) is None
    assert small.hidden(torch.zeros(1, 17, dtype=torch.int64), model.init_state(1)) is None
    model.graphs = small
    tree = torch.ones(1, 2, 2, dtype=torch.bool).tril()
    model.hidden(torch.zeros(1, 2, dtype=torch.int64), 2 * one, model.init_state(1), visible=tree)
    model.hidden(torch.zeros(1, 2, dtype=torch.int64), 2 * one, None)
    model.graphs = None
    assert len(small) == 1


@few
@given(
    seed=st.integers(0, 5),
    talk=st.lists(st.tuples(st.sampled_from(["the", "speaker", "is", "still", "talking"]), st.booleans()), max_size=24),
    context=st.sampled_from([48, 512]),
    languages=st.sampled_from([("es",), ("fr", "de", "es")]),
)
def test_a_translation_is_the_same(
    seed: int, talk: list[tuple[str, bool]], context: int, languages: tuple[str, ...]
) -> None:
    """What leaves the context included."""
    translator = tiny.translator(seed, max_context_tokens=context)
    found = []
    for replayed in (LlmGraphs(translator.llm, again), None):
        translator.llm.graphs = replayed
        interpreter, chunks = Interleaved(translator), list[Any]()
        state = interpreter.init_state([translator.direction(language, "low") for language in languages], {})
        for word, closes in talk:
            state = interpreter.feed(state, [word], closes=closes)
            while interpreter.ready(state):
                [new], [state] = interpreter.step([state], max_forwards=3)
                chunks += new
        found.append(chunks)
    assert found[0] == found[1]


# --------------------------------------------------------------------------------------------- what a graph can hold


class NeverAsks(TorchDispatchMode):
    """Fails where a value or a tensor goes from the host to the device or back: a graph would not see it again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        name = str(func)
        assert not any(part in name for part in ("local_scalar", "nonzero", ".item", "unique", "masked_select")), name
        assert torch.Tag.dynamic_output_shape not in func.tags and torch.Tag.data_dependent_output not in func.tags
        for tensor in [t for t in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]:
            assert tensor.device.type == "cuda", f"{name} has a tensor on the {tensor.device}"
        return result


def watched(compute: Compute) -> Compute:
    """Where a capture would be: one computation before, as to warm up, and one that never asks."""
    compute()
    with NeverAsks() as mode:
        output = compute()
    assert mode.calls > 100
    return lambda: output


def on_fake_gpu(build: Callable[[], Any], dtype: torch.dtype) -> Any:
    """A module with weights there; fake ones cannot be converted."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return build()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_bias", [True, False])
def test_the_encoders_step_never_asks_the_host(dtype: torch.dtype, use_bias: bool) -> None:
    with FakeTensorMode():
        encoder = on_fake_gpu(lambda: RecognizerNet(tiny.config(use_bias=use_bias)), dtype).encoder.freeze()
        encoder.graphs = EncoderGraphs(encoder, watched)
        for B, T in ((1, 1), (3, 4), (9, 7)):
            mel = torch.zeros(B, 8 * T, 80, device="cuda", dtype=dtype)
            slots, chunk = torch.full((B,), 8 * T), torch.full((B,), T)
            encoded, state = encoder.step(mel, encoder.init_state(B), slots=slots, chunk_frames=chunk)
            assert encoded.shape == (B, T, 32) and encoded.device.type == "cuda" and encoded.dtype == dtype
            assert state.attention.dtype == dtype
        assert len(encoder.graphs) == 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_language_models_step_never_asks_the_host(dtype: torch.dtype, shape: str) -> None:
    with FakeTensorMode():
        model = on_fake_gpu(lambda: Llm(SHAPES[shape]), dtype).freeze()
        for B, T in ((1, 1), (3, 3), (9, 8)):
            step = FixedStep(model, model.init_state(B, capacity=128).memory, T)
            output = watched(step.compute)()
            assert output.shape == (B, T, 24) and output.dtype == dtype


def test_the_watch_sees_who_asks() -> None:
    def step(compute: Callable[[Tensor], Any]) -> None:
        with FakeTensorMode():
            x = torch.zeros(3, device="cuda")
            with pytest.raises(Exception), NeverAsks():  # noqa: B017
                compute(x)

    step(lambda x: x.nonzero())
    step(lambda x: x + torch.tensor([1, 2, 3], device="cuda"))
    step(lambda x: x.cpu())
    step(lambda x: bool(x.any()))
    step(lambda x: x[torch.arange(2)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_graphs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recogniser's and the translator's own, against the same models without them."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # whose rounding depends on the number of rows
    encoder = RecognizerNet(tiny.config()).cuda().encoder.freeze()
    for B in (1, 3, 8):
        step = Watched(encoder, 2)
        step.graphs = EncoderGraphs(encoder, CudaCapture(torch.device("cuda")), most=2)
        pasts = [(encoder.init_state(1), encoder.init_state(1)) for _ in range(B)]
        for T in (1, 4, 3, 7, 1):
            mel = torch.randn(B, 8 * T, 80, device="cuda")
            pasts = step(mel, pasts, torch.randint(1, 8 * T + 1, (B,)), torch.full((B,), T))
    for shape in SHAPES:
        model = Llm(SHAPES[shape]).cuda().freeze()
        steps, past = LlmGraphs(model, CudaCapture(torch.device("cuda"))), model.init_state(3)
        for T in (4, 1, 1, 2, 9):
            tokens, counts = torch.randint(0, VOCAB, (3, T)), torch.randint(0, T + 1, (3,))
            expected, after = reads(model, None, tokens, counts, past.copy())
            got, past = reads(model, steps, tokens, counts, past)
            same(past, after)
            for row, count in enumerate(counts.tolist()):
                close(got[row, :count], expected[row, :count])
        assert len(steps) == 4
