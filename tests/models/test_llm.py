"""The language model: any cutting into steps is the same, rows are independent, and a cache is a value."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.kv_cache import KvCache
from models.llm import Llm, load_llm, save_llm
from models.llm_config import LlmConfig, RopeConfig
from streaming.errors import DragomanError

VOCAB = 50
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 24, "d_ff": 40, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8,
}  # fmt: skip
#: The plain model of our own family, one with windows, and one with every switch turned.
SHAPES = {
    "plain": LlmConfig(**SHAPE),
    "windows": LlmConfig(**SHAPE, windows=(6, 0), local_rope=RopeConfig(theta=50.0)),
    "everything": LlmConfig(
        **SHAPE, windows=(0, 6), rope=RopeConfig(100.0, "linear", 2.0), activation="gelu_tanh", tied=False,
        qkv_bias=True, out_bias=True, qk_norm=True, norm_plus_one=True, post_norms=True, embedding_scale=2.0,
        query_scale=0.5, attention_softcap=3.0, logit_softcap=4.0,
    ),
}  # fmt: skip
shapes = st.sampled_from(list(SHAPES))
few = settings(max_examples=20, deadline=None)


def fresh(shape: str = "plain") -> Llm:
    """Random weights, large enough that every part shows in the logits."""
    torch.manual_seed(1)
    net = Llm(SHAPES[shape])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net


@cache
def frozen(shape: str = "plain") -> Llm:
    return fresh(shape).freeze()


def sequence(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def whole(net: Llm, tokens: Tensor) -> Tensor:
    """Logits ``[T, vocab]`` of one sequence at once."""
    logits, none = net.step(tokens[None], torch.tensor([len(tokens)]), None, logits_at=None)
    assert none is None
    return logits[0].detach()


def read(net: Llm, tokens: Tensor, past: KvCache) -> tuple[Tensor, KvCache]:
    """All logits of one row's next tokens."""
    logits, after = net.step(tokens[None], torch.tensor([len(tokens)]), past, logits_at=None)
    assert after is not None
    return logits[0], after


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def naive(net: Llm, tokens: Tensor, see: Tensor) -> Tensor:
    """The plain and the windowed model by the textbook, one head and one pair of dimensions after the other.

    ``see`` is ``bool[T, T]``; token ``i`` stands at position ``i``.
    """
    c, w = net.config, {name: tensor.double() for name, tensor in net.state_dict().items()}
    T, D = len(tokens), c.head_dim

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[name]

    def turned(x: Tensor, theta: float) -> Tensor:
        y = torch.empty_like(x)
        for pair in range(D // 2):
            angle = torch.arange(T) * theta ** (-2 * pair / D)
            z = torch.complex(x[:, pair], x[:, pair + D // 2]) * torch.polar(torch.ones(T), angle)
            y[:, pair], y[:, pair + D // 2] = z.real, z.imag
        return y

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c.n_layers):
        at, theta = f"model.layers.{i}.", c.layer_rope(i).theta
        y, distance = norm(x, at + "input_layernorm.weight"), torch.arange(T)[:, None] - torch.arange(T)
        mask = see & (distance < (c.window(i) or T))
        q, k, v = (y @ w[f"{at}self_attn.{name}_proj.weight"].T for name in "qkv")
        heads = []
        for h in range(c.n_heads):
            g = h * c.n_kv_heads // c.n_heads
            query, key = turned(q[:, h * D : (h + 1) * D], theta), turned(k[:, g * D : (g + 1) * D], theta)
            scores = (query @ key.T / D**0.5).masked_fill(~mask, -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, g * D : (g + 1) * D])
        x = x + torch.cat(heads, -1) @ w[at + "self_attn.o_proj.weight"].T
        y = norm(x, at + "post_attention_layernorm.weight")
        gate, up, down = (w[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        x = x + (y @ gate * torch.sigmoid(y @ gate) * (y @ up)) @ down
    return (norm(x, "model.norm.weight") @ w["model.embed_tokens.weight"].T).float()


# ---------------------------------------------------------------------------------------------- steps and rows


@pytest.mark.parametrize("shape", ["plain", "windows"])
def test_logits_are_those_of_the_textbook(shape: str) -> None:
    tokens = sequence(17)
    close(whole(frozen(shape), tokens), naive(fresh(shape), tokens, torch.ones(17, 17).tril().bool()))


@few
@given(shape=shapes, length=st.integers(1, 40), cuts=st.lists(st.integers(1, 12), min_size=1), seed=st.integers(0, 5))
def test_any_cutting_into_steps_gives_the_same_logits(shape: str, length: int, cuts: list[int], seed: int) -> None:
    net, tokens = frozen(shape), sequence(length, seed)
    past, out, done, i = net.init_state(1, capacity=4), [], 0, 0
    while done < length:
        logits, past = read(net, tokens[done : done + cuts[i % len(cuts)]], past)
        out.append(logits)
        done, i = done + len(logits), i + 1
    close(torch.cat(out), whole(net, tokens))
    assert past.lengths.tolist() == past.next_positions.tolist() == [length]


@few
@given(data=st.data())
def test_rows_do_not_depend_on_each_other(data: st.DataObject) -> None:
    """Random batches of random rows with random counts, 0 included; each row is as it is alone."""
    net = frozen(data.draw(shapes))
    tokens = [sequence(n, i) for i, n in enumerate(data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4)))]
    caches, done = [net.init_state(1, capacity=2 + i) for i in range(len(tokens))], [0] * len(tokens)
    got: list[list[Tensor]] = [[] for _ in tokens]
    while any(d < len(t) for d, t in zip(done, tokens, strict=True)):
        part = data.draw(st.lists(st.sampled_from(range(len(tokens))), min_size=1, unique=True))
        counts = [data.draw(st.integers(0, min(6, len(tokens[i]) - done[i]))) for i in part]
        if all(done[i] < len(tokens[i]) for i in part) and not any(counts):
            counts[0] = 1
        batch = torch.randint(-(10**6), 10**6, (len(part), max([1, *counts])))  # the padding must not matter
        for b, (i, n) in enumerate(zip(part, counts, strict=True)):
            batch[b, :n] = tokens[i][done[i] : done[i] + n]
        logits, after = net.step(batch, torch.tensor(counts), KvCache.cat([caches[i] for i in part]), logits_at=None)
        assert after is not None
        for b, (i, n, row) in enumerate(zip(part, counts, after.rows(), strict=True)):
            got[i].append(logits[b, :n])
            done[i], caches[i] = done[i] + n, row
    for parts, row in zip(got, tokens, strict=True):
        close(torch.cat(parts), whole(net, row))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_the_last_tokens_are_the_last_logits(shape: str) -> None:
    net, counts = frozen(shape), torch.tensor([5, 3])
    tokens = torch.stack([sequence(5, 1), sequence(5, 2)])
    every, _ = net.step(tokens, counts, net.init_state(2), logits_at=None)
    last, _ = net.step(tokens, counts, net.init_state(2))
    three, _ = net.step(tokens, counts, net.init_state(2), logits_at=3)
    hidden, _ = net.hidden(tokens, counts, net.init_state(2))
    close(last[:, 0], torch.stack([every[0, 4], every[1, 2]]))
    close(three, torch.stack([every[0, 2:5], every[1, 0:3]]))
    close(net.logits(hidden)[0], every[0])


# --------------------------------------------------------------------------------------------------- the cache


@few
@given(data=st.data(), shape=shapes)
def test_cropped_is_as_never_having_gone_there(data: st.DataObject, shape: str) -> None:
    net = frozen(shape)
    kept = [data.draw(st.integers(0, 12)) for _ in range(2)]
    astray = [data.draw(st.integers(0, 9)) for _ in range(2)]
    tokens = [torch.cat([sequence(k, b), sequence(a, 7)]) for b, (k, a) in enumerate(zip(kept, astray, strict=True))]
    batch = torch.nn.utils.rnn.pad_sequence([*tokens, torch.zeros(1, dtype=torch.int64)], batch_first=True)[:2]
    _, past = net.step(batch, torch.tensor([len(t) for t in tokens]), net.init_state(2, capacity=4))
    assert past is not None
    past = past.crop(torch.tensor(kept))
    assert past.lengths.tolist() == past.next_positions.tolist() == kept
    rest = torch.stack([sequence(6, 20), sequence(6, 21)])
    logits, _ = net.step(rest, torch.tensor([6, 6]), past, logits_at=None)
    for b in range(2):
        close(logits[b], whole(net, torch.cat([sequence(kept[b], b), rest[b]]))[kept[b] :])


def test_a_row_cannot_be_cropped_to_more_than_it_has() -> None:
    with pytest.raises(ValueError, match=r"\[0\] tokens cannot be cropped to \[1\]"):
        frozen().init_state(1).crop(torch.tensor([1]))


@pytest.mark.parametrize("copied", [lambda past: past.row(1), lambda past: past.copy().rows()[1]], ids=["row", "copy"])
def test_a_copied_row_continues_identically_and_shares_no_memory(copied: Any) -> None:
    net, tokens = frozen(), torch.stack([sequence(9, i) for i in range(3)])
    _, past = net.step(tokens, torch.tensor([9, 7, 4]), net.init_state(3))
    assert past is not None
    one, two = copied(past), copied(past)
    expected, _ = read(net, sequence(5, 8), one)
    for tensor in (one.memory, one.positions, one.lengths, one.next_positions):
        tensor.zero_()
    again, _ = read(net, sequence(5, 8), two)
    in_place, _ = read(net, sequence(5, 8), past.rows()[1])
    assert torch.equal(expected, again)
    assert torch.equal(expected, in_place)
    close(expected, whole(net, torch.cat([tokens[1, :7], sequence(5, 8)]))[7:])


def test_an_older_value_stays_true_until_it_is_appended_to() -> None:
    net, prompt, one, other = frozen(), sequence(6), sequence(4, 1), sequence(4, 2)
    _, before = read(net, prompt, net.init_state(1))
    first, _ = read(net, one, before)
    second, _ = read(net, other, before)
    close(first, whole(net, torch.cat([prompt, one]))[6:])
    close(second, whole(net, torch.cat([prompt, other]))[6:])
    assert before.lengths.tolist() == [6]


@few
@given(length=st.integers(1, 30), capacity=st.integers(1, 40))
def test_growing_changes_nothing(length: int, capacity: int) -> None:
    net, tokens = frozen("everything"), sequence(length)
    _, small = read(net, tokens, net.init_state(1, capacity=capacity))
    _, large = read(net, tokens, net.init_state(1, capacity=128))
    for token in sequence(12, 4):
        expected, large = read(net, token[None], large)
        logits, small = read(net, token[None], small)
        assert torch.equal(logits, expected)
    assert length + 12 <= small.capacity <= max(capacity, 2 * (length + 12))


@few
@given(data=st.data(), shape=st.sampled_from(["plain", "windows"]))
def test_evicting_is_attention_over_the_kept_keys(data: st.DataObject, shape: str) -> None:
    """Two rows lose spans at their own times, as often as it comes; a token sees what is there when it is read."""
    net, T = frozen(shape), 24
    tokens = [sequence(T, 1), sequence(T, 2)]
    see = torch.ones(2, T, T).tril().bool()
    held: list[list[int]] = [[], []]
    past, done, got = net.init_state(2, capacity=4), 0, []
    while done < T:
        n = data.draw(st.integers(1, min(8, T - done)))
        new = torch.stack([t[done : done + n] for t in tokens])
        logits, after = net.step(new, torch.tensor([n, n]), past, logits_at=None)
        assert after is not None
        got.append(logits)
        spans = []
        for b, row in enumerate(held):
            row += range(done, done + n)
            keep = data.draw(st.integers(0, len(row)))
            spans.append((keep, data.draw(st.integers(keep, len(row)))))
            see[b, done + n :, row[slice(*spans[b])]] = False
            del row[slice(*spans[b])]
        done += n
        past = after.evict(*torch.tensor(spans).T)
        assert past.lengths.tolist() == [len(row) for row in held]
        assert past.next_positions.tolist() == [done, done]
    for b in range(2):
        close(torch.cat([part[b] for part in got]), naive(fresh(shape), tokens[b], see[b]))


def test_after_evicting_the_newest_can_still_be_cropped() -> None:
    net, tokens = frozen(), sequence(12)
    _, past = read(net, tokens, net.init_state(1))
    evicted = past.evict(torch.tensor([2]), torch.tensor([7]))
    expected, _ = read(net, sequence(3, 5), evicted.copy())
    _, further = read(net, sequence(5, 6), evicted)
    cropped = further.crop(torch.tensor([7]))
    assert (cropped.lengths.tolist(), cropped.next_positions.tolist()) == ([7], [12])
    got, _ = read(net, sequence(3, 5), cropped)
    close(got, expected)


def test_only_what_a_row_has_can_be_evicted() -> None:
    _, past = read(frozen(), sequence(5), frozen().init_state(1))
    with pytest.raises(ValueError, match=r"slots \[2\] to \[6\] cannot be dropped from rows of \[5\] tokens"):
        past.evict(torch.tensor([2]), torch.tensor([6]))


# ---------------------------------------------------------------------------------------------- trees of drafts


@few
@given(data=st.data(), shape=shapes)
def test_each_branch_of_a_tree_is_as_it_is_alone(data: st.DataObject, shape: str) -> None:
    """Two rows with random trees of their own sizes, behind pasts of their own lengths; one branch is kept."""
    net, T = frozen(shape), 6
    pasts = [data.draw(st.integers(1, 9)) for _ in range(2)]
    sizes = [data.draw(st.integers(1, T)) for _ in range(2)]
    prompts, drafts = [sequence(n, b) for b, n in enumerate(pasts)], [sequence(T, 10 + b) for b in range(2)]
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    _, before = net.step(padded, torch.tensor(pasts), net.init_state(2, capacity=4))
    assert before is not None
    paths: list[list[list[int]]] = []  # from each node's root to itself
    positions, visible = torch.randint(0, 99, (2, T)), torch.rand(2, T, T) < 0.5
    for b, size in enumerate(sizes):
        paths.append([])
        for i in range(size):
            parent = data.draw(st.integers(-1, i - 1))
            paths[b].append([*(paths[b][parent] if parent >= 0 else []), i])
            positions[b, i] = pasts[b] + len(paths[b][i]) - 1
            visible[b, i, :size] = torch.zeros(size).index_fill(0, torch.tensor(paths[b][i]), 1).bool()
    logits, after = net.step(
        torch.stack(drafts), torch.tensor(sizes), before, logits_at=None, positions=positions, visible=visible
    )
    assert after is not None
    for b in range(2):
        for i, path in enumerate(paths[b]):
            close(logits[b, i], whole(net, torch.cat([prompts[b], drafts[b][path]]))[-1])

    chosen = [data.draw(st.sampled_from([[], *row])) for row in paths]
    path = torch.nn.utils.rnn.pad_sequence([torch.tensor(c, dtype=torch.int64) for c in [*chosen, [0]]], True)[:2]
    counts = torch.tensor([len(c) for c in chosen])
    kept = after.accept(torch.tensor(pasts), path, counts)
    assert kept.lengths.tolist() == kept.next_positions.tolist() == (torch.tensor(pasts) + counts).tolist()
    rest = torch.stack([sequence(4, 30), sequence(4, 31)])
    logits, _ = net.step(rest, torch.tensor([4, 4]), kept, logits_at=None)
    for b in range(2):
        close(logits[b], whole(net, torch.cat([prompts[b], drafts[b][chosen[b]], rest[b]]))[-4:])


# -------------------------------------------------------------------------------------------- precision, training


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_close_to_fp32(shape: str) -> None:
    net, tokens = fresh(shape).bfloat16().freeze(), sequence(20)
    expected = whole(frozen(shape), tokens)
    logits, past = read(net, tokens[:12], net.init_state(1))
    more, past = read(net, tokens[12:], past)
    assert past.memory.dtype == logits.dtype == torch.bfloat16
    error = torch.cat([logits, more]).float() - expected
    assert error.square().mean() < 2e-3 * expected.square().mean()


@pytest.mark.parametrize("shape", SHAPES)
def test_training_has_the_same_logits_and_finite_gradients(shape: str) -> None:
    net, tokens = fresh(shape), torch.stack([sequence(14, 1), sequence(14, 2)])
    logits = net(tokens)
    for row, got in zip(tokens, logits, strict=True):
        close(got.detach(), whole(frozen(shape), row))
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_a_new_model_says_nothing_sure() -> None:
    torch.manual_seed(0)
    logits = whole(Llm(SHAPES["plain"]), sequence(8))
    assert logits.softmax(-1).max() < 2 / VOCAB


# ------------------------------------------------------------------------------------------------------ on disk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_llm(tmp_path / "model", SHAPES["everything"], fresh("everything").state_dict())
    return tmp_path / "model"


def test_a_folder_comes_back_as_it_was(folder: Path) -> None:
    net = load_llm(folder)
    assert net.config == SHAPES["everything"]
    assert torch.equal(whole(net, sequence(9)), whole(frozen("everything"), sequence(9)))
    assert load_llm(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_a_folder_can_be_trained_on(folder: Path) -> None:
    net = load_llm(folder, frozen=False)
    net(sequence(5)[None]).sum().backward()
    save_llm(folder, net.config, net.state_dict())
    close(whole(load_llm(folder), sequence(9)), whole(frozen("everything"), sequence(9)))


def change(folder: Path, changes: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(DragomanError, match=f"has no {missing}.*pickled weights are not read") as error:
        load_llm(folder)
    assert error.value.code == "model_not_found"


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(DragomanError, match="has no model-00001-of-00001.safetensors"):
        load_llm(folder)
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(DragomanError, match="has no weight_map from tensors to files beside it"):
        load_llm(folder)


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    change(folder, {"d_ff": 41})
    with pytest.raises(DragomanError, match=r"mlp\.\w+_proj\.weight has shape .*40.* the config asks for .*41"):
        load_llm(folder)
    change(folder, {"d_ff": 40, "n_layers": 3, "windows": []})
    with pytest.raises(DragomanError, match=r"tensors are missing \(model\.layers\.2"):
        load_llm(folder)
    change(folder, {"n_layers": 2})
    save_file({**load_file(folder / "model.safetensors"), "colour": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(DragomanError, match=r"0 tensors are missing \(none\), 1 are unknown \(colour\)"):
        load_llm(folder)


@pytest.mark.parametrize(("file", "what"), [("config.json", "JSON"), ("model.safetensors", "a safetensors file")])
def test_a_broken_file_is_named(folder: Path, file: str, what: str) -> None:
    (folder / file).write_bytes(b"{[")
    with pytest.raises(DragomanError, match=f"{file} is not {what}") as error:
        load_llm(folder)
    assert error.value.code == "bad_checkpoint"


def test_what_cannot_be_asked_for(folder: Path) -> None:
    for arguments, code in [({"dtype": "int8"}, "unsupported_dtype"), ({"device": "tpu"}, "unsupported_device")]:
        with pytest.raises(DragomanError) as error:
            load_llm(folder, **arguments)
        assert error.value.code == code
    with pytest.raises(DragomanError, match="is not a model folder"):
        load_llm(folder / "config.json")


HF = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'; this engine reads llama, mistral, qwen2"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not supported.*default, linear"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "no 'original_max_position_embeddings'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"mlp_bias": True}, "biases in the feed-forward are not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
        ({"hidden_act": "relu"}, "'relu' is not supported"),
        ({"model_type": "gemma2", "layer_types": ["linear_attention"] * 2}, "layer type 'linear_attention' is not"),
        ({"num_key_value_heads": 3}, "4 heads are not a multiple of 3"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"model_type": "dragoman-llm"}, "unexpected keyword argument 'hidden_size'; known keys are vocab_size"),
    ],
)
def test_a_config_that_is_not_supported_is_told_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DragomanError, match=message) as error:
        LlmConfig.from_hf({**HF, **changes})
    assert error.value.code == "unsupported_model"


def test_a_key_that_is_needed_is_named() -> None:
    with pytest.raises(DragomanError, match="the config of a llama model has no 'hidden_size'"):
        LlmConfig.from_hf({key: value for key, value in HF.items() if key != "hidden_size"})


def test_the_sparse_config_of_a_multimodal_gemma_3() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    scaling = {"factor": 8.0, "rope_type": "linear"}
    config = LlmConfig.from_hf({"model_type": "gemma3", "text_config": {**text, "rope_scaling": scaling}})
    assert (config.n_heads, config.n_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262_208)
    assert config.windows[:7] == (1024,) * 5 + (0, 1024)
    assert config.layer_rope(5) == RopeConfig(1e6, "linear", 8.0)
    assert config.layer_rope(0) == RopeConfig(1e4)


def test_llama_3_stretches_only_long_wavelengths() -> None:
    plain, scaled = RopeConfig(), RopeConfig(10000.0, "llama3", 8.0, 1.0, 4.0, 1024)
    ratio = plain.frequencies(64) / scaled.frequencies(64)
    wavelength = 2 * torch.pi / plain.frequencies(64)
    close(ratio[wavelength < 1024 / 4], torch.ones(int((wavelength < 256).sum())))
    close(ratio[wavelength > 1024], torch.full((int((wavelength > 1024).sum()),), 8.0))
    between = ratio[(wavelength > 256) & (wavelength < 1024)]
    assert len(between) and ((between > 1) & (between < 8)).all()
