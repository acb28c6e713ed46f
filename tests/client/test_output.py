import json
from pathlib import Path

import pytest

from client.output import OrderedOutput, OutputFormat, make_writer
from streaming.errors import DragomanError
from streaming.events import Event, SessionClosed, TranscriptDelta, Word


def delta(text: str) -> TranscriptDelta:
    return TranscriptDelta(0, f" {text}", 0, 1500, 1500, 0, False, (Word(text, 0, 1500, 0.5),))


def output(
    names: list[str], output_format: OutputFormat = OutputFormat.TXT, folder: Path | None = None
) -> tuple[OrderedOutput, list[str]]:
    written: list[str] = []
    return OrderedOutput(names, output_format, folder, written.append), written


def test_text_is_the_deltas_without_the_first_space() -> None:
    writer = make_writer(OutputFormat.TXT, "a.wav")
    pieces = [writer.push([]), writer.push([delta("one"), delta("two")]), writer.push([delta("three")])]
    assert [*pieces, writer.finish()] == ["", "one two", " three", "\n"]


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
    with pytest.raises(DragomanError, match=r"a\.txt"):
        output(["x/a.wav", "y/a.mp3"], OutputFormat.TXT, tmp_path)
