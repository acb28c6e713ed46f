import re
from collections.abc import Sequence
from io import StringIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from client.output import OutputFormat, make_writer
from client.view import Level, Lines, Panes, SegmentLines, Status, describe_level, make_view, status_line
from streaming.events import Event, SessionClosed, TranscriptDelta, TranslationDelta

LISTENING = Status(heard_s=3_723.4, db=-30, warning="", lag_s=0.24, dropped_s=0, ending=False)


def said(delta: str, segment: int = 0) -> TranscriptDelta:
    return TranscriptDelta(0, delta, 0, 400, 400, segment, False, ())


def translated(delta: str, language: str = "es", *, ends: bool = False) -> TranslationDelta:
    return TranslationDelta(0, delta, language, (0, 0), ends)


TALK: list[Event] = [
    said(" how are"),
    said(" you"),
    translated(" cómo estás", ends=False),
    translated("", ends=True),
    said(" fine", 1),
    translated(" bien", ends=True),
    translated(" gut", "de", ends=True),
    SessionClosed(9, 1000),
]


def written(writer: SegmentLines, events: Sequence[Event], cuts: Sequence[int] = ()) -> str:
    places = [0, *sorted(cuts), len(events)]
    return "".join(writer.push(events[a:b]) for a, b in zip(places, places[1:], strict=False)) + writer.finish()


@given(st.lists(st.integers(0, len(TALK))))
def test_a_line_for_each_segment_however_the_events_come(cuts: list[int]) -> None:
    assert written(SegmentLines(), TALK, cuts) == "how are you\nfine\n"
    assert written(SegmentLines("es"), TALK, cuts) == "cómo estás\nbien\n"
    assert written(SegmentLines("de"), TALK, cuts) == "gut\n"
    assert written(SegmentLines("fr"), TALK, cuts) == ""


def test_the_level() -> None:
    level = Level()
    assert describe_level(level) == ""
    level.hear(np.full(1600, 3277, "<i2").tobytes(), 0.1)
    assert level.db == pytest.approx(-20, abs=0.01)
    level.hear(bytes(3200), 0.1)
    assert level.db == pytest.approx(-21.5, abs=0.01), "it falls slowly"
    level.hear(np.full(10, 32767, "<i2").tobytes(), 0.1)
    assert (round(level.db), describe_level(level)) == (0, "too loud")
    for _ in range(29):
        level.hear(bytes(3200), 0.1)
    assert describe_level(level) == ""
    level.hear(bytes(3200), 0.2)
    assert "muted" in describe_level(level)
    level.hear(b"", 0.0)


def test_the_status_in_one_line() -> None:
    assert status_line(LISTENING).plain == "1:02:03  ▮▮▮▮▮▮▮▮▮▮▯▯▯▯▯▯▯▯▯▯  0.2 s behind  Ctrl-C ends"
    bad = Status(0, float("-inf"), "too loud", 31, 2.5, True)
    line = status_line(bad, ascii_only=True).plain
    assert line == "0:00:00  --------------------  31.0 s behind  2.5 s lost  too loud  the last words, Ctrl-C leaves"
    assert "#" * 20 in status_line(Status(0, 3, "", 0, 0, False), ascii_only=True).plain


def screen(panes: Panes, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, file=StringIO(), force_terminal=True, color_system=None)
    panes._console = console
    with console.capture() as capture:
        console.print(panes.frame(LISTENING), end="")
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip() for line in capture.get().split("\n")][:height]


def test_panes_show_the_words_above_and_each_translation_below() -> None:
    panes = Panes(make_writer(OutputFormat.TXT, "mic", ["es", "de"], bilingual=True), ["es", "de"])
    for event in TALK:
        panes.hear(event)
    assert screen(panes, 40, 14) == [
        "╭─ speech ─────────────────────────────╮",
        "│ how are you                          │",
        "│ fine                                 │",
        "╰──────────────────────────────────────╯",
        "╭─ es ─────────────────────────────────╮",
        "│ cómo estás                           │",
        "│ bien                                 │",
        "╰──────────────────────────────────────╯",
        "╭─ de ─────────────────────────────────╮",
        "│ gut                                  │",
        "│                                      │",
        "╰──────────────────────────────────────╯",
        "1:02:03  ▮▮▮▮▮▮▮▮▮▮▯▯▯▯▯▯▯▯▯▯  0.2 s be…",
        "",
    ]


def test_panes_show_what_was_told_last_and_leave_all_of_it_behind(capsys: pytest.CaptureFixture[str]) -> None:
    with Panes(make_writer(OutputFormat.TXT, "mic"), []) as panes:
        panes.hear(TALK[0])
        panes.tell("the connection was lost: connecting again")
        panes.tell("the session goes on")
        assert screen(panes, 40, 5) == [
            "╭─ speech ─────────────────────────────╮",
            "│ how are                              │",
            "╰──────────────────────────────────────╯",
            "the session goes on",
            "1:02:03  ▮▮▮▮▮▮▮▮▮▮▯▯▯▯▯▯▯▯▯▯  0.2 s be…",
        ]
    told = "dragoman: the connection was lost: connecting again\ndragoman: the session goes on\n"
    assert capsys.readouterr().err.endswith(told)


@given(st.lists(st.tuples(st.text("ab ", min_size=1, max_size=9), st.booleans()), max_size=30), st.integers(5, 30))
def test_shown_text_stays_where_it_is(pieces: list[tuple[str, bool]], width: int) -> None:
    """Whatever is appended, full lines only scroll up."""
    panes = Panes(make_writer(OutputFormat.TXT, "mic"), [])
    before: list[str] = []
    segment = 0
    for piece, ends in pieces:
        panes.hear(said(f" {piece.strip()}x", segment))
        segment += ends
        lines = panes._panes[""].last_lines(width, 1_000)
        assert lines[: len(before[:-1])] == before[:-1]
        assert panes._panes[""].last_lines(width, 3) == lines[-3:]
        assert all(len(line) <= width for line in lines)
        before = lines


def test_panes_remember_what_fits_on_a_screen() -> None:
    panes = Panes(make_writer(OutputFormat.TXT, "mic"), [])
    for i in range(3_000):
        panes.hear(said(f" word{i}", 0 if i < 1_500 else i))
    assert sum(map(len, panes._panes[""]._paragraphs)) < 250_000
    assert panes._panes[""].last_lines(20, 2) == ["word2998", "word2999"]
    assert panes._panes[""].last_lines(20, 0) == []


def test_where_text_goes_to_a_terminal_there_are_panes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_view(OutputFormat.TXT, ["es"]), Lines)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert isinstance(make_view(OutputFormat.TXT, ["es"]), Panes)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_view(OutputFormat.TXT, ["es"]), Lines)
    assert isinstance(make_view(OutputFormat.JSONL, ["es"]), Lines)


@pytest.mark.parametrize(
    ("kind", "languages", "text"),
    [
        ("txt", [], "how are you\nfine\n"),
        ("txt", ["es"], "cómo estás\nbien\n"),
        ("txt", ["es", "de"], "how are you\n    es  cómo estás\nfine\n    es  bien\n    de  gut\n"),
    ],
)
def test_lines_are_written_as_they_come(
    kind: str, languages: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with make_view(OutputFormat(kind), languages) as view:
        for i, event in enumerate(TALK):
            view.hear(event)
            view.draw(view.frame(LISTENING))
            if i == 0 and languages != ["es"]:
                assert capsys.readouterr().out == text[:7]
                text = text[7:]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (text, "")


def test_after_panes_all_of_the_text_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Panes(SegmentLines(), ["es", "de"]) as view:
        for event in TALK:
            view.hear(event)
    assert capsys.readouterr().out.endswith("how are you\nfine\n")
