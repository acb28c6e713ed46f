"""Packs speech manifests into one memory-mappable file of samples with an index: what training reads.

    python -m training.asr.prepare --manifest libri_clean.jsonl --manifest kokoro.jsonl --out packed \
        --weight libri_clean=2

``packed/audio.i16`` is all utterances' 16 kHz int16 samples (little endian) end to end;
``packed/index.jsonl`` has a line for each: `offset_samples`, `n_samples`, `text` (see `client.normalize`),
`speaker`, `source` (the manifest's name) and `weight`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import soundfile
import soxr
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from client.normalize import normalize_transcript

__all__ = [
    "INDEX",
    "SAMPLE_RATE_HZ",
    "PackedUtterance",
    "SourceSummary",
    "pack",
    "read_audio",
    "read_index",
    "rejection",
    "write_index",
]

SAMPLE_RATE_HZ = 16_000
INDEX = "index.jsonl"
MIN_DURATION_S, MAX_DURATION_S = 0.3, 16.0
# Fluent English has 12 to 18 characters a second; far outside this range the text is not what is said.
MIN_CHARS_PER_S, MAX_CHARS_PER_S = 2.0, 28.0


@dataclass(frozen=True)
class PackedUtterance:
    """One line of the index.

    Attributes:
        offset_samples: Where the utterance starts in ``audio.i16``.
        n_samples: Its length.
        text: What is said, as `normalize_transcript` writes it.
        speaker: Who says it; the source and the file's name where the manifest does not tell.
        source: Name of the manifest.
        weight: How often training should draw it, relative to others.
    """

    offset_samples: int
    n_samples: int
    text: str
    speaker: str
    source: str
    weight: float


@dataclass
class SourceSummary:
    """What became of one manifest.

    Attributes:
        seconds: Seconds of audio that were packed.
        utterances: Utterances that were packed.
        speakers: Names of those who speak in them.
        dropped: Utterances left out, by reason.
    """

    seconds: float = 0.0
    utterances: int = 0
    speakers: set[str] = field(default_factory=set)
    dropped: Counter[str] = field(default_factory=Counter)


def rejection(text: str | None, duration_s: float, excluded: Set[str] = frozenset()) -> str | None:
    """Says why an utterance is unfit for training, or None if it is fit.

    Args:
        text: The normalised transcript, None if there is none.
        duration_s: Length of the recording.
        excluded: Normalised transcripts that a test set is made of.
    """
    if text is None:
        return "unspeakable text"
    if text in excluded:
        return "in a test set"
    if duration_s > MAX_DURATION_S:
        return "too long"
    if duration_s < MIN_DURATION_S:
        return "too short"
    chars_per_s = len(text) / duration_s
    return None if MIN_CHARS_PER_S <= chars_per_s <= MAX_CHARS_PER_S else "implausible pace"


def read_audio(path: Path) -> NDArray[np.int16]:
    """Decodes a recording (anything that libsndfile reads) to mono int16 samples [n] at 16 kHz."""
    samples, rate_hz = soundfile.read(path, dtype="int16", always_2d=True)
    if samples.shape[1] == 1 and rate_hz == SAMPLE_RATE_HZ:
        return np.ascontiguousarray(samples[:, 0])
    mono = samples.astype(np.float32).mean(axis=1)
    resampled = soxr.resample(mono, rate_hz, SAMPLE_RATE_HZ)
    clipped: NDArray[np.float32] = np.clip(np.rint(resampled), -32768, 32767)
    return clipped.astype(np.int16)


def read_index(packed: Path) -> list[dict[str, Any]]:
    """The lines of a packed set's index: `PackedUtterance`, and what was found out later."""
    return [json.loads(line) for line in (packed / INDEX).read_text(encoding="utf-8").splitlines()]


def write_index(packed: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the index of a packed set; an interrupted write leaves the old one."""
    partial = packed / f"{INDEX}.part"
    partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    partial.replace(packed / INDEX)


def _records(manifest: Path) -> Iterator[dict[str, Any]]:
    """Reads a manifest that a synthesis may still be writing: an unfinished last line is not read."""
    with manifest.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.endswith("\n"))


def _pack_source(
    manifest: Path,
    weight: float,
    audio: BinaryIO,
    offset_samples: int,
    summary: SourceSummary,
    excluded: Set[str],
) -> Iterator[PackedUtterance]:
    """Appends the fit utterances of one manifest to `audio` and yields their index lines."""
    source = manifest.stem
    for record in _records(manifest):
        text = normalize_transcript(str(record["text"]))
        # The stated length spares decoding what is unfit by far; the decoded one decides.
        reason = rejection(text, float(record["duration_s"]), excluded)
        samples = read_audio(manifest.parent / record["audio"]) if reason is None else np.zeros(0, np.int16)
        reason = reason or rejection(text, len(samples) / SAMPLE_RATE_HZ)
        if reason is not None or text is None:
            summary.dropped[reason or ""] += 1
            continue
        audio.write(samples.astype("<i2", copy=False).tobytes())
        speaker = str(record.get("speaker") or f"{source}-{Path(record['audio']).stem}")
        summary.seconds += len(samples) / SAMPLE_RATE_HZ
        summary.utterances += 1
        summary.speakers.add(speaker)
        yield PackedUtterance(offset_samples, len(samples), text, speaker, source, weight)
        offset_samples += len(samples)


def pack(
    manifests: Sequence[Path],
    out: Path,
    weights: Mapping[str, float] | None = None,
    exclude: Sequence[Path] = (),
) -> dict[str, SourceSummary]:
    """Packs manifests into ``audio.i16`` and ``index.jsonl``.

    Args:
        manifests: JSON lines with `audio` (relative to the manifest), `text`, `duration_s` and, where known,
            `speaker`.
        out: Folder to write; what it holds from an earlier call is replaced when all is done.
        weights: Weight by manifest name; 1 for the others.
        exclude: Manifests of test sets, none of whose sentences may be packed.

    Returns:
        A summary for each manifest name.

    Raises:
        ValueError: If a weight names no manifest.
    """
    weights = weights or {}
    summaries = {manifest.stem: SourceSummary() for manifest in manifests}
    if unknown := sorted(set(weights) - set(summaries)):
        raise ValueError(
            f"weight for {', '.join(unknown)}, but the manifests are {', '.join(summaries)}: correct the name"
        )
    excluded = frozenset(text for file in exclude for text in _sentences(file))
    out.mkdir(parents=True, exist_ok=True)
    audio_part, index_part = out / "audio.i16.part", out / f"{INDEX}.part"
    offset_samples = 0
    with audio_part.open("wb") as audio, index_part.open("w", encoding="utf-8") as index:
        for manifest in manifests:
            weight = weights.get(manifest.stem, 1.0)
            for utterance in _pack_source(manifest, weight, audio, offset_samples, summaries[manifest.stem], excluded):
                offset_samples = utterance.offset_samples + utterance.n_samples
                index.write(json.dumps(asdict(utterance)) + "\n")
    audio_part.replace(out / "audio.i16")
    index_part.replace(out / INDEX)
    return summaries


def _sentences(manifest: Path) -> Iterator[str]:
    for line in manifest.read_text(encoding="utf-8").splitlines():
        if text := normalize_transcript(json.loads(line)["text"]):
            yield text


def _table(summaries: Mapping[str, SourceSummary], weights: Mapping[str, float]) -> Table:
    table = Table("source", "hours", "utterances", "speakers", "weight", "dropped")
    for name, summary in summaries.items():
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(summary.dropped.items()))
        table.add_row(
            name,
            f"{summary.seconds / 3600:.2f}",
            str(summary.utterances),
            str(len(summary.speakers)),
            f"{weights.get(name, 1.0):g}",
            dropped,
        )
    total_h = sum(summary.seconds for summary in summaries.values()) / 3600
    table.add_row("total", f"{total_h:.2f}", str(sum(summary.utterances for summary in summaries.values())), "", "", "")
    return table


def _parse_weights(options: Iterable[str]) -> dict[str, float]:
    weights = {}
    for option in options:
        name, _, value = option.partition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            raise typer.BadParameter(
                f"{option!r} is not NAME=NUMBER, as in libri_clean=2", param_hint="--weight"
            ) from None
    return weights


app = typer.Typer(add_completion=False)


@app.command()
def main(
    manifest: Annotated[list[Path], typer.Option(help="Manifest to pack; give as often as there are.")],
    out: Annotated[Path, typer.Option(help="Folder for audio.i16 and index.jsonl.")],
    weight: Annotated[list[str] | None, typer.Option(help="Weight of one manifest, NAME=NUMBER (default 1).")] = None,
    exclude: Annotated[list[Path] | None, typer.Option(help="Test manifest whose sentences are left out.")] = None,
) -> None:
    """Packs speech manifests for training."""
    weights = _parse_weights(weight or [])
    Console().print(_table(pack(manifest, out, weights, exclude or []), weights))


if __name__ == "__main__":
    app()
