"""Which frames run when: chunks, ends, and streams that share a step."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.encoder import EncoderStream, encode
from tests import tiny

NET = tiny.net().encoder.freeze()


def stream(lookahead: int) -> EncoderStream:
    return EncoderStream.begin(NET, lookahead)


def test_a_chunk_runs_when_it_is_whole() -> None:
    waiting = stream(3).extended(torch.zeros(3, 8, 80), 24, ended=False)
    assert waiting.ready_frames(1) == 0
    whole = waiting.extended(torch.zeros(6, 8, 80), 48, ended=False)
    assert whole.ready_frames(1) == 4
    assert whole.ready_frames(9) == 8


def test_the_end_lets_the_rest_run() -> None:
    rest = stream(3).extended(torch.zeros(6, 8, 80), 43, ended=True)
    assert rest.ready_frames(1) == 4
    assert rest.ready_frames(2) == 6
    assert stream(3).extended(torch.zeros(0, 8, 80), 0, ended=True).ready_frames(1) == 0


@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 40),
    missing=st.integers(0, 7),
    lookahead=st.sampled_from([0, 1, 3, 6]),
    max_chunks=st.integers(1, 6),
)
def test_how_many_chunks_run_at_once_changes_nothing(
    groups: int, missing: int, lookahead: int, max_chunks: int
) -> None:
    mel = torch.randn(groups, 8, 80, generator=torch.Generator().manual_seed(groups)) * 3 - 8

    def run(chunks: int) -> torch.Tensor:
        current, frames = stream(lookahead).extended(mel, 8 * groups - missing, ended=True), []
        while current.ready_frames(chunks):
            y, done, (current,) = encode(NET, [current], max_chunks=chunks)
            assert done[0].start_frame == sum(map(len, frames))
            frames.append(y[0, : done[0].frames])
        assert not len(current.groups) and not current.slots
        return torch.cat(frames)

    torch.testing.assert_close(run(max_chunks), run(1), atol=1e-5, rtol=1e-5)


def test_streams_of_different_kind_share_a_step() -> None:
    mel = torch.randn(20, 8, 80)
    streams = [stream(r).extended(mel, 160, ended=r == 6) for r in (0, 1, 6)]
    y, done, after = encode(NET, streams)
    assert [item.frames for item in done] == [1, 2, 7]
    assert [len(s.groups) for s in after] == [19, 18, 13]
    for item, one in zip(done, streams, strict=True):
        alone, _, _ = encode(NET, [one])
        torch.testing.assert_close(y[item.row, : item.frames], alone[0], atol=1e-5, rtol=1e-5)
