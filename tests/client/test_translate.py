"""Translating text: a line for each line, whatever the batch, and what cannot be read is told with its line."""

from __future__ import annotations

import io
import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

import models.translator
import streaming.speculation
from client.cli import app
from client.translate import JsonLines, Lines, Step, TextLines, translate
from models.translator import Translator
from streaming.drafts import SEED, save_seeds, spelled
from streaming.errors import DragomanError
from streaming.events import SessionClosed, TranslationDelta
from streaming.speculation import Speculation, speculation_for
from streaming.text_session import TextSession
from tests import tiny

TRANSLATOR = tiny.translator(2)
TEXT = ["the speaker is still talking", "", "  ", "y nada se retira", "é 😀 <|end-of-read|> 漢字", "noch " * 8]


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.translator, "load_translator", lambda folder, **_: TRANSLATOR)
    monkeypatch.setattr(models.translator, "EMBEDDED_TRANSLATOR", Path("no seed of another model"))


def alone(line: str, languages: list[str], latency: str) -> list[TranslationDelta | SessionClosed]:
    """What a session tells about one line, word by word."""
    session = TextSession(TRANSLATOR, languages, latency)
    events = [event for word in line.split() for event in session.push(word)] + session.finish()
    return [event for event in events if isinstance(event, TranslationDelta | SessionClosed)]


def text_of(line: str, language: str, latency: str) -> str:
    deltas = (event.delta for event in alone(line, [language], latency) if isinstance(event, TranslationDelta))
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", "".join(deltas))


def run(*arguments: str, stdin: bytes | str | None = None) -> Result:
    return CliRunner().invoke(app, ["translate", *arguments], input=stdin)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("latency", ["low", "offline"])
def test_each_line_is_what_it_is_alone(batch_size: int, latency: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXT), encoding="utf-8")
    result = run(str(tmp_path / "a.txt"), "--to", "es", "--latency", latency, "--batch-size", str(batch_size))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.split("\n") == [*(text_of(line, "es", latency) for line in TEXT), ""]
    assert sum(map(len, result.stdout.split("\n"))) > 5, "the test is empty if nothing is written"


def test_several_languages_have_a_column_each() -> None:
    lines = TEXT[:4]
    result = run("--to", "de,es , de", stdin="\r\n".join(lines) + "\r\n")
    assert result.exit_code == 0
    expected = ["\t".join(text_of(line, language, "medium") for language in ("de", "es")) for line in lines]
    assert result.stdout.split("\n") == [*expected, ""]


@pytest.mark.parametrize("batch_size", ["1", "4"])
def test_json_lines_are_the_events_with_the_number_of_their_line(batch_size: str) -> None:
    command = ("-", "--to", "es,fr", "--format", "jsonl", "--latency", "low", "--batch-size", batch_size)
    result = run(*command, stdin="\n".join(TEXT))
    expected = [
        {**event.to_dict(), "line": number}
        for number, line in enumerate(TEXT, 1)
        for event in alone(line, ["es", "fr"], "low")
    ]
    assert [json.loads(line) for line in result.stdout.splitlines()] == expected


def test_a_glossary_is_kept(tmp_path: Path) -> None:
    (tmp_path / "g.tsv").write_text("speaker\tes\tSprecher\n", encoding="utf-8")
    command = ("--to", "es", "--glossary", str(tmp_path / "g.tsv"))
    assert "Sprecher" in run(*command, stdin="the speaker is still talking").stdout


lines_of_words = st.lists(st.lists(st.sampled_from("the speaker nada 😀".split()), max_size=6), max_size=6)


@settings(max_examples=10, deadline=None)
@given(lines_of_words, st.integers(1, 4))
def test_the_batch_changes_nothing(lines: list[list[str]], batch_size: int) -> None:
    texts = [" ".join(words) for words in lines]
    stream = io.BytesIO("".join(f"{text}\n" for text in texts).encode())
    writer, written = TextLines(["es"]), ""
    numbers = []
    for step in translate(Lines(stream, "x"), lambda: TextSession(TRANSLATOR, ["es"]), batch_size=batch_size):
        written += writer.push(step)
        numbers += [step.number] if step.done else []
    assert written == "".join(f"{text_of(text, 'es', 'medium')}\n" for text in texts)
    assert numbers == list(range(1, len(texts) + 1))


def test_a_line_is_translated_before_the_next_one_has_come() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as stream, open(writer, "wb", buffering=0) as out:
        steps = translate(Lines(stream, "x"), lambda: TextSession(TRANSLATOR, ["es"]), batch_size=8)
        out.write(b"the speaker is still talking\n")
        while not next(steps).done:
            pass
        threading.Thread(target=lambda: (time.sleep(0.2), out.write(b"y nada\n"), out.close())).start()
        assert [step.number for step in steps if step.done] == [2]


def test_text_in_lines_has_no_line_breaks_and_columns_no_tabs() -> None:
    def step(done: bool, *deltas: tuple[str, str]) -> Step:
        return Step(1, [TranslationDelta(0, text, language, (0, 0)) for language, text in deltas], done)

    writer = TextLines(["es"])
    pieces = [writer.push(step(False, ("es", "a\nb"))), writer.push(step(True, ("es", "\t\u2028c\u00a0!")))]
    assert pieces == ["a b", "  c\u00a0!\n"]
    writer = TextLines(["es", "de"])
    pieces = [writer.push(step(False, ("de", "x\ty"))), writer.push(step(True, ("es", "z")))]
    assert pieces == ["", "z\tx y\n"]
    assert JsonLines().push(step(False, ("es", "a\nb"))).count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to", "xx"], "cannot write the language 'xx'; it knows es, de, fr"),
        (["--to", ""], "empty language"),
        (["--to", "es,,de"], "empty language"),
        (["--to", "es", "--latency", "slow"], "cannot translate at the latency 'slow'; it knows low, "),
        (["--to", "es", "--glossary", "none.tsv"], "none.tsv: there is no such file"),
        (["--to", "es", "none.txt"], "none.txt: No such file"),
    ],
)
def test_what_cannot_be_asked_for(arguments: list[str], sentence: str) -> None:
    result = run(*arguments, stdin="hello\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(rf"dragoman: [^\n]*{re.escape(sentence)}[^\n]*\n", result.stderr)


def test_what_is_not_utf_8_is_told_with_its_line_after_the_lines_before_it() -> None:
    result = run("--to", "es", stdin=b"\xef\xbb\xbfthe speaker\n\xff\nnada\n")
    assert result.exit_code == 2
    assert result.stdout == f"{text_of('the speaker', 'es', 'medium')}\n"
    assert result.stderr == "dragoman: -, line 2 is not UTF-8 text: convert it first\n"


def test_an_error_of_the_text_comes_in_its_place() -> None:
    lines = Lines(io.BytesIO(b"a\n\xff"), "x")
    assert lines.take(wait=True) == "a"
    with pytest.raises(DragomanError, match="line 2") as raised:
        lines.take(wait=True)
    assert raised.value.code == "text_unreadable"


def test_no_lines_at_all() -> None:
    assert run("--to", "es", stdin="").stdout == ""
    assert run("--to", "es", stdin="\n").stdout == "\n"


# ------------------------------------------------------------------------------------------------------- speculation


def test_the_text_is_the_same_with_speculation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is on if the model has a seed, off if not, and as it is wanted."""
    made: list[Speculation] = []
    real = streaming.speculation.Speculation
    monkeypatch.setattr(streaming.speculation, "Speculation", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    command = ("--to", "es,de", "--format", "jsonl", "--translator", str(tmp_path))
    expected, text = run(*command, stdin="\n".join(TEXT)), "\n".join(TEXT)
    assert expected.exit_code == 0 and not made
    assert run(*command, "--speculation", stdin=text).stdout == expected.stdout
    assert len(made) == 1 and made[0].forwards > 0
    save_seeds(tmp_path / SEED, {"es": {spelled([TRANSLATOR.end_of_write]): (300, 0.9)}})
    assert run(*command, stdin=text).stdout == expected.stdout
    assert len(made) == 2 and made[1].drafted["n-grams"] > 0
    assert run(*command, "--no-speculation", stdin=text).stdout == expected.stdout
    assert len(made) == 2


def test_speculation_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / SEED).write_bytes(b"nothing")
    result = run("--to", "es", "--translator", str(tmp_path), stdin="the speaker")
    assert result.exit_code == 2 and "does not hold n-grams" in result.stderr
    assert run("--to", "es", "--translator", str(tmp_path), "--no-speculation", stdin="the speaker").exit_code == 0
    monkeypatch.setattr(Translator, "policy", "wait-k")
    with pytest.raises(DragomanError, match="writes by the policy wait-k") as raised:
        speculation_for(TRANSLATOR, tmp_path, wanted=True)
    assert raised.value.code == "unsupported_model"
    assert speculation_for(TRANSLATOR, tmp_path) is None
