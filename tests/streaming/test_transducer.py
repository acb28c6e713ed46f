"""Greedy search against a plain loop over frames, in batches and in pieces."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.recognizer import RecognizerNet
from streaming.transducer import CtcSearch, DecoderState, TransducerSearch
from tests import tiny


def plain_loop(net: RecognizerNet, encoded: Tensor) -> list[tuple[int, int]]:
    """The textbook search: one row, one frame, one symbol at a time, with nn.LSTM over the whole history."""
    blank, history, out = net.config.vocab_size, [net.config.vocab_size], []
    prediction = net.transducer.decoder.prediction
    for t, frame in enumerate(net.transducer.joint.enc(encoded)):
        for _ in range(net.transducer.config.max_symbols_per_frame):
            embedded = prediction.embed(torch.tensor([history]))
            output, _ = prediction.dec_rnn.lstm(embedded)
            predicted = net.transducer.joint.pred(output[0, -1])
            piece = int(net.transducer.joint.joint_net(frame + predicted).argmax())
            if piece == blank:
                break
            out.append((piece, t))
            history.append(piece)
    return out


def net_of(seed: int, pred_layers: int) -> RecognizerNet:
    return tiny.net(tiny.config(pred_layers=pred_layers), seed).eval().requires_grad_(False)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 20),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    layers=st.integers(1, 2),
)
def test_transducer_equals_plain_loop(seed: int, lengths: list[int], layers: int) -> None:
    net = net_of(seed, layers)
    encoded = torch.randn(len(lengths), max(lengths), 32, generator=torch.Generator().manual_seed(seed)) * 2
    search = TransducerSearch(net)
    tokens, state = search.step(encoded, lengths, search.init_state(len(lengths)))
    for row, length in enumerate(lengths):
        expected = plain_loop(net, encoded[row, :length])
        assert [(token.piece, token.frame) for token in tokens[row]] == expected
        assert all(0 < token.probability <= 1 for token in tokens[row])
    assert state.frames == lengths


def test_the_cap_of_symbols_per_frame_is_reached() -> None:
    net = net_of(1, 1)
    net.transducer.joint.joint_net[2].bias[tiny.PIECES] = -100.0
    search = TransducerSearch(net)
    tokens, _ = search.step(torch.randn(1, 3, 32), [3], search.init_state(1))
    assert [token.frame for token in tokens[0]] == [0] * 10 + [1] * 10 + [2] * 10


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 20), cuts=st.lists(st.integers(0, 20), max_size=6), ctc=st.booleans())
def test_any_cutting_of_the_frames(seed: int, cuts: list[int], ctc: bool) -> None:
    net = net_of(seed, 1)
    search = CtcSearch(net) if ctc else TransducerSearch(net)
    encoded = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(seed)) * 2
    whole, _ = search.step(encoded, [20], search.init_state(1))
    state, tokens, start = search.init_state(1), [], 0
    for end in [*sorted(cuts), 20]:
        part, state = search.step(encoded[:, start:end], [end - start], state)
        tokens += part[0]
        start = end
    assert [(t.piece, t.frame) for t in tokens] == [(t.piece, t.frame) for t in whole[0]]


def test_ctc_merges_repeats_and_drops_blanks() -> None:
    net = net_of(2, 1)
    search = CtcSearch(net)
    encoded = torch.randn(1, 40, 32) * 2
    best = net.ctc_decoder(encoded)[0].argmax(-1).tolist()
    expected = [p for p, before in zip(best, [tiny.PIECES, *best], strict=False) if p not in (before, tiny.PIECES)]
    tokens, _ = search.step(encoded, [40], search.init_state(1))
    assert [token.piece for token in tokens[0]] == expected


def test_rows_join_and_part() -> None:
    net = net_of(3, 2)
    search = TransducerSearch(net)
    encoded = torch.randn(2, 10, 32) * 2
    alone = [search.step(encoded[b : b + 1], [10], search.init_state(1))[0][0] for b in range(2)]
    _, first = search.step(encoded[:1, :4], [4], search.init_state(1))
    joined = DecoderState.cat([first, search.init_state(1)])
    padded = torch.zeros(2, 10, 32)
    padded[0, :6], padded[1] = encoded[0, 4:], encoded[1]
    tokens, state = search.step(padded, [6, 10], joined)
    assert [t.piece for t in tokens[0]] == [t.piece for t in alone[0] if t.frame >= 4]
    assert [t.piece for t in tokens[1]] == [t.piece for t in alone[1]]
    assert [row.frames for row in state.rows()] == [[10], [10]]
