"""The front end against NeMo's preprocessor, over whole files."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from benchmarks.nemo_reference import build
from models.config import HOP_SAMPLES, FeatureConfig
from models.fastconformer import LEADING_SLOTS
from streaming.features import FrontEnd

pytestmark = pytest.mark.nemo
SAMPLE = Path(__file__).parents[2] / "samples" / "jfk.flac"
#: Around one hop, one window and one group; then a prime number of samples, and none left over.
LENGTHS = (159, 160, 161, 320, 399, 400, 1279, 1280, 1281, 2560, 20011, 48000)


def speech_like(samples: int, seed: int) -> np.ndarray:
    """Pulses through two resonances with pauses of digital silence between them, and a little noise."""
    random = np.random.default_rng(seed)
    time = np.arange(samples) / 16000
    pitch = 110 * (1 + 0.2 * np.sin(2 * np.pi * 3 * time))
    source = np.sign(np.sin(2 * np.pi * np.cumsum(pitch) / 16000)) * (np.sin(2 * np.pi * 2 * time) > -0.3)
    tone = np.sin(2 * np.pi * 700 * time) + 0.5 * np.sin(2 * np.pi * 2400 * time)
    return (0.3 * source * tone + 0.001 * random.standard_normal(samples) * (time > 0.05)).astype(np.float32)


@pytest.mark.parametrize(("shape", "mel_bins"), [("tiny", 80), ("tiny_128", 128)])
def test_log_mel(shape: str, mel_bins: int) -> None:
    pytest.importorskip("nemo")
    recording, _ = soundfile.read(SAMPLE, dtype="float32")
    rows = [recording, *(speech_like(length, seed) for seed, length in enumerate(LENGTHS))]
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
    theirs, frames = build(shape, seed=0).log_mel(padded, torch.tensor([len(row) for row in rows]))

    front_end = FrontEnd(FeatureConfig(mel_bins=mel_bins))
    for samples, expected, count in zip(rows, theirs, frames.tolist(), strict=True):
        groups, slots, _ = front_end.step(samples, front_end.init_state(), last=True)
        mel = groups.reshape(-1, mel_bins)[LEADING_SLOTS:slots]
        assert len(mel) == count == len(samples) // HOP_SAMPLES
        # The two round alike; with the window elsewhere in the transform this is 3e-4 for quiet mel bins.
        torch.testing.assert_close(mel, expected[:, :count].t(), atol=1e-5, rtol=0)
