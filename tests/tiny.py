"""Small random models: fast, and with weights large enough that every path of the search is taken."""

from __future__ import annotations

import io
from functools import cache

import sentencepiece
import torch

from models.config import DecoderConfig, EncoderConfig, FeatureConfig, ModelConfig
from models.recognizer import Recognizer, RecognizerNet

PIECES = 64


@cache
def tokenizer() -> bytes:
    """A SentencePiece model of 64 pieces."""
    words = "the speaker is still talking and nothing once shown is ever taken back while words go on".split()
    sentences = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 4), model_writer=model, vocab_size=PIECES, model_type="bpe",
        bos_id=-1, eos_id=-1, pad_id=-1, unk_id=0, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def config(
    *, layers: int = 2, d_model: int = 32, pred_layers: int = 1, use_bias: bool = True, gates: int = 0
) -> ModelConfig:
    """A shape with four look-aheads, or with gates, and a left context of 28 frames."""
    encoder = EncoderConfig(
        n_layers=layers, d_model=d_model, n_heads=4, subsampling_conv_channels=8, use_bias=use_bias,
        left_context_frames=28, lookahead_frames=(layers * gates,) if gates else (6, 3, 1, 0), gate_frames=gates,
    )  # fmt: skip
    decoder = DecoderConfig(vocab_size=PIECES, pred_hidden=24, pred_layers=pred_layers, joint_hidden=40)
    return ModelConfig(FeatureConfig(), encoder, vocab_size=PIECES, decoder=decoder, name="tiny")


def net(shape: ModelConfig | None = None, seed: int = 0) -> RecognizerNet:
    """Random weights whose search emits runs of pieces and runs of blanks."""
    torch.manual_seed(seed)
    net = RecognizerNet(shape or config())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0.0, 0.25) if parameter.dim() > 1 else parameter.add_(0.05 * torch.randn_like(parameter))
        net.transducer.joint.joint_net[2].bias[PIECES] += 2.0
        net.ctc_decoder.decoder_layers[0].bias[PIECES] += 1.0
        net.transducer.decoder.prediction.embed.weight[PIECES] = 0
        for layer in net.encoder.layers if net.config.encoder.adaptive else ():
            layer.lookahead.scores.bias.normal_(1.0, 0.5)
            layer.lookahead.scores.weight.normal_(0.0, 1.5)
    return net


@cache
def recognizer(seed: int = 0, gates: int = 0) -> Recognizer:
    """A frozen tiny model with its tokenizer."""
    return Recognizer(net(config(gates=gates), seed), tokenizer())
