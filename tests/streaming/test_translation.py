"""Reading and writing: what is cached, batched and read ahead is what a naive loop over whole sequences makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.tokenizer import decode, encode_words
from models.translator import OWN_ENDPOINT, Translator, load_translator
from streaming import translation
from streaming.errors import DragomanError
from streaming.translation import Interleaved, TranslatedChunk, TranslationState, looping, write_cap
from tests import tiny

WORDS = [
    *"the speaker is still talking and nothing that was shown is taken back".split(), "Talking,", "straße", "🎉👩‍👩‍👧",
    "同声传译", "x" * 90, "<|es|>", "<|end-of-read|>and", "<s>", "<0x41>", "\u200b", "▁", "\u0301", "\ud800",
]  # fmt: skip
words_ = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from([False, False, False, True])), max_size=16)
seeds = st.integers(0, 5)
few = settings(max_examples=10, deadline=None)

Spoken = Sequence[tuple[str, bool]]  # words, and whether each closes a segment


class NaiveSequence:
    """Every token ever read, of which each sees those that were in the context when it was read; nothing is cached."""

    def __init__(self, translator: Translator, prompt: Sequence[int]) -> None:
        self.translator, self.prompt = translator, list(prompt)
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.seen: list[list[int]] = []
        self.restart()

    def restart(self) -> None:
        self.alive: list[int] = []
        self.chunks: list[list[int]] = []
        self.said: list[tuple[list[int], list[int]]] = []
        self.next_position = 0
        for token in self.prompt:
            self.append(token)

    def append(self, token: int) -> int:
        index = len(self.tokens)
        self.alive.append(index)
        self.tokens.append(token)
        self.positions.append(self.next_position)
        self.seen.append(list(self.alive))
        self.next_position += 1
        return index

    def logits(self) -> torch.Tensor:
        n = len(self.tokens)
        visible = torch.zeros(1, n, n, dtype=torch.bool)
        for i, seen in enumerate(self.seen):
            visible[0, i, seen] = True
        llm = self.translator.llm
        logits, _ = llm.step(
            torch.tensor([self.tokens]), torch.tensor([n]), None,
            positions=torch.tensor([self.positions]), visible=visible,
        )  # fmt: skip
        return logits[0, 0]

    def end_chunk(self, slots: list[int], rest: list[int], source: list[int], written: list[int]) -> None:
        """Whole old chunks leave, a copy of the prompt moves up to those that stay, and the chunk's end is read."""
        self.chunks.append(slots + [-1] * len(rest))
        self.said.append((source, written))
        if len(last := self.said[-3:]) == 3:
            same_words, same_text = (all(chunk[side] == last[0][side] for chunk in last) for side in (0, 1))
            if same_text and not same_words:
                return self.restart()
        limit = self.translator.config.max_context_tokens
        if len(self.prompt) + sum(map(len, self.chunks)) > limit:
            while self.chunks and len(self.prompt) + sum(map(len, self.chunks)) > limit * 3 // 4:
                del self.chunks[0]
            if not self.chunks:
                return self.restart()
            kept, after = [slot for chunk in self.chunks for slot in chunk if slot >= 0], self.next_position
            self.alive, self.next_position = [], self.positions[kept[0]] - len(self.prompt)
            for token in self.prompt:
                self.append(token)
            self.alive += kept
            self.next_position = after
        self.chunks[-1] = slots + [self.append(token) for token in rest]
        return None


def naive(t: Translator, spoken: Spoken, *, target: str, latency: str) -> list[TranslatedChunk]:
    """Word by word and token by token, with whole sequences; no glossary."""
    direction = t.direction(target, latency)
    sequence, chunks = NaiveSequence(t, direction.prompt), list[TranslatedChunk]()
    slots, source, first_word, begun = list[int](), list[int](), 0, False
    for i, ids, closes in read_out(t, spoken):
        slots += [sequence.append(token) for token in ids]
        source += ids
        full = len(source) >= (t.config.max_context_tokens - len(direction.prompt)) // 4
        must = bool(source) and (closes or full)
        if not must:
            if not ids or latency == "offline":
                continue
            if sequence.logits().softmax(-1)[t.end_of_read] < t.config.read_threshold:
                continue
        slots.append(sequence.append(t.end_of_read))
        written: list[int] = []
        rest = [t.end_of_write]
        while True:
            closing = source == list(t.endpoint)
            mask = t.unwritable if written or closing else t.unable_to_begin
            token = int(sequence.logits().masked_fill(mask, -torch.inf).argmax())
            if token == t.end_of_write or (closing and token not in t.marks):
                break
            written.append(token)
            if cut := looping(written):
                for _ in range(cut - 1):  # the last token has not been appended yet
                    slots.pop()
                    for record in (sequence.tokens, sequence.positions, sequence.seen, sequence.alive):
                        record.pop()
                    sequence.next_position -= 1
                del written[-cut:]
                break
            if len(written) >= write_cap(len(source)):
                rest = [token, t.end_of_write]
                break
            slots.append(sequence.append(token))
        text = decode(t.tokenizer, written)
        text = text if begun else text.lstrip(" ")
        chunks.append(TranslatedChunk(0, target, text, tuple(written), min(first_word, i), i, closes))
        begun = begun or bool(text)
        sequence.end_chunk(slots, rest, source, written)
        slots, source, first_word = [], [], i + 1
    return chunks


def read_out(t: Translator, spoken: Spoken) -> Iterator[tuple[int, list[int], bool]]:
    """What is read in each step: the number of its word, its ids, and whether a write must follow."""
    for i, (word, closes) in enumerate(spoken):
        yield i, list(t.encode_word(word)), closes and not t.endpoint
        if closes and t.endpoint:
            yield i, list(t.endpoint), True


def run(
    interpreter: Interleaved, state: TranslationState, forwards: int = 1
) -> tuple[list[TranslatedChunk], TranslationState]:
    """Steps until nothing is left to do."""
    chunks: list[TranslatedChunk] = []
    while interpreter.ready(state):
        [found], [state] = interpreter.step([state], max_forwards=forwards)
        chunks += found
    return chunks, state


def fed(interpreter: Interleaved, state: TranslationState, spoken: Spoken) -> TranslationState:
    for word, closes in spoken:
        state = interpreter.feed(state, [word], closes=closes)
    return state


def opened(
    t: Translator,
    targets: Sequence[str] = ("es",),
    latency: str = "medium",
    glossary: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Interleaved, TranslationState]:
    interpreter = Interleaved(t)
    terms = {term: {"es": text} for term, text in glossary.items()}
    return interpreter, interpreter.init_state([t.direction(target, latency) for target in targets], terms)


@few
@given(
    seed=seeds,
    spoken=words_,
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    context=st.sampled_from([48, 96, 512]),
    latency=st.sampled_from(["low", "high", "offline"]),
    endpoint=st.sampled_from([None, OWN_ENDPOINT]),
)
def test_cached_equals_uncached(
    seed: int, spoken: Spoken, cuts: list[int], context: int, latency: str, endpoint: str | None
) -> None:
    """Whatever came at once, ids, texts and spans are those of a loop that reads whole sequences from the start."""
    t = tiny.translator(seed, max_context_tokens=context, endpoint=endpoint)
    interpreter, state = opened(t, latency=latency)
    chunks, start, i = list[TranslatedChunk](), 0, 0
    while start < len(spoken):
        end = start + cuts[i % len(cuts)]
        found, state = run(interpreter, fed(interpreter, state, spoken[start:end]), 1 + i % 3)
        chunks, start, i = chunks + found, end, i + 1
    assert chunks == naive(t, spoken, target="es", latency=latency)


@few
@given(
    seed=seeds,
    talks=st.lists(words_, min_size=2, max_size=3),
    order=st.lists(st.integers(0, 2), min_size=4, max_size=60),
    context=st.sampled_from([48, 512]),
)
def test_rows_and_sessions_change_nothing_for_each_other(
    seed: int, talks: list[Spoken], order: list[int], context: int
) -> None:
    """Sessions of one and of several languages, in any interleaving, do what each row does alone."""
    t = tiny.translator(seed, max_context_tokens=context)
    languages = [("es",), ("de", "es"), ("fr", "de", "es"), ("de",)]
    interpreter = Interleaved(t)
    states = [opened(t, languages[i])[1] for i in range(len(talks))]
    chunks: list[list[TranslatedChunk]] = [[] for _ in talks]
    at = [0] * len(talks)
    for n, pick in enumerate(order + list(range(len(talks))) * 500):
        i = pick % len(talks)
        if at[i] < len(talks[i]):
            states[i], at[i] = fed(interpreter, states[i], talks[i][at[i] : at[i] + 2]), at[i] + 2
        part = [j for j in range(len(talks)) if j == i or (j + n) % 3]
        found, after = interpreter.step([states[j] for j in part], max_forwards=1 + n % 2)
        for j, new, state in zip(part, found, after, strict=True):
            chunks[j] += new
            states[j] = state
        if all(a >= len(talk) for a, talk in zip(at, talks, strict=True)) and not any(map(interpreter.ready, states)):
            break
    for i, talk in enumerate(talks):
        for row, language in enumerate(languages[i]):
            alone, _ = run(*(lambda one: (one[0], fed(one[0], one[1], talk)))(opened(t, [language])))
            assert [replace(chunk, row=0) for chunk in chunks[i] if chunk.row == row] == alone


@pytest.mark.parametrize(("seed", "context"), [(1, 48), (5, 48), (2, 96)])
def test_what_leaves_the_context_leaves_as_in_the_naive_loop(seed: int, context: int) -> None:
    """Long enough that chunks leave, rows begin anew, and the prompt moves, several times."""
    t = tiny.translator(seed, max_context_tokens=context)
    interpreter, state = opened(t)
    chunks, state = run(interpreter, fed(interpreter, state, talk(60)))
    assert chunks == naive(t, talk(60), target="es", latency="medium")
    assert len(chunks) > 12


@cache
def talk(words: int) -> tuple[tuple[str, bool], ...]:
    return tuple((WORDS[(7 * i + i * i // 5) % 14], i % 37 == 36) for i in range(words))


def test_a_long_talk_has_bounded_state_and_goes_on() -> None:
    t = tiny.translator(3, max_context_tokens=96)
    interpreter, state = opened(t)
    lengths, capacities, chunks = [], set(), 0
    for word, closes in talk(800):
        found, state = run(interpreter, interpreter.feed(state, [word], closes=closes))
        chunks += len(found)
        lengths.append(int(state.cache.lengths[0]))
        capacities.add(state.cache.capacity)
    assert chunks > 20
    assert max(lengths) <= 96 + 24 + write_cap(24) + 64
    assert max(capacities) <= 512


def test_positions_begin_anew_before_they_are_not_exact_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation, "MAX_POSITION", 100)
    interpreter, state = opened(tiny.translator(3))
    newest = []
    for word, closes in talk(300):
        _, state = run(interpreter, interpreter.feed(state, [word], closes=closes))
        newest.append(int(state.cache.next_positions[0]))
    assert max(newest) < 100 + 2 * 127 + 256
    assert newest.count(0) == 0 or min(newest[50:]) < 50


def test_a_row_is_stuck_that_says_the_same_upon_other_words() -> None:
    row = replace(opened(tiny.translator(0))[1].rows[0], recent=(((9,), ()), ((10,), ())))
    assert not row.stuck and replace(row, recent=(*row.recent, ((9,), ()))).stuck
    assert not replace(row, recent=(((9,), ()),) * 3).stuck
    assert not replace(row, recent=(*row.recent, ((9,), (7,)))).stuck


def test_ten_thousand_words_without_a_pause_are_written_upon_in_portions() -> None:
    t = tiny.translator(0)
    interpreter, state = opened(t, latency="offline")
    chunks, _ = run(interpreter, interpreter.feed(state, ["the"] * 10_000), 64)
    limit = (t.config.max_context_tokens - 4) // 4
    assert {c.last_word - c.first_word + 1 for c in chunks} == {-(-limit // len(t.encode_word("the")))}
    assert chunks[-1].last_word > 10_000 - limit


def test_an_end_without_words_writes_upon_what_was_read_and_only_once() -> None:
    t = tiny.translator(0)
    interpreter, state = opened(t, latency="offline")
    assert not interpreter.ready(interpreter.feed(state, [], closes=True))
    chunks, state = run(interpreter, interpreter.feed(state, ["the", "speaker"]))
    assert not chunks
    chunks, state = run(interpreter, interpreter.feed(state, [], closes=True))
    assert [(c.first_word, c.last_word, c.endpoint) for c in chunks] == [(0, 1, True)]
    assert not interpreter.ready(interpreter.feed(state, [], closes=True))


@pytest.mark.parametrize("latency", ["low", "offline"])
def test_an_endpoint_is_read_once_behind_the_last_word_however_late_it_comes(latency: str) -> None:
    t = tiny.translator(0)
    interpreter, state = opened(t, latency=latency)
    assert not interpreter.ready(interpreter.feed(state, [], closes=True)), "no segment is open"
    together, end = run(interpreter, interpreter.feed(state, ["the", "speaker"], closes=True))
    own, state = run(interpreter, interpreter.feed(opened(t, latency=latency)[1], ["the", "speaker"]))
    late, state = run(interpreter, interpreter.feed(state, [], closes=True))
    assert own + late == together and [chunk.endpoint for chunk in together] == [False] * len(own) + [True]
    assert together[-1].last_word == 1 and (together[-1].first_word == 1 if own else together[-1].first_word == 0)
    assert state.rows[0].history == end.rows[0].history and state.rows[0].history.count(chr(t.endpoint[0])) == 1
    assert not interpreter.ready(interpreter.feed(state, [], closes=True)), "it is closed already"
    with pytest.raises(DragomanError, match="only the last 0 of an open segment"):
        interpreter.revise(interpreter.feed(state, ["is"], closes=True), 1, [])


@few
@given(seed=seeds, spoken=words_, forwards=st.integers(1, 3))
def test_upon_an_endpoint_alone_come_only_marks(seed: int, spoken: Spoken, forwards: int) -> None:
    """All words have been written upon, so that a word more would be one that nobody said."""
    t = tiny.translator(seed)
    interpreter, state = opened(t, latency="low")
    for word, _ in spoken:
        _, state = run(interpreter, interpreter.feed(state, [word]), forwards)
        alone = not state.rows[0].read
        chunks, state = run(interpreter, interpreter.feed(state, [], closes=True), forwards)
        if alone and chunks:
            [chunk] = chunks
            assert not any(character.isalnum() or character == "\ufffd" for character in chunk.delta)


@pytest.mark.model
def test_the_embedded_model_closes_a_sentence_that_it_has_translated_with_a_mark() -> None:
    t = load_translator()
    interpreter, state = opened(t)
    shown, state = run(interpreter, fed(interpreter, state, [(word, False) for word in "we go to the market".split()]))
    assert not state.rows[0].read, "the last word was written upon"
    closing, _ = run(interpreter, interpreter.feed(state, [], closes=True))
    assert "".join(chunk.delta for chunk in shown + closing) == "Vamos al mercado."


def test_an_end_reaches_the_last_queued_word_and_the_open_write() -> None:
    """Of a model that reads no endpoints."""
    t = tiny.translator(0, endpoint=None)
    interpreter, state = opened(t, latency="offline")
    state = interpreter.feed(interpreter.feed(state, ["the", "speaker"]), [], closes=True)
    assert [word.closes for word in state.rows[0].queue] == [False, True]
    _, [state] = interpreter.step([state])
    write = state.rows[0].write
    assert write is not None and write.closes
    again = interpreter.feed(state, [], closes=True).rows[0].write
    assert again is not None and again.closes


# ------------------------------------------------------------------------------------------------- ends of a write


@pytest.mark.parametrize(
    ("ids", "cut"),
    [
        ([], 0), ([1, 1, 1], 0), ([1] * 8, 7), ([1] * 7, 0), ([5, *[1] * 8], 7), ([1, 2] * 4, 6), ([1, 2] * 3, 0),
        ([9, *[1, 2, 3] * 3], 6), ([1, 2, 3] * 2, 0), (list(range(16)) * 3, 32), (list(range(17)) * 3, 0),
    ],
)  # fmt: skip
def test_what_counts_as_a_loop(ids: list[int], cut: int) -> None:
    assert looping(ids) == cut


@few
@given(seed=seeds, spoken=words_)
def test_writes_are_capped_and_do_not_loop(seed: int, spoken: Spoken) -> None:
    t = tiny.translator(seed)
    interpreter, state = opened(t)
    chunks, _ = run(interpreter, fed(interpreter, state, spoken))
    for chunk in chunks:
        source = sum(len(t.encode_word(word)) for word, _ in spoken[chunk.first_word : chunk.last_word + 1])
        assert len(chunk.ids) <= write_cap(source)
        assert not looping(chunk.ids)
        assert not set(chunk.ids) & t.tokenizer.controls


def test_the_cap_grows_with_what_was_read() -> None:
    assert [write_cap(n) for n in (1, 10, 115, 116, 5_000)] == [27, 45, 255, 256, 256]


# ------------------------------------------------------------------------------------------------------- revision


@few
@given(
    seed=seeds,
    spoken=st.lists(st.sampled_from(WORDS[:14]), min_size=1, max_size=12),
    dropped=st.integers(0, 12),
    new=st.lists(st.sampled_from(WORDS[:14]), max_size=4),
    forwards=st.integers(0, 3),
)
def test_a_revised_tail_is_as_if_it_had_come_so(
    seed: int, spoken: list[str], dropped: int, new: list[str], forwards: int
) -> None:
    t = tiny.translator(seed)
    interpreter, state = opened(t)
    state = interpreter.feed(state, spoken)
    [shown], [state] = interpreter.step([state], max_forwards=forwards)
    free = len(state.rows[0].read) + len(state.rows[0].queue)
    if dropped > free:
        with pytest.raises(DragomanError, match=f"last {free} "):
            interpreter.revise(state, dropped, new)
        return
    later, state = run(interpreter, interpreter.revise(state, dropped, new))
    straight, other = run(interpreter, interpreter.feed(opened(t)[1], [*spoken[: len(spoken) - dropped], *new]))
    assert shown + later == straight
    assert state.rows[0] == other.rows[0]


# ------------------------------------------------------------------------------------------------------- glossary


def forced(glossary: Mapping[str, str], seed: int, text: str = "the speaker is still talking") -> list[TranslatedChunk]:
    interpreter, state = opened(tiny.translator(seed), latency="offline", glossary=glossary)
    chunks, _ = run(interpreter, interpreter.feed(state, text.split(), closes=True))
    return chunks


@pytest.mark.parametrize("seed", range(6))
def test_a_term_of_the_glossary_is_written_where_it_occurs(seed: int) -> None:
    t = tiny.translator(seed)
    [plain] = forced({"absent": "hablante"}, seed)
    for term in ("speaker", "still talking"):
        [chunk] = forced({term: "el Zug"}, seed)
        ids = encode_words(t.tokenizer, "el Zug")
        at = next(i for i in range(len(chunk.ids)) if chunk.ids[i : i + len(ids)] == ids)
        assert chunk.ids[:at] == plain.ids[:at]  # up to there it is what the model wrote by itself
        assert "el Zug" in chunk.delta


@pytest.mark.parametrize("seed", range(6))
def test_a_term_that_is_written_already_or_does_not_occur_changes_nothing(seed: int) -> None:
    [plain] = forced({"absent": "x"}, seed)
    assert plain.delta == opened_plain(seed)
    written = next((word for word in plain.delta.split() if word.isalpha()), None)
    if written is not None:
        assert forced({"speaker": written.upper()}, seed) == [plain]


def opened_plain(seed: int) -> str:
    interpreter, state = opened(tiny.translator(seed), latency="offline")
    chunks, _ = run(interpreter, interpreter.feed(state, "the speaker is still talking".split(), closes=True))
    return "".join(chunk.delta for chunk in chunks)


def test_the_place_of_a_term_is_the_one_that_costs_the_model_least() -> None:
    t = tiny.translator(1)
    [plain] = forced({"absent": "x"}, 1)
    first = encode_words(t.tokenizer, "Zug")[0]
    slots = [
        *t.direction("es", "offline").prompt,
        *encode_words(t.tokenizer, "the speaker is still talking"),
        t.end_of_read,
    ]
    costs = {}
    starts = t.tokenizer.word_starts
    assert starts is not None
    for place in range(len(plain.ids) + 1):
        sequence = NaiveSequence(t, [*slots, *plain.ids[:place]])
        chosen = plain.ids[place] if place < len(plain.ids) else t.end_of_write
        if chosen in starts or chosen == t.end_of_write:
            logits = sequence.logits()
            costs[place] = float(logits[chosen] - logits[first])
    [chunk] = forced({"speaker": "Zug"}, 1)
    best = min(costs, key=lambda place: costs[place])
    assert chunk.ids[: best + 1] == (*plain.ids[:best], first)


def test_a_term_may_begin_in_the_chunk_before() -> None:
    interpreter, state = opened(tiny.translator(0), latency="offline", glossary={"still talking": "Zug"})
    first, state = run(interpreter, interpreter.feed(state, ["is", "still"], closes=True))
    second, _ = run(interpreter, interpreter.feed(state, ["Talking!"], closes=True))
    assert "Zug" not in first[0].delta and "Zug" in second[0].delta


def test_several_terms_are_all_written() -> None:
    glossary = {"the": "Zug", "speaker": "Berg", "talking": "Tal"}
    [chunk] = forced(glossary, 2, "the speaker is talking")
    assert all(term in chunk.delta for term in glossary.values())


def test_of_terms_within_each_other_the_longest_is_written() -> None:
    [chunk] = forced({"talking": "Berg", "still talking": "Zug", "is": "Tal"}, 2)
    assert "Zug" in chunk.delta and "Tal" in chunk.delta and "Berg" not in chunk.delta


def test_terms_make_no_write_longer_than_any_may_be() -> None:
    glossary = {word: " ".join([word] * 8) for word in "abcdefghijklmnopqrstuvwxyz"}
    [chunk] = forced(glossary, 2, " ".join(glossary))
    assert 200 < len(chunk.ids) <= translation.MAX_WRITE_TOKENS


@pytest.mark.parametrize(
    ("glossary", "code"),
    [
        (["x"], "list"),
        ({"x": "y"}, "'x'"),
        ({"x": {"es": ""}}, "''"),
        ({"": {"es": "y"}}, "''"),
        ({"a": {"es": "b " * 9}}, "1 to 8"),
    ],
)
def test_a_broken_glossary_is_refused(glossary: object, code: str) -> None:
    from streaming.glossary import check_glossary

    with pytest.raises(DragomanError, match=code) as refused:
        check_glossary(glossary)
    assert refused.value.code == "bad_glossary"
