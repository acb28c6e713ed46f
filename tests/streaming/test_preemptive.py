"""Translation ahead of what is told: events do not depend on it, and often nothing is left to translate."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.translator import OWN_ENDPOINT, Translator
from streaming.audio import AudioFormat
from streaming.drafts import NGrams, OldOutput
from streaming.events import Event, TranscriptDelta, TranslationDelta
from streaming.interpreter import translate, translate_ahead
from streaming.preemptive import expecting, told
from streaming.session import Session, SessionConfig, tick
from streaming.speculation import Speculation
from streaming.text_session import TextSession
from streaming.translation import Interleaved, TranslatedChunk, TranslationState
from tests import tiny
from tests.streaming.test_session_translation import (
    LANGUAGES,
    LONG,
    PAUSING,
    SHORT,
    TEXT,
    alone,
    audio,
    few,
    opened,
    talk,
    wire,
)
from tests.streaming.test_translation import run

#: A tiny translator whose forced writes are long.
WRITES_MUCH = 0
moments = st.integers(0, 1 << 32).map(random.Random)


#: Models that read the end of a segment, and models that do not.
endpoints = st.sampled_from([None, OWN_ENDPOINT])


def drafting() -> Speculation:
    """Drafts with what has been dropped."""
    return Speculation([OldOutput(), NGrams()], max_tokens=9)


@few
@given(
    samples=st.integers(0, 40_000),
    seed=st.integers(0, 30),
    idle=moments,
    languages=st.sampled_from(LANGUAGES),
    latency=st.sampled_from(["low", "offline"]),
    kind=st.sampled_from([LONG, PAUSING, SHORT]),
    drafts=st.booleans(),
    endpoint=endpoints,
)
def test_speech_gives_identical_events_whenever_the_machine_is_idle(
    samples: int,
    seed: int,
    idle: random.Random,
    languages: tuple[str, ...],
    latency: str,
    kind: int,
    drafts: bool,
    endpoint: str | None,
) -> None:
    pcm, t = audio(samples, seed), tiny.translator(endpoint=endpoint)
    config = SessionConfig(AudioFormat("s16le"), 480, endpoint_silence_ms=400, languages=languages, latency=latency)
    session = Session(tiny.recognizer(kind), config, t, drafting() if drafts else None)
    events, start = list[Event](), 0
    while start < samples:
        end = start + idle.randint(1, 6_000)
        session.write(pcm[start:end])
        while session.ready():
            tick([session])
        events += session.take_events()
        for _ in range(idle.choice([0, 0, 1, 3, 30])):
            translate_ahead([session], max_forwards=idle.randint(1, 4))
        assert session.take_events() == []
        start = end
    events += session.finish()
    assert wire(events) == wire(alone(pcm, Session(tiny.recognizer(kind), config, t)))


def test_a_flush_tells_the_same_after_translating_ahead() -> None:
    """What is ahead of the words that it tells is taken over, and the stream goes on from there."""
    pcm, told_ = audio(64_000, 7), []
    for ahead in (False, True):
        session, events = opened(("es", "de"), "low", 0, SHORT), list[Event]()
        for start in range(0, len(pcm), 8_000):
            events += session.push(pcm[start : start + 8_000])
            while ahead and translate_ahead([session]):
                pass
            if start % 24_000 == 0:
                events += session.flush()
        told_.append(wire(events + session.finish()))
    assert told_[0] == told_[1] and len(told_[0]) > 20


@few
@given(
    lines=st.lists(st.lists(TEXT, max_size=3), min_size=1, max_size=3),
    idle=moments,
    latency=st.sampled_from(["low", "medium", "offline"]),
    drafts=st.booleans(),
    endpoint=endpoints,
)
def test_text_sessions_translate_ahead_together(
    lines: list[list[list[str]]], idle: random.Random, latency: str, drafts: bool, endpoint: str | None
) -> None:
    """Words a few at a time, guessed right and wrong, in batches of any of the sessions."""
    t, speculation = tiny.translator(3, endpoint=endpoint), drafting() if drafts else None
    sessions = [Guessing(idle, t, LANGUAGES[i], latency, speculation) for i in range(len(lines))]
    events: list[list[Event]] = [[] for _ in lines]
    coming = [[(word, i + 1 == len(line)) for line in talk for i, word in enumerate(line)] for talk in lines]
    while any(coming):
        for session, words in zip(sessions, coming, strict=True):
            if words and idle.random() < 0.5:
                word, ends = words.pop(0)
                session.write(word, closes=False)
                if ends:
                    session.write("", closes=True)
                session.guess([word for word, _ in words[:1]])
        while (busy := [session for session in sessions if session.ready()]) and idle.random() < 0.9:
            translate(busy)
        for _ in range(idle.choice([0, 1, 2, 9])):
            waiting = [session for session in sessions if not session.ready() and idle.random() < 0.7]
            translate_ahead(waiting, max_forwards=idle.randint(1, 3))
        for found, session in zip(events, sessions, strict=True):
            found += session.take_events()
    for i, (session, talk_) in enumerate(zip(sessions, lines, strict=True)):
        whole = TextSession(t, LANGUAGES[i], latency)
        expected = [e for line in talk_ for e in whole.push(" ".join(line)) + (whole.end_segment() if line else [])]
        assert events[i] + session.finish() == expected + whole.finish()


class Guessing(TextSession):
    """Knows which word comes next, or thinks so."""

    def __init__(
        self,
        lies: random.Random,
        translator: Translator,
        languages: Sequence[str],
        latency: str,
        speculation: Speculation | None = None,
    ) -> None:
        super().__init__(translator, languages, latency, None, speculation)
        self.lies, self.next_word = lies, ""

    def guess(self, words: list[str]) -> None:
        self.next_word = self.lies.choice([*words * 3, "speaker", "x", ""])

    @property
    def tail(self) -> str:
        return self.next_word

    @property
    def pausing(self) -> bool:
        return self.lies.random() < 0.5


@pytest.mark.parametrize("language", ["es", "de"])
@pytest.mark.parametrize("endpoint", [None, OWN_ENDPOINT])
def test_what_comes_as_expected_leaves_nothing_to_translate(language: str, endpoint: str | None) -> None:
    """A word, its segment's end, or one after the other; a word more is all that is left."""
    for word, closes in [("the", False), ("the", True), ("", True), ("the speaker", True)]:
        session = Guessing(random.Random(0), tiny.translator(3, endpoint=endpoint), [language], "low")
        session.push("nothing is shown")
        session.next_word = word.partition(" ")[0]
        for _ in range(200):
            translate_ahead([session])
        session.write(word, closes=False)
        assert session.ready() == (" " in word)
        while session.ready():
            translate([session])
        if closes:
            session.write("", closes=True)
            assert session.ready() <= (" " in word)


def test_the_end_of_speech_has_been_translated_when_it_is_told() -> None:
    """Of a session that has been idle in its pauses, every endpoint but those that came with more words."""
    session, ready_s, pcm = opened(("es",), "offline", 0, PAUSING), list[bool](), talk()
    for start in range(0, len(pcm), 1280):
        session.write(pcm[start : start + 1280])
        while session.ready() and not session.translates:
            tick([session])
        told_ = [event for event in session.take_events() if isinstance(event, TranscriptDelta)]
        ready_s += [session.translates for event in told_ if event.endpoint]
        while session.ready():
            tick([session])
        while translate_ahead([session]):
            pass
    assert len(ready_s) > 1 and not any(ready_s)


def test_the_tail_is_what_the_next_word_begins_with() -> None:
    session, pcm, tail, checked = opened((), kind=LONG), audio(160_000, 5), "", 0
    for start in range(0, len(pcm), 1280):
        events = session.push(pcm[start : start + 1280])
        if told_ := [word.word for event in events if isinstance(event, TranscriptDelta) for word in event.words]:
            assert told_[0].startswith(tail)
            checked += bool(tail)
        tail = session.tail
    assert checked > 3


def test_no_idle_call_is_unbounded_and_none_is_made_for_the_busy() -> None:
    session = TextSession(tiny.translator(3), ["es"], "offline")
    session.push("the speaker is")
    guess = session._expecting()
    assert guess is not None and translate_ahead([session], max_forwards=1)
    assert session._interpretation is not None and session._interpretation.ahead is not None
    write = session._interpretation.ahead.open.state.rows[0].write
    assert write is not None and len(write.ids) <= 1
    session.write("still talking")
    assert session.ready() and not translate_ahead([session])
    assert not translate_ahead([TextSession(tiny.translator(3), ["es"])])
    assert not translate_ahead([opened(())])


# ------------------------------------------------------------------------------------------------------ old output


def begun(speculation: Speculation | None = None) -> tuple[Interleaved, TranslationState]:
    interpreter = Interleaved(tiny.translator(WRITES_MUCH), speculation)
    state = interpreter.init_state([interpreter.translator.direction("es", "offline")])
    return interpreter, interpreter.feed(state, "the speaker is still".split())


def test_what_was_written_upon_a_guess_is_a_draft_of_what_is_written_instead() -> None:
    """Here instead is the same, since the word that came has no tokens."""
    forwards: list[int] = []
    written: list[list[TranslatedChunk]] = []
    for recalled in (False, True):
        speculation = Speculation([OldOutput()], max_tokens=64, fixed=True)
        interpreter, state = begun(speculation)
        _, state = run(interpreter, state)
        ahead = expecting(interpreter, state, None, "", ends=True)
        chunks, after = run(interpreter, ahead.open.state)
        ahead = ahead.after(after, chunks)
        before = speculation.forwards
        if recalled:
            branch, _ = told(interpreter, state, ahead, ["\u200b"], closes=True)
            assert not branch.chunks and branch.state.rows[0].former
            state = branch.state
        else:
            state = interpreter.feed(state, ["\u200b"], closes=True)
        found, end = run(interpreter, state)
        written.append(found)
        forwards.append(speculation.forwards - before)
        assert end.rows[0].former == ""
    assert written[0] == written[1] and forwards[1] < forwards[0]


def test_a_revised_write_is_a_draft() -> None:
    """One that the model has begun of itself, upon a word that was not meant."""
    revised = []
    for t in map(tiny.translator, range(6)):
        interpreter = Interleaved(t)
        state = interpreter.feed(interpreter.init_state([t.direction("es", "low")]), ["the", "speaker"])
        for _ in range(4):
            _, [state] = interpreter.step([state])
            write = state.rows[0].write
            if write is not None and write.ids:
                revised.append(interpreter.revise(state, 1, ["talking"]).rows[0].former == "".join(map(chr, write.ids)))
                break
    assert revised and all(revised)


def test_events_tell_the_languages_in_the_order_in_which_they_were_asked_for() -> None:
    session = TextSession(tiny.translator(0), ["de", "es", "fr"], "low")
    events = [e for _ in range(3) for e in session.push("the speaker is still talking") + session.end_segment()]
    asked = ["de", "es", "fr"]
    order = [(e.source_words[1], asked.index(e.language)) for e in events if isinstance(e, TranslationDelta)]
    assert len(order) > 5 and order == sorted(order)
