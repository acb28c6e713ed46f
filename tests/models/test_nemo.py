"""Archives are made here by hand, as NeMo would write them; the last test asks NeMo itself."""

import pickle
import tarfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from models.checkpoint import load_recognizer
from models.nemo import MAX_TEXT_BYTES, MAX_WEIGHTS_BYTES, import_nemo
from streaming.errors import DragomanError
from tests.models.archives import (
    KINDS,
    TOKENIZER,
    members,
    model_config,
    pack,
    pickled,
    settings,
    tokenizer,
    weights,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["", "./"])
@pytest.mark.parametrize("compressed", [False, True], ids=["tar", "tar.gz"])
def test_import_keeps_every_tensor(kind: str, prefix: str, compressed: bool, tmp_path: Path) -> None:
    archive = pack(tmp_path / "m.nemo", members(kind), prefix=prefix, compressed=compressed)

    config = import_nemo(archive, tmp_path / "out")

    stored = load_file(tmp_path / "out" / "model.safetensors")
    expected = {name: t for name, t in weights(kind).items() if not name.startswith("preprocessor.")}
    if kind == "ctc":
        expected = {name.replace("decoder.decoder", "ctc_decoder.decoder"): t for name, t in expected.items()}
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer()
    assert load_recognizer(tmp_path / "out").config == config
    assert config.source == "m.nemo" and config.name == "m"


@pytest.mark.parametrize("kind", KINDS)
def test_import_reads_the_shape(kind: str, tmp_path: Path) -> None:
    config = import_nemo(pack(tmp_path / "m.nemo", members(kind)), tmp_path / "out", source="a/b@c")

    expected = model_config(kind)
    assert config.encoder == expected.encoder and config.features == expected.features
    assert config.ctc == expected.ctc and config.source == "a/b@c"
    assert (config.decoder is None) == (kind == "ctc")
    if config.decoder is not None:
        assert config.decoder.max_symbols_per_frame == 7 and config.decoder.pred_layers == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a/b@c" in card and "sha256" in card and "1040, 480, 80, 0 ms" in card


def test_a_joint_without_dropout_counts_one_entry_less(tmp_path: Path) -> None:
    tensors = {name.replace("joint_net.2.", "joint_net.1."): t for name, t in weights("rnnt").items()}
    files = members("rnnt") | {"model_weights.ckpt": pickled(tensors)}

    import_nemo(pack(tmp_path / "m.nemo", files), tmp_path / "out")

    assert "joint.joint_net.2.bias" in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "lookaheads", "left"),
    [
        ({"att_context_size": [70, 6]}, (6,), 70),
        ({"att_context_size": [[56, 13], [56, 3], [56, 0]]}, (13, 3, 0), 56),
        ({"att_context_size": [70, 0], "att_context_style": "regular"}, (0,), 70),
        ({"conv_context_size": [8, 0]}, (13, 6, 1, 0), 70),
    ],
)
def test_spellings_of_bounded_context(
    change: dict[str, Any], lookaheads: tuple[int, ...], left: int, tmp_path: Path
) -> None:
    config = settings("hybrid")
    config["encoder"] |= change
    files = members("hybrid") | {"model_config.yaml": yaml.safe_dump(config).encode()}

    encoder = import_nemo(pack(tmp_path / "m.nemo", files), tmp_path / "out").encoder

    assert encoder.lookahead_frames == lookaheads and encoder.left_context_frames == left


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("encoder.causal_downsampling", False, "causal_downsampling is False, this engine needs True"),
        ("encoder.att_context_style", "chunked_limited_with_rc", "needs chunked_limited"),
        ("encoder.att_context_size", [-1, -1], "is [-1, -1], this engine needs a bounded one"),
        ("encoder.att_context_size", [70, -1], "is [70, -1], this engine needs a bounded one"),
        ("encoder.att_context_size", [[70, 13], [56, 6]], "one left context"),
        ("encoder.att_context_size", [70, 12], "12 + 1 frames does not divide the left context of 70"),
        ("encoder.att_context_size", 7, "att_context_size is 7, pairs of frames are needed"),
        ("encoder.conv_context_size", None, "conv_context_size is None, this engine needs causal"),
        ("encoder.conv_context_size", [4, 4], "conv_context_size is [4, 4], this engine needs causal"),
        ("encoder.conv_context_style", "dcc", "conv_context_style is dcc, this engine needs regular"),
        (
            "encoder.conv_norm_type",
            "batch_norm",
            "conv_norm_type is batch_norm, this engine needs layer_norm",
        ),
        ("encoder.subsampling", "striding", "subsampling is striding, this engine needs dw_striding"),
        ("encoder.subsampling_factor", 4, "subsampling_factor is 4, this engine needs 8"),
        (
            "encoder.self_attention_model",
            "rel_pos_local_attn",
            "is rel_pos_local_attn, this engine needs rel_pos",
        ),
        ("encoder._target_", "nemo.modules.SqueezeformerEncoder", "is SqueezeformerEncoder"),
        ("encoder.n_layers", "many", "n_layers is 'many', a whole number is needed"),
        (
            "decoder._target_",
            "nemo.modules.StatelessTransducerDecoder",
            "needs RNNTDecoder or ConvASRDecoder",
        ),
        ("joint.num_extra_outputs", 5, "num_extra_outputs is 5, this engine needs 0"),
        ("preprocessor.normalize", "per_feature", "normalize is per_feature, this engine needs NA"),
        ("preprocessor.sample_rate", 8000, "sample_rate is 8000, this engine needs 16000"),
        ("preprocessor.window_size", 0.02, "window_size is 0.02, this engine needs 0.025"),
        ("tokenizer.type", "agg", "type is agg, this engine needs bpe"),
        ("target", "nemo.EncDecHybridRNNTCTCBPEModelWithPrompt", "needs a model without language prompts"),
    ],
)
def test_other_models_are_refused(path: str, value: object, said: str, tmp_path: Path) -> None:
    config = deepcopy(settings("hybrid"))
    *sections, key = path.split(".")
    section = config
    for name in sections:
        section = section[name]
    section[key] = value
    files = members("hybrid") | {"model_config.yaml": yaml.safe_dump(config).encode()}

    with pytest.raises(DragomanError) as caught:
        import_nemo(pack(tmp_path / "m.nemo", files), tmp_path / "out")

    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_look_ahead_that_adds_up_is_refused(tmp_path: Path) -> None:
    config = settings("hybrid")
    config["encoder"] |= {"att_context_style": "regular", "att_context_size": [70, 1]}
    files = members("hybrid") | {"model_config.yaml": yaml.safe_dump(config).encode()}

    with pytest.raises(DragomanError, match="regular style, in which look-ahead adds up") as caught:
        import_nemo(pack(tmp_path / "m.nemo", files), tmp_path / "out")

    assert caught.value.code == "unsupported_model"


class Bomb:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str, str], object], tuple[str, str]]:
        return open, (str(self.path), "w")


def tensors_with(changes: dict[str, Tensor | None]) -> bytes:
    changed: dict[str, Tensor | None] = {**weights("hybrid"), **changes}
    return pickled({name: tensor for name, tensor in changed.items() if tensor is not None})


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("model_config.yaml", b"- a\n- list\n", "holds a list, a mapping is needed"),
        ("model_config.yaml", b"encoder: [unclosed", "is not YAML"),
        ("model_config.yaml", b"!!python/object/apply:os.getcwd []", "is not YAML"),
        ("model_weights.ckpt", b"not a pickle", "cannot be read as plain tensors"),
        ("model_weights.ckpt", pickled([1, 2]), "is not a state dict"),
        ("model_weights.ckpt", pickle.dumps(print, protocol=2), "cannot be read as plain tensors"),
        (TOKENIZER, b"no pieces", "is not a SentencePiece model"),
        (TOKENIZER, b"", "is not a SentencePiece model"),
        (
            "model_weights.ckpt",
            tensors_with({"encoder.layers.1.self_attn.linear_q.weight": torch.zeros(8, 16)}),
            "encoder.layers.1.self_attn.linear_q.weight has shape (8, 16), the config asks for (16, 16)",
        ),
        ("model_weights.ckpt", tensors_with({"joint.enc.bias": None}), "joint.enc.bias"),
        (
            "model_weights.ckpt",
            tensors_with({"prompt_kernel.0.bias": torch.zeros(1)}),
            "prompt_kernel.0.bias",
        ),
    ],
)
def test_bad_members_are_refused(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    archive = pack(tmp_path / "m.nemo", members("hybrid") | {name: data})

    with pytest.raises(DragomanError) as caught:
        import_nemo(archive, tmp_path / "out")

    assert caught.value.code == "bad_checkpoint" and said in str(caught.value) and "m.nemo" in str(caught.value)


def test_a_pickle_cannot_run_anything(tmp_path: Path) -> None:
    files = members("hybrid") | {"model_weights.ckpt": pickled({"a": Bomb(tmp_path / "ran")})}

    with pytest.raises(DragomanError, match="cannot be read as plain tensors"):
        import_nemo(pack(tmp_path / "m.nemo", files), tmp_path / "out")

    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model_config.yaml", "model_weights.ckpt", TOKENIZER])
def test_missing_members_are_named(name: str, tmp_path: Path) -> None:
    files = members("hybrid")
    del files[name]

    with pytest.raises(DragomanError, match=f"has no {name}; it has ") as caught:
        import_nemo(pack(tmp_path / "m.nemo", files), tmp_path / "out")

    assert caught.value.code == "bad_checkpoint"


@pytest.mark.parametrize("data", [b"", b"just some text\n" * 100], ids=["empty", "text"])
def test_a_file_that_is_no_archive(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.nemo").write_bytes(data)

    with pytest.raises(DragomanError, match="m.nemo is not a tar archive") as caught:
        import_nemo(tmp_path / "m.nemo", tmp_path / "out")

    assert caught.value.code == "bad_checkpoint"


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DragomanError, match="is not a file") as caught:
        import_nemo(tmp_path / "m.nemo", tmp_path / "out")

    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("compressed", [False, True], ids=["tar", "tar.gz"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_download_that_broke_off(kept: float, compressed: bool, tmp_path: Path) -> None:
    archive = pack(tmp_path / "m.nemo", members("hybrid"), compressed=compressed)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(len(whole) * kept)])

    with pytest.raises(DragomanError) as caught:
        import_nemo(archive, tmp_path / "out")

    assert caught.value.code == "bad_checkpoint"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "size"), [("padding", MAX_WEIGHTS_BYTES + 1), ("model_config.yaml", MAX_TEXT_BYTES + 1)]
)
def test_a_member_that_claims_too_much(name: str, size: int, tmp_path: Path) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    with (tmp_path / "m.nemo").open("wb") as file:
        file.write(info.tobuf())
        file.truncate(MAX_TEXT_BYTES + 10_000)

    with pytest.raises(DragomanError, match=str(size)) as caught:
        import_nemo(tmp_path / "m.nemo", tmp_path / "out")

    assert caught.value.code == "bad_checkpoint"


def test_members_never_leave_the_archive(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    files = members("hybrid") | {"../escaped": b"x", "/tmp/dragoman-escaped": b"x"}
    archive = pack(tmp_path / "inside" / "m.nemo", files)

    import_nemo(archive, tmp_path / "inside" / "out")

    assert not (tmp_path / "escaped").exists() and not Path("/tmp/dragoman-escaped").exists()


def test_links_are_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "m.nemo", "w:") as tar:
        link = tarfile.TarInfo("model_config.yaml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)

    with pytest.raises(DragomanError, match="has no model_config.yaml"):
        import_nemo(tmp_path / "m.nemo", tmp_path / "out")


@pytest.mark.nemo
@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_that_nemo_wrote(kind: Any, tmp_path: Path) -> None:
    pytest.importorskip("nemo")
    from benchmarks.nemo_reference import build

    reference = build("tiny", seed=3, kind=kind)
    reference.save_nemo(tmp_path / "m.nemo")

    config = import_nemo(tmp_path / "m.nemo", tmp_path / "out")

    stored = load_file(tmp_path / "out" / "model.safetensors")
    expected = reference.state_dict()
    if kind == "ctc":
        expected = {name.replace("decoder.decoder", "ctc_decoder.decoder"): t for name, t in expected.items()}
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    assert load_recognizer(tmp_path / "out").tokenizer.serialized_model_proto() == reference.tokenizer_bytes
    assert config.encoder.lookahead_frames == (13, 6, 1, 0) and config.ctc == (kind != "rnnt")
