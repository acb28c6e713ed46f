"""Has a recogniser hear sentences of the corpus, for the mistakes that its translator will read.

    python -m training.translation.recognised --manifest synth/flite.jsonl --model models/en-small \
        --out recognised.jsonl

The manifests are those of :mod:`training.asr.synthesize`. Out come JSON lines with ``text`` and ``recognised``, as
``training.translation.data --recognised`` reads them. What the recogniser did not hear at all is left out, and so is
what cannot be read.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from client.evaluate import Utterance, read_sets
from client.files import AudioFile
from client.transcribe import transcribe
from models.checkpoint import load_recognizer
from models.recognizer import Recognizer
from streaming.events import TranscriptDelta
from streaming.session import SessionConfig

_BATCH = 16


def hear(recognizer: Recognizer, utterances: Sequence[Utterance]) -> Iterator[tuple[str, str]]:
    """Text and what was recognised of each utterance, in the order in which they end.

    Args:
        recognizer: Hears them at its largest look-ahead.
        utterances: What is said, and where.
    """
    heard = ["" for _ in utterances]
    openers = [partial(AudioFile, utterance.audio) for utterance in utterances]
    for step in transcribe(openers, recognizer, SessionConfig(), batch_size=_BATCH):
        for event in step.events:
            if isinstance(event, TranscriptDelta):
                heard[step.index] += event.delta
        if step.done and heard[step.index].strip():
            yield utterances[step.index].text, heard[step.index].strip()


def run(
    manifest: Annotated[list[Path], typer.Option(help="Spoken sentences; may be given several times.")],
    model: Annotated[Path, typer.Option(help="Folder of the recogniser.")],
    out: Annotated[Path, typer.Option(help="File of JSON lines.")],
    limit: Annotated[int | None, typer.Option(help="Sentences to draw from all manifests; all if left out.")] = None,
    max_s: Annotated[float, typer.Option(help="Longest recording, in seconds; joined sentences match no pair.")] = 5.0,
    seed: int = 1,
    threads: int = 2,
) -> None:
    """Writes what the recogniser made of the sentences."""
    torch.set_num_threads(threads)
    utterances = [u for speech in read_sets(manifest) for u in speech.utterances if (u.duration_s or 0.0) <= max_s]
    random.Random(seed).shuffle(utterances)
    with out.open("w", encoding="utf-8") as lines:
        for text, recognised in hear(load_recognizer(model), utterances[:limit]):
            lines.write(json.dumps({"text": text, "recognised": recognised}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(run)
