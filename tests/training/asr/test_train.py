"""The trainer: it learns, resumes exactly where it was, and its pieces say what they should."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import typer
from safetensors.torch import save_file

from models.adaptive import encode_whole
from models.config import FeatureConfig
from models.folder import read_tensors
from streaming.errors import DragomanError
from streaming.features import FrontEnd
from tests import tiny
from training.asr.data import Batch, TrainingBatches, collate, read_packed, text_batches
from training.asr.export import CURVE, SCORES_MARK, Other, export, run_export
from training.asr.phones import PHONES
from training.asr.train import (
    CHUNK_LOOKAHEADS,
    PhoneHead,
    Recipe,
    Trainer,
    _validate,
    flat_alignment,
    run,
    spec_augment,
    word_beginnings,
)

RECIPE = Recipe(easy_steps=0, flat_steps=5, rnnt_from_step=5, warmup_steps=1, peak_lr=3e-3)


def batch(rows: int = 3) -> Batch:
    """Tones whose pitch says which pieces they are."""
    rng, audio, targets = np.random.default_rng(0), [], []
    for _ in range(rows):
        pieces = rng.integers(1, 6, 4)
        tones = [np.sin(np.arange(4800) * 0.1 * piece) * 0.2 for piece in pieces]
        audio.append(np.concatenate(tones).astype(np.float32))
        targets.append(pieces.tolist())
    phones = [[piece + 3 for piece in row for _ in range(3)] for row in targets]
    return collate(audio, targets, FrontEnd(FeatureConfig()), phones)


def trainer(recipe: Recipe = RECIPE) -> Trainer:
    return Trainer(tiny.config(), recipe, "cpu", autocast=False)


def test_both_losses_fall_on_what_can_be_learnt() -> None:
    learner, data = trainer(), batch()
    losses = [learner.train_step(data, 1.0) for _ in range(60)]
    assert "flat" in losses[0] and "rnnt" not in losses[0]
    assert "rnnt" in losses[5] and "flat" not in losses[5]
    assert losses[-1]["rnnt"] < 0.5 * losses[5]["rnnt"]
    assert losses[-1]["ctc"] < 0.7 * losses[0]["ctc"]


def test_a_middle_layer_learns_the_sounds() -> None:
    learner, data = trainer(dataclasses.replace(RECIPE, phone_weight=0.5)), batch()
    lower = learner.net.encoder.layers[0].self_attn.linear_q.weight.clone()
    losses = [learner.train_step(data, 1.0)["phones"] for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(lower, learner.net.encoder.layers[0].self_attn.linear_q.weight)
    assert "phones" not in trainer().train_step(data, 1.0)


def test_the_loss_of_the_sounds_is_that_of_ctc_and_of_rows_that_have_them() -> None:
    torch.manual_seed(0)
    head, layer, frames = PhoneHead(8), torch.randn(3, 5, 8), torch.tensor([5, 4, 3])
    phones, lengths = torch.randint(len(PHONES), (3, 6)), torch.tensor([6, 0, 4])
    expected = 0.0
    for row in (0, 2):
        part = layer[row : row + 1, : int(frames[row])]
        scores = head.scores(head.norm(part)).view(-1, len(PHONES) + 1).log_softmax(-1)
        expected += float(ctc_by_hand(scores.detach(), phones[row, : int(lengths[row])].tolist()))
    torch.testing.assert_close(head.loss(layer, frames, phones, lengths).item(), expected / 10, rtol=1e-4, atol=0)
    assert head.loss(layer, frames, phones, torch.zeros_like(lengths)).item() == 0.0


def ctc_by_hand(scores: torch.Tensor, phones: list[int]) -> torch.Tensor:
    """The forward recursion of Graves et al. (2006), §4.1; the blank is the last score."""
    path = [len(PHONES)]
    for phone in phones:
        path += [phone, len(PHONES)]
    alpha = torch.full((len(path),), -torch.inf)
    alpha[:2] = scores[0, path[:2]]
    for now in scores[1:]:
        before = alpha.clone()
        for i in range(len(path)):
            reach = [before[i]] + ([before[i - 1]] if i else [])
            if i > 1 and path[i] not in (len(PHONES), path[i - 2]):
                reach.append(before[i - 2])
            alpha[i] = torch.logsumexp(torch.stack(reach), 0) + now[path[i]]
    return -torch.logsumexp(alpha[-2:], 0)


def test_a_misled_predictor_is_of_no_use_and_a_short_memory_changes_what_is_encoded() -> None:
    data = batch()

    def losses(**changes: float) -> dict[str, float]:
        learner = trainer(dataclasses.replace(RECIPE, **changes))
        learner.step = 5
        torch.manual_seed(3)
        return learner.train_step(data, 1.0)

    plain = losses()
    assert losses(misled_share=1.0)["ctc"] == plain["ctc"] and losses(misled_share=1.0)["rnnt"] != plain["rnnt"]
    assert losses(short_memory_share=1.0)["ctc"] != plain["ctc"]
    learner = trainer(dataclasses.replace(RECIPE, short_memory_share=0.5))
    memory = learner._memory(400)
    full = learner.net.encoder.config.left_context_frames
    assert 120 < int((memory == full).sum()) < 280
    assert set(memory[memory != full].tolist()) == set(range(2, 11))


def test_the_predictor_learns_from_text_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny.tokenizer())
    sentences = ["the speaker is still talking", "nothing once shown is ever taken back"]
    text = text_batches(sentences, tmp_path / "tokenizer.model", rows=6, seed=1)
    learner, data = trainer(), batch()
    losses = [learner.train_step(data, 1.0, next(text)) for _ in range(80)]
    assert "text" not in losses[0]  # the transducer is not there yet
    assert losses[-1]["text"] < 0.7 * losses[5]["text"]
    assert losses[-1]["rnnt"] < 0.5 * losses[5]["rnnt"]
    assert not learner.net.transducer.decoder.prediction.embed.weight[tiny.PIECES].any()


def test_the_internal_language_model_is_the_transducer_with_a_silent_encoder() -> None:
    net = tiny.net().transducer.eval()
    targets = torch.randint(tiny.PIECES, (2, 5))
    scores = net.internal_lm(targets)
    state = net.init_state(2)
    for u in range(5):
        expected = net.logits(torch.zeros_like(state.output), state.output)[:, : tiny.PIECES]
        torch.testing.assert_close(scores[:, u], expected, atol=1e-5, rtol=1e-5)
        state = net.predict(targets[:, u], state)


def test_gates_close_where_the_delay_costs_much() -> None:
    def reaches(weight: float) -> list[float]:
        recipe = dataclasses.replace(RECIPE, latency_weight=weight, latency_from_step=5, hardening_steps=20)
        learner = Trainer(tiny.config(gates=3), recipe, "cpu", autocast=False)
        losses, data = [learner.train_step(batch(), 1.0) for _ in range(40)], batch()
        assert losses[-1]["ctc"] < 0.8 * losses[0]["ctc"]
        whole = encode_whole(
            learner.net.encoder.eval(), data.mel, slots=data.slots, max_lookahead_frames=torch.full((3,), 6)
        )
        hard = (whole.reach - torch.arange(whole.reach.shape[1])).float()[:, :10].mean().item()
        return [losses[5]["reach"], losses[-1]["reach"], hard]

    free, dear = reaches(0.0), reaches(3.0)
    assert free[0] == pytest.approx(dear[0], rel=1e-3)
    assert dear[1] < 0.4 * free[1]
    assert dear[2] < 0.5 * free[2]


def test_only_pieces_that_tell_a_word_pay_for_delay() -> None:
    learner, data = trainer(), batch()
    learner.telling = torch.arange(tiny.PIECES) % 2 == 1
    frames = -(-data.slots // 8)
    reach = torch.arange(int(frames.max())).expand(3, -1).float()
    delay = learner._delay(reach, data.targets, frames, data.target_lengths)
    told = data.targets % 2 == 1
    assert (delay[(~told)[:, None].expand_as(delay)] == 0).all()
    # A frame later is a frame more for all that are told.
    torch.testing.assert_close(delay[:, 1:] - delay[:, :-1], told[:, None].expand(-1, delay.shape[1] - 1, -1).float())


def test_the_reach_of_chunks_is_their_last_frame() -> None:
    learner, data = trainer(dataclasses.replace(RECIPE, easy_steps=99)), batch()
    _, reach = learner._encode(data.mel, data.slots, easy=True)
    chunk, frames = 7, -(-int(data.slots[0]) // 8)
    expected = [min(t // chunk * chunk + chunk - 1, frames - 1) for t in range(frames)]
    assert reach[0, :frames].tolist() == expected


def test_a_share_of_the_rows_is_encoded_in_chunks_and_none_changes_place() -> None:
    still = {"least_noise": 1e-9, "latency_from_step": 0, "hardening_steps": 1}
    recipe = dataclasses.replace(RECIPE, chunked_share=0.5, capped_share=0.0, **still)
    learner, data = Trainer(tiny.config(gates=2), recipe, "cpu", autocast=False), batch(6)
    learner.step = 1
    learner.net.eval()
    torch.manual_seed(1)
    encoded, reach = learner._encode(data.mel, data.slots, easy=False)
    kinds = set()
    for row in range(6):
        mel, slots = data.mel[row : row + 1], data.slots[row : row + 1]
        own = {"adaptive": learner._encode_adaptive(mel, slots, easy=False)}
        for lookahead in CHUNK_LOOKAHEADS:
            own[f"{lookahead}"] = learner._encode_chunks(mel, slots, (lookahead,), easy=False)
        matching = [kind for kind, (x, _) in own.items() if torch.allclose(x[0], encoded[row], atol=1e-5)]
        assert len(matching) == 1
        torch.testing.assert_close(own[matching[0]][1][0], reach[row])
        kinds.add(matching[0] == "adaptive")
    assert kinds == {True, False}


def test_pieces_that_begin_a_word(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny.tokenizer())
    begins = word_beginnings(tmp_path / "tokenizer.model")
    pieces = tiny.recognizer().tokenizer
    ids = pieces.encode("the speaker is talking")
    assert sum(begins[i].item() for i in ids) == 4 and begins[ids[0]]


def test_a_model_with_gates_may_start_from_one_without(tmp_path: Path) -> None:
    learner = trainer()
    learner.save(tmp_path / "last.pt")
    (tmp_path / "tokenizer.model").write_bytes(tiny.tokenizer())
    export(tmp_path, tmp_path / "tokenizer.model", tmp_path / "model", "card")
    started = Trainer(tiny.config(gates=2), RECIPE, "cpu", autocast=False)
    started.start_from(tmp_path / "model")
    assert started.train_step(batch(), 0.1)["ctc"] > 0


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
    export(tmp_path, tmp_path / "tokenizer.model", tmp_path / "model", "card")
    assert (tmp_path / "model" / "README.md").read_text() == "card"
    net = load_recognizer(tmp_path / "model").net
    expected = learner.average["encoder.pre_encode.out.weight"].bfloat16().float()
    assert torch.equal(net.encoder.pre_encode.out.weight, expected)


def test_export_writes_the_mean_with_another_model(tmp_path: Path) -> None:
    learner = trainer()
    learner.save(tmp_path / "last.pt")
    (tmp_path / "tokenizer.model").write_bytes(tiny.tokenizer())
    files = tmp_path, tmp_path / "tokenizer.model"
    export(*files, tmp_path / "old", "card")
    for tensor in learner.average.values():
        tensor += 1.0
    learner.save(tmp_path / "last.pt")
    export(*files, tmp_path / "mean", "card", other=Other(tmp_path / "old", 0.25))
    old, mean = (read_tensors(tmp_path / name / "model.safetensors") for name in ("old", "mean"))
    for name, tensor in old.items():
        torch.testing.assert_close(mean[name].float(), tensor.float() + 0.75, atol=0.02, rtol=0.01)
    smaller = {name: tensor[:1] for name, tensor in old.items()}
    save_file(smaller, tmp_path / "old" / "model.safetensors")
    with pytest.raises(DragomanError, match="the weights in .*old"):
        export(*files, tmp_path / "mean", "card", other=Other(tmp_path / "old", 0.25))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Two recordings of noise."""
    records = []
    for i, text in enumerate(("the speaker is $5", "is still talking")):
        soundfile.write(tmp_path / f"{i}.wav", np.random.default_rng(i).normal(0, 0.1, 24_000), 16_000)
        records.append(json.dumps({"audio": f"{i}.wav", "text": text}))
    file = tmp_path / "dev.jsonl"
    file.write_text("\n".join(records))
    return file


def test_an_exported_card_has_the_scores_of_what_is_in_the_folder(tmp_path: Path, manifest: Path) -> None:
    trainer().save(tmp_path / "last.pt")
    (tmp_path / "tokenizer.model").write_bytes(tiny.tokenizer())
    (tmp_path / "notes.md").write_text(f"before\n\n{SCORES_MARK}\n\nafter\n")
    out, threads = tmp_path / "model", torch.get_num_threads()
    files = {"tokenizer": tmp_path / "tokenizer.model", "notes": tmp_path / "notes.md"}
    run_export(tmp_path, **files, out=out, manifest=[manifest], threads=threads)
    assert "<svg" in (out / CURVE).read_text()
    card = (out / "README.md").read_text()
    rows = re.findall(r"\| dev \| 2 \| 8 \| (rnnt|ctc) \| (\d+) ms \| [\d.]+ % \| (?:\d+|–) / (?:\d+|–) \|", card)
    assert rows == [("ctc", "480"), *(("rnnt", ms) for ms in ("0", "80", "240", "480"))]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [(s["decoder"], str(s["lookahead_ms"])) for s in scores] == rows
    (tmp_path / "0.wav").unlink()
    with pytest.raises(typer.Exit):
        run_export(tmp_path, **files, out=out, manifest=[manifest], threads=threads)
    assert SCORES_MARK in (out / "README.md").read_text()


def test_validation_logs_the_rates_of_the_heads_that_are_trained(
    tmp_path: Path, manifest: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny.tokenizer())
    learner = trainer()
    for step, rates in ((1, r"ctc [\d.]+%"), (9, r"rnnt [\d.]+% ctc [\d.]+%")):
        learner.step = step
        with caplog.at_level(logging.INFO, "training.asr.train"):
            _validate(learner, tmp_path / "tokenizer.model", [manifest])
        assert re.fullmatch(rf"step {step} WER on dev: {rates}", caplog.messages[-1])


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

    index = [json.loads(line) | {"phones": "ðə"} for line in (folder / "index.jsonl").read_text().splitlines()]
    (folder / "index.jsonl").write_text("\n".join(map(json.dumps, index)))
    assert all([PHONES[i] for i in row] == ["ð", "ə"] for row in stream(1)[0].phones.tolist())
    first, again, other = stream(1), stream(1), stream(2)
    assert all(torch.equal(a.mel, b.mel) for a, b in zip(first, again, strict=True))
    assert any(a.mel.shape != b.mel.shape or not torch.equal(a.mel, b.mel) for a, b in zip(first, other, strict=True))
    for item in first:
        assert item.audio_s <= 20 + 6
        assert int(item.slots.min()) > 7 + 100  # the entry of weight 0 has 100 mel frames and is never drawn


def test_a_run_leaves_its_checkpoint_however_seldom_it_validates(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny.tokenizer())
    files = {"train": [packed(tmp_path / "packed", [20_000, 24_000])], "tokenizer": tmp_path / "tokenizer.model"}
    run(**files, out=tmp_path / "run", steps=2, decay_steps=1, valid_every_steps=1000, width=16, threads=1)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 2
