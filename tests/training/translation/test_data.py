"""Sequences are, id for id, what inference builds; packing and batching lose nothing."""

from __future__ import annotations

import json
import random
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.tokenizer import SentencePieceTokenizer, decode
from models.translator import END_OF_READ, END_OF_WRITE, OWN_ENDPOINT, TranslationConfig
from streaming.errors import DragomanError
from tests import tiny
from training.translation import data
from training.translation.align import write_aligned
from training.translation.chunks import LEVEL_WORDS, OFFLINE
from training.translation.corpus import Pair
from training.translation.data import (
    PROMPT,
    READ_ON,
    SOURCE,
    WRITE,
    Chunks,
    Encoder,
    Interleaved,
    Mix,
    Packed,
    RecogniserErrors,
    Sentence,
    Writer,
    as_recognised,
    pack,
    read_recognised,
)

TOKENIZER = SentencePieceTokenizer(tiny.translation_tokenizer())
ENCODER = Encoder(TOKENIZER)
PAIR = Pair("es", "The speaker, Mr. Green, is still talking.", "El hablante, señor Green, sigue hablando.")
LINKS = [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (6, 5)]


def sequence(chunks: Chunks, latency: str = "medium", *, late: bool = False) -> Interleaved:
    made = ENCODER.begin("es", latency)
    ENCODER.add_segment(made, chunks, late=late)
    return made


def test_a_sequence_is_the_one_that_inference_builds() -> None:
    chunks = Chunks([["the", "speaker"], ["is", "talking"]], [["El", "hablante"], ["sigue", "hablando."]])
    made = sequence(chunks)
    translator = tiny.translator()
    ids = list(translator.direction("es", "medium").prompt)
    for i, (source, target) in enumerate(zip(chunks.source, chunks.target, strict=True)):
        for word in source:
            ids += translator.encode_word(word)
        ids += translator.endpoint if i else ()
        ids.append(translator.end_of_read)
        for word in target:
            ids += translator.tokenizer.encode_word(word)
        ids.append(translator.end_of_write)
    assert made.ids == ids
    assert TranslationConfig().prompt.format(source="en", target="es", latency="medium") == "<s><|en|><|es|><|medium|>"


def test_kinds_say_what_each_position_learns() -> None:
    made = sequence(Chunks([["talking", "speaker"], ["and"]], [["hablante"], ["y"]]))
    ends = TOKENIZER.id_of(END_OF_READ), TOKENIZER.id_of(END_OF_WRITE)
    first, second, third = (ENCODER.word(word) for word in ("talking", "speaker", "and"))
    wanted = [PROMPT] * len(ENCODER.begin("es", "medium").ids)
    wanted += [SOURCE] * len(first) + [READ_ON] + [SOURCE] * (len(second) - 1)
    wanted += [WRITE] * (2 + len(ENCODER.word("hablante")))
    assert made.ids.index(ends[0]) == len(wanted) - 2 - len(ENCODER.word("hablante"))
    wanted += [SOURCE] * len(third) + [PROMPT, PROMPT] + [WRITE] * (1 + len(ENCODER.word("y")))
    assert made.kinds == wanted
    assert made.ids[len(wanted) - len(ENCODER.word("y")) - 3] == TOKENIZER.id_of(OWN_ENDPOINT)


def test_a_late_endpoint_brings_the_marks_that_end_a_sentence() -> None:
    ends = [TOKENIZER.id_of(symbol) for symbol in (END_OF_READ, END_OF_WRITE, OWN_ENDPOINT)]
    read, write, endpoint = ends
    source = [["talking"]]
    late = sequence(Chunks(source, [["hablando", "hablante", "!"]]), late=True)
    begin = len(ENCODER.begin("es", "medium").ids) + len(ENCODER.word("talking"))
    word = ENCODER.target_word
    words, mark = [*word("hablando"), *word("hablante")], word("!")
    assert late.ids[begin:] == [read, *words, write, endpoint, read, *mark, write]
    assert late.kinds[begin:] == [WRITE] * (len(words) + 2) + [PROMPT, PROMPT] + [WRITE] * (len(mark) + 1)
    # What was written when the endpoint comes late is what is written at once, but for where it is written.
    for last in ("hablante.", "hablante", "y/o?", "«y»"):
        target = ["hablando", last]
        early, late = sequence(Chunks(source, [target])), sequence(Chunks(source, [target]), late=True)
        texts = [
            [t for t, kind in zip(x.ids, x.kinds, strict=True) if kind == WRITE and t not in ends]
            for x in (early, late)
        ]
        assert texts[0] == texts[1]
    assert sequence(Chunks(source, [["!"]]), late=True) == sequence(Chunks(source, [["!"]]))


def test_levels_keep_the_words_in_both_forms() -> None:
    sentence = Sentence.of(PAIR, LINKS)
    for latency in (*LEVEL_WORDS, OFFLINE):
        written, spoken = sentence.chunks(latency, spoken=False), sentence.chunks(latency, spoken=True)
        assert sum(written.source, []) == PAIR.source.split() and sum(written.target, []) == PAIR.target.split()
        assert sum(spoken.source, []) == "the speaker mister green is still talking".split()
        assert spoken.target == written.target
        assert len(spoken.source) == len(written.source) == len(written.target)
    assert Sentence.of(Pair("es", "and/or", "y/o"), [(0, 0)]).spoken is None


words = st.lists(st.sampled_from("a b c d e".split()), min_size=1, max_size=4)


@settings(deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=5), words)
def test_recognised_words_replace_the_source_and_no_target_is_lost(
    parts: list[tuple[list[str], list[str]]], heard: list[str]
) -> None:
    chunks = Chunks([source for source, _ in parts], [target for _, target in parts])
    made = as_recognised(chunks, " ".join(heard))
    assert sum(made.source, []) == heard and sum(made.target, []) == sum(chunks.target, [])
    assert len(made.source) == len(made.target) and all(made.source) and all(made.target)
    assert as_recognised(chunks, " ".join(sum(chunks.source, []))) == chunks


def test_chunks_end_where_the_matching_word_was_heard() -> None:
    chunks = Chunks(
        [["my", "dog"], ["sleeps"], ["in", "the", "garden"]], [["Mi", "perro"], ["duerme"], ["en el jardín"]]
    )
    made = as_recognised(chunks, "my old dock sleeps the garden")
    assert made.source == [["my", "old", "dock"], ["sleeps"], ["the", "garden"]]
    made = as_recognised(chunks, "my dog in the garden")
    assert made == Chunks([["my", "dog"], ["in", "the", "garden"]], [["Mi", "perro"], ["duerme", "en el jardín"]])


def test_errors_are_as_many_as_asked_and_similar() -> None:
    counts = Counter({"their": 9, "there": 9, "hat": 9, "hut": 9, "rare": 1, "house": 9, "the": 99})
    errors, rng = RecogniserErrors(counts), random.Random(0)
    assert errors(["their", "house"], 0.0, rng) == ["their", "house"]
    heard = [word for _ in range(300) for word in errors(["hat"] * 10, 0.3, rng)]
    assert "hut" in heard and "rare" not in heard
    assert 0.6 < heard.count("hat") / 3000 < 0.85
    assert all(errors(["hat"], 1.0, rng) for _ in range(50)), "something is always heard"
    assert {errors._similar("their", rng) for _ in range(20)} == {"there"}


def sentences(count: int) -> list[Sentence]:
    rng = random.Random(1)
    source, target = "the speaker is still talking and".split(), "el hablante sigue hablando y nada".split()
    made = []
    for k in range(count):
        n = rng.randint(1, 9)
        pair = Pair("es", " ".join(rng.choices(source, k=n)), " ".join([*rng.choices(target, k=n - 1), f"{k}"]))
        links = [(i, n - 1 - i if k % 5 == 0 else i) for i in range(n)]
        made.append(Sentence.of(pair, links))
    return made


def test_a_pass_holds_each_sentence_once() -> None:
    given_sentences = sentences(60)
    writer = Writer(ENCODER, Mix(error_share=0.0), RecogniserErrors({}), {})
    made = list(writer.one_pass(given_sentences, random.Random(3)))
    found: list[str] = []
    ends, latencies = {TOKENIZER.id_of(END_OF_READ), TOKENIZER.id_of(END_OF_WRITE)}, Counter[int]()
    for one in made:
        latencies[one.ids[3]] += 1
        text, inside = [], False
        for token in one.ids:
            if token in ends:
                inside = token == TOKENIZER.id_of(END_OF_READ)
            elif inside:
                text.append(token)
        found += [word for word in decode(TOKENIZER, text).split() if word.isdigit()]
        assert set(one.ids) & ends == ends and one.ids[-1] == TOKENIZER.id_of(END_OF_WRITE)
    assert sorted(found, key=int) == [str(k) for k in range(60)]
    assert len(latencies) == 6
    again = list(writer.one_pass(given_sentences, random.Random(3)))
    assert again == made


def test_whether_to_write_is_learnt_wherever_a_cut_is_but_not_at_a_pause() -> None:
    read = TOKENIZER.id_of(END_OF_READ)
    pairs = [Pair("es", "people saw red houses near big green trees", f"a b c d e f g {k}") for k in range(4)]
    given_sentences = [Sentence.of(pair, [(i, i) for i in range(8)]) for pair in pairs]

    def kinds(continuous_share: float, late_share: float) -> list[list[int]]:
        mix = Mix(
            continuous_share=continuous_share,
            late_share=late_share,
            error_share=0.0,
            joined=1.0,
            offline_share=0.0,
            max_ids=2000,
        )
        writer = Writer(ENCODER, mix, RecogniserErrors({}), {})
        made = list(writer._paragraph(deque(given_sentences), "low", deque(), random.Random(0)))
        return [[kind for token, kind in zip(x.ids, x.kinds, strict=True) if token == read] for x in made]

    assert kinds(0.0, 0.0) == [[WRITE, WRITE, WRITE, PROMPT] * 4]
    assert kinds(1.0, 0.0) == [[WRITE] * 15 + [PROMPT]]
    assert kinds(0.0, 1.0) == [[WRITE, WRITE, WRITE, WRITE, PROMPT] * 4]


def test_joined_sentences_may_be_cut_between_them() -> None:
    one, other = Sentence.of(PAIR, LINKS), Sentence.of(Pair("es", "still talking", "sigue hablando"), [(0, 0), (1, 1)])
    both = Sentence.joined([one, other])
    assert both.source == one.source + other.source and both.target == one.target + other.target
    low = both.chunks("low", spoken=True)
    assert sum(low.source, []) == sum(one.chunks("low", spoken=True).source, []) + ["still", "talking"]
    assert both.chunks(OFFLINE, spoken=False) == Chunks([both.source], [both.target])
    assert (len(one.source), len(one.target)) in [(c.source_end, c.target_end) for c in both.smallest]


def test_what_the_recogniser_made_of_a_sentence_is_mixed_in(tmp_path: Path) -> None:
    file = tmp_path / "recognised.jsonl"
    lines = [{"text": "The speaker!", "recognised": "this speaker"}, {"text": "The speaker", "recognised": " "}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recognised = read_recognised(file)
    assert recognised == {"the speaker": ["this speaker"]}
    mix = Mix(written_share=0.0, error_share=0.0, recognised_share=1.0, joined=0.0, offline_share=1.0)
    writer = Writer(ENCODER, mix, RecogniserErrors({}), recognised)
    sentence = Sentence.of(Pair("es", "The speaker.", "El hablante."), [(0, 0), (1, 1)])
    (made,) = writer.one_pass([sentence], random.Random(0))
    assert made.ids == sequence(Chunks([["this", "speaker"]], [["El", "hablante."]]), OFFLINE).ids


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 5), st.integers(64, 300), st.integers(0, 12))
def test_batches_hold_each_sequence_of_a_pass_once(tmp_path_factory, seed: int, budget: int, skip: int) -> None:
    folder = tmp_path_factory.getbasetemp() / "packed"
    rng = np.random.default_rng(0)
    made = [[Interleaved([k, *rng.integers(1, 9, rng.integers(1, 30)).tolist()]) for k in range(40)] for _ in range(2)]
    for one in (x for some in made for x in some):
        one.kinds = [1 + i % 3 for i in one.ids]
    if not folder.exists():
        pack(made, folder, {"tokenizer_sha256": "x"})
    packed = Packed(folder)
    assert len(packed) == 80
    seen: Counter[tuple[int, ...]] = Counter()
    stream = packed.batches(budget, seed)
    for _ in range(60):
        batch = next(stream)
        B, T = batch.ids.shape
        assert T % 8 == 0 and B == max(1, budget // T)
        for ids, kinds in zip(batch.ids.tolist(), batch.kinds.tolist(), strict=True):
            length = sum(kind != 0 for kind in kinds)
            assert not any(ids[length:])
            assert kinds[:length] == [1 + i % 3 for i in ids[:length]]
            seen[tuple(ids[:length])] += 1
    known = Counter(tuple(one.ids) for some in made for one in some)
    assert set(seen) <= set(known)
    later, skipped = packed.batches(budget, seed), packed.batches(budget, seed, skip=skip)
    for _ in range(skip):
        next(later)
    assert next(later).ids.equal(next(skipped).ids)


def test_the_command_packs_and_names_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_aligned(tmp_path / "aligned.tsv", [(PAIR, LINKS)] * 5 + [(Pair("de", "Yes.", "Ja."), [(0, 0)])])
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(tiny.translation_tokenizer())
    data.run(tmp_path / "aligned.tsv", tokenizer, tmp_path / "packed", passes=2)
    assert "sequences" in capsys.readouterr().out
    packed = Packed(tmp_path / "packed")
    packed.require_tokenizer(tokenizer)
    assert packed.n_ids == sum(1 for _ in np.memmap(tmp_path / "packed" / "kinds.u8", np.uint8, "r"))
    tokenizer.write_bytes(tiny.tokenizer())
    with pytest.raises(DragomanError, match="pack them anew"):
        packed.require_tokenizer(tokenizer)
    with pytest.raises(DragomanError, match="end-of-read"):
        Encoder(SentencePieceTokenizer(tiny.tokenizer()))
