"""Small random models: fast, and with weights large enough that every path of the search is taken."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import sentencepiece
import torch

from models.config import DecoderConfig, EncoderConfig, FeatureConfig, ModelConfig
from models.llm import Llm
from models.llm_config import LlmConfig
from models.recognizer import Recognizer, RecognizerNet
from models.tokenizer import SentencePieceTokenizer
from models.translator import (
    END_OF_READ,
    END_OF_WRITE,
    LATENCIES,
    OWN_ENDPOINT,
    TranslationConfig,
    Translator,
    save_translator,
)

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


@cache
def translation_tokenizer() -> bytes:
    """A SentencePiece model of 340 pieces, bytes among them, with the symbols of an interleaved model."""
    words = (
        "the speaker is still talking and el hablante sigue hablando y nada se retira der Sprecher redet noch".split()
    )
    sentences = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
    languages = ("en", "es", "de", "fr")
    symbols = [END_OF_READ, END_OF_WRITE, *(f"<|{name}|>" for name in (*languages, *LATENCIES))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 4), model_writer=model, vocab_size=340, model_type="unigram",
        byte_fallback=True, user_defined_symbols=symbols, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def translation_llm(seed: int = 0) -> Llm:
    """Random weights of which about every third word leads to a write, and a write has some tokens or many."""
    tokenizer = SentencePieceTokenizer(translation_tokenizer())
    torch.manual_seed(seed)
    shape = LlmConfig(
        vocab_size=tokenizer.size + 3, d_model=32, d_ff=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, tied=False
    )
    llm = Llm(shape)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.normal_(0.0, 0.3) if parameter.dim() > 1 else parameter.add_(0.05 * torch.randn_like(parameter))
        assert llm.lm_head is not None
        for symbol in (END_OF_READ, END_OF_WRITE):
            llm.lm_head.weight[tokenizer.id_of(symbol)] *= 5.0
    return llm


@cache
def translator(seed: int = 0, *, max_context_tokens: int = 512, endpoint: str | None = OWN_ENDPOINT) -> Translator:
    """A frozen tiny model that interprets, with its tokenizer."""
    config = TranslationConfig(max_context_tokens=max_context_tokens, endpoint=endpoint)
    tokenizer = SentencePieceTokenizer(translation_tokenizer())
    return Translator(translation_llm(seed).freeze(), tokenizer, config, name="tiny")


def save_tiny_translator(folder: Path, seed: int = 0) -> Path:
    """The folder of what :func:`translator` gives."""
    llm, config = translation_llm(seed), TranslationConfig(endpoint=OWN_ENDPOINT)
    save_translator(folder, llm.config, llm.state_dict(), translation_tokenizer(), config)
    return folder
