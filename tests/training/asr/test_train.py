"""The trainer: it learns, resumes exactly where it was, and its pieces say what they should."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models.config import FeatureConfig
from streaming.features import FrontEnd
from tests import tiny
from training.asr.data import Batch, TrainingBatches, collate, read_packed
from training.asr.export import export
from training.asr.train import Recipe, Trainer, flat_alignment, lr_scale, spec_augment

RECIPE = Recipe(easy_steps=0, flat_steps=5, rnnt_from_step=5, warmup_steps=1, peak_lr=3e-3)


def batch(rows: int = 3) -> Batch:
    """Tones whose pitch says which pieces they are."""
    rng, audio, targets = np.random.default_rng(0), [], []
    for _ in range(rows):
        pieces = rng.integers(1, 6, 4)
        tones = [np.sin(np.arange(4800) * 0.1 * piece) * 0.2 for piece in pieces]
        audio.append(np.concatenate(tones).astype(np.float32))
        targets.append(pieces.tolist())
    return collate(audio, targets, FrontEnd(FeatureConfig()))


def trainer(recipe: Recipe = RECIPE) -> Trainer:
    return Trainer(tiny.config(), recipe, "cpu", autocast=False)


def test_both_losses_fall_on_what_can_be_learnt() -> None:
    learner, data = trainer(), batch()
    losses = [learner.train_step(data, 1.0) for _ in range(60)]
    assert "flat" in losses[0] and "rnnt" not in losses[0]
    assert "rnnt" in losses[5] and "flat" not in losses[5]
    assert losses[-1]["rnnt"] < 0.5 * losses[5]["rnnt"]
    assert losses[-1]["ctc"] < 0.7 * losses[0]["ctc"]


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    data = batch()
    straight = trainer()
    for _ in range(3):
        straight.train_step(data, 1.0)
    straight.save(tmp_path / "last.pt")
    resumed = trainer(dataclasses.replace(RECIPE, seed=9))
    resumed.load(tmp_path / "last.pt")
    assert resumed.step == 3
    for learner in (straight, resumed):
        torch.manual_seed(1)
        learner.train_step(data, 0.5)
    for name, tensor in straight.net.state_dict().items():
        assert torch.equal(tensor, resumed.net.state_dict()[name]), name
        assert torch.equal(straight.average[name], resumed.average[name]), name


def test_a_new_run_may_start_from_a_model(tmp_path: Path) -> None:
    learner = trainer()
    learner.train_step(batch(), 1.0)
    learner.save(tmp_path / "last.pt")
    (tmp_path / "tokenizer.model").write_bytes(tiny.tokenizer())
    export(tmp_path, tmp_path / "tokenizer.model", tmp_path / "model", "card")
    started = trainer(dataclasses.replace(RECIPE, seed=5))
    started.start_from(tmp_path / "model")
    name = "encoder.layers.0.self_attn.linear_q.weight"
    assert torch.equal(started.net.state_dict()[name], learner.average[name].bfloat16().float())
    assert "rnnt" in started.train_step(batch(), 0.1)


def test_the_start_piece_stays_zero() -> None:
    learner, data = trainer(), batch()
    for _ in range(8):
        learner.train_step(data, 1.0)
    assert learner.net.transducer is not None
    assert not learner.net.transducer.decoder.prediction.embed.weight[tiny.PIECES].any()


def test_export_writes_the_average_in_bf16(tmp_path: Path) -> None:
    from models.checkpoint import load_recognizer

    learner = trainer()
    learner.train_step(batch(), 1.0)
    learner.save(tmp_path / "last.pt")
    (tmp_path / "tokenizer.model").write_bytes(tiny.tokenizer())
    export(tmp_path, tmp_path / "tokenizer.model", tmp_path / "model", "<!-- steps --> steps")
    assert (tmp_path / "model" / "README.md").read_text() == "1 steps"
    net = load_recognizer(tmp_path / "model").net
    expected = learner.average["encoder.pre_encode.out.weight"].bfloat16().float()
    assert torch.equal(net.encoder.pre_encode.out.weight, expected)


def test_the_flat_start_covers_the_loud_part_in_order() -> None:
    quiet, loud = np.zeros(12_800, np.float32), np.random.default_rng(0).normal(0, 0.1, 25_600).astype(np.float32)
    data = collate([np.concatenate([quiet, loud, quiet])], [[3, 5]], FrontEnd(FeatureConfig()))
    aligned = flat_alignment(data, blank=9)[0].tolist()
    said = [piece for piece in aligned if piece not in (9, -1)]
    assert said == sorted(said) and set(said) == {3, 5}
    assert aligned[:8] == [9] * 8
    assert abs(said.count(3) - said.count(5)) <= 1
    assert aligned[-1] == -1  # padding of the bucket


def test_spec_augment_masks_a_copy_and_only_real_slots() -> None:
    mel = torch.randn(2, 160, 80)
    masked = spec_augment(mel, torch.tensor([160, 80]), Recipe(freq_masks=2, time_masks=2, time_share=0.3))
    assert torch.equal(masked[1, 80:], mel[1, 80:])
    assert not torch.equal(masked, mel)
    assert (masked == mel).float().mean() > 0.3


def test_the_learning_rate_is_a_trapezoid() -> None:
    scales = [lr_scale(step, 10, 100, 20) for step in range(101)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[9:81] == [1.0] * 72
    assert scales[90] == pytest.approx(0.5)
    assert scales[100] == 0


def packed(folder: Path, lengths: list[int]) -> Path:
    folder.mkdir()
    samples = np.random.default_rng(0).integers(-2000, 2000, sum(lengths)).astype("<i2")
    samples.tofile(folder / "audio.i16")
    rows, offset = [], 0
    for i, length in enumerate(lengths):
        row = {"offset_samples": offset, "n_samples": length, "text": "the speaker", "speaker": "s", "source": "x"}
        rows.append(json.dumps(row | {"weight": float(i > 0)}))
        offset += length
    (folder / "index.jsonl").write_text("\n".join(rows))
    return folder


def test_batches_are_bounded_seeded_and_weighted(tmp_path: Path) -> None:
    folder = packed(tmp_path / "packed", [16_000, 20_000, 48_000, 90_000])
    (tmp_path / "tokenizer.model").write_bytes(tiny.tokenizer())

    def stream(seed: int) -> list[Batch]:
        entries = read_packed([folder])
        batches = TrainingBatches(
            entries, tmp_path / "tokenizer.model", FeatureConfig(), None, batch_s=20, seed=seed, pool=30
        )
        return [item for item, _ in zip(batches, range(8), strict=False)]

    first, again, other = stream(1), stream(1), stream(2)
    assert all(torch.equal(a.mel, b.mel) for a, b in zip(first, again, strict=True))
    assert any(a.mel.shape != b.mel.shape or not torch.equal(a.mel, b.mel) for a, b in zip(first, other, strict=True))
    for item in first:
        assert item.audio_s <= 20 + 6
        assert int(item.slots.min()) > 7 + 100  # the entry of weight 0 has 100 mel frames and is never drawn
