"""Packed speech, to Opus and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from training.asr.data import AudioStore, read_packed
from training.asr.shards import pack, unpack


@pytest.fixture
def packed(tmp_path: Path) -> list[Path]:
    """Two folders of tones that sweep, each utterance another one."""
    folders, seconds = [tmp_path / "a", tmp_path / "b"], [1.0, 2.5, 0.7, 1.3]
    for k, folder in enumerate(folders):
        folder.mkdir()
        offset, index, audio = 0, [], []
        for i, s in enumerate(seconds):
            t = np.arange(int(16_000 * s)) / 16_000
            audio.append((8_000 * np.sin(2 * np.pi * (200 + 100 * (i + 4 * k)) * t)).astype(np.int16))
            index.append(
                {
                    "offset_samples": offset,
                    "n_samples": len(t),
                    "text": f"t{k}{i}",
                    "speaker": f"v{i % 2}",
                    "source": "s",
                }
                | {"weight": 2, "cuts_samples": [0, len(t)]}
            )
            offset += len(t)
        np.concatenate(audio).astype("<i2").tofile(folder / "audio.i16")
        (folder / "index.jsonl").write_text("".join(json.dumps(item) + "\n" for item in index))
    return folders


def test_what_comes_back_is_what_was_packed(packed: list[Path], tmp_path: Path) -> None:
    shards = pack(packed, tmp_path / "shards", megabytes=0.008)  # 4 s at 16 kbit/s
    assert len(shards) > 2
    assert all(shard.stat().st_size < 12_000 for shard in shards)
    assert unpack(tmp_path / "shards", tmp_path / "back") == 8
    before, after = read_packed(packed), read_packed([tmp_path / "back"])
    for a, b in zip(before, after, strict=True):
        assert replace(b, file=a.file, offset=a.offset) == a
    old, new = AudioStore(before), AudioStore(after)
    for a, b in zip(before, after, strict=True):
        x, y = old[a], new[b]
        assert len(x) == len(y)
        middle = slice(2_000, len(x) - 2_000)  # Opus smears what meets at the seams
        assert np.corrcoef(x[middle], y[middle])[0, 1] > 0.95


def test_a_rate_that_opus_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="6000 to 256000"):
        pack([], tmp_path, bits_per_s=1_000)
