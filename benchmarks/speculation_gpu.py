"""Speculation where a forward is launched or replayed: {eager, CUDA graph} x {plain, speculative} x batch.

    python -m benchmarks.speculation_gpu --device cuda --dtype bfloat16

On a GPU, a small model's forward is mostly the launching of kernels, so that reading several tokens seems to cost
nothing; a graph takes that time away, and with it the gain. So both are measured, with the very same step: of fixed
shape, one for each batch and number of tokens, in memory that does not move. Models are the embedded translator and a
Llama shape of a billion parameters with random weights.

First each row is continued greedily, a token at a time. Then the same text is written with drafts of an oracle: it
knows what comes, and lies about each token with a set probability. Of the lengths in :data:`LENGTHS` that one is taken
for which the measured times of the steps promise most. Tokens go to the host after each step, as a translator needs
them, and drafts come from there.

- ``step_ms``: of one token, and ``spec_step_ms``: of the draft and the token before it.
- ``plain``, ``speculative``: tokens a second of all rows together. ``ratio``: of both.
- ``tokens_per_step``: that the rows have advanced with the drafts.
- ``otherwise``: share of the places at which the verifying step chose another token than the text has. In float32 none;
  in bfloat16 two forwards of different shapes round differently, and the text is followed all the same.

Without CUDA there are no graphs, and their columns are empty.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer
from torch import Tensor

from models.folder import dtype_of, require_device
from models.graphs import CudaCapture, FixedStep
from models.llm import Llm, load_llm
from models.llm_config import LlmConfig, RopeConfig
from models.translator import EMBEDDED_TRANSLATOR

BATCHES: Final = (1, 8, 64, 256)
ACCEPTANCES: Final = (0.4, 0.6, 0.8)
#: Lengths of drafts.
LENGTHS: Final = (1, 2, 3, 5, 7)
SHAPES: Final = {
    "1b": LlmConfig(
        128_256, d_model=2048, d_ff=8192, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, norm_eps=1e-5,
        rope=RopeConfig(500_000.0), name="random Llama of 1.2 billion parameters",
    ),
    "tiny": LlmConfig(
        97, d_model=32, d_ff=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, windows=(0, 24), name="random, tiny"
    ),
}  # fmt: skip
#: Steps before the clock counts.
_WARM_UP: Final = 3


@dataclass(frozen=True)
class Cell:
    """One model, way of running, batch and acceptance; see the head of this file."""

    model: str
    mode: str
    batch: int
    acceptance: float
    draft_tokens: int
    step_ms: float
    spec_step_ms: float
    plain: float
    speculative: float
    ratio: float
    tokens_per_step: float
    otherwise: float


class Step:
    """A forward of fixed shape: so many tokens of each row, and the model's choice after each of them.

    Args:
        llm: The model, frozen.
        memory: ``[L, 2, B, H_kv, capacity, D_h]`` of :class:`models.kv_cache.KvCache`; written in place.
        T: Tokens of each row.
        begin: Tokens that the rows hold at least; what stands before is not written to.
        graph: Whether to capture the step once and replay it.
    """

    def __init__(self, llm: Llm, memory: Tensor, T: int, *, begin: int, graph: bool) -> None:
        B, capacity = memory.shape[2], memory.shape[4]
        self._step = FixedStep(llm, memory, T)
        self._positions = torch.arange(capacity).repeat(B, 1)  # nothing was evicted: each token stands at its slot
        self._load(torch.zeros(B, T, dtype=torch.int64), torch.full((B,), begin))  # capturing writes behind them

        def choices() -> Tensor:
            return llm.logits(self._step.compute()).argmax(-1)

        self._choices = CudaCapture(llm.device)(choices) if graph else choices

    @torch.no_grad()
    def __call__(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Reads ``int64[B, T]`` behind ``int64[B]`` tokens of each row; the choices ``int64[B, T]``."""
        self._load(torch.from_numpy(tokens), torch.from_numpy(lengths))
        choices: np.ndarray = self._choices().cpu().numpy()
        return choices

    def _load(self, tokens: Tensor, lengths: Tensor) -> None:
        self._step.load(tokens, lengths, lengths, self._positions)


@dataclass(frozen=True)
class Written:
    """What a run has written.

    Attributes:
        step_s: Of a step, the mean.
        tokens_per_step: By which a row has advanced in one, the mean.
        otherwise: Share of the places at which the step's choice is not the text's.
    """

    step_s: float
    tokens_per_step: float
    otherwise: float


def continued(step: Step, first: np.ndarray, begin: int, tokens: int) -> tuple[np.ndarray, float]:
    """Rows continued greedily from their last token: the text ``int64[B, 1 + tokens]``, and seconds of a step."""
    text, seconds = [first], list[float]()
    for i in range(tokens):
        begun = time.perf_counter()
        text.append(step(text[-1][:, None], np.full(len(first), begin + i))[:, 0])
        seconds.append(time.perf_counter() - begun)
    return np.stack(text, 1), float(np.mean(seconds[_WARM_UP:]))


def speculated(
    step: Step, text: np.ndarray, begin: int, k: int, acceptance: float, *, vocab_size: int, seed: int = 0
) -> Written:
    """The same text with drafts of an oracle that is right with a set probability, until it has no more.

    Args:
        step: Of ``k + 1`` tokens.
        text: As of :func:`continued`.
        begin: Tokens before the text.
        k: Length of the drafts.
        acceptance: Probability that a drafted token is the text's.
        vocab_size: Of the model.
        seed: Of the lies.
    """
    chance, rows = np.random.default_rng(seed), np.arange(len(text))[:, None]
    at, seconds, advanced, otherwise, places = np.zeros(len(text), np.int64), list[float](), list[float](), 0, 0
    while at.max() + k + 1 < text.shape[1]:
        begun = time.perf_counter()
        coming = text[rows, at[:, None] + np.arange(k + 2)]
        true = chance.random((len(text), k)) < acceptance
        fed = coming[:, :-1].copy()
        fed[:, 1:] = np.where(true, fed[:, 1:], (fed[:, 1:] + 1) % vocab_size)
        choices = step(fed, begin + at)
        right = np.cumprod(true, 1).sum(1)  # what the oracle says is what the text has, so that coins tell
        at += right + 1
        seconds.append(time.perf_counter() - begun)
        read = np.arange(k + 1) <= right[:, None]
        otherwise += int((read & (choices != coming[:, 1:])).sum())
        places += int(read.sum())
        advanced.append(float(np.mean(right + 1)))
    warm = _WARM_UP if len(seconds) > 2 * _WARM_UP else 0
    return Written(float(np.mean(seconds[warm:])), float(np.mean(advanced)), otherwise / max(1, places))


def measure(
    llm: Llm,
    *,
    batches: Sequence[int] = BATCHES,
    acceptances: Sequence[float] = ACCEPTANCES,
    lengths: Sequence[int] = LENGTHS,
    prompt: int = 128,
    tokens: int = 96,
) -> list[Cell]:
    """The table of one model.

    Args:
        llm: Frozen.
        batches: Rows of each.
        acceptances: Of the oracle.
        lengths: Of its drafts.
        prompt: Random tokens that each row has read before.
        tokens: That are then written, more than twice the longest draft.
    """
    cells = []
    for mode in ("eager", "graph") if llm.device.type == "cuda" else ("eager",):
        for batch in batches:
            cells += _cells(llm, mode, batch, acceptances, lengths, prompt, tokens)
    return cells


@torch.no_grad()
def _cells(
    llm: Llm, mode: str, batch: int, acceptances: Sequence[float], lengths: Sequence[int], prompt: int, tokens: int
) -> list[Cell]:
    """Those of one way of running and one batch."""
    size, begin = llm.config.vocab_size, prompt
    ids = torch.randint(size, (batch, prompt + 1), generator=torch.Generator().manual_seed(0))
    capacity = prompt + tokens + max(lengths) + 2
    _, cache = llm.hidden(ids[:, :prompt], torch.full((batch,), prompt), llm.init_state(batch, capacity=capacity))
    assert cache is not None

    def step(T: int) -> Step:
        return Step(llm, cache.memory, T, begin=begin, graph=mode == "graph")

    text, plain_s = continued(step(1), ids[:, prompt].numpy(), begin, tokens)
    seconds = {k: _step_seconds(step(k + 1), text[:, : k + 1], begin) for k in lengths}
    cells = []
    for a in acceptances:
        k = max(lengths, key=lambda k: sum(a**i for i in range(k + 1)) / seconds[k])
        run = speculated(step(k + 1), text, begin, k, a, vocab_size=size)
        plain, fast = batch / plain_s, batch * run.tokens_per_step / run.step_s
        times = 1000 * plain_s, 1000 * run.step_s
        found = (plain, fast, fast / plain, run.tokens_per_step, run.otherwise)
        cells.append(Cell(llm.config.name, mode, batch, a, k, *times, *found))
    return cells


def _step_seconds(step: Step, fed: np.ndarray, begin: int, repeats: int = 8) -> float:
    """The median of some steps that read the same."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        step(np.ascontiguousarray(fed), np.full(len(fed), begin))
        seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds))


def random_llm(config: LlmConfig, device: str, dtype: str) -> Llm:
    """Random weights of a shape, frozen, made where they stay."""
    torch.manual_seed(0)
    with torch.device(device):
        llm = Llm(config)
    return llm.to(dtype_of(dtype)).freeze()


def report(cells: Sequence[Cell], device: str) -> str:
    """The table, eager beside graph."""
    lines = [f"{device}   load average {os.getloadavg()[0]:.1f}"]
    columns = f"{'plain tok/s':>12} {'spec. tok/s':>12} {'ratio':>6} {'k':>2}"
    graphs = {(one.model, one.batch, one.acceptance): one for one in cells if one.mode == "graph"}
    for name in dict.fromkeys(one.model for one in cells):
        lines += [f"\n{name}", f"{'batch':>5} {'accept.':>7}   eager {columns[6:]}   graph {columns[6:]}"]
        for one in (one for one in cells if one.model == name and one.mode == "eager"):
            graph = graphs.get((one.model, one.batch, one.acceptance))
            right = "needs CUDA" if graph is None else _rates(graph)
            lines.append(f"{one.batch:5} {one.acceptance:7.1f} {_rates(one)} {right}")
    return "\n".join(lines)


def _rates(one: Cell) -> str:
    return f"{one.plain:12.0f} {one.speculative:12.0f} {one.ratio:6.2f} {one.draft_tokens:2}"


def main(
    model: Annotated[list[str] | None, typer.Option(help="embedded, 1b or tiny. Left out: embedded and 1b.")] = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the models run.")] = "cuda",
    dtype: Annotated[str, typer.Option(metavar="float32|bfloat16", help="What they compute in.")] = "bfloat16",
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Rows; may be given several times.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens read before.")] = 128,
    tokens: Annotated[int, typer.Option(min=20, help="Tokens written.")] = 96,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure speculation eager and as CUDA graphs."""
    if unknown := [name for name in model or () if name not in ("embedded", *SHAPES)]:
        raise typer.BadParameter(f"{unknown[0]} is no model here: embedded, {', '.join(SHAPES)} are")
    require_device(device)
    cells = []
    for name in model or ["embedded", "1b"]:
        if name == "embedded":
            llm = load_llm(EMBEDDED_TRANSLATOR, device=device, dtype=dtype)
        else:
            llm = random_llm(SHAPES[name], device, dtype)
        cells += measure(llm, batches=batch or BATCHES, prompt=prompt, tokens=tokens)
    where = torch.cuda.get_device_name() if device.startswith("cuda") else device
    found: dict[str, Any] = {"device": where, "dtype": dtype, "load_average": os.getloadavg()[0]}
    typer.echo(json.dumps(found | {"cells": [asdict(one) for one in cells]}) if as_json else report(cells, where))


if __name__ == "__main__":
    typer.run(main)
