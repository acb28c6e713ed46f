"""Makes the n-grams that drafts begin with, from the packed sequences.

    python -m training.translation.drafts --packed packed --tokenizer tokenizer.model --out models/en-esdefr-small

They are those of one pass, of each language by itself, and stand beside the model (:mod:`streaming.drafts`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from models.tokenizer import SentencePieceTokenizer
from models.translator import END_OF_READ, END_OF_WRITE, TranslationConfig
from streaming.drafts import SEED, Chunks, Seed, count_seed, save_seeds
from training.translation.data import PROMPT


def rows(packed: Path, language: int, end_of_read: int, end_of_write: int) -> Iterator[Chunks]:
    """The chunks of the sequences of one pass into a language.

    Args:
        packed: As :mod:`training.translation.data` writes it.
        language: Id of the prompt's token for the target language.
        end_of_read: Id of the token that begins a write.
        end_of_write: Id of the token that ends it.
    """
    ids, kinds = np.memmap(packed / "ids.u16", np.uint16, "r"), np.memmap(packed / "kinds.u8", np.uint8, "r")
    starts, passes = np.load(packed / "starts.npy"), np.load(packed / "passes.npy")
    for i in range(int(passes[0]), int(passes[1])):
        row, kind = np.asarray(ids[starts[i] : starts[i + 1]]), kinds[starts[i] : starts[i + 1]]
        prompt = int(np.argmax(kind != PROMPT))
        if language not in row[:prompt]:
            continue
        chunks = np.split(row[prompt:], np.flatnonzero(row[prompt:] == end_of_write) + 1)[:-1]
        middles = [int(np.argmax(chunk == end_of_read)) for chunk in chunks]
        yield [(chunk[:middle], chunk[middle + 1 :]) for chunk, middle in zip(chunks, middles, strict=True)]


def run(
    packed: Annotated[Path, typer.Option(help="Folder of the packed sequences.")],
    tokenizer: Annotated[Path, typer.Option(help="The SentencePiece model that they were packed with.")],
    out: Annotated[Path, typer.Option(help="Folder of the model.")],
    max_contexts: Annotated[int, typer.Option(help="Contexts to keep, for each language.")] = 100_000,
) -> None:
    """Writes the n-grams of every target language."""
    pieces = SentencePieceTokenizer(tokenizer.read_bytes())
    seeds: dict[str, Seed] = {}
    for language in TranslationConfig().targets:
        symbols = [pieces.id_of(symbol) for symbol in (f"<|{language}|>", END_OF_READ, END_OF_WRITE)]
        into, read, write = (-1 if symbol is None else symbol for symbol in symbols)
        if min(into, read, write) < 0:
            raise typer.BadParameter(f"{tokenizer} has no <|{language}|>, no {END_OF_READ} or no {END_OF_WRITE}")
        seeds[language] = count_seed(rows(packed, into, read, write), max_contexts=max_contexts)
        typer.echo(f"{language}: {len(seeds[language])} contexts")
    out.mkdir(parents=True, exist_ok=True)
    save_seeds(out / SEED, seeds)


if __name__ == "__main__":
    typer.run(run)
