"""Trains the translator's SentencePiece model: one vocabulary for all languages, with the symbols of the format.

    python -m training.translation.tokenizer --pairs corpus/train.tsv --pieces 8192 --out tokenizer.model

The text is the targets and the sources, both as written and as the recogniser would write them. What no piece spells is
spelled in bytes.
"""

from __future__ import annotations

import io
import random
import tempfile
from pathlib import Path
from typing import Annotated

import sentencepiece
import typer

from client.normalize import normalize_transcript
from models.translator import END_OF_READ, END_OF_WRITE, LATENCIES
from training.translation.align import read_aligned

LANGUAGES = ("en", "es", "de", "fr")
SYMBOLS = (END_OF_READ, END_OF_WRITE, *(f"<|{name}|>" for name in (*LANGUAGES, *LATENCIES)))

#: Spellings of one character, hexadecimal: typographic quotes are read as straight ones, as the corpus has them.
_RULES = {"2018": "27", "2019": "27", "02BC": "27", "00B4": "27", "201C": "22", "201D": "22", "201E": "22"}


def train_tokenizer(lines: list[str], pieces: int) -> bytes:
    """A serialised unigram model of so many pieces."""
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as rules:
        rules.write("".join(f"{written}\t{read}\n" for written, read in _RULES.items()))
        rules.flush()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=pieces,
            model_type="unigram",
            character_coverage=0.9998,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=list(SYMBOLS),
            normalization_rule_tsv=rules.name,
            num_threads=1,
            minloglevel=2,
        )
    return model.getvalue()


def run(
    pairs: Annotated[Path, typer.Option(help="Pairs for training, aligned or not.")],
    out: Annotated[Path, typer.Option(help="Where the model goes.")],
    pieces: Annotated[int, typer.Option(help="Vocabulary, with bytes and symbols.")] = 8192,
    lines: Annotated[int, typer.Option(help="Lines of text to train on.")] = 400_000,
    seed: int = 1,
) -> None:
    """Trains on a sample of the text."""
    texts: list[str] = []
    sources: set[str] = set()
    for pair, _ in read_aligned(pairs):
        texts.append(pair.target)
        sources.add(pair.source)
    rng = random.Random(seed)
    for source in sorted(sources):
        spoken = normalize_transcript(source) if rng.random() < 0.5 else source
        texts.append(spoken or source)
    rng.shuffle(texts)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(train_tokenizer(texts[:lines], pieces))


if __name__ == "__main__":
    typer.run(run)
