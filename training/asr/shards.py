"""Packed speech as Opus shards, small enough to travel to the machine that trains, and back to packed speech there.

    python -m training.asr.shards pack packed/real packed/synth --out shards --megabytes 55
    python -m training.asr.shards unpack shards --out packed/all

A shard is ``NNN.ogg``, utterances end to end, with ``NNN.jsonl``, the index of :mod:`training.asr.prepare` with
offsets into it. At 16 kbit/s an hour takes 7 MB, a sixteenth of the samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile
import typer

from training.asr.prepare import INDEX, SAMPLE_RATE_HZ, read_index

# Opus is asked for a level of compression, which libsndfile maps evenly onto 256 … 6 kbit/s.
_MOST_BITS_PER_S, _LEAST_BITS_PER_S = 256_000, 6_000
_BLOCK_SAMPLES = 60 * SAMPLE_RATE_HZ


def pack(packed: list[Path], out: Path, *, megabytes: float = 55.0, bits_per_s: int = 16_000) -> list[Path]:
    """Writes packed folders as shards, whole utterances each.

    Args:
        packed: Folders of :func:`training.asr.prepare.pack`.
        out: Folder to write.
        megabytes: Size of a shard at most, as far as Opus keeps to its rate.
        bits_per_s: Rate of the Opus streams, 6,000 to 256,000.

    Returns:
        The Opus files.

    Raises:
        ValueError: If the rate is out of range.
    """
    if not _LEAST_BITS_PER_S <= bits_per_s <= _MOST_BITS_PER_S:
        raise ValueError(f"bits_per_s is {bits_per_s}; choose {_LEAST_BITS_PER_S} to {_MOST_BITS_PER_S}")
    out.mkdir(parents=True, exist_ok=True)
    most_samples = int(megabytes * 8e6 / bits_per_s * SAMPLE_RATE_HZ)
    shards: list[Path] = []
    for number, utterances in enumerate(_cut(_utterances(packed), most_samples)):
        shards.append(out / f"{number:03}.ogg")
        _write(shards[-1], utterances, bits_per_s)
    return shards


def unpack(shards: Path, out: Path) -> int:
    """Writes a folder of shards as one packed folder; returns its number of utterances."""
    out.mkdir(parents=True, exist_ok=True)
    offset, lines = 0, []
    with (out / "audio.i16").open("wb") as audio:
        for shard in sorted(shards.glob("*.ogg")):
            index = [json.loads(line) for line in shard.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
            lines += [json.dumps({**item, "offset_samples": item["offset_samples"] + offset}) for item in index]
            for block in soundfile.blocks(shard, _BLOCK_SAMPLES, dtype="int16"):
                audio.write(block.astype("<i2").tobytes())
                offset += len(block)
    (out / INDEX).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


_Utterance = tuple[dict[str, Any], np.ndarray]


def _utterances(packed: list[Path]) -> Iterator[_Utterance]:
    for folder in packed:
        audio = np.memmap(folder / "audio.i16", "<i2", "r")
        for item in read_index(folder):
            yield item, audio[item["offset_samples"] : item["offset_samples"] + item["n_samples"]]


def _cut(utterances: Iterator[_Utterance], most_samples: int) -> Iterator[list[_Utterance]]:
    part: list[_Utterance] = []
    samples = 0
    for item, audio in utterances:
        if part and samples + len(audio) > most_samples:
            yield part
            part, samples = [], 0
        part.append((item, audio))
        samples += len(audio)
    if part:
        yield part


def _write(shard: Path, utterances: list[_Utterance], bits_per_s: int) -> None:
    level = (_MOST_BITS_PER_S - bits_per_s) / (_MOST_BITS_PER_S - _LEAST_BITS_PER_S)
    offset, lines = 0, []
    with soundfile.SoundFile(
        shard, "w", SAMPLE_RATE_HZ, 1, format="OGG", subtype="OPUS", compression_level=level
    ) as opus:
        for item, audio in utterances:
            opus.write(np.ascontiguousarray(audio))
            lines.append(json.dumps({**item, "offset_samples": offset}))
            offset += len(audio)
    shard.with_suffix(".jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


app = typer.Typer(add_completion=False)


@app.command("pack")
def pack_command(
    packed: Annotated[list[Path], typer.Argument(help="Packed folders.")],
    out: Annotated[Path, typer.Option(help="Folder of the shards.")],
    megabytes: Annotated[float, typer.Option(help="Size of a shard at most.")] = 55.0,
    kbit_per_s: Annotated[int, typer.Option(help="Rate of the Opus streams.")] = 16,
) -> None:
    """Writes packed folders as Opus shards."""
    for shard in pack(packed, out, megabytes=megabytes, bits_per_s=1000 * kbit_per_s):
        print(f"{shard} {shard.stat().st_size / 1e6:.1f} MB")


@app.command("unpack")
def unpack_command(
    shards: Annotated[Path, typer.Argument(help="Folder of shards.")],
    out: Annotated[Path, typer.Option(help="Packed folder to write.")],
) -> None:
    """Writes shards as a packed folder."""
    print(f"{unpack(shards, out)} utterances")


if __name__ == "__main__":
    app()
