from io import StringIO
from itertools import pairwise

import pysubs2
import pytest
import webvtt
from hypothesis import given
from hypothesis import strategies as st

from client.output import OutputFormat, make_writer
from client.subtitles import MAX_LINE_CHARACTERS, Cue, CueMaker, spread, srt_cue, vtt_cue
from streaming.events import SessionClosed, TranscriptDelta, TranslationDelta, Word


def delta(*words: tuple[str, int, int], endpoint: bool = False) -> TranscriptDelta:
    """A delta of words given as text, start and end in ms."""
    made = tuple(Word(text, start_ms, end_ms, 0.9) for text, start_ms, end_ms in words)
    text = "".join(f" {word.word}" for word in made)
    start_ms, end_ms = (made[0].start_ms, made[-1].end_ms) if made else (0, 0)
    return TranscriptDelta(0, text, start_ms, end_ms, end_ms, 0, endpoint, made)


def cues(*deltas: TranscriptDelta) -> list[Cue]:
    maker = CueMaker()
    return [cue for one in deltas for cue in maker.push(one)] + maker.finish()


def test_an_endpoint_ends_a_cue() -> None:
    first, second = delta(("one", 0, 1200), endpoint=True), delta(("two", 1300, 2500))
    assert cues(first, second) == [Cue(0, 1200, ("one",)), Cue(1300, 2500, ("two",))]


def test_an_endpoint_without_words_ends_the_cue_before_it() -> None:
    deltas = delta(("one", 0, 1200)), delta(endpoint=True), delta(("two", 1300, 2500))
    assert cues(*deltas) == [Cue(0, 1200, ("one",)), Cue(1300, 2500, ("two",))]


def test_endpoints_one_after_another_end_nothing_that_is_to_come() -> None:
    deltas = (
        delta(("one", 0, 1200), endpoint=True),
        delta(endpoint=True),
        delta(("two", 1300, 1800), ("three", 1900, 2600)),
    )
    assert cues(*deltas) == [Cue(0, 1200, ("one",)), Cue(1300, 2600, ("two three",))]


def test_a_pause_ends_a_cue() -> None:
    words = delta(("one", 0, 1200), ("two", 2700, 3700), ("three", 5201, 6300))
    assert cues(words) == [Cue(0, 3700, ("one two",)), Cue(5201, 6300, ("three",))]


def test_a_cue_lasts_six_seconds_at_most() -> None:
    words = delta(*((f"w{i}", 1000 * i, 1000 * i + 1000) for i in range(10)))
    assert [(cue.start_ms, cue.end_ms) for cue in cues(words)] == [(0, 6000), (6000, 10000)]


def test_two_balanced_lines() -> None:
    text = "ask not what your country can do for you ask what you can do"
    words = delta(*((word, 100 * i, 100 * i + 100) for i, word in enumerate(text.split())))
    (cue,) = cues(words)
    assert cue.lines == ("ask not what your country can", "do for you ask what you can do")


def test_a_short_cue_stays_for_a_second_but_not_over_the_next() -> None:
    assert cues(delta(("hi", 500, 700))) == [Cue(500, 1500, ("hi",))]
    assert cues(delta(("hi", 500, 700), endpoint=True), delta(("you", 900, 2000)))[0].end_ms == 900


def test_a_long_cue_is_given_at_its_endpoint_and_a_short_one_when_the_next_begins() -> None:
    maker = CueMaker()
    assert maker.push(delta(("long", 0, 1000), endpoint=True)) == [Cue(0, 1000, ("long",))]
    assert maker.push(delta(("short", 2000, 2100), endpoint=True)) == []
    assert maker.push(delta(("next", 8000, 8100))) == [Cue(2000, 3000, ("short",))]


def translated(text: str, start_ms: int, end_ms: int, endpoint: bool = False) -> TranslationDelta:
    return TranslationDelta(0, text, "es", (0, 0), endpoint, start_ms, end_ms, end_ms)


def test_a_translation_is_spread_over_the_time_of_its_source() -> None:
    words = spread(translated(" aa bbbb  cc", 1000, 2600))
    assert [(word.word, word.start_ms, word.end_ms) for word in words] == [
        ("aa", 1000, 1400),
        ("bbbb", 1400, 2200),
        ("cc", 2200, 2600),
    ]
    assert spread(translated("", 0, 1000)) == spread(translated(" ", 0, 1000)) == []


def test_cues_of_a_translation() -> None:
    maker = CueMaker()
    deltas = [
        translated("pregunta no lo que tu país", 0, 2000),
        translated(" puede hacer", 2000, 3000),
        translated("", 2000, 3000, endpoint=True),  # nothing was left to say
        translated(" pregunta", 4000, 4500, endpoint=True),
    ]
    assert [cue for one in deltas for cue in maker.push(one)] + maker.finish() == [
        Cue(0, 3000, ("pregunta no lo que tu país puede hacer",)),
        Cue(4000, 5000, ("pregunta",)),
    ]


@given(
    st.lists(
        st.tuples(st.text("ab ", max_size=30), st.integers(0, 2000), st.integers(0, 3000), st.booleans()), max_size=8
    )
)
def test_cues_of_translations_keep_the_rules(raw: list[tuple[str, int, int, bool]]) -> None:
    maker, result, now_ms = CueMaker(), [], 0
    for text, gap_ms, length_ms, endpoint in raw:
        result += maker.push(translated(text, now_ms + gap_ms, now_ms + gap_ms + length_ms, endpoint))
        now_ms += gap_ms + length_ms
    result += maker.finish()
    said = [word for text, *_ in raw for word in text.split()]
    assert [word for cue in result for line in cue.lines for word in line.split()] == said
    assert all(cue.start_ms < cue.end_ms for cue in result)
    assert all(one.end_ms <= other.start_ms for one, other in pairwise(result))


def test_a_word_longer_than_a_line_is_kept_whole() -> None:
    word = "x" * 60
    assert [cue.lines for cue in cues(delta(("a", 0, 500), (word, 500, 1500), ("b", 1500, 1600)))] == [
        ("a",),
        (word,),
        ("b",),
    ]


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Z"]), min_size=1, max_size=15)
# Gaps may be negative and words empty of time: a recogniser that errs must not make a broken file.
deltas = st.lists(
    st.tuples(st.lists(st.tuples(texts, st.integers(-100, 3000), st.integers(0, 2000)), max_size=5), st.booleans()),
    max_size=15,
)


def timed(raw: list[tuple[list[tuple[str, int, int]], bool]]) -> list[TranscriptDelta]:
    now_ms = 0
    made = []
    for raw_words, endpoint in raw:
        words = []
        for text, gap_ms, length_ms in raw_words:
            start_ms = max(0, now_ms + gap_ms)
            now_ms = start_ms + length_ms
            words.append((text, start_ms, now_ms))
        made.append(delta(*words, endpoint=endpoint))
    return made


@given(deltas)
def test_cues_keep_the_rules(raw: list[tuple[list[tuple[str, int, int]], bool]]) -> None:
    made = timed(raw)
    result = cues(*made)
    spoken = [word.word for one in made for word in one.words]
    assert [word for cue in result for line in cue.lines for word in line.split()] == spoken
    for cue in result:
        assert 0 <= cue.start_ms < cue.end_ms
        assert len(cue.lines) <= 2
        assert all(len(line) <= MAX_LINE_CHARACTERS or " " not in line for line in cue.lines)
    for one, other in pairwise(result):
        assert one.end_ms <= other.start_ms
        assert one.end_ms - one.start_ms >= 1000 or one.end_ms == other.start_ms


@given(deltas)
def test_srt_and_vtt_are_read_back_by_others(raw: list[tuple[list[tuple[str, int, int]], bool]]) -> None:
    made = timed(raw)
    expected = [(cue.start_ms, cue.end_ms) for cue in cues(*made)]
    srt, vtt = (write(kind, made) for kind in (OutputFormat.SRT, OutputFormat.VTT))
    assert [(line.start, line.end) for line in pysubs2.SSAFile.from_string(srt, "srt")] == expected
    read = webvtt.from_buffer(StringIO(vtt)).captions
    assert [(milliseconds(caption.start), milliseconds(caption.end)) for caption in read] == expected


def write(output_format: OutputFormat, made: list[TranscriptDelta]) -> str:
    writer = make_writer(output_format, "a.wav")
    return "".join([*(writer.push([one]) for one in made), writer.push([SessionClosed(9, 9)]), writer.finish()])


def milliseconds(clock: str) -> int:
    hours, minutes, seconds = clock.split(":")
    return 3_600_000 * int(hours) + 60_000 * int(minutes) + round(1000 * float(seconds))


def test_the_text_of_both_formats() -> None:
    made = [delta(("a<b>&c", 0, 1500), endpoint=True), delta(("-->", 3_723_004, 3_725_000))]
    assert write(OutputFormat.SRT, made) == (
        "1\n00:00:00,000 --> 00:00:01,500\na<b>&c\n\n2\n01:02:03,004 --> 01:02:05,000\n->\n\n"
    )
    assert write(OutputFormat.VTT, made) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\na&lt;b&gt;&amp;c\n\n01:02:03.004 --> 01:02:05.000\n--&gt;\n\n"
    )


def test_empty_transcripts() -> None:
    assert write(OutputFormat.SRT, []) == ""
    assert write(OutputFormat.VTT, []) == "WEBVTT\n\n"
    assert write(OutputFormat.TXT, []) == "\n"


@pytest.mark.parametrize("ms", [0, 999, 1000, 59_999, 3_599_999, 360_000_000])
def test_clocks(ms: int) -> None:
    text = srt_cue(1, Cue(ms, ms + 1, ("a",))).splitlines()[1].split(" --> ")[0]
    assert milliseconds(text.replace(",", ".")) == ms
    assert vtt_cue(Cue(ms, ms + 1, ("a",))).startswith(text.replace(",", "."))
