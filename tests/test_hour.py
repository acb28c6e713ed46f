"""An hour of one session: nothing grows, nothing sticks."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.flatness import measure, repeated
from benchmarks.hour import PAUSES, hear, longest_loop, parts, phrases
from benchmarks.speed import CONFIG, read_audio
from models.checkpoint import load_recognizer
from tests import tiny

SAMPLE = Path(__file__).parents[1] / "samples" / "jfk.flac"


@pytest.mark.slow
@pytest.mark.parametrize(("gates", "minutes"), [(0, 60), (3, 20)])
def test_an_hour_costs_no_more_memory_or_time_than_its_first_minutes(gates: int, minutes: int) -> None:
    rng = np.random.default_rng(0)
    bursts = np.repeat(rng.integers(0, 2, 60), 8000)
    audio = (rng.standard_normal(len(bursts)) * bursts * 0.1).astype(np.float32)
    rows = measure(tiny.recognizer(gates=gates), repeated(audio), minutes, CONFIG)
    early, late = rows[4], rows[-1]
    assert late["words"] > minutes / 6 * early["words"] > 0, "it was spoken to its end"
    assert late["resident_mb"] < 1.05 * early["resident_mb"]
    assert late["step_ms"] < 1.5 * early["step_ms"]  # growth with time would be tenfold; a busy machine is not


@pytest.mark.slow
@pytest.mark.model
def test_what_is_said_after_a_pause_is_heard() -> None:
    """Five minutes of phrases between silence, noise, hum and music.

    The bounds are those of a weak model, which hears less with noise or music in its left context; that is over with
    the next phrase, and does not grow.
    """
    heard = hear(load_recognizer(), phrases(read_audio(SAMPLE)), 5, CONFIG, seed=3)
    assert len(heard.phrases) > 30
    assert {phrase.after for phrase in heard.phrases} >= set(PAUSES)
    assert len(heard.missed) <= 0.1 * len(heard.phrases), heard.missed
    assert not any(a in heard.missed and b in heard.missed for a, b in itertools.pairwise(heard.phrases))
    assert 0.5 < heard.kept() < 1.3
    assert heard.kept(2 / 3, 1) > 0.75 * heard.kept(0, 1 / 3), "it hears less and less"
    assert heard.longest_loop <= 3
    assert heard.words_in_pauses < 6 * heard.pauses_s / 60
    assert heard.minutes[-1]["resident_mb"] < 1.05 * heard.minutes[1]["resident_mb"]


@given(st.lists(st.sampled_from("ab"), max_size=12))
def test_the_longest_loop_is_that_of_a_naive_search(words: list[str]) -> None:
    def times(start: int, size: int) -> int:
        n = 1
        while words[start + n * size : start + (n + 1) * size] == words[start : start + size]:
            n += 1
        return n

    groups = [(start, size) for size in range(1, 9) for start in range(len(words) - size + 1)]
    assert longest_loop(words) == max((times(*group) for group in groups), default=0)


def test_a_stream_of_phrases_has_every_kind_of_pause_and_speech_after_each() -> None:
    spoken = phrases(read_audio(SAMPLE))
    assert len(spoken) == 3
    stream = parts(spoken, 0)
    drawn = [next(stream) for _ in range(120)]
    kinds = [part.kind for part in drawn]
    assert set(kinds) == {"speech", *PAUSES} and "speech" in kinds[-2:]
    for part in drawn:
        assert part.samples.dtype == np.float32 and np.abs(part.samples).max(initial=0) <= 1
        assert (np.abs(part.samples).max() > 0) == (part.kind != "silence")
