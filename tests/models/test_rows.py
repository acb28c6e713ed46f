"""Rows of a batch as values of their own are those that are copied one by one."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.fastconformer import EncoderState
from models.kv_cache import KvCache
from models.rnnt import PredictorState
from models.rows import parted


def leaves(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for field in fields(value):
        part = getattr(value, field.name)
        found += [] if part is None else part if isinstance(part, tuple) else [part]
    return found


def state(B: int) -> EncoderState:
    first, second, third = torch.randn(B, 1, 1, 9), torch.randn(B, 4, 1, 5), torch.randn(B, 4, 1, 3)
    return EncoderState(torch.arange(B), (first, second, third), torch.randn(2, 2, B, 2, 7, 4), torch.randn(2, B, 8, 8))


def cache(B: int) -> KvCache:
    lengths = torch.arange(B)
    return KvCache(torch.randn(2, 2, B, 2, 16, 4), torch.arange(16).repeat(B, 1), lengths, lengths + 3)


def predictor(B: int) -> PredictorState:
    return PredictorState(torch.randn(2, B, 8), torch.randn(2, B, 8), torch.randn(B, 5))


@pytest.mark.parametrize("make", [state, cache, predictor])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_all_rows_at_once_are_the_rows_one_by_one(make: Any, rows: int) -> None:
    batch = make(rows)
    parts = batch.rows()
    assert len(parts) == rows
    for i, part in enumerate(parts):
        for got, expected in zip(leaves(part), leaves(batch.row(i)), strict=True):
            assert torch.equal(got, expected) and got.shape == expected.shape and got.is_contiguous()
    again = type(batch).cat(parts)
    before = [tensor.clone() for tensor in leaves(again)]
    if rows > 1:
        for tensor in leaves(batch):
            tensor.zero_()
        for got, expected in zip(leaves(type(batch).cat(parts)), before, strict=True):
            assert torch.equal(got, expected), "a row shares no memory with its batch"


@pytest.mark.parametrize("rows", [2, 5])
def test_room_for_a_step_stands_behind_the_caches(rows: int) -> None:
    parts = state(rows).rows()
    roomy, plain = EncoderState.cat(parts, room_frames=3), EncoderState.cat(parts)
    for got, expected in zip(leaves(replace(roomy, room=None)), leaves(plain), strict=True):
        assert torch.equal(got, expected)
    assert roomy.room is not None and plain.room is None
    roomy.room.attention.zero_()
    roomy.room.conv.zero_()
    assert not roomy.attention.any() and not roomy.conv.any(), "it is the same memory"
    assert roomy.room.attention.shape == (2, 2, rows, 2, 10, 4) and roomy.room.conv.shape == (2, rows, 11, 8)
    assert all(part.attention.any() for part in parts)


def test_rows_of_a_view_are_copied() -> None:
    x = torch.randn(4, 3, 5, dtype=torch.bfloat16).transpose(0, 2)
    for i, row in enumerate(parted(x, 1)):
        assert torch.equal(row, x[:, i : i + 1]) and row.is_contiguous()
