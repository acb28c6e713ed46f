"""Heads that guess further tokens from a hidden state of a frozen language model, and how sure they may be.

The model's hidden state at a place decides the token that follows; what it knows beyond that token is enough to guess
a few more. Head ``k`` makes a state for the ``k``-th token after that one, from the state before it and the token that
the state before it stands for, and the model's own output matrix turns it into a guess:

    s_0 = hidden state,  s_k = s_0 + SiLU(W_k [s_(k-1); embedding of token k-1]),  guess k = argmax of output(s_k)

With ``W_k`` zero a head says what the model said before, which is where training begins. Guesses are of the tokens that
a translator writes most often, so that the output matrix has few rows; what is rare would be guessed wrong anyway.

One more head says how probable it is that a guess is right if those before it were: a residual block on ``s_k``, and a
linear layer on it, on the logarithm of the guess's own probability, and on ``k``.

Sources: Cai et al., "Medusa" (arXiv 2401.10774), §2.1.1, for heads on a frozen model and their form; Ankner et al.,
"Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding" (arXiv 2402.05109), §3, for guesses that know those
before them; Zhao et al., "FR-Spec" (arXiv 2502.14856), for fewer rows; Huang et al., "SpecDec++" (arXiv 2405.19715),
§3.3, for the head that says when a draft should end.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from models.folder import read_tensors, require_fit
from models.linear import Linear
from models.llm import Llm
from streaming.errors import DragomanError

#: File of the heads, in the model's folder.
HEADS: Final = "heads.safetensors"
#: Name in the file of the weights by which a model is known: its last norm's.
_NORM: Final = "model.norm.weight"


class DraftHeads(nn.Module):
    """The heads of one model. Its parameters are those of the file, and so are their names.

    Args:
        llm: The model, frozen or not; it is read and never changed.
        tokens: Ids that may be guessed, ``int64[V]``, ascending.
        heads: How many tokens are guessed at most.

    Attributes:
        weight: ``W_k``, ``float32[heads, d_model, 2 * d_model]``.
        block: Of the head for acceptance, ``[d_model, d_model]``.
        tokens: ``int64[V]``.
    """

    def __init__(self, llm: Llm, tokens: Tensor, heads: int = 3) -> None:
        super().__init__()
        d, device = llm.config.d_model, llm.device
        self.weight = nn.Parameter(torch.zeros(heads, d, 2 * d, device=device))
        self.block = nn.Parameter(torch.zeros(d, d, device=device))
        self.sure = nn.Parameter(torch.zeros(d, device=device))
        self.trust = nn.Parameter(torch.ones((), device=device))
        self.depth = nn.Parameter(torch.zeros(heads, device=device))
        self.tokens: Tensor
        self.register_buffer("tokens", tokens.to(device))
        self._embedding = llm.model.embed_tokens.weight.detach()
        self._rows = llm.output_rows(self.tokens).float()
        self._output = Linear(self._rows, None, frozen=True)
        self._index = torch.full((llm.config.vocab_size,), -1, device=device)
        self._index[self.tokens] = torch.arange(len(tokens), device=device)

    def __len__(self) -> int:
        """How many tokens are guessed at most."""
        return len(self.weight)

    def copy(self) -> DraftHeads:
        """The same, to be changed by itself; what is the model's is shared."""
        shared = (self.tokens, self._embedding, self._rows, self._output, self._index)
        return deepcopy(self, {id(one): one for one in shared})

    def state(self, k: int, hidden: Tensor, before: Tensor, token: Tensor) -> Tensor:
        """The state for guess ``k + 1``.

        Args:
            k: Index of the head.
            hidden: ``float32[N, d_model]``: the model's own, from which the first of the known tokens was chosen.
            before: The state before, ``float32[N, d_model]``; ``hidden`` for the first head.
            token: The token that the state before stands for, ``int64[N]``.
        """
        embedded = F.rms_norm(self._embedding[token].float(), hidden.shape[-1:])
        return hidden + F.silu(F.linear(torch.cat([before, embedded], -1), self.weight[k]))

    def states(self, hidden: Tensor, tokens: Tensor) -> list[Tensor]:
        """The states of all heads where the tokens are known.

        Args:
            hidden: ``float32[N, d_model]``.
            tokens: ``int64[N, heads]``: the token that follows each place, and those behind it; negative where there
                is none, for which the states mean nothing.
        """
        states = [hidden]
        for k, token in enumerate(tokens.clamp(min=0).unbind(1)):
            states.append(self.state(k, hidden, states[-1], token))
        return states[1:]

    def loss(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Cross-entropy of the heads, summed over them, each a mean over the places that have a token for it.

        Args:
            hidden: ``float32[N, d_model]``.
            tokens: ``int64[N, heads + 1]``, as for :meth:`states`, and one more.
        """
        total = hidden.new_zeros(())
        for state, wanted in zip(self.states(hidden, tokens[:, :-1]), tokens[:, 1:].unbind(1), strict=True):
            index = torch.where(wanted >= 0, self._index[wanted.clamp(min=0)], -1)
            if bool((known := index >= 0).any()):
                total = total + F.cross_entropy(F.linear(state[known], self._rows), index[known])
        return total

    def best(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The guesses at states ``float32[N, d_model]``, ``int64[N]``, and the logarithms of their probabilities."""
        value, index = self._output(state).log_softmax(-1).max(-1)
        return self.tokens[index], value

    def acceptance(self, k: int, state: Tensor, log_probability: Tensor) -> Tensor:
        """Logits ``float32[N]`` of a guess of head ``k`` being right, if those before it are.

        Args:
            k: Index of the head.
            state: ``float32[N, d_model]``.
            log_probability: ``float32[N]``, of :meth:`best`.
        """
        p = log_probability.clamp(max=-1e-4)
        own = p - torch.log(-torch.expm1(p))  # the logit of the head's own probability
        block = state + F.silu(F.linear(state, self.block))
        return self.trust * own + block @ self.sure + self.depth[k]

    @torch.no_grad()
    def guess(self, hidden: Tensor, token: Tensor, k: int, least: float = 0.0) -> tuple[Tensor, Tensor]:
        """The next tokens of some rows.

        Args:
            hidden: ``[N, d_model]``: what the model made of a place of each row.
            token: ``int64[N]``: the token that it chose there.
            k: How many more to guess, 1 or more, of which no more than there are heads are.
            least: Guessing ends where none of the rows' guesses is as probable as this to be reached and right.

        Returns:
            Ids ``int64[N, n]`` and the probability of each to be right if those before it are, ``float32[N, n]``, of
            ``n <= k`` guesses.
        """
        state = hidden = hidden.float()
        tokens, sure, reached = [], [], torch.ones(len(token), device=token.device)
        for i in range(min(k, len(self))):
            state = self.state(i, hidden, state, token)
            token, log_probability = self.best(state)
            tokens.append(token)
            sure.append(self.acceptance(i, state, log_probability).sigmoid())
            reached = reached * sure[i]
            if least and i + 1 < min(k, len(self)) and float(reached.max()) < least:
                break
        return torch.stack(tokens, 1), torch.stack(sure, 1)


def save_heads(folder: Path, heads: DraftHeads, llm: Llm) -> None:
    """Writes the heads beside their model, in bf16."""
    tensors = {name: t.detach().cpu().bfloat16() for name, t in heads.named_parameters()}
    tensors |= {"tokens": heads.tokens.cpu().int(), _NORM: _fingerprint(llm)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / HEADS)


def load_heads(folder: Path, llm: Llm) -> DraftHeads | None:
    """The heads beside a model; None if the folder has none.

    Args:
        folder: The model's.
        llm: The model.

    Raises:
        DragomanError: ``bad_checkpoint`` if the file is not one of :func:`save_heads`, or of another model.
    """
    if not (file := folder / HEADS).is_file():
        return None
    tensors = read_tensors(file)
    norm = tensors.pop(_NORM, None)
    if norm is None or not torch.equal(norm, _fingerprint(llm)):
        raise DragomanError(
            "bad_checkpoint",
            f"{file} was made for other weights than the model's: make it anew with training.translation.heads, or"
            " delete it",
        )
    weight, tokens = tensors.get("weight", norm), tensors.get("tokens", norm)
    vocab_size = llm.config.vocab_size
    if tokens.dim() != 1 or len(tokens) == 0 or not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise DragomanError("bad_checkpoint", f"{file} has no list of tokens of the model's {vocab_size}")
    heads = DraftHeads(llm, tokens.long(), len(weight))
    require_fit(heads.state_dict(), tensors, f"the heads of {file}")
    heads.load_state_dict({name: tensor.float() if name != "tokens" else tensor for name, tensor in tensors.items()})
    return heads.requires_grad_(False)


def _fingerprint(llm: Llm) -> Tensor:
    """Weights by which a model is known from another of its shape, and which are small."""
    return llm.model.norm.weight.detach().cpu().bfloat16().clone()
