import json
from pathlib import Path

import pytest

from client.output import OrderedOutput, OutputFormat, make_writer
from streaming.errors import DragomanError
from streaming.events import Event, SessionClosed, TranscriptDelta, TranslationDelta, Word


def delta(text: str) -> TranscriptDelta:
    return TranscriptDelta(0, f" {text}", 0, 1500, 1500, 0, False, (Word(text, 0, 1500, 0.5),))


def translated(text: str, language: str = "es") -> TranslationDelta:
    return TranslationDelta(0, text, language, (0, 0), False, 0, 1500, 1500)


TALK: list[Event] = [delta("one"), translated("uno"), translated("eins", "de"), delta("two"), delta("three")]
TALK += [translated(" dos"), translated(" zwei", "de"), translated(""), translated(" tres")]


def output(
    names: list[str], output_format: OutputFormat = OutputFormat.TXT, folder: Path | None = None, *languages: str
) -> tuple[OrderedOutput, list[str]]:
    written: list[str] = []
    return OrderedOutput(names, output_format, folder, written.append, languages), written


def test_text_is_the_deltas_without_the_first_space() -> None:
    writer = make_writer(OutputFormat.TXT, "a.wav")
    pieces = [writer.push([]), writer.push([delta("one"), delta("two")]), writer.push([delta("three")])]
    assert [*pieces, writer.finish()] == ["", "one two", " three", "\n"]


def test_a_translation_is_its_deltas() -> None:
    writer = make_writer(OutputFormat.TXT, "a.wav", ["es"])
    assert "".join([*(writer.push([event]) for event in TALK), writer.finish()]) == "uno dos tres\n"


@pytest.mark.parametrize(("languages", "bilingual"), [(["es", "de"], False), (["es", "de"], True)])
def test_translations_stand_under_what_they_are_of(languages: list[str], bilingual: bool) -> None:
    expected = "one\n    es  uno\n    de  eins\ntwo three\n    es  dos\n    de  zwei\n    es  tres\n"
    one_by_one, at_once = (make_writer(OutputFormat.TXT, "a.wav", languages, bilingual=bilingual) for _ in range(2))
    assert "".join([*(one_by_one.push([event]) for event in TALK), one_by_one.finish()]) == expected
    assert at_once.push(TALK) + at_once.finish() == expected


def test_one_translation_on_a_terminal_has_the_transcript_too() -> None:
    writer = make_writer(OutputFormat.TXT, "a.wav", ["es"], bilingual=True)
    assert writer.push(TALK[:2]) + writer.finish() == "one\n    es  uno\n"


def test_each_language_has_a_file_of_its_own(tmp_path: Path) -> None:
    for output_format in OutputFormat:
        folder = tmp_path / output_format
        results, written = output(["x/talk.wav"], output_format, folder, "es", "de")
        results.add(0, TALK)
        results.end(0, failed=False)
        assert written == []
        suffixes = [""] if output_format is OutputFormat.JSONL else ["", ".es", ".de"]
        assert sorted(path.name for path in folder.iterdir()) == sorted(f"talk{s}.{output_format}" for s in suffixes)
    texts = [(tmp_path / "txt" / f"talk{suffix}.txt").read_text() for suffix in ("", ".es", ".de")]
    assert texts == ["one two three\n", "uno dos tres\n", "eins zwei\n"]
    assert "uno dos tres\n" in (tmp_path / "srt" / "talk.es.srt").read_text()
    assert len((tmp_path / "jsonl" / "talk.jsonl").read_text().splitlines()) == len(TALK)


def test_json_lines_are_the_wire_events_with_the_file() -> None:
    writer = make_writer(OutputFormat.JSONL, "dir/ä.wav")
    events: list[Event] = [delta("one"), SessionClosed(1, 1500)]
    lines = (writer.push(events) + writer.finish()).splitlines()
    assert [json.loads(line) for line in lines] == [{**e.to_dict(), "file": "dir/ä.wav"} for e in events]


def test_one_recording_is_written_as_it_grows() -> None:
    results, written = output(["a.wav"])
    results.add(0, [delta("one")])
    assert written == ["one"]
    results.add(0, [delta("two")])
    results.end(0, failed=False)
    assert "".join(written) == "one two\n"


def test_several_come_in_their_order_each_with_its_name() -> None:
    results, written = output(["a.wav", "b.wav", "c.wav"])
    results.add(1, [delta("later")])
    results.end(1, failed=False)
    assert written == []
    results.add(0, [delta("first")])
    assert written == ["a.wav: first"]
    results.end(2, failed=False)
    results.end(0, failed=False)
    assert "".join(written) == "a.wav: first\nb.wav: later\nc.wav: \n"


def test_a_failure_keeps_what_was_heard_and_leaves_no_trace_where_nothing_was() -> None:
    results, written = output(["a.wav", "b.wav"])
    results.add(0, [delta("half")])
    results.end(0, failed=True)
    results.end(1, failed=True)
    assert "".join(written) == "a.wav: half\n"


@pytest.mark.parametrize("output_format", list(OutputFormat))
def test_a_folder_takes_one_file_for_each(output_format: OutputFormat, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    results, written = output(["x/a.b.wav", "-", "gone.wav"], output_format, folder)
    for index in (0, 1):
        results.add(index, [delta("word")])
        results.end(index, failed=False)
    results.end(2, failed=True)
    assert written == []
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted([f"a.b.{output_format}", f"stdin.{output_format}"])
    assert "word" in (folder / f"a.b.{output_format}").read_text(encoding="utf-8")


def test_a_silent_recording_has_its_file_too(tmp_path: Path) -> None:
    results, _ = output(["a.wav"], OutputFormat.SRT, tmp_path)
    results.end(0, failed=False)
    assert (tmp_path / "a.srt").read_text() == ""


def test_what_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DragomanError, match="--output"):
        output(["a.wav", "b.wav"], OutputFormat.VTT)
    with pytest.raises(DragomanError, match="2 languages do not fit in one srt file"):
        output(["a.wav"], OutputFormat.SRT, None, "es", "de")
    with pytest.raises(DragomanError, match=r"a\.es\.srt"):
        output(["a.wav", "a.es.wav"], OutputFormat.SRT, tmp_path, "es")
    with pytest.raises(DragomanError, match=r"a\.txt"):
        output(["x/a.wav", "y/a.mp3"], OutputFormat.TXT, tmp_path)
