"""What the benchmark of translation says of a talk is what a naive count finds."""

from __future__ import annotations

import json
from itertools import chain, islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.translation import (
    GROUP_WORDS,
    TALK,
    WINDOW_WORDS,
    Minute,
    Talk,
    interpret,
    repetition,
    run,
    segments,
    sentences,
)
from streaming.text_session import TextSession
from tests import tiny


@given(st.lists(st.sampled_from("ab"), max_size=40), st.lists(st.sampled_from("abcdefgh"), max_size=300))
def test_repetition_is_that_of_a_naive_count(few: list[str], many: list[str]) -> None:
    for words in (few, many):
        groups = [words[i : i + GROUP_WORDS] for i in range(len(words) - GROUP_WORDS + 1)]
        again = [groups[i] in groups[max(0, i - WINDOW_WORDS) : i] for i in range(len(groups))]
        assert repetition(words) == sum(again) / max(1, len(groups))


def test_the_talk_says_every_sentence_before_it_says_one_again() -> None:
    spoken = sentences()
    assert len(set(spoken)) == len(spoken) > 100
    words = sum(map(len, spoken))
    said = list(islice(chain.from_iterable(segments(spoken, 0)), 2 * words))
    assert sorted(said[:words]) == sorted(said[words:]) == sorted(chain.from_iterable(spoken))
    assert said[:words] != said[words:]
    assert repetition(said) < 0.02
    assert max(map(len, islice(segments(spoken, 0), 100))) > 60, "some segments have many sentences"


def test_a_recogniser_writes_the_sentences() -> None:
    first, *_ = TALK.read_text(encoding="utf-8").splitlines()
    assert first == "Good morning, everybody, and thank you for coming so early."
    assert sentences()[0] == ("good", "morning", "everybody", "and", "thank", "you", "for", "coming", "so", "early")


def test_silence_is_counted_in_a_row() -> None:
    told = Talk(silent={"es": [1, 2, 3, 7, 9, 10], "de": []})
    assert told.longest_silence() == 3
    assert Talk(silent={"es": []}).longest_silence() == 0


def test_words_written_are_those_for_each_word_and_language() -> None:
    minutes = [Minute(i, 0.0, 0.0, 0.0, written) for i, written in enumerate((300, 300, 150))]
    told = Talk(minutes, texts={"es": "", "de": ""})
    assert told.written() == 750 / 900
    assert told.written(2 / 3, 1) == 0.5


def test_a_talk_is_what_a_session_makes_of_its_segments() -> None:
    translator, languages = tiny.translator(1), ["es", "de"]
    said = list(islice(segments(sentences(), 3), 4))
    told = interpret(TextSession(translator, languages), languages, said, 60)
    session, events = TextSession(translator, languages), []
    for segment in said:
        events += session.push(" ".join(segment)) + session.end_segment()
    for language in languages:
        deltas = [event for event in events if getattr(event, "language", None) == language]
        assert told.texts[language] == "".join(event.delta for event in deltas)
    assert told.segments == 4
    assert len(told.minutes) == sum(map(len, said)) // 150


def test_it_runs_on_any_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save_tiny_translator(tmp_path)
    run(folder, words=5, minutes=1, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert {row["languages"] for row in printed["steps"]} == {1, 3}
    assert all(0 < row["ms_p50"] <= row["ms_p95"] for row in printed["steps"])
    assert printed["talk"]["words"] == 150 and len(printed["talk"]["minutes"]) == 1
    run(folder, words=5, minutes=1)
    table = capsys.readouterr().out
    assert table.startswith("threads\tlanguages\tms_p50") and "segments_silent " in table
