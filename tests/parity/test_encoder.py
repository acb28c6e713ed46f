"""The encoder against NeMo's, whole files and step by step, on a batch of unequal rows."""

import pytest
import torch
from torch import Tensor

from benchmarks.nemo_reference import NemoReference
from models.config import SUBSAMPLING_FACTOR
from models.fastconformer import LEADING_SLOTS
from models.recognizer import Recognizer
from streaming.encoder import EncoderStream, encode

pytestmark = pytest.mark.nemo
#: Mel frames: one full left context and more, some that end inside a chunk, inside a group, and at once.
LENGTHS = (730, 397, 113, 9, 1)
ATOL = 1e-4


def log_mel_like(bins: int) -> Tensor:
    """``[rows, bins, frames]`` with zeros after each row's end, as both front ends leave them."""
    random = torch.Generator().manual_seed(3)
    mel = torch.zeros(len(LENGTHS), bins, max(LENGTHS))
    for row, frames in zip(mel, LENGTHS, strict=True):
        slow = torch.randn(bins, frames // 10 + 1, generator=random).repeat_interleave(10, 1)[:, :frames]
        row[:, :frames] = 2 * slow + torch.randn(bins, frames, generator=random) - 8
    return mel


def in_slots(mel: Tensor) -> tuple[Tensor, Tensor]:
    """Our layout of the same input: groups of eight, the first with seven slots before the audio."""
    slots = torch.tensor(LENGTHS) + LEADING_SLOTS
    groups = -(-int(slots.max()) // SUBSAMPLING_FACTOR)
    tail = groups * SUBSAMPLING_FACTOR - mel.shape[2] - LEADING_SLOTS
    return torch.nn.functional.pad(mel, (LEADING_SLOTS, tail)).transpose(1, 2), slots


@pytest.mark.parametrize("models", ["hybrid_large", "medium", "nemotron4", "nemotron4_unscaled"], indirect=True)
@pytest.mark.parametrize("lookahead", [0, 1, 6, 13])
def test_whole_files(models: tuple[NemoReference, Recognizer], lookahead: int) -> None:
    reference, recognizer = models
    mel = log_mel_like(reference.shape.mel_bins)
    encoded, frames = reference.encode_offline(mel, torch.tensor(LENGTHS), lookahead)
    chunk = torch.full((len(LENGTHS),), lookahead + 1)
    mine, slots = in_slots(mel)

    ours, _ = recognizer.net.encoder.step(mine, None, slots=slots, chunk_frames=chunk)

    assert frames.tolist() == [-(-int(n) // SUBSAMPLING_FACTOR) for n in slots]
    for mine_row, row, count in zip(ours, encoded, frames.tolist(), strict=True):
        torch.testing.assert_close(mine_row[:count], row[:count], atol=ATOL, rtol=0)


@pytest.mark.parametrize("lookahead", [0, 1, 6, 13])
def test_step_by_step(models: tuple[NemoReference, Recognizer], lookahead: int) -> None:
    reference, recognizer = models
    mel = log_mel_like(reference.shape.mel_bins)
    theirs = [reference.encode_streaming(mel[i : i + 1, :, :frames], lookahead)[0] for i, frames in enumerate(LENGTHS)]
    mine, slots = in_slots(mel)
    encoder = recognizer.net.encoder
    streams = [
        EncoderStream.begin(encoder, lookahead).extended(
            row[: -(-count // SUBSAMPLING_FACTOR) * SUBSAMPLING_FACTOR].unflatten(0, (-1, SUBSAMPLING_FACTOR)),
            count,
            ended=True,
        )
        for row, count in zip(mine, slots.tolist(), strict=True)
    ]

    pieces: list[list[Tensor]] = [[] for _ in LENGTHS]
    while active := [row for row, stream in enumerate(streams) if len(stream.groups)]:
        encoded, done, after = encode(encoder, [streams[row] for row in active])
        for row, frames, item, stream in zip(active, encoded, done, after, strict=True):
            pieces[row].append(frames[: item.frames])
            streams[row] = stream

    for ours, expected in zip(pieces, theirs, strict=True):
        torch.testing.assert_close(torch.cat(ours), expected, atol=ATOL, rtol=0)
