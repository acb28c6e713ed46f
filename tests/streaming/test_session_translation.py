"""Translation in its session: the same events for any chunks of audio, whoever else is there."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.audio import AudioFormat
from streaming.drafts import NGrams
from streaming.errors import DragomanError
from streaming.events import ErrorEvent, Event, SessionClosed, TranscriptDelta, TranslationDelta, Word
from streaming.interpreter import FORWARDS_PER_TICK, translate
from streaming.session import Session, SessionConfig, tick
from streaming.speculation import Speculation
from streaming.text_session import TextSession
from tests import tiny

few = settings(max_examples=8, deadline=None)
LANGUAGES = [("es",), ("es", "de"), ("fr", "es", "de")]


def audio(samples: int, seed: int) -> np.ndarray:
    """Noise in bursts with true silence between them, so that endpoints happen."""
    rng = np.random.default_rng(seed)
    bursts = np.repeat(rng.integers(0, 3, samples // 12000 + 1) > 0, 12000)[:samples]
    return (rng.standard_normal(samples) * bursts * 3000).clip(-32768, 32767).astype(np.int16)


#: Tiny recognisers that tell long words; a few, with endpoints between them; and many of one letter.
LONG, PAUSING, SHORT = 0, 3, 4


def talk() -> np.ndarray:
    """Four bursts of noise with pauses after them."""
    return np.concatenate([part for seed in range(4) for part in (audio(24_000, seed + 1), np.zeros(24_000, np.int16))])


def opened(
    languages: Sequence[str] = ("es",), latency: str = "medium", lookahead_ms: int = 480, kind: int = LONG
) -> Session:
    config = SessionConfig(
        AudioFormat("s16le", 16000), lookahead_ms, endpoint_silence_ms=400, languages=tuple(languages), latency=latency
    )
    return Session(tiny.recognizer(kind), config, tiny.translator())


def alone(pcm: np.ndarray, session: Session) -> list[Event]:
    return session.push(pcm) + session.finish()


def wire(events: Sequence[Event]) -> list[str]:
    return [event.to_json() for event in events]  # which rounds what depends on the size of a batch


def translations(events: Sequence[Event], language: str) -> list[TranslationDelta]:
    return [event for event in events if isinstance(event, TranslationDelta) and event.language == language]


def spoken(events: Sequence[Event]) -> list[Word]:
    return [word for event in events if isinstance(event, TranscriptDelta) for word in event.words]


@few
@given(
    samples=st.integers(0, 30_000),
    seed=st.integers(0, 30),
    cuts=st.lists(st.integers(0, 30_000), max_size=8),
    languages=st.sampled_from(LANGUAGES),
    latency=st.sampled_from(["low", "offline"]),
    kind=st.sampled_from([LONG, PAUSING, SHORT]),
)
def test_any_chunking_gives_identical_events(
    samples: int, seed: int, cuts: list[int], languages: tuple[str, ...], latency: str, kind: int
) -> None:
    pcm = audio(samples, seed)
    session, events, start = opened(languages, latency, kind=kind), list[Event](), 0
    for end in [*sorted(min(cut, samples) for cut in cuts), samples]:
        events += session.push(pcm[start:end])
        start = end
    events += session.finish()
    assert events == alone(pcm, opened(languages, latency, kind=kind))
    assert [event.seq for event in events] == list(range(len(events)))
    assert isinstance(events[-1], SessionClosed)


@few
@given(
    seeds=st.lists(st.integers(0, 30), min_size=2, max_size=3),
    max_chunks=st.integers(1, 4),
    order=st.lists(st.integers(0, 2), max_size=20),
)
def test_company_and_batching_change_nothing(seeds: list[int], max_chunks: int, order: list[int]) -> None:
    pcms = [audio(40_000, seed) for seed in seeds]
    sessions = [opened(LANGUAGES[i], "low", 80) for i in range(len(seeds))]
    at = [0] * len(seeds)
    for pick in order + list(range(len(seeds))) * 8:
        i = pick % len(seeds)
        if at[i] < len(pcms[i]):
            sessions[i].write(pcms[i][at[i] : at[i] + 7_000])
            at[i] += 7_000
        tick(sessions, max_chunks=max_chunks)
    for session in sessions:
        session.close_input()
    while any(session.ready(max_chunks) for session in sessions):
        tick(sessions, max_chunks=max_chunks)
    for i, session in enumerate(sessions):
        assert wire(session.take_events()) == wire(alone(pcms[i], opened(LANGUAGES[i], "low", 80)))


def test_the_transcript_is_the_same_without_translation() -> None:
    pcm = audio(80_000, 3)
    with_it, without = alone(pcm, opened(("es", "de"))), alone(pcm, opened(()))
    assert spoken(with_it) == spoken(without)
    assert opened(()).policy is None and opened().policy == "interleaved"


@pytest.mark.parametrize("latency", ["low", "offline"])
def test_every_word_is_written_upon_once_and_when_it_was_told(latency: str) -> None:
    events = alone(talk(), opened(("es", "de"), latency))
    words, told = spoken(events), 0
    next_word = {"es": 0, "de": 0}
    emitted_ms = 0
    for event in events:
        if isinstance(event, TranscriptDelta):
            told += len(event.words)
            emitted_ms = event.emitted_ms
        elif isinstance(event, TranslationDelta):
            first, last = event.source_words
            assert next_word[event.language] <= first + event.endpoint and first <= last < told
            assert (event.source_start_ms, event.source_end_ms) == (words[first].start_ms, words[last].end_ms)
            assert event.emitted_ms == emitted_ms  # of what was told last before it
            next_word[event.language] = last + 1
    assert len(words) > 10 and set(next_word.values()) == {len(words)}


def test_an_endpoint_is_translated_before_what_follows_it() -> None:
    events = alone(talk(), opened(("es",), "offline", kind=PAUSING))
    closing = [i for i, event in enumerate(events) if isinstance(event, TranscriptDelta) and event.endpoint]
    assert len(closing) > 1
    for i in closing:
        after = next(event for event in events[i + 1 :] if not isinstance(event, TranslationDelta) or event.endpoint)
        assert isinstance(after, TranslationDelta)
        assert after.source_words[1] + 1 == len(spoken(events[: i + 1]))


def test_deltas_are_the_text_of_a_language_with_their_spaces() -> None:
    events = alone(talk(), opened(("es",), "low"))
    deltas = [event.delta for event in translations(events, "es") if event.delta]
    assert len(deltas) > 2
    assert not deltas[0].startswith(" ")
    assert all(delta.startswith(" ") for delta in deltas[1:])


@pytest.mark.parametrize("at", [10_000, 64_000, 90_000])
def test_a_flush_translates_what_it_tells_and_nothing_twice(at: int) -> None:
    pcm, session = talk(), opened(("es", "de"), "offline")
    events = session.push(pcm[:at]) + session.flush()
    told = len(spoken(events))
    for language in ("es", "de"):
        last = translations(events, language)[-1].source_words[1] if told else -1
        assert last == told - 1
    assert session.flush() == []
    events += session.push(pcm[at:]) + session.finish()
    assert [event.seq for event in events] == list(range(len(events)))
    for language in ("es", "de"):
        own = translations(events, language)
        for before, after in itertools.pairwise(own):
            # Upon an endpoint alone, the word before it is told once more.
            assert before.source_words[1] < after.source_words[0] + (after.endpoint and not before.endpoint)
        assert own[-1].source_words[1] + 1 == len(spoken(events))


def test_a_flush_before_the_events_were_computed_tells_them_once() -> None:
    pcm = audio(64_000, 7)
    session = opened(("es",), "low")
    session.write(pcm)
    tick([session])
    flushed = session.take_events() + session.flush()
    rest = session.finish()
    assert not [event for event in rest if isinstance(event, TranscriptDelta)] and isinstance(rest[-1], SessionClosed)
    assert len(spoken(flushed)) == len(spoken(alone(pcm, opened(("es",), "low"))))


def test_half_a_sample_at_the_end_costs_no_translation() -> None:
    pcm = audio(64_000, 7)
    session = opened()
    events = session.push(pcm.tobytes() + b"\x01") + session.finish()
    assert [event.code for event in events if isinstance(event, ErrorEvent)] == ["audio_odd_bytes"]
    assert [e.delta for e in translations(events, "es")] == [e.delta for e in translations(alone(pcm, opened()), "es")]


def test_no_audio_is_an_empty_session() -> None:
    assert [type(event) for event in opened(("es", "de")).finish()] == [SessionClosed]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"languages": ("xx",)}, "'xx'; it knows es, de, fr"),
        ({"languages": ("es", "es")}, "twice"),
        ({"languages": ("es",), "latency": "soon"}, "'soon'; choose one of low"),
        ({"languages": ("es",), "glossary": {"x": "y"}}, "'x'"),
    ],
)
def test_what_cannot_be_translated_is_refused(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(DragomanError, match=message):
        Session(tiny.recognizer(), SessionConfig(**settings_), tiny.translator())  # type: ignore[arg-type]


def test_languages_without_a_translator_are_refused() -> None:
    with pytest.raises(DragomanError, match="no translator is loaded"):
        Session(tiny.recognizer(), SessionConfig(languages=("es",)))


# -------------------------------------------------------------------------------------------------- text sessions

TEXT = st.lists(st.sampled_from("the speaker is still talking and nothing is shown".split()), max_size=14)


@few
@given(
    lines=st.lists(TEXT, max_size=3),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    languages=st.sampled_from(LANGUAGES),
    latency=st.sampled_from(["medium", "offline"]),
)
def test_any_portions_of_words_give_identical_events(
    lines: list[list[str]], cuts: list[int], languages: tuple[str, ...], latency: str
) -> None:
    whole = TextSession(tiny.translator(3), languages, latency)
    portions = TextSession(tiny.translator(3), languages, latency)
    expected, events, i = list[Event](), list[Event](), 0
    for line in lines:
        expected += whole.push(" ".join(line)) + whole.end_segment()
        while line:
            size = cuts[i % len(cuts)]
            events += portions.push(" ".join(line[:size]))
            line, i = line[size:], i + 1
        events += portions.end_segment()
    assert events + portions.finish() == expected + whole.finish()
    assert [event.seq for event in expected] == list(range(len(expected)))


def test_text_sessions_advance_together() -> None:
    lines = ["the speaker is still talking", "and nothing", "is taken back and the words go on"]
    sessions = [TextSession(tiny.translator(3), ["es", "de"]) for _ in lines]
    for session, line in zip(sessions, lines, strict=True):
        session.write(line, closes=True)
        session.close_input()
    while any(session.ready() for session in sessions):
        translate(sessions)
    for session, line in zip(sessions, lines, strict=True):
        single = TextSession(tiny.translator(3), ["es", "de"])
        assert session.take_events() == single.push(line) + single.end_segment() + single.finish()


def test_a_text_session_writes_upon_its_last_words_and_ends() -> None:
    session = TextSession(tiny.translator(3), ["es"], "offline")
    assert session.push("the speaker is") == []
    delta, closed = session.finish()
    assert isinstance(delta, TranslationDelta) and delta.source_words == (0, 2) and delta.emitted_ms is None
    assert isinstance(closed, SessionClosed)
    for call in (session.finish, lambda: session.push("on")):
        with pytest.raises(DragomanError, match="ended already|after the end"):
            call()


def test_a_text_session_needs_a_language() -> None:
    with pytest.raises(DragomanError, match="needs a language"):
        TextSession(tiny.translator(), [])


def test_sessions_of_one_speculation_share_each_forward_and_tell_what_each_tells_without() -> None:
    t, speculation = tiny.translator(3), Speculation([NGrams()])
    lines = ["the speaker is still talking", "and nothing is taken back", "el hablante sigue"] * 2
    sessions = [TextSession(t, ["es", "de"], speculation=speculation) for _ in lines]
    for session, line in zip(sessions, lines, strict=True):
        session.write(line)
        session.close_input()
    steps = 0
    while ready := [session for session in sessions if session.ready()]:
        translate(ready)
        steps += 1
    assert steps <= speculation.forwards <= FORWARDS_PER_TICK * steps
    for session, line in zip(sessions, lines, strict=True):
        single = TextSession(t, ["es", "de"])
        assert session.take_events() == single.push(line) + single.finish()
