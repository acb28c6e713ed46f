"""Glossaries: how terms of the speaker shall be translated, one a line.

    # comments and blank lines are passed over
    firmware<TAB>es<TAB>firmware
    graphics card<TAB>de<TAB>Grafikkarte

The first field is a word or words of the source, the second the code of a target language, the third what to write.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from streaming.errors import DragomanError

if TYPE_CHECKING:
    from streaming.glossary import Glossary

_FIELDS: Final = ("source", "language", "target")


def read_glossary(file: Path) -> Glossary:
    """Read a glossary.

    Raises:
        DragomanError: ``glossary_unreadable``; or ``glossary_invalid`` with the number of the line, which has not
            three fields, an empty one, or another translation for a term than a line before it.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DragomanError("glossary_unreadable", f"{file}: there is no such file") from None
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DragomanError("glossary_unreadable", f"{file} cannot be read as a glossary: {reason}") from None
    glossary: dict[str, dict[str, str]] = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            source, language, target = _entry(line, f"{file}, line {number}")
            known = glossary.setdefault(source, {}).setdefault(language, target)
            if known != target:
                raise DragomanError(
                    "glossary_invalid",
                    f"{file}, line {number} translates {source!r} into {language} as {target!r}, and a line before it"
                    f" as {known!r}: keep one",
                )
    return glossary


def _entry(line: str, where: str) -> tuple[str, str, str]:
    fields = [" ".join(field.split()) for field in line.split("\t")]
    if len(fields) != len(_FIELDS):
        raise DragomanError(
            "glossary_invalid",
            f"{where} has {len(fields)} fields: write the source term, the language and the translation with a tab"
            " between them",
        )
    for name, field in zip(_FIELDS, fields, strict=True):
        if not field:
            raise DragomanError("glossary_invalid", f"{where} has an empty {name}: fill it in, or take the line out")
    source, language, target = fields
    return source, language, target
