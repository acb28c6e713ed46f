"""Words from pieces: when they are certain, what they say, and where segments end."""

from __future__ import annotations

import sentencepiece

from streaming.text import MAX_PIECES_PER_WORD, FlushGuard, TextState, WordAssembler, close_segment
from streaming.transducer import Token
from tests import tiny

PIECES = sentencepiece.SentencePieceProcessor(model_proto=tiny.tokenizer())


def tokens(text: str, frame: int = 0, probability: float = 0.9) -> list[Token]:
    """The pieces of a text, one a frame."""
    return [Token(piece, frame + i, probability) for i, piece in enumerate(PIECES.encode(text))]


def assembler(silence_frames: int = 10) -> WordAssembler:
    return WordAssembler(PIECES, silence_frames)


def test_a_word_waits_for_the_next_one() -> None:
    words, state = assembler().add(tokens("talking while"), TextState())
    assert [word.delta for word in words] == ["talking"]
    words, state = assembler().close_word(state)
    assert [word.delta for word in words] == [" while"]
    assert state.pending == ()


def test_pieces_may_come_in_any_portions() -> None:
    spoken = tokens("nothing once shown is ever taken back")
    state, deltas = TextState(), []
    for token in spoken:
        words, state = assembler().add([token], state)
        deltas += [word.delta for word in words]
    words, state = assembler().close_word(state)
    assert "".join(deltas + [word.delta for word in words]) == "nothing once shown is ever taken back"


def test_times_and_confidence_come_from_the_pieces() -> None:
    spoken = tokens("talking", frame=12, probability=0.25)
    words, _ = assembler().close_word(assembler().add(spoken, TextState())[1])
    word = words[0].word
    assert word.start_ms == 11 * 80
    assert word.end_ms == (12 + len(spoken) - 1) * 80
    assert abs(word.confidence - 0.25) < 1e-9


def test_a_piece_that_continues_a_closed_word_is_joined_verbatim() -> None:
    """A segment may end within a word; what follows is appended without a space that nobody said."""
    spoken = tokens("talking")
    assert len(spoken) > 1
    _, state = assembler().add(spoken[:1], TextState())
    first, state = assembler().close_word(state)
    _, state = assembler().add(spoken[1:], close_segment(state))
    second, _ = assembler().close_word(state)
    assert first[0].delta + second[0].delta == "talking"


def test_an_endless_word_is_cut() -> None:
    tail = next(i for i in range(PIECES.get_piece_size()) if not PIECES.id_to_piece(i).startswith("▁") and i)
    words, state = assembler().add([Token(tail, i, 0.5) for i in range(3 * MAX_PIECES_PER_WORD)], TextState())
    assert len(words) == 2
    assert len(state.pending) == MAX_PIECES_PER_WORD


def test_an_endpoint_needs_silence_by_both_witnesses() -> None:
    words = assembler(10)
    _, state = words.add(tokens("back"), TextState())
    last = state.silent_from_frame
    assert not words.suspects_endpoint(last + 9, state)
    assert words.suspects_endpoint(last + 10, state)
    ended, state = words.at_endpoint(last + 10, state, silent=False)
    assert not ended
    assert not words.suspects_endpoint(last + 12, state), "asked again too soon"
    assert words.suspects_endpoint(last + 15, state) and words.at_endpoint(last + 15, state, silent=True)[0]
    assert not words.at_endpoint(last + 15, state, silent=False)[0]
    assert words.at_endpoint(last + 30, state, silent=False)[0], "patience has an end"


def test_no_endpoint_without_words() -> None:
    assert not assembler(10).suspects_endpoint(100, TextState())


def test_after_a_flush_the_same_pieces_are_not_shown_again() -> None:
    """The stream decides them once more, one of them late; then it goes on."""
    shown = tokens("ever taken", frame=0)
    guard = FlushGuard(until_frame=len(shown) - 1, padded_until_frame=20, expected=tuple(t.piece for t in shown))
    _, state = assembler().add(shown, TextState(guard=guard))
    assert state.pending == ()
    words, state = assembler().add(tokens("back is", frame=len(shown)), state)
    assert [word.word.word for word in words] == ["back"]
    assert state.guard is None


def test_after_a_flush_within_a_word_its_rest_follows_verbatim() -> None:
    spoken = tokens("talking", frame=0)
    guard = FlushGuard(until_frame=1, padded_until_frame=8, expected=(spoken[0].piece,))
    _, state = assembler().add(spoken, TextState(words=1, guard=guard))
    words, _ = assembler().close_word(state)
    assert words[0].delta == PIECES.decode([t.piece for t in spoken[1:]])


def test_after_a_flush_that_guessed_otherwise_the_cut_word_is_not_mended() -> None:
    spoken = tokens("talking while", frame=0)
    guard = FlushGuard(until_frame=1, padded_until_frame=8, expected=(spoken[0].piece, 5))
    _, state = assembler().add(spoken, TextState(words=1, guard=guard))
    words, _ = assembler().close_word(state)
    assert [word.delta for word in words] == [" while"]
