"""What a decoder-only language model is: our own ``config.json``, and those of the Llama, Qwen and Gemma families.

The families differ in a handful of switches on one architecture, so that they are fields of one dataclass and the
arithmetic in :mod:`models.llm` asks for the switch and never for the family.

Sources: Touvron et al., "LLaMA" (arXiv 2302.13971); Jiang et al., "Mistral 7B" (arXiv 2310.06825); "Qwen2 Technical
Report" (arXiv 2407.10671); "Qwen3 Technical Report" (arXiv 2505.09388); "Gemma" (arXiv 2403.08295), "Gemma 2" (arXiv
2408.00118) and "Gemma 3" (arXiv 2503.19786). What their config files leave out is what Transformers fills in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streaming.errors import DragomanError

OWN_TYPE = "dragoman-llm"
ROPE_KINDS = ("default", "linear", "llama3")
ACTIVATIONS = ("silu", "gelu_tanh")

#: What Transformers takes for a key that the file lacks; other keys have to be there or follow from others.
_QWEN: dict[str, Any] = {"sliding_window": 4096, "max_window_layers": 28}
_GEMMA: dict[str, Any] = {"head_dim": 256, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
_GEMMA2: dict[str, Any] = {**_GEMMA, "num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 256}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {**_QWEN, "attention_bias": True},
    "qwen3": {**_QWEN, "head_dim": 128},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA2, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    # The published multimodal configs keep only what differs from these.
    "gemma3_text": {
        **_GEMMA2,
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
}
_ACTIVATION_NAMES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (Su et al., "RoFormer", arXiv 2104.09864).

    Attributes:
        theta: Base of the wavelengths.
        kind: ``default``; ``linear``, every wavelength stretched by ``factor``; or ``llama3``, which stretches only
            the long ones ("The Llama 3 Herd of Models", arXiv 2407.21783, and its code).
        factor: How many times longer the wavelengths are made; 1 or more.
        low_freq_factor: ``llama3``: wavelengths above ``original_max_positions / low_freq_factor`` tokens are
            stretched in full.
        high_freq_factor: ``llama3``: wavelengths below ``original_max_positions / high_freq_factor`` tokens stay.
        original_max_positions: ``llama3``: the context, in tokens, before the stretching.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise _unsupported(f"rope type {self.kind!r} is not supported: this engine has {', '.join(ROPE_KINDS)}")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise _unsupported(
                f"rope's high_freq_factor {self.high_freq_factor} has to be above its low_freq_factor"
                f" {self.low_freq_factor}"
            )

    def frequencies(self, head_dim: int) -> Tensor:
        """Radians per token of each pair of dimensions, ``float32[head_dim / 2]``, on the host."""
        frequency = 1.0 / self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        if self.kind == "llama3":
            periods = self.original_max_positions * frequency / (2 * math.pi)  # in the original context
            kept = (periods - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            kept = kept.clamp(0.0, 1.0)
            return frequency * (kept + (1.0 - kept) / self.factor)
        return frequency / self.factor


@dataclass(frozen=True)
class LlmConfig:
    """One decoder-only language model.

    Attributes:
        vocab_size: Token ids are ``0 … vocab_size - 1``.
        d_model: Width.
        d_ff: Width of the gated feed-forward (Shazeer, "GLU Variants", arXiv 2002.05202).
        n_layers: Layers.
        n_heads: Query heads; a multiple of ``n_kv_heads``.
        n_kv_heads: Key and value heads, each shared by ``n_heads / n_kv_heads`` query heads (Ainslie et al.,
            "GQA", arXiv 2305.13245).
        head_dim: Width of a head; even. ``n_heads * head_dim`` need not be ``d_model``.
        max_positions: Context that the model was trained for, tokens; nothing enforces it.
        norm_eps: Epsilon of the norms (Zhang and Sennrich, "RMSNorm", arXiv 1910.07467).
        rope: Rotary positions.
        local_rope: Those of the layers with a window; None for the same ones.
        windows: Tokens that each layer sees, the current one included; 0 for all. Empty: 0 in every layer.
        activation: Of the feed-forward's gate, ``silu`` or ``gelu_tanh``.
        tied: Whether the embedding is also the output matrix.
        qkv_bias: Whether queries, keys and values have biases.
        out_bias: Whether attention's output has one.
        qk_norm: Whether each head's queries and keys are normed before they are rotated.
        norm_plus_one: Whether norms multiply by ``1 + w`` instead of ``w``.
        post_norms: Whether attention's and the feed-forward's outputs are normed before they are added.
        embedding_scale: Embeddings are multiplied by it.
        query_scale: Attention's scores are multiplied by it; None for ``head_dim ** -0.5``.
        attention_softcap: Scores ``s`` become ``c * tanh(s / c)``; None for no cap.
        logit_softcap: The same for the logits.
        name: What the model calls itself in events and logs.
        source: Where the weights came from, for the record.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_positions: int = 4096
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    local_rope: RopeConfig | None = None
    windows: tuple[int, ...] = ()
    activation: str = "silu"
    tied: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    norm_plus_one: bool = False
    post_norms: bool = False
    embedding_scale: float = 1.0
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    name: str = "unnamed"
    source: str = ""

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise _unsupported(f"{self.n_heads} heads are not a multiple of {self.n_kv_heads} key and value heads")
        if self.head_dim % 2:
            raise _unsupported(f"rotary positions turn pairs of dimensions, head_dim is {self.head_dim}; make it even")
        if len(self.windows) not in (0, self.n_layers):
            raise _unsupported(f"{len(self.windows)} windows are given for {self.n_layers} layers; give one for each")
        if any(window < 0 for window in self.windows):
            raise _unsupported(f"a window of {min(self.windows)} tokens is not possible; use 0 for no window")
        if self.activation not in ACTIVATIONS:
            raise _unsupported(
                f"the activation {self.activation!r} is not supported: this engine has {' and '.join(ACTIVATIONS)}"
            )

    def window(self, layer: int) -> int:
        """Tokens that a layer sees, the current one included; 0 for all."""
        return self.windows[layer] if self.windows else 0

    def layer_rope(self, layer: int) -> RopeConfig:
        """The rotary positions of a layer."""
        return self.local_rope if self.local_rope is not None and self.window(layer) else self.rope

    def to_dict(self) -> dict[str, Any]:
        """The ``config.json`` object of our own family, which :meth:`from_hf` reads back."""
        return {"model_type": OWN_TYPE, **dataclasses.asdict(self)}

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> LlmConfig:
        """Reads the object of a ``config.json``, as Transformers 5 or 4 wrote it, or our own.

        Raises:
            DragomanError: ``unsupported_model`` for an unknown ``model_type``, for a feature that this engine does
                not have, and for a missing key; in our own configs also for an unknown one.
        """
        kind = data.get("model_type")
        if kind == OWN_TYPE:
            return _own(data)
        if kind == "gemma3":  # with images; the text model is inside
            return cls.from_hf({"model_type": "gemma3_text", **data.get("text_config", {})})
        if kind not in _DEFAULTS:
            known = ", ".join((*_DEFAULTS, "gemma3", OWN_TYPE))
            raise _unsupported(f"model_type is {kind!r}; this engine reads {known}")
        return _foreign(kind, {**_DEFAULTS[kind], **data})


def _unsupported(sentence: str) -> DragomanError:
    return DragomanError("unsupported_model", sentence)


def _own(data: Mapping[str, Any]) -> LlmConfig:
    # What a model of the family was trained for stands in objects of its own beside the shape.
    fields = {key: value for key, value in data.items() if key not in ("model_type", "translation")}
    try:
        for key in ("rope", "local_rope"):
            if fields.get(key) is not None:
                fields[key] = RopeConfig(**fields[key])
        return LlmConfig(**{**fields, "windows": tuple(fields.get("windows", ()))})
    except TypeError as error:
        known = ", ".join(field.name for field in dataclasses.fields(LlmConfig))
        raise _unsupported(f"config of the language model: {error}; known keys are {known}") from error


def _foreign(kind: str, c: Mapping[str, Any]) -> LlmConfig:
    """A config of Transformers, with its family's defaults filled in."""
    _refuse_what_is_missing_here(c)
    gemma, sandwich = kind.startswith("gemma"), kind in ("gemma2", "gemma3_text")
    try:
        heads, width = c["num_attention_heads"], c["hidden_size"]
        rope, local_rope = _ropes(kind, c)
        bias = bool(c.get("attention_bias"))
        return LlmConfig(
            vocab_size=c["vocab_size"],
            d_model=width,
            d_ff=c["intermediate_size"],
            n_layers=c["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=c.get("num_key_value_heads") or heads,
            head_dim=c.get("head_dim") or width // heads,
            max_positions=c.get("max_position_embeddings") or 4096,
            norm_eps=c.get("rms_norm_eps", 1e-6),
            rope=rope,
            local_rope=local_rope,
            windows=_windows(kind, c),
            activation=_activation(kind, c),
            tied=c.get("tie_word_embeddings", False),
            qkv_bias=bias,
            out_bias=bias and kind != "qwen2",
            qk_norm=kind in ("qwen3", "gemma3_text"),
            norm_plus_one=gemma,
            post_norms=sandwich,
            embedding_scale=width**0.5 if gemma else 1.0,
            query_scale=c["query_pre_attn_scalar"] ** -0.5 if sandwich else None,
            attention_softcap=c.get("attn_logit_softcapping") if kind == "gemma2" else None,
            logit_softcap=c.get("final_logit_softcapping") if sandwich else None,
            name=kind,
        )
    except KeyError as error:
        raise _unsupported(f"the config of a {kind} model has no {error.args[0]!r}; it is needed") from error


def _refuse_what_is_missing_here(c: Mapping[str, Any]) -> None:
    refused = {
        "mlp_bias": "biases in the feed-forward are",
        "use_bidirectional_attention": "attention to the future is",
        "quantization_config": "quantised weights are",
    }
    for key, what in refused.items():
        if c.get(key):
            raise _unsupported(f"{what} not supported ({key} is set); use a causal model with plain weights")


def _activation(kind: str, c: Mapping[str, Any]) -> str:
    if kind == "gemma":  # files that say "gelu" mean its approximation by tanh, as the authors have said
        return "gelu_tanh"
    name = c.get("hidden_activation") or c.get("hidden_act", "silu")
    if name not in _ACTIVATION_NAMES:
        raise _unsupported(f"the activation {name!r} is not supported: this engine has {', '.join(_ACTIVATION_NAMES)}")
    return _ACTIVATION_NAMES[name]


def _windows(kind: str, c: Mapping[str, Any]) -> tuple[int, ...]:
    """Each layer's window, from the list of the layers' types or from the older rules that it has replaced."""
    window, layers = c.get("sliding_window") or 0, range(c["num_hidden_layers"])
    types = c.get("layer_types")
    if kind.startswith("qwen") and not c.get("use_sliding_window"):
        window = 0
    if kind == "mistral":
        sliding = [True for _ in layers]
    elif types is not None:
        sliding = [_is_sliding(t) for t in types]
    elif kind.startswith("qwen"):
        sliding = [i >= c["max_window_layers"] for i in layers]
    elif kind == "gemma2":
        sliding = [i % 2 == 0 for i in layers]
    elif kind == "gemma3_text":
        sliding = [(i + 1) % c["sliding_window_pattern"] != 0 for i in layers]
    else:
        return ()
    return tuple(window if s else 0 for s in sliding) if window else ()


def _is_sliding(layer_type: str) -> bool:
    if layer_type not in ("sliding_attention", "full_attention"):
        raise _unsupported(
            f"the layer type {layer_type!r} is not supported: this engine has full_attention and sliding_attention"
        )
    return layer_type == "sliding_attention"


def _ropes(kind: str, c: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotary positions of all layers, and those of the layers with a window where they differ.

    Transformers 5 writes ``rope_parameters``, for Gemma 3 one object for each type of layer; before it were
    ``rope_theta``, ``rope_scaling`` and ``rope_local_base_freq``.
    """
    theta = c.get("rope_theta") or 10000.0
    new = c.get("rope_parameters") or {}
    if "full_attention" in new or "sliding_attention" in new:
        full, sliding = new.get("full_attention") or {}, new.get("sliding_attention") or {}
    else:
        full, sliding = {**new, **(c.get("rope_scaling") or {})}, {}
    if kind != "gemma3_text":
        return _rope(full, theta), None
    return _rope(full, theta), _rope(sliding, c.get("rope_local_base_freq", 10000.0))


def _rope(c: Mapping[str, Any], theta: float) -> RopeConfig:
    kind = c.get("rope_type") or c.get("type") or "default"
    if c.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unsupported(f"only whole heads can be rotated, partial_rotary_factor is {c['partial_rotary_factor']}")
    theta = c.get("rope_theta", theta)
    if kind == "linear":
        return RopeConfig(theta, kind, c["factor"])
    if kind == "llama3":
        before = c["original_max_position_embeddings"]
        return RopeConfig(theta, kind, c["factor"], c["low_freq_factor"], c["high_freq_factor"], before)
    return RopeConfig(theta, kind)
