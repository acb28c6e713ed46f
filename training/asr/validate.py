"""Word error rates of a recogniser on manifests, through the same sessions that serve people.

    python -m training.asr.validate --manifest dev/kokoro.jsonl --manifest dev/libri_other.jsonl

Both sides are normalised by :func:`training.asr.text.normalize_transcript`; the rate is jiwer's over all words of a
manifest. Utterances whose reference that function refuses are left out and counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import jiwer
import torch
import typer
from rich.console import Console
from rich.table import Table

from models.checkpoint import load_recognizer
from models.recognizer import Recognizer
from streaming.events import TranscriptDelta
from streaming.session import Decoder, Session, SessionConfig, tick
from training.asr.prepare import read_audio
from training.asr.text import normalize_transcript

BATCH = 16
#: Chunks of one utterance in a step; more at once cost less each and change nothing.
MAX_CHUNKS = 8


@dataclass(frozen=True)
class Score:
    """One manifest at one setting.

    Attributes:
        manifest: Its file name without the suffix.
        decoder: ``rnnt`` or ``ctc``.
        lookahead_ms: Of every chunk.
        utterances: How many were scored.
        left_out: How many had no usable reference.
        words: Words of the references.
        wer: Substitutions, deletions and insertions over ``words``.
    """

    manifest: str
    decoder: str
    lookahead_ms: int
    utterances: int
    left_out: int
    words: int
    wer: float


def score(
    recognizer: Recognizer,
    manifest: Path,
    *,
    decoder: Decoder = "rnnt",
    max_lookahead_ms: int | None = None,
    limit: int | None = None,
) -> Score:
    """Transcribes a manifest (JSON lines with ``audio``, relative to it, and ``text``) and scores it.

    Args:
        recognizer: The model.
        manifest: What to transcribe.
        decoder: Which head decodes.
        max_lookahead_ms: As in :class:`streaming.session.SessionConfig`.
        limit: The first so many utterances only.
    """
    items = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()][:limit]
    references = {i: normalize_transcript(item["text"]) for i, item in enumerate(items)}
    usable = [i for i, reference in references.items() if reference]
    usable.sort(key=lambda i: float(items[i]["duration_s"]))  # rows of a batch end together
    config = SessionConfig(max_lookahead_ms=max_lookahead_ms, decoder=decoder)
    hypotheses: list[str] = []
    for start in range(0, len(usable), BATCH):
        audio = [manifest.parent / items[i]["audio"] for i in usable[start : start + BATCH]]
        hypotheses += transcripts(recognizer, audio, config)
    truth = [references[i] or "" for i in usable]
    return Score(
        manifest=manifest.stem,
        decoder=decoder,
        lookahead_ms=recognizer.lookahead_frames(max_lookahead_ms) * 80,
        utterances=len(usable),
        left_out=len(items) - len(usable),
        words=sum(len(reference.split()) for reference in truth),
        wer=float(jiwer.wer(truth, [normalize_transcript(text) or "" for text in hypotheses])),
    )


def transcripts(recognizer: Recognizer, audio: Sequence[Path], config: SessionConfig) -> list[str]:
    """The transcripts of a few recordings, advanced as one batch."""
    sessions = [Session(recognizer, config) for _ in audio]
    for session, file in zip(sessions, audio, strict=True):
        session.write(read_audio(file))
        session.close_input()
    while any(session.ready() for session in sessions):
        tick(sessions, max_chunks=MAX_CHUNKS)
    events = (session.take_events() for session in sessions)
    return ["".join(e.delta for e in row if isinstance(e, TranscriptDelta)) for row in events]


def table(scores: Sequence[Score]) -> str:
    """The scores as a Markdown table."""
    rows = ["| set | utterances | words | decoder | look-ahead | WER |", "|---|---|---|---|---|---|"]
    for s in scores:
        rows.append(
            f"| {s.manifest} | {s.utterances} | {s.words} | {s.decoder} | {s.lookahead_ms} ms | {100 * s.wer:.1f} % |"
        )
    return "\n".join(rows)


def run(
    manifest: Annotated[list[Path], typer.Option(help="What to score; may be given several times.")],
    model: Annotated[Path | None, typer.Option(help="Model folder; the embedded one by default.")] = None,
    max_lookahead_ms: Annotated[list[int] | None, typer.Option(help="Look-aheads to score, ms.")] = None,
    decoder: Annotated[list[str] | None, typer.Option(help="rnnt, ctc or both.")] = None,
    threads: int = 2,
) -> None:
    """Prints one row for each manifest, decoder and look-ahead."""
    torch.set_num_threads(threads)
    recognizer = load_recognizer(model)
    printed = Table("set", "utterances", "decoder", "look-ahead ms", "WER %", title=recognizer.name)
    for file in manifest:
        for head in decoder or ["rnnt"]:
            for ms in max_lookahead_ms or recognizer.lookaheads_ms[-1:]:
                s = score(recognizer, file, decoder=cast(Decoder, head), max_lookahead_ms=ms)
                printed.add_row(s.manifest, str(s.utterances), s.decoder, str(s.lookahead_ms), f"{100 * s.wer:.1f}")
    Console().print(printed)


if __name__ == "__main__":
    typer.run(run)
