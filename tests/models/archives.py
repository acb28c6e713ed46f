"""Archives as NeMo writes them, made by hand: a small model of every kind with its tokenizer."""

import io
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import yaml
from torch import Tensor

from models.config import DecoderConfig, EncoderConfig, FeatureConfig, ModelConfig
from models.recognizer import RecognizerNet

VOCAB = 32
KINDS = ("hybrid", "rnnt", "ctc")
TOKENIZER = "0123456789abcdef_tokenizer.model"
Members = dict[str, bytes]


@cache
def tokenizer() -> bytes:
    """A SentencePiece model of ``VOCAB`` pieces."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(
            "the ship came in at noon and they sang on the way home\nno one else was there to see it\n" * 20
        )
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=f"{folder}/t", vocab_size=VOCAB, model_type="bpe", minloglevel=2
        )
        return Path(folder, "t.model").read_bytes()


def model_config(kind: str) -> ModelConfig:
    decoder = DecoderConfig(vocab_size=VOCAB, pred_hidden=12, pred_layers=2, joint_hidden=20)
    return ModelConfig(
        features=FeatureConfig(mel_bins=80),
        encoder=EncoderConfig(n_layers=2, d_model=16, n_heads=2, subsampling_conv_channels=8),
        vocab_size=VOCAB,
        decoder=None if kind == "ctc" else decoder,
        ctc=kind != "rnnt",
    )


def settings(kind: str) -> dict[str, Any]:
    """The part of a ``model_config.yaml`` that describes the model of ``model_config``."""
    head = {"_target_": "nemo.collections.asr.modules.ConvASRDecoder", "feat_in": 16, "num_classes": VOCAB}
    result: dict[str, Any] = {
        "target": "nemo.collections.asr.models.SomeModel",
        "tokenizer": {"type": "bpe", "model_path": f"nemo:{TOKENIZER}"},
        "preprocessor": {
            "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
            "sample_rate": 16000,
            "normalize": "NA",
            "window_size": 0.025,
            "features": 80,
            "n_fft": 512,
            "dither": 1.0e-05,
        },
        "encoder": {
            "_target_": "nemo.collections.asr.modules.ConformerEncoder",
            "feat_in": 80,
            "n_layers": 2,
            "d_model": 16,
            "n_heads": 2,
            "subsampling": "dw_striding",
            "subsampling_factor": 8,
            "subsampling_conv_channels": 8,
            "causal_downsampling": True,
            "att_context_size": [[70, 13], [70, 6], [70, 1], [70, 0]],
            "att_context_style": "chunked_limited",
            "conv_kernel_size": 9,
            "conv_norm_type": "layer_norm",
            "conv_context_size": "causal",
        },
        "decoder": head,
    }
    if kind != "ctc":
        result["decoder"] = {
            "_target_": "nemo.collections.asr.modules.RNNTDecoder",
            "prednet": {"pred_hidden": 12, "pred_rnn_layers": 2},
        }
        result["joint"] = {
            "_target_": "nemo.collections.asr.modules.RNNTJoint",
            "jointnet": {"joint_hidden": 20, "activation": "relu", "dropout": 0.2},
        }
        result["decoding"] = {"strategy": "greedy_batch", "greedy": {"max_symbols": 7}}
    if kind == "hybrid":
        result["aux_ctc"] = {"decoder": head}
    return result


def weights(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {name: torch.randn_like(t) for name, t in RecognizerNet(model_config(kind)).checkpoint().items()}
    if kind == "ctc":
        tensors = {name.removeprefix("ctc_"): tensor for name, tensor in tensors.items()}
    return tensors | {"preprocessor.featurizer.window": torch.ones(400)}


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def members(kind: str) -> Members:
    return {
        "model_config.yaml": yaml.safe_dump(settings(kind)).encode(),
        "model_weights.ckpt": pickled(weights(kind)),
        TOKENIZER: tokenizer(),
    }


def pack(path: Path, files: Members, *, prefix: str = "", compressed: bool = False) -> Path:
    with tarfile.open(path, "w:gz" if compressed else "w:") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
