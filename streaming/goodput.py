"""How long drafts should be: so long that a second of the machine brings the most tokens.

What a draft brings is the sum over its tokens of the probability that it and those before it are right; what it costs
is the time of a forward that reads it. Both are measured while the engine runs, since neither carries over from another
text or machine. No draft is always among the choices, so that a loaded machine is not made slower. Asking for drafts
takes time too, of a second model a great deal, so that it is also measured for which length it pays to ask at all.

Source: Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput" (arXiv
2406.14066).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final, NamedTuple

import numpy as np
import torch

from models.llm import Llm
from models.speculative import ROOT
from streaming.drafts import Proposal

#: How much a new time moves the running median of its shape.
_MEDIAN_STEP = 0.05
#: The line is drawn anew after so many measurements.
_FIT_EVERY = 64
#: Measurements of a shape that count as much as what the fit says of it.
_FIT_WEIGHT = 8
#: Guesses that count as much as what their source says of them, and after how many the old ones count half.
_SOURCE_WEIGHT, _MEMORY = 10, 2000
#: Of so many steps one tries the next length, so that no measurement is too old.
EXPLORE_EVERY: Final = 64
#: Steps for which another length is asked for, to see what it saves, and steps until the next such trial: at first, and
#: when many of them have changed nothing.
_TRIAL, _FIRST_WAIT, _LONGEST_WAIT = 4, 64, 2048
#: How much a step moves the mean of what asking saves, and how much one of a trial does, of which there are few.
_MEAN_STEP, _TRIAL_STEP = 1 / 64, 1 / 16


class Shape(NamedTuple):
    """What one forward computes.

    Attributes:
        rows: Of the batch.
        tokens: New ones of each row, padding included.
        keys: Slots of the longest row.
    """

    rows: int
    tokens: int
    keys: int


@dataclass
class _Measured:
    shape: Shape
    seconds: float
    count: int = 1
    factor: float = 1.0  # by which it differs from the line


class Cost:
    """Seconds of a forward: a line through what was measured, corrected where the shape itself has been.

    The line has a constant, a part for each token and one for each key that is read. Shapes of the same batch and
    number of tokens share a running median, which a few stalled forwards do not move.
    """

    def __init__(self) -> None:
        self._measured: dict[tuple[int, int], _Measured] = {}
        self._line = (1.0, 0.05, 0.0)
        self._new = 0

    def copy(self) -> Cost:
        """What is known now, to be learnt on from by itself."""
        other = Cost()
        other._measured = {key: replace(one) for key, one in self._measured.items()}
        other._line = self._line
        return other

    def measured(self, shape: Shape, seconds: float) -> None:
        """Learns what a forward took."""
        key = _bucket(shape)
        if (known := self._measured.get(key)) is None:
            known = self._measured[key] = _Measured(shape, seconds)
            self._new = _FIT_EVERY
        else:
            known.count += 1
            step = max(_MEDIAN_STEP, 0.5 / known.count)
            known.seconds *= 1 + step if seconds > known.seconds else 1 / (1 + step)
            known.shape = shape
        self._new += 1
        if self._new >= _FIT_EVERY:
            self._fit()
            self._new = 0
        else:
            known.factor = self._factor(known)

    def seconds(self, shape: Shape) -> float:
        """What a forward is expected to take; before the first measurement, in units of a short one."""
        known = self._measured.get(_bucket(shape))
        return self._on_line(shape) * (1.0 if known is None else known.factor)

    def _factor(self, known: _Measured) -> float:
        return math.pow(known.seconds / self._on_line(known.shape), known.count / (known.count + _FIT_WEIGHT))

    def _on_line(self, shape: Shape) -> float:
        constant, by_token, by_key = self._line
        return max(constant + by_token * shape.rows * shape.tokens + by_key * shape.rows * shape.keys, 1e-9)

    def _fit(self) -> None:
        """Least squares of the relative error, without negative parts: what would be negative is left out."""
        known = list(self._measured.values())
        y = np.array([one.seconds for one in known])
        weight = np.sqrt([min(one.count, 50) for one in known]) / y
        shapes = [one.shape for one in known]
        X = np.array([[1.0, shape.rows * shape.tokens, shape.rows * shape.keys] for shape in shapes])
        parts = [0, 1, 2][: len(known)]
        while parts:
            found = np.linalg.lstsq(X[:, parts] * weight[:, None], y * weight, rcond=None)[0]
            if (found >= 0).all():
                line = dict(zip(parts, found.tolist(), strict=True))
                self._line = line.get(0, 0.0), line.get(1, 0.0), line.get(2, 0.0)
                break
            del parts[int(found.argmin())]
        for one in known:
            one.factor = self._factor(one)


def clock(device: torch.device) -> float:
    """Seconds of a clock that other processes disturb least: on a CPU, it stands while this thread does not run."""
    return time.thread_time() if device.type == "cpu" else time.perf_counter()


def _bucket(shape: Shape) -> tuple[int, int]:
    """Shapes that share a median: small ones by themselves, large ones to within an eighth."""
    return _rounded(shape.rows), _rounded(shape.tokens)


def _rounded(n: int) -> int:
    step = 1 << max(0, n.bit_length() - 4)
    return n // step * step


@torch.no_grad()
def calibrated(llm: Llm, *, rows: Sequence[int] = (1, 4, 16), keys: int = 128, repeats: int = 3) -> Cost:
    """The cost of a model on this machine, measured in less than a second for a small one."""
    cost = Cost()
    for n in rows:
        for tokens in (1, 2, 3, 4, 5, 7, 9):
            new, counts = torch.zeros(n, tokens, dtype=torch.int64), torch.full((n,), tokens)
            cache = llm.init_state(n, capacity=keys + 16)
            cache.lengths += keys
            cache.next_positions += keys
            for i in range(repeats + 1):
                begun = clock(llm.device)
                hidden, _ = llm.hidden(new, counts, cache)
                llm.logits(hidden).argmax(-1).tolist()
                if i:  # the first one may allocate
                    cost.measured(Shape(n, tokens, keys + tokens), clock(llm.device) - begun)
    return cost


class Acceptance:
    """How often guesses are right, for each source and how sure it was (in tenths)."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], list[float]] = {}

    def probability(self, source: str, sure: float) -> float:
        """Of being right, if what was guessed before it was."""
        right, count = self._seen.get((source, int(10 * sure)), (0.0, 0.0))
        return (right + _SOURCE_WEIGHT * sure) / (count + _SOURCE_WEIGHT)

    def observe(self, proposal: Proposal, path: Sequence[int]) -> None:
        """Learns from the tokens whose parents were right: those on the path, and their children."""
        right = {ROOT, *path}
        for i, parent in enumerate(proposal.draft.parents):
            if parent in right:
                seen = self._seen.setdefault((proposal.sources[i], int(10 * proposal.sure[i])), [0.0, 0.0])
                seen[0] += i in right
                seen[1] += 1
                if seen[1] > _MEMORY:
                    seen[:] = seen[0] / 2, seen[1] / 2

    def gains(self, proposal: Proposal) -> list[float]:
        """For each token of a proposal the probability that it is committed."""
        reached: list[float] = []
        for source, sure, parent in zip(proposal.sources, proposal.sure, proposal.draft.parents, strict=True):
            before = 1.0 if parent == ROOT else reached[parent]
            reached.append(before * self.probability(source, sure))
        return reached


@dataclass
class _Asked:
    """What a step has saved for which drafts of one length were asked for, on the average, in seconds."""

    saved: float = math.inf
    steps: int = 0
    tried: int = 0


@dataclass
class _Load:
    """What is known for one number of rows: of each length, which one is asked for, and when another is tried."""

    lengths: list[_Asked]
    length: int = 0
    steps_left: int = 0
    trying: bool = True
    best: int = 0
    wait: int = _FIRST_WAIT
    trials: int = 0


class Asking:
    """For drafts of which length the drafters are asked: the one that has saved most, less the time that it took.

    Whether a draft is taken is decided when it is there; this decides whether it is made. All lengths are tried at
    first, and others than the best now and then, the less often the longer it has remained the best.
    """

    def __init__(self) -> None:
        self._loads: dict[tuple[int, int], _Load] = {}

    def length(self, rows: int, longest: int) -> int:
        """What to ask for in the next step, 0 for nothing, up to ``longest``."""
        load = self._load(rows, longest)
        if load.steps_left == 0:
            load.length, load.steps_left = self._next(load)
        return load.length

    def learned(self, rows: int, longest: int, length: int, saved: float) -> None:
        """Learns what a step has saved, in seconds, less than nothing if asking took more; once for each."""
        load = self._load(rows, longest)
        known = load.lengths[length]
        known.steps += 1
        step = max(_TRIAL_STEP if load.trying else _MEAN_STEP, 1 / known.steps)
        known.saved = saved if known.steps == 1 else known.saved + step * (saved - known.saved)
        load.steps_left = max(0, load.steps_left - 1)

    def _load(self, rows: int, longest: int) -> _Load:
        key = _rounded(rows), longest
        if key not in self._loads:
            self._loads[key] = _Load([_Asked() for _ in range(longest + 1)])
        return self._loads[key]

    @staticmethod
    def _next(load: _Load) -> tuple[int, int]:
        """The length to ask for next, and for how many steps."""
        lengths = load.lengths
        for length in range(len(lengths) - 1, -1, -1):
            if not lengths[length].steps:
                return length, _TRIAL
        best = max(range(len(lengths)), key=lambda length: lengths[length].saved)
        others = [length for length in range(len(lengths)) if length != best]
        if load.trying or not others:
            load.wait = min(2 * load.wait, _LONGEST_WAIT) if best == load.best else _FIRST_WAIT
            load.best, load.trying = best, False
            return best, load.wait
        load.trying, load.trials = True, load.trials + 1
        other = min(others, key=lambda length: lengths[length].tried)
        lengths[other].tried = load.trials
        return other, _TRIAL


class Goodput:
    """The controller: from proposals to drafts, for one engine.

    Args:
        cost: Of the model on this machine, from :func:`calibrated`; None to begin with a guess.

    Attributes:
        cost: It goes on learning.
        acceptance: Of all sources.
        asking: For how long drafts it pays to ask.
        saved: Seconds that the drafts of the last step are expected to save.
    """

    def __init__(self, cost: Cost | None = None) -> None:
        self.cost = cost or Cost()
        self.acceptance = Acceptance()
        self.asking = Asking()
        self.saved = 0.0
        self._steps = 0

    def choose(
        self, candidates: Sequence[Sequence[Proposal]], decided: Sequence[int], keys: int, *, longest: bool = False
    ) -> list[Proposal]:
        """The drafts of one step.

        Args:
            candidates: What the drafters propose for each row, perhaps nothing.
            decided: Tokens that each row reads in any case.
            keys: Slots of the longest row before the step.
            longest: Whether to take the drafts whole, whatever they cost.

        Returns:
            For each row its best candidate, cut to the length at which tokens per second are highest.
        """
        best, gains = list[Proposal](), list[list[float]]()
        for proposals in candidates:
            found = [(self.acceptance.gains(one), one) for one in proposals if one.sure]
            gain, proposal = max(found, key=lambda one: sum(one[0]), default=([], Proposal()))
            best.append(proposal)
            gains.append(gain)
        self.saved, most = 0.0, max(map(len, gains))
        if longest or not most:
            return best
        brought, tokens = _advances(gains, decided, most)
        seconds = [self.cost.seconds(Shape(len(gains), max(1, n), keys + n)) for n in tokens]
        length = max(range(most + 1), key=lambda k: brought[k] / seconds[k])
        self.saved = brought[length] * seconds[0] / max(brought[0], 1e-9) - seconds[length]
        self._steps += 1
        if self._steps % EXPLORE_EVERY == 0:
            longer = length == 0 or (self._steps // EXPLORE_EVERY % 2 == 0 and length < most)
            length += 1 if longer else -1
        return [proposal.first(length) for proposal in best]


def _advances(gains: Sequence[Sequence[float]], decided: Sequence[int], most: int) -> tuple[list[float], list[int]]:
    """For drafts of at most 0, 1 … ``most`` tokens: by how many all rows advance, and how many the longest one reads.

    Who reads advances by one, and by what the draft brings.
    """
    more, tokens = [0.0] * (most + 1), [max(decided)] * (most + 1)
    for n, gain in zip(decided, gains, strict=True):
        if n:
            more[0] += 1
            for k, one in enumerate(gain, 1):
                more[k] += one
        for k in range(1, most + 1):
            tokens[k] = max(tokens[k], n + min(k, len(gain)))
    return list(accumulate(more)), tokens
