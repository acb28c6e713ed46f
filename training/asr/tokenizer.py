"""Trains the recogniser's SentencePiece model on normalised transcripts.

python -m training.asr.tokenizer --pairs tatoeba.en-de.train.tsv.xz --pieces 256 --out tokenizer.model
"""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Annotated

import sentencepiece
import typer

from client.normalize import normalize_transcript
from training.asr.synthesize import read_sentences


def run(
    pairs: Annotated[list[Path], typer.Option(help="File of English sentences; may be given several times.")],
    out: Annotated[Path, typer.Option(help="Where the model goes.")],
    pieces: Annotated[int, typer.Option(help="Vocabulary, the unknown piece counted in.")] = 256,
    sentences: Annotated[int, typer.Option(help="Sentences to train on.")] = 100_000,
    seed: int = 1,
) -> None:
    """Trains a unigram model without sentence marks: the transducer's blank is not a piece."""
    texts = sorted({text for path in pairs for text in read_sentences(path)})
    random.Random(seed).shuffle(texts)
    normal = (normalize_transcript(text) for text in texts[:sentences])
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for text in normal if text),
        model_writer=model,
        vocab_size=pieces,
        model_type="unigram",
        character_coverage=1.0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        unk_id=0,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(model.getvalue())


if __name__ == "__main__":
    typer.run(run)
