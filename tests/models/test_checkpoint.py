"""Model folders: what is written is read back, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.checkpoint import load_recognizer, save_checkpoint
from streaming.errors import DragomanError
from tests import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    net = tiny.net()
    save_checkpoint(tmp_path / "model", net.config, net.checkpoint(), tiny.tokenizer(), "# card\n")
    return tmp_path / "model"


def test_a_folder_comes_back_as_it_was(folder: Path) -> None:
    recognizer, net = load_recognizer(folder), tiny.net()
    assert recognizer.config == net.config
    assert recognizer.lookaheads_ms == (0, 80, 240, 480)
    mel = torch.randn(1, 160, 80)
    slots, chunk = torch.tensor([160]), torch.tensor([7])
    expected, _ = net.eval().encoder.step(mel, None, slots=slots, chunk_frames=chunk)
    got, _ = recognizer.net.encoder.step(mel, None, slots=slots, chunk_frames=chunk)
    torch.testing.assert_close(got, expected.detach(), atol=1e-5, rtol=1e-5)


def test_bf16_is_a_choice_of_the_reader(folder: Path) -> None:
    assert load_recognizer(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_the_largest_look_ahead_not_above_is_taken(folder: Path) -> None:
    recognizer = load_recognizer(folder)
    asked = [(0, 0), (79, 0), (80, 1), (400, 3), (480, 6), (9999, 6), (None, 6)]
    assert [recognizer.lookahead_frames(ms) for ms, _ in asked] == [frames for _, frames in asked]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(DragomanError, match=missing):
        load_recognizer(folder)


def test_a_nemo_archive_is_not_a_folder_and_the_way_is_told(tmp_path: Path) -> None:
    archive = tmp_path / "model.nemo"
    archive.write_bytes(b"x")
    with pytest.raises(DragomanError, match="dragoman models import"):
        load_recognizer(archive)


def test_a_weight_of_the_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["decoder"]["joint_hidden"] = 41
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DragomanError, match=r"joint.*\(40.*\(41"):
        load_recognizer(folder)


def test_another_number_of_layers_names_missing_tensors(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["encoder"]["n_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DragomanError, match=r"tensors are missing \(encoder.layers.2"):
        load_recognizer(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "whisper"}, "dragoman-asr"),
        ({"colour": "red"}, "colour"),
        ({"encoder": {"d_model": 32}}, "n_heads"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(DragomanError, match=message):
        load_recognizer(folder)


def test_broken_files_are_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(DragomanError, match=r"model\.safetensors is not a safetensors file"):
        load_recognizer(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(DragomanError, match="list, not an object"):
        load_recognizer(folder)


@pytest.mark.parametrize(("device", "message"), [("cuda:99", "sees"), ("tpu", "use cpu"), ("cuda:x", "use cpu")])
def test_a_device_that_is_not_there(folder: Path, device: str, message: str) -> None:
    with pytest.raises(DragomanError, match=message):
        load_recognizer(folder, device=device)


def test_an_unknown_dtype(folder: Path) -> None:
    with pytest.raises(DragomanError, match="float32 or bfloat16"):
        load_recognizer(folder, dtype="float16")
