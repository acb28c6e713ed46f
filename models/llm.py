"""Decoder-only language models: logits as a function of (new tokens, cache).

One step takes any number of new tokens of each row, so that a prompt, the next source words, one generated token and a
tree of drafts are all the same call, and the rows of a batch may bring different numbers of them. What the families
that :mod:`models.llm_config` reads have in common is written out here; names of parameters are Transformers'.

Three things make ragged rows simple. New tokens stand first and padding last, so that a causal mask hides the padding
from every real token. What a step writes beyond a row's real tokens is overwritten by the next step. And a key is
rotated once, by its absolute position, so that slots of the cache may be dropped without touching the others.

Sources: Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762); the parts' are in :mod:`models.llm_config`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.folder import (
    CONFIG,
    WEIGHTS,
    dtype_of,
    read_object,
    read_tensors,
    require_device,
    require_fit,
    required_file,
    write_model,
)
from models.kv_cache import KvCache
from models.linear import Linear
from models.llm_config import LlmConfig, RopeConfig
from streaming.errors import DragomanError

INDEX = "model.safetensors.index.json"
_CONTENTS = (
    f"a language model's folder holds {CONFIG} and {WEIGHTS}, whole or in shards with {INDEX} (pickled weights are not"
    " read)"
)
#: Spread of a new model's matrices.
INITIAL_STD = 0.02


class LayerWeights(NamedTuple):
    """One layer's weights in the shape the step uses them, read from the modules below; norms are float32."""

    before_attention: Tensor  # [d_model]
    after_attention: Tensor | None
    before_ff: Tensor
    after_ff: Tensor | None
    qkv: Linear
    qk_norm: Tensor | None  # [n_heads + n_kv_heads, head_dim]
    out: Linear
    gate_up: Linear
    down: Linear
    window: int
    rope: RopeConfig


class StepShape(NamedTuple):
    """Where the new tokens of one step stand and what they see: made once, for all layers."""

    rotations: dict[RopeConfig, tuple[Tensor, Tensor]]  # cosines and sines, float32[B, T, 1, head_dim / 2]
    masks: dict[int, Tensor | None]  # bool[B, 1, G * T, keys] of each window; None: plainly causal, or all seen
    keys: int  # slots of the longest row after the step
    start: int  # where the new tokens go, if that is the same slot in all rows
    slots: tuple[Tensor, Tensor] | None  # else rows int64[B, 1] and slots int64[B, T], on the device


class Replayed(Protocol):
    """What may run steps in the place of :meth:`Llm.hidden`; see :mod:`models.graphs`."""

    def hidden(self, tokens: Tensor, cache: KvCache) -> Tensor | None:
        """Reads tokens behind a cache that has room for them; None if it does not run such a step."""


class Llm(nn.Module):
    """The model. Its state dict has the names of Transformers' ``…ForCausalLM``.

    Args:
        config: Its shape.

    Attributes:
        graphs: Runs the steps with a cache that it can run, trees of drafts aside; None for none.
    """

    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Trunk(config)
        self.lm_head = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.graphs: Replayed | None = None
        self._frozen: tuple[list[LayerWeights], Linear] | None = None
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INITIAL_STD)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, the cache and the logits."""
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    def freeze(self) -> Llm:
        """Prepares for inference on the device where the weights are. Returns itself.

        Weights are fused and packed and gradients end. The layers' own matrices are given up, so a frozen model
        cannot be saved or moved. On a CPU a tied embedding is kept twice: as rows to look up and packed.
        """
        self.eval().requires_grad_(False)
        layers = []
        for layer in self._layers():  # one at a time, so that never more than one layer is there twice
            layers.append(layer.weights(frozen=True))
            layer.release()
        self._frozen = layers, Linear(self._output_matrix(), None, frozen=True)
        if self.lm_head is not None:
            _release(self.lm_head)
        return self

    def without(self, layers: Collection[int]) -> Llm:
        """A frozen model that shares this one's weights and leaves some of its layers out; this one must be frozen.

        Args:
            layers: Their indices.

        Raises:
            ValueError: There is no such layer, or none is left.
        """
        assert self._frozen is not None, "only a frozen model has a view"
        c = self.config
        kept = [i for i in range(c.n_layers) if i not in layers]
        if not kept or not set(layers) <= set(range(c.n_layers)):
            raise ValueError(f"layers {sorted(layers)} cannot be left out of a model of {c.n_layers}")
        windows = tuple(c.windows[i] for i in kept) if c.windows else ()
        with torch.device("meta"):
            view = Llm(replace(c, n_layers=len(kept), windows=windows))
        view.eval().requires_grad_(False)
        view.lm_head, view.model.layers = None, nn.ModuleList()
        view.model.embed_tokens, view.model.norm = self.model.embed_tokens, self.model.norm
        weights, head = self._frozen
        view._frozen = [weights[i] for i in kept], head
        return view

    def init_state(self, batch: int, *, capacity: int = 256) -> KvCache:
        """The cache of ``batch`` empty sequences, with memory for ``capacity`` tokens each; it grows when needed."""
        c = self.config
        return KvCache(
            memory=torch.zeros(
                (c.n_layers, 2, batch, c.n_kv_heads, capacity, c.head_dim), dtype=self.dtype, device=self.device
            ),
            positions=torch.zeros(batch, capacity, dtype=torch.int64),
            lengths=torch.zeros(batch, dtype=torch.int64),
            next_positions=torch.zeros(batch, dtype=torch.int64),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, T, vocab_size]`` of whole sequences ``int64[B, T]``: what training asks for."""
        B, T = tokens.shape
        logits, _ = self.step(tokens, torch.full((B,), T), None, logits_at=None)
        return logits

    def step(
        self,
        tokens: Tensor,
        counts: Tensor,
        cache: KvCache | None,
        *,
        logits_at: int | None = 1,
        positions: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> tuple[Tensor, KvCache | None]:
        """Reads the next tokens of each row and says what may follow them.

        Args:
            tokens: ``int64[B, T]``; those beyond a row's count may hold anything.
            counts: ``int64[B]`` on the host: new tokens of each row, ``0 … T``. A row with 0 stays as it is, and
                its logits mean nothing.
            cache: The past of the rows, or None for whole sequences of which nothing is kept. See its ownership rule;
                with a cache nothing is differentiated.
            logits_at: For how many of each row's last tokens; None for all positions.
            positions: ``int64[B, T]`` on the host: where the new tokens stand; None for one after another.
            visible: ``bool[B, T, T]`` on the host: whether new token ``[b, i]`` sees new token ``[b, j]``; None for
                those before it. All see the past, and each sees itself. With both, a tree of drafts is read in one
                step; :meth:`KvCache.accept` keeps one of its branches.

        Returns:
            Logits in the weights' dtype, ``[B, T, vocab_size]`` for all positions (rows mean something up to their
            counts), else ``[B, logits_at, vocab_size]``, where the last belong to each row's last new token (and a
            row with fewer new tokens means nothing in the first ones). And the cache after the step.
        """
        hidden, after = self.hidden(tokens, counts, cache, positions=positions, visible=visible)
        if logits_at is not None:
            index = (counts[:, None] - logits_at + torch.arange(logits_at)).clamp(min=0)
            hidden = hidden[torch.arange(len(counts))[:, None], index]
        return self.logits(hidden), after

    def hidden(
        self,
        tokens: Tensor,
        counts: Tensor,
        cache: KvCache | None,
        *,
        positions: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> tuple[Tensor, KvCache | None]:
        """:meth:`step` up to the last norm: ``[B, T, d_model]``, what :meth:`logits` reads, and the cache."""
        T = tokens.shape[1]
        padded = torch.arange(T) >= counts[:, None]
        if bool(padded.any()):
            tokens = tokens.masked_fill(padded.to(tokens.device), 0)
        tokens = tokens.to(self.device)
        if cache is None:
            none = torch.zeros_like(counts)
            shape = self._shape(none, _positions(none, T, positions), None, padded, visible)
            return self.run(tokens, None, shape), None
        cache, is_tree = cache.with_room(T), positions is not None or visible is not None
        positions = _positions(cache.next_positions, T, positions)
        slots = cache.lengths[:, None] + torch.arange(T)
        cache.positions[torch.arange(len(counts))[:, None], slots] = positions
        x = None if self.graphs is None or is_tree else self.graphs.hidden(tokens, cache)
        if x is None:
            shape = self._shape(cache.lengths, positions, cache.positions, padded, visible)
            with torch.no_grad():
                x = self.run(tokens, cache.memory, shape)
        newest = positions.masked_fill(padded, -1).amax(1) + 1
        next_positions = torch.where(counts > 0, newest, cache.next_positions)
        return x, KvCache(cache.memory, cache.positions, cache.lengths + counts, next_positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[…, d_model]`` to ``[…, vocab_size]``."""
        *lead, width = hidden.shape
        y = self._head(hidden.reshape(-1, width)).view(*lead, self.config.vocab_size)
        cap = self.config.logit_softcap
        return y if cap is None else cap * torch.tanh(y / cap)

    def output_rows(self, tokens: Tensor) -> Tensor:
        """The rows of the output matrix that belong to some tokens, ``[len(tokens), d_model]``, without gradient."""
        tied = self.lm_head is None  # else a frozen model has given its own matrix up
        matrix = self._output_matrix() if tied or self._frozen is None else self._frozen[1].weight
        return matrix.detach()[tokens.to(self.device)]

    # ------------------------------------------------------------------------------------------- shape of a step

    def _shape(
        self, past: Tensor, positions: Tensor, key_positions: Tensor | None, padded: Tensor, visible: Tensor | None
    ) -> StepShape:
        """Rotations, masks and slots of new tokens that stand at ``positions`` behind ``past`` others."""
        c, (B, T) = self.config, positions.shape
        keys = int(past.max()) + T
        uniform = bool((past == past[0]).all())
        key_positions = positions if key_positions is None else key_positions[:, :keys]
        rotations = {}
        for rope in {c.layer_rope(i) for i in range(c.n_layers)}:
            angle = (positions.float()[:, :, None] * rope.frequencies(c.head_dim))[:, :, None].to(self.device)
            rotations[rope] = (angle.cos(), angle.sin())
        # Where nothing needs to be hidden, or only the future of whole sequences, attention is faster without a mask.
        unmasked = visible is None and uniform and (T == 1 or (keys == T and c.attention_softcap is None))
        masks: dict[int, Tensor | None] = {}
        for window in {c.window(i) for i in range(c.n_layers)}:
            if (hides := 0 < window <= int(positions.max())) or not unmasked:
                see = _visible(past, keys, padded, visible)
                near = positions[:, :, None] - key_positions[:, None, :] < window
                masks[window] = self.folded(see & near if hides else see)
            else:
                masks[window] = None
        slots = None
        if not uniform:
            slots = (
                torch.arange(B, device=self.device)[:, None],
                (past[:, None] + torch.arange(T)).to(self.device),
            )
        return StepShape(rotations, masks, keys, int(past[0]), slots)

    def folded(self, see: Tensor) -> Tensor:
        """``bool[B, T, keys]`` repeated for the query heads of a group, which attend as if they were more tokens."""
        B, T, K = see.shape
        group = self.config.n_heads // self.config.n_kv_heads
        return see[:, None].expand(B, group, T, K).reshape(B, 1, group * T, K).to(self.device)

    # ------------------------------------------------------------------------------------------------ the layers

    def run(self, tokens: Tensor, memory: Tensor | None, shape: StepShape) -> Tensor:
        """Embedding, layers and last norm; the new keys and values are written to the memory."""
        layers = self._frozen[0] if self._frozen else [layer.weights(frozen=False) for layer in self._layers()]
        B, T = tokens.shape
        x = self.model.embed_tokens(tokens).view(B * T, -1)
        if self.config.embedding_scale != 1.0:
            x = x * _rounded(self.config.embedding_scale, x.dtype)
        for i, w in enumerate(layers):
            x = self._layer(x.view(B * T, -1), w, None if memory is None else memory[i], shape, B)
        return self._norm(x, self.model.norm.scale()).view(B, T, -1)

    def _layer(self, x: Tensor, w: LayerWeights, memory: Tensor | None, shape: StepShape, B: int) -> Tensor:
        """One layer; ``x`` is the list of all rows' tokens, ``[B * T, d_model]``."""
        query, keys, values = self._heads(w.qkv(self._norm(x, w.before_attention)), w, shape, B)
        if memory is not None:
            keys, values = _appended(memory, keys, values, shape)
        mixed = self._attend(query, keys, values, shape.masks[w.window])
        x = self._added(x, w.out, mixed, w.after_attention)
        gate, up = w.gate_up(self._norm(x, w.before_ff)).chunk(2, -1)
        gate = F.silu(gate) if self.config.activation == "silu" else F.gelu(gate, approximate="tanh")
        return self._added(x, w.down, gate * up, w.after_ff)

    def _heads(self, qkv: Tensor, w: LayerWeights, shape: StepShape, B: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and rotated queries and keys, and values: ``[B, heads, T, head_dim]``."""
        c = self.config
        heads = qkv.view(B, -1, c.n_heads + 2 * c.n_kv_heads, c.head_dim)
        turned, values = heads[:, :, : -c.n_kv_heads], heads[:, :, -c.n_kv_heads :]
        if w.qk_norm is not None:
            turned = self._norm(turned, w.qk_norm)
        cos, sin = shape.rotations[w.rope]
        first, second = turned.chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(qkv.dtype)
        query, keys = turned[:, :, : c.n_heads], turned[:, :, c.n_heads :]
        return query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, n_heads, T, head_dim]`` queries over ``[B, n_kv_heads, keys, head_dim]``, to ``[B * T, …]``."""
        c, (B, H, T, D) = self.config, query.shape
        scale = D**-0.5 if c.query_scale is None else c.query_scale
        if mask is None and T > 1:
            if query.requires_grad and query.device.type == "cpu":
                mixed = _causal_attention(query, keys, values, scale)
            else:
                mixed = F.scaled_dot_product_attention(
                    query, keys, values, is_causal=True, scale=scale, enable_gqa=True
                )
        else:
            # A group's queries stand as further tokens of their one key head, so that no key is read twice.
            folded = query.reshape(B, c.n_kv_heads, -1, D)
            if c.attention_softcap is None:
                mixed = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
            else:
                mixed = _capped_attention(folded, keys, values, mask, scale, c.attention_softcap)
        return mixed.reshape(B, H, T, D).transpose(1, 2).reshape(B * T, H * D)

    def _added(self, x: Tensor, linear: Linear, y: Tensor, norm: Tensor | None) -> Tensor:
        return linear.add_to(x, y) if norm is None else x + self._norm(linear(y), norm)

    def _norm(self, x: Tensor, scale: Tensor) -> Tensor:
        """Root-mean-square norm of the last dimension, computed in float32."""
        return (F.rms_norm(x.float(), x.shape[-1:], eps=self.config.norm_eps) * scale).to(x.dtype)

    # ----------------------------------------------------------------------------------------------- the weights

    def load_checkpoint(self, tensors: dict[str, Tensor]) -> None:
        """Takes over tensors with the published names; they become the parameters as they are.

        Raises:
            DragomanError: ``bad_checkpoint`` naming the tensors that are missing, unknown or of another shape.
        """
        require_fit(_parameters(self.config), tensors)
        self.load_state_dict(tensors, assign=True)

    def _layers(self) -> Iterator[_Layer]:
        for layer in self.model.layers:
            assert isinstance(layer, _Layer)
            yield layer

    def _head(self, x: Tensor) -> Tensor:
        return self._frozen[1](x) if self._frozen else F.linear(x, self._output_matrix())

    def _output_matrix(self) -> Tensor:
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight


@functools.cache
def _rounded(scale: float, dtype: torch.dtype) -> float:
    """A scale in the weights' precision, as Gemma was trained."""
    return torch.tensor(scale, dtype=dtype).item()


def _positions(first: Tensor, T: int, positions: Tensor | None) -> Tensor:
    return first[:, None] + torch.arange(T) if positions is None else positions


def _visible(past: Tensor, keys: int, padded: Tensor, visible: Tensor | None) -> Tensor:
    """``bool[B, T, keys]``: which slot each new token sees, windows aside."""
    T = padded.shape[1]
    new = torch.arange(keys) - past[:, None, None]  # the slot's index among the new tokens, negative in the past
    if visible is None:
        return new <= torch.arange(T)[:, None]
    # Padding sees itself too: attention over nothing at all would be NaN.
    visible = (visible & ~padded[:, None]) | torch.eye(T, dtype=torch.bool)
    among_new = visible.gather(2, new.clamp(0, T - 1).expand(-1, T, -1))
    return (new < 0) | ((new < T) & among_new)


def _appended(memory: Tensor, keys: Tensor, values: Tensor, shape: StepShape) -> tuple[Tensor, Tensor]:
    """Writes ``[B, H_kv, T, D_h]`` into one layer's memory; returns all that the longest row now holds."""
    if shape.slots is None:
        end = shape.start + keys.shape[2]
        memory[0, :, :, shape.start : end], memory[1, :, :, shape.start : end] = keys, values
    else:
        rows, slots = shape.slots
        memory[0][rows, :, slots], memory[1][rows, :, slots] = keys.transpose(1, 2), values.transpose(1, 2)
    return memory[0, :, :, : shape.keys], memory[1, :, :, : shape.keys]


def _causal_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """What PyTorch's fused attention computes; its gradient takes a CPU several times as long for short sequences."""
    B, H, T, D = query.shape
    folded = query.reshape(B, keys.shape[1], -1, D) * scale
    scores = (folded @ keys.transpose(2, 3)).view(B, H, T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=query.device).triu(1)
    weights = torch.softmax(scores.masked_fill(future, -torch.inf), -1).to(values.dtype)
    return (weights.view(B, keys.shape[1], -1, T) @ values).view(B, H, T, D)


def _capped_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, cap: float
) -> Tensor:
    """Attention whose scores ``s`` become ``cap * tanh(s / cap)`` (Gemma 2, §2)."""
    scores = (query @ keys.transpose(2, 3)).float() * (scale / cap)
    scores = cap * torch.tanh(scores)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1).to(values.dtype) @ values


class _RmsNorm(nn.Module):
    """Holds a norm's parameter; a new one multiplies by 1."""

    def __init__(self, width: int, *, plus_one: bool) -> None:
        super().__init__()
        self.plus_one = plus_one
        self.weight = nn.Parameter(torch.zeros(width) if plus_one else torch.ones(width))

    def scale(self) -> Tensor:
        """What the norm multiplies by, ``float32[width]``."""
        return self.weight.float() + 1.0 if self.plus_one else self.weight.float()


class _Trunk(nn.Module):
    def __init__(self, c: LlmConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.d_model)
        self.layers = nn.ModuleList(_Layer(c, i) for i in range(c.n_layers))
        self.norm = _RmsNorm(c.d_model, plus_one=c.norm_plus_one)


class _Layer(nn.Module):
    """Holds one layer's parameters under Transformers' names; the arithmetic is in :class:`Llm`."""

    def __init__(self, c: LlmConfig, index: int) -> None:
        super().__init__()
        self.window, self.rope = c.window(index), c.layer_rope(index)
        self.self_attn = _Attention(c)
        self.mlp = _FeedForward(c)
        self.input_layernorm = _RmsNorm(c.d_model, plus_one=c.norm_plus_one)
        self.post_attention_layernorm = _RmsNorm(c.d_model, plus_one=c.norm_plus_one)
        self.sandwich = c.post_norms
        if c.post_norms:
            self.pre_feedforward_layernorm = _RmsNorm(c.d_model, plus_one=c.norm_plus_one)
            self.post_feedforward_layernorm = _RmsNorm(c.d_model, plus_one=c.norm_plus_one)

    def weights(self, *, frozen: bool) -> LayerWeights:
        """The parameters as the step reads them."""
        attention, mlp = self.self_attn, self.mlp
        # Without norms after them, the name "after attention" means before the feed-forward.
        second = self.post_attention_layernorm.scale()
        return LayerWeights(
            before_attention=self.input_layernorm.scale(),
            after_attention=second if self.sandwich else None,
            before_ff=self.pre_feedforward_layernorm.scale() if self.sandwich else second,
            after_ff=self.post_feedforward_layernorm.scale() if self.sandwich else None,
            qkv=_fused([attention.q_proj, attention.k_proj, attention.v_proj], frozen=frozen),
            qk_norm=attention.qk_scale(),
            out=Linear(attention.o_proj.weight, attention.o_proj.bias, frozen=frozen),
            gate_up=_fused([mlp.gate_proj, mlp.up_proj], frozen=frozen),
            down=Linear(mlp.down_proj.weight, None, frozen=frozen),
            window=self.window,
            rope=self.rope,
        )

    def release(self) -> None:
        """Gives up the matrices that frozen weights have replaced."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _release(module)


class _Attention(nn.Module):
    def __init__(self, c: LlmConfig) -> None:
        super().__init__()
        self.heads = c.n_heads, c.n_kv_heads
        queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        self.q_proj = nn.Linear(c.d_model, queries, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.d_model, keys, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.d_model, keys, bias=c.qkv_bias)
        self.o_proj = nn.Linear(queries, c.d_model, bias=c.out_bias)
        self.q_norm = _RmsNorm(c.head_dim, plus_one=c.norm_plus_one) if c.qk_norm else None
        self.k_norm = _RmsNorm(c.head_dim, plus_one=c.norm_plus_one) if c.qk_norm else None

    def qk_scale(self) -> Tensor | None:
        """Both norms' factors for each head, so that queries and keys are normed at once."""
        if self.q_norm is None or self.k_norm is None:
            return None
        queries, keys = self.heads
        return torch.cat([self.q_norm.scale().expand(queries, -1), self.k_norm.scale().expand(keys, -1)])


class _FeedForward(nn.Module):
    def __init__(self, c: LlmConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.up_proj = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.down_proj = nn.Linear(c.d_ff, c.d_model, bias=False)


def _fused(linears: list[nn.Linear], *, frozen: bool) -> Linear:
    """One product in the place of several with the same input."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    weight = torch.cat(tuple(linear.weight for linear in linears))
    return Linear(weight, torch.cat(tuple(biases)) if biases else None, frozen=frozen)


def _release(linear: nn.Linear) -> None:
    linear.weight.data = linear.weight.data.new_empty(0)


# ------------------------------------------------------------------------------------------------------- on disk


def load_llm(folder: Path, *, device: str = "cpu", dtype: str = "float32", frozen: bool = True) -> Llm:
    """Reads a model folder in Hugging Face's layout.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors``, or its shards with their index. The families are
            those of :meth:`LlmConfig.from_hf`.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``float32`` or ``bfloat16``, whatever the weights are stored in.
        frozen: Whether the model is prepared for inference; False to train it.

    Raises:
        DragomanError: ``model_not_found``, ``bad_checkpoint`` or ``unsupported_model``, saying which file and why;
            ``unsupported_device`` or ``unsupported_dtype``.
    """
    weights_dtype = dtype_of(dtype)
    require_device(device)
    config = LlmConfig.from_hf(read_object(required_file(folder, CONFIG, _CONTENTS)))
    with torch.device("meta"):
        net = Llm(config)
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        for published, tensor in read_tensors(file).items():
            name = _own_name(published)
            if name is not None and not (config.tied and name == "lm_head.weight"):
                tensors[name] = tensor.to(device, weights_dtype)
    net.load_checkpoint(tensors)
    return net.freeze() if frozen else net


def save_llm(folder: Path, config: LlmConfig, weights: Mapping[str, Tensor]) -> None:
    """Writes the config and the weights of a model of our own family, as :func:`load_llm` reads them.

    Args:
        folder: Made if it is not there.
        config: Shape and name of the model.
        weights: The state dict of a model that is not frozen, in the dtype to be stored.

    Raises:
        DragomanError: ``bad_checkpoint``, if the weights are not those of the config.
    """
    require_fit(_parameters(config), weights)
    write_model(folder, config.to_dict(), weights)


def _parameters(config: LlmConfig) -> dict[str, Tensor]:
    """What the config asks for, without memory for it."""
    with torch.device("meta"):
        return Llm(config).state_dict()


def _own_name(published: str) -> str | None:
    """Our name of a published tensor; None for what the language model does not need.

    That is the parts of a model that also sees (whose language model has a prefix), and constants that old versions
    of Transformers stored.
    """
    name = published.removeprefix("language_model.").replace("model.language_model.", "model.", 1)
    other = ("vision_tower.", "multi_modal_projector.")
    if name.removeprefix("model.").startswith(other) or name.endswith(".rotary_emb.inv_freq"):
        return None
    return name


def _weight_files(folder: Path) -> list[Path]:
    """The file of the weights, or its shards."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [required_file(folder, WEIGHTS, _CONTENTS)]
    shards = read_object(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
        raise DragomanError("bad_checkpoint", f"{folder / INDEX} has no weight_map from tensors to files beside it")
    return [required_file(folder, name, _CONTENTS) for name in sorted(set(shards.values()))]
