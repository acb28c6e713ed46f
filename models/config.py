"""What a model is: frozen dataclasses that mirror the ``config.json`` of a model folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from streaming.errors import DragomanError

#: Mel frames that become one encoder frame; the sub-sampling is three convolutions of stride 2.
SUBSAMPLING_FACTOR = 8
HOP_SAMPLES = 160
#: Audio that one encoder frame stands for.
FRAME_SAMPLES = SUBSAMPLING_FACTOR * HOP_SAMPLES
FRAME_MS = 80

_Section = TypeVar("_Section")


@dataclass(frozen=True)
class FeatureConfig:
    """The log-mel front end.

    Attributes:
        sample_rate_hz: Rate of the audio that the features are made from; only 16,000 is trained.
        mel_bins: Mel filters, 80 or 128 in the published family.
    """

    sample_rate_hz: int = 16000
    mel_bins: int = 80

    def __post_init__(self) -> None:
        if self.sample_rate_hz != 16000:
            raise DragomanError(
                "unsupported_model",
                f"the front end works at 16000 Hz, the model asks for {self.sample_rate_hz} Hz",
            )


@dataclass(frozen=True)
class EncoderConfig:
    """A cache-aware FastConformer.

    Attributes:
        n_layers: Conformer layers.
        d_model: Width; a multiple of ``n_heads``.
        n_heads: Attention heads.
        ff_expansion_factor: Feed-forward width over ``d_model``.
        subsampling_conv_channels: Channels of the sub-sampling convolutions.
        conv_kernel_size: Kernel of the causal depthwise convolution, frames.
        use_bias: Whether linear and convolution layers inside the Conformer layers have biases.
        xscaling: Whether the sub-sampled input is multiplied by ``sqrt(d_model)``.
        left_context_frames: Past frames that attention sees.
        lookahead_frames: Look-aheads that the model was trained on; the first is its default. With gates they are
            caps on the reach (see :mod:`models.lookahead`), and every value up to the largest is allowed.
        gate_frames: Next frames that each layer's gates choose from; 0 for a model that looks ahead in chunks.
        gate_hidden: Hidden width of the networks that set the gates.
    """

    n_layers: int
    d_model: int
    n_heads: int
    ff_expansion_factor: int = 4
    subsampling_conv_channels: int = 256
    conv_kernel_size: int = 9
    use_bias: bool = True
    xscaling: bool = True
    left_context_frames: int = 70
    lookahead_frames: tuple[int, ...] = (13, 6, 1, 0)
    gate_frames: int = 0
    gate_hidden: int = 64

    @property
    def adaptive(self) -> bool:
        """Whether the layers decide how far they look ahead."""
        return self.gate_frames > 0

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads:
            raise DragomanError(
                "unsupported_model", f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}"
            )
        for lookahead in self.lookahead_frames:
            if self.adaptive and 0 <= lookahead <= self.gate_frames * self.n_layers:
                continue
            if self.adaptive:
                raise DragomanError(
                    "unsupported_model",
                    f"{self.n_layers} layers of {self.gate_frames} gates reach {self.gate_frames * self.n_layers}"
                    f" frames ahead, not {lookahead}; choose caps within that",
                )
            if lookahead < 0 or self.left_context_frames % (lookahead + 1):
                raise DragomanError(
                    "unsupported_model",
                    f"a chunk of {lookahead} + 1 frames does not divide the left context of "
                    f"{self.left_context_frames} frames; choose a left context that every chunk size divides",
                )
        if not self.lookahead_frames:
            raise DragomanError("unsupported_model", "lookahead_frames is empty; name at least one look-ahead")


@dataclass(frozen=True)
class DecoderConfig:
    """The transducer's predictor and joint.

    Attributes:
        vocab_size: Pieces, without the blank; the blank's id is ``vocab_size``.
        pred_hidden: Width of the predictor's embedding and LSTM.
        pred_layers: LSTM layers.
        joint_hidden: Width of the joint.
        max_symbols_per_frame: Cap on the pieces that greedy search emits at one encoder frame.
    """

    vocab_size: int
    pred_hidden: int = 640
    pred_layers: int = 1
    joint_hidden: int = 640
    max_symbols_per_frame: int = 10


@dataclass(frozen=True)
class ModelConfig:
    """One recogniser.

    Attributes:
        vocab_size: Pieces of the tokenizer, without the blank.
        decoder: The transducer, or None for a pure CTC model.
        ctc: Whether there is a CTC head.
        name: What the model calls itself in events and logs.
        source: Where the weights came from (archive name, repository and revision), for the record.
    """

    features: FeatureConfig
    encoder: EncoderConfig
    vocab_size: int
    decoder: DecoderConfig | None = None
    ctc: bool = True
    name: str = "unnamed"
    source: str = ""

    def __post_init__(self) -> None:
        if self.decoder is None and not self.ctc:
            raise DragomanError("unsupported_model", "the model has neither a transducer nor a CTC head")
        if self.decoder is not None and self.decoder.vocab_size != self.vocab_size:
            raise DragomanError(
                "unsupported_model",
                f"the transducer has {self.decoder.vocab_size} pieces, the model {self.vocab_size}",
            )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that :meth:`from_dict` reads back."""
        return {"model_type": "dragoman-asr", **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Reads a ``config.json`` object.

        Raises:
            DragomanError: ``unsupported_model`` for an unknown ``model_type``, a missing or an unknown key.
        """
        fields = dict(data)
        kind = fields.pop("model_type", None)
        if kind != "dragoman-asr":
            raise DragomanError("unsupported_model", f"model_type is {kind!r}; this engine reads 'dragoman-asr'")
        encoder = dict(fields.pop("encoder", {}))
        encoder["lookahead_frames"] = tuple(encoder.get("lookahead_frames", ()))
        decoder = fields.pop("decoder", None)
        fields["features"] = _section(FeatureConfig, fields.get("features", {}), "features")
        fields["encoder"] = _section(EncoderConfig, encoder, "encoder")
        fields["decoder"] = None if decoder is None else _section(DecoderConfig, decoder, "decoder")
        return _section(cls, fields, "the model")


def _section(cls: type[_Section], data: Mapping[str, Any], where: str) -> _Section:
    """Builds a dataclass from a mapping and names what is unknown or missing."""
    try:
        return cls(**data)
    except TypeError as error:
        known = ", ".join(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
        raise DragomanError("unsupported_model", f"config of {where}: {error}; known keys are {known}") from error
