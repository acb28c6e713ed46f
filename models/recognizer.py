"""One model: encoder, heads and tokenizer, on one device in one dtype."""

from __future__ import annotations

from typing import Self

import sentencepiece
import torch
from torch import Tensor, nn

from models.config import FRAME_MS, ModelConfig
from models.fastconformer import FastConformer
from models.folder import require_fit
from models.graphs import CudaCapture, EncoderGraphs
from models.rnnt import CtcHead, Transducer
from streaming.errors import DragomanError


class RecognizerNet(nn.Module):
    """All weights of a recogniser, named as in the published checkpoints.

    Args:
        config: Shape of the model.
        dropout: Probability in training.
    """

    def __init__(self, config: ModelConfig, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.encoder = FastConformer(config.encoder, config.features.mel_bins, dropout=dropout)
        self.transducer: Transducer | None = None
        if config.decoder is not None:
            self.transducer = Transducer(config.decoder, config.encoder.d_model, dropout=dropout)
        self.ctc_decoder = CtcHead(config.encoder.d_model, config.vocab_size) if config.ctc else None

    def checkpoint(self) -> dict[str, Tensor]:
        """The state dict under the published names."""
        return {name.removeprefix("transducer."): tensor for name, tensor in self.state_dict().items()}

    def load_checkpoint(self, tensors: dict[str, Tensor]) -> None:
        """Loads a state dict with the published names.

        Raises:
            DragomanError: ``bad_checkpoint`` naming the tensors that are missing, unknown or of another shape.
        """
        own = self.checkpoint()
        require_fit(own, tensors)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])


class Recognizer:
    """A frozen network with its tokenizer; immutable, and shared by every session.

    On a GPU, the steps of an encoder that looks ahead in chunks are replayed as graphs (:mod:`models.graphs`).

    Args:
        net: The weights, already loaded, on their device and in their dtype.
        tokenizer: A SentencePiece model, serialised.

    Raises:
        DragomanError: ``bad_checkpoint`` if the tokenizer does not have the model's number of pieces.
    """

    def __init__(self, net: RecognizerNet, tokenizer: bytes) -> None:
        self.config = net.config
        self.net = net.eval().requires_grad_(False)
        self.net.encoder.freeze()
        if self.device.type == "cuda" and not self.adaptive:
            self.net.encoder.graphs = EncoderGraphs(self.net.encoder, CudaCapture(self.device))
        try:
            self.tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
        except Exception as error:
            raise DragomanError("bad_checkpoint", "tokenizer.model is not a SentencePiece model") from error
        if self.tokenizer.get_piece_size() != self.config.vocab_size:
            raise DragomanError(
                "bad_checkpoint",
                f"tokenizer.model has {self.tokenizer.get_piece_size()} pieces, the model {self.config.vocab_size}",
            )

    @property
    def name(self) -> str:
        """What the model calls itself."""
        return self.config.name

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.net.encoder.pre_encode.out.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are kept and computed in."""
        return self.net.encoder.pre_encode.out.weight.dtype

    @property
    def adaptive(self) -> bool:
        """Whether the layers decide how far they look ahead."""
        return self.config.encoder.adaptive

    @property
    def lookaheads_ms(self) -> tuple[int, ...]:
        """The look-aheads that the model was trained on, ascending; an adaptive one's are caps among others."""
        return tuple(sorted(frames * FRAME_MS for frames in self.config.encoder.lookahead_frames))

    def lookahead_frames(self, max_lookahead_ms: int | None) -> int:
        """The largest possible look-ahead not above ``max_lookahead_ms``; None asks for the largest of all.

        It is one of those that the model was trained on, or, if its layers are adaptive, any number of frames.

        Raises:
            DragomanError: ``unsupported_lookahead`` if every trained look-ahead is above it.
        """
        if self.adaptive and max_lookahead_ms is not None and max_lookahead_ms >= 0:
            return min(max_lookahead_ms, self.lookaheads_ms[-1]) // FRAME_MS
        fitting = [ms for ms in self.lookaheads_ms if max_lookahead_ms is None or ms <= max_lookahead_ms]
        if not fitting:
            raise DragomanError(
                "unsupported_lookahead",
                f"max_lookahead_ms is {max_lookahead_ms}, the smallest look-ahead of model {self.name!r} is"
                f" {0 if self.adaptive else self.lookaheads_ms[0]} ms; ask for at least that",
            )
        return fitting[-1] // FRAME_MS

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        weights: dict[str, Tensor],
        tokenizer: bytes,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Builds a recogniser from tensors under the published names."""
        net = RecognizerNet(config)
        net.load_checkpoint(weights)
        return cls(net.to(device=device, dtype=dtype), tokenizer)
