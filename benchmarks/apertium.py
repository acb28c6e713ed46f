"""Apertium's rule-based translation of a set of text, as a floor for a trained translator.

    python -m benchmarks.apertium test.jsonl --limit 300

Needs Debian's ``apertium-eng-spa``. The sentences are given as they are written, one a line, and scored as `dragoman
eval` scores: BLEU and chrF against all references.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from client.evaluate_translation import Quality


def translate(sentences: list[str], mode: str) -> list[str]:
    """What Apertium makes of each sentence."""
    done = subprocess.run(
        ["apertium", "-u", mode], input="\n".join(sentences) + "\n", capture_output=True, text=True, check=True
    )
    lines = done.stdout.split("\n")[: len(sentences)]
    if len(lines) != len(sentences):
        raise RuntimeError(f"apertium gave {len(lines)} lines for {len(sentences)} sentences")
    return [line.strip() for line in lines]


def main(
    manifest: Annotated[Path, typer.Argument(help="JSON lines with `text` and references in `es`.")],
    limit: Annotated[int | None, typer.Option(help="Take the first so many lines.")] = None,
    mode: Annotated[str, typer.Option(help="Apertium's name of the pair.")] = "eng-spa",
    language: Annotated[str, typer.Option(help="Key of the references.")] = "es",
) -> None:
    """Prints BLEU and chrF."""
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()][:limit]
    print(Quality.of(translate([row["text"] for row in rows], mode), [row[language] for row in rows]))


if __name__ == "__main__":
    typer.run(main)
