from pathlib import Path

import pytest

from client.glossary import read_glossary
from streaming.errors import DragomanError


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_terms_by_source_and_language(tmp_path: Path) -> None:
    text = "\ufeff# terms of the talk\n\ngraphics  card\tde\tGrafikkarte\r\n"
    text += "graphics card\tes\t tarjeta gráfica \nRust\tes\tRust\n"
    assert read_glossary(write(tmp_path / "g.tsv", text)) == {
        "graphics card": {"de": "Grafikkarte", "es": "tarjeta gráfica"},
        "Rust": {"es": "Rust"},
    }


def test_an_empty_glossary_and_a_term_given_twice_alike(tmp_path: Path) -> None:
    assert read_glossary(write(tmp_path / "g.tsv", "")) == {}
    assert read_glossary(write(tmp_path / "h.tsv", "a\tes\tb\na\tes\tb\n")) == {"a": {"es": "b"}}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("firmware es firmware", "has 1 fields"),
        ("firmware\tes", "has 2 fields"),
        ("firmware\tes\tfirmware\tnote", "has 4 fields"),
        ("firmware\tes\t ", "empty target"),
        ("\tes\tfirmware", "empty source"),
        ("good\tes\tmalo", "'malo', and a line before it as 'bueno'"),
    ],
)
def test_a_broken_line_is_told_with_its_number(line: str, sentence: str, tmp_path: Path) -> None:
    file = write(tmp_path / "g.tsv", f"good\tes\tbueno\n# next\n{line}\n")
    with pytest.raises(DragomanError, match=sentence) as raised:
        read_glossary(file)
    assert raised.value.code == "glossary_invalid"
    assert f"{file}, line 3 " in str(raised.value)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"a\tes\t\xe1\n")
    for name, reason in (("none", "no such file"), ("latin", "not UTF-8"), (".", "directory")):
        with pytest.raises(DragomanError, match=reason) as raised:
            read_glossary(tmp_path / name)
        assert raised.value.code == "glossary_unreadable"
