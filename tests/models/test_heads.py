"""Heads: their guesses are those of a naive loop, row by row, and their file is that of one model."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.heads import HEADS, DraftHeads, load_heads, save_heads
from models.llm import Llm
from streaming.errors import DragomanError
from tests.models.test_llm import SHAPES, VOCAB, fresh, frozen

few = settings(max_examples=20, deadline=None)


def random_heads(llm: Llm, seed: int = 0, *, tokens: Tensor | None = None, heads: int = 3) -> DraftHeads:
    """Heads with weights large enough that each says something else."""
    made = DraftHeads(llm, torch.arange(llm.config.vocab_size) if tokens is None else tokens, heads)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.5)
    return made.requires_grad_(False)


@cache
def some_heads(shape: str, seed: int) -> DraftHeads:
    return random_heads(frozen(shape), seed, tokens=torch.arange(1, VOCAB, 2))


def hidden_states(n: int, llm: Llm, seed: int) -> Tensor:
    return torch.randn(n, llm.config.d_model, generator=torch.Generator().manual_seed(seed))


@few
@given(shape=st.sampled_from(sorted(SHAPES)), seed=st.integers(0, 3), n=st.integers(1, 4), k=st.integers(1, 5))
def test_guesses_are_those_of_a_loop_over_rows_and_heads(shape: str, seed: int, n: int, k: int) -> None:
    heads, llm, whole = some_heads(shape, seed), frozen(shape), fresh(shape).requires_grad_(False)
    output = whole.model.embed_tokens.weight if whole.lm_head is None else whole.lm_head.weight
    hidden, tokens = hidden_states(n, llm, seed), torch.arange(3, 3 + n)
    guessed, sure = heads.guess(hidden, tokens, k)
    assert guessed.shape == sure.shape == (n, min(k, 3))
    for row in range(n):
        state, token = hidden[row], int(tokens[row])
        for i in range(min(k, 3)):
            embedded = whole.model.embed_tokens.weight[token]
            embedded = embedded / (embedded.square().mean() + torch.finfo(torch.float32).eps).sqrt()
            inner = heads.weight[i] @ torch.cat([state, embedded])
            state = hidden[row] + inner * inner.sigmoid()
            p = (output[heads.tokens] @ state).softmax(-1)
            token = int(heads.tokens[p.argmax()])
            block = heads.block @ state
            own = (p.max() / (1 - p.max()).clamp(min=1e-4)).log()
            logit = heads.trust * own + heads.sure @ (state + block * block.sigmoid()) + heads.depth[i]
            assert int(guessed[row, i]) == token
            assert float(sure[row, i]) == pytest.approx(float(logit.sigmoid()), abs=2e-3)


@few
@given(seed=st.integers(0, 3), n=st.integers(1, 4), least=st.floats(0.0, 1.0))
def test_guessing_ends_where_no_row_will_get(seed: int, n: int, least: float) -> None:
    heads, llm = some_heads("plain", seed), frozen()
    hidden, tokens = hidden_states(n, llm, seed), torch.arange(n)
    whole, how_sure = heads.guess(hidden, tokens, 3)
    some, sure = heads.guess(hidden, tokens, 3, least)
    assert torch.equal(some, whole[:, : some.shape[1]]) and torch.equal(sure, how_sure[:, : some.shape[1]])
    reached = how_sure.cumprod(1).amax(0)
    assert some.shape[1] == next((i + 1 for i in range(2) if reached[i] < least), 3)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_new_heads_say_what_the_model_says_and_how_sure_it_is(shape: str) -> None:
    llm = frozen(shape)
    heads, hidden = DraftHeads(llm, torch.arange(VOCAB)), hidden_states(5, llm, 1)
    logits = hidden @ llm.output_rows(torch.arange(VOCAB)).T
    if llm.config.logit_softcap is None:
        torch.testing.assert_close(logits, llm.logits(hidden), atol=1e-5, rtol=1e-5)
    guessed, sure = heads.guess(hidden, torch.zeros(5, dtype=torch.int64), 3)
    assert (guessed == logits.argmax(-1)[:, None]).all()
    torch.testing.assert_close(sure, logits.softmax(-1).amax(-1)[:, None].expand(-1, 3), atol=1e-4, rtol=1e-3)


def test_the_loss_is_the_cross_entropy_of_what_can_be_guessed() -> None:
    llm = frozen()
    heads, hidden = random_heads(llm, 2, tokens=torch.arange(0, VOCAB, 2)), hidden_states(4, llm, 3)
    tokens = torch.tensor([[4, 6, 8, 10], [5, 2, -1, -1], [1, 3, 6, -1], [2, 3, 3, 3]])
    expected = 0.0
    for k, state in enumerate(heads.states(hidden, tokens[:, :-1])):
        rows = [row for row in range(4) if tokens[row, k + 1] >= 0 and tokens[row, k + 1] % 2 == 0]
        losses = [F.cross_entropy(state[row] @ heads._rows.T, tokens[row, k + 1] // 2) for row in rows]
        expected += float(sum(losses, torch.zeros(()))) / max(1, len(rows))
    assert float(heads.loss(hidden, tokens)) == pytest.approx(expected, rel=1e-5)
    assert not heads.loss(hidden, torch.full((4, 4), 1)).requires_grad


def test_a_copy_is_changed_by_itself() -> None:
    heads = random_heads(frozen(), 1)
    other, before = heads.copy(), heads.weight.clone()
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(heads.weight, before) and other._rows is heads._rows


def test_heads_come_back_from_their_file(tmp_path: Path) -> None:
    llm = frozen()
    assert load_heads(tmp_path, llm) is None
    heads = random_heads(llm, 4, tokens=torch.arange(2, VOCAB)).bfloat16().float()
    save_heads(tmp_path, heads, llm)
    loaded, hidden, tokens = load_heads(tmp_path, llm), hidden_states(6, llm, 1), torch.arange(6)
    assert loaded is not None and not any(p.requires_grad for p in loaded.parameters())
    for found, expected in zip(loaded.guess(hidden, tokens, 3), heads.guess(hidden, tokens, 3), strict=True):
        assert torch.equal(found, expected)
    bytes_of_weights = 2 * sum(p.numel() for p in heads.parameters())
    assert (tmp_path / HEADS).stat().st_size < bytes_of_weights + 4 * VOCAB + 2 * llm.config.d_model + 1000


def test_a_file_that_is_none_or_of_another_model_is_refused(tmp_path: Path) -> None:
    llm = frozen()

    def refused(sentence: str, **changed: Tensor) -> None:
        if changed:
            save_heads(tmp_path, random_heads(llm), llm)
            save_file({**load_file(tmp_path / HEADS), **changed}, tmp_path / HEADS)
        with pytest.raises(DragomanError, match=sentence) as error:
            load_heads(tmp_path, llm)
        assert error.value.code == "bad_checkpoint"

    (tmp_path / HEADS).write_bytes(b"nothing")
    refused("is not a safetensors file")
    save_file({"weight": torch.zeros(1)}, tmp_path / HEADS)
    refused("was made for other weights than the model's: make it anew")
    refused("was made for other weights", **{"model.norm.weight": torch.zeros(llm.config.d_model).bfloat16()})
    refused(f"has no list of tokens of the model's {VOCAB}", tokens=torch.tensor([1, VOCAB]).int())
    refused("has no list of tokens", tokens=torch.tensor([], dtype=torch.int32))
    refused(r"heads of .*heads.safetensors do not fit.* block has shape \(2, 2\)", block=torch.zeros(2, 2))
    refused(r"1 are unknown \(extra\)", extra=torch.zeros(1))
    refused("weight has shape", weight=torch.zeros(3, 5, 5))
