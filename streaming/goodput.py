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
#: Steps for which the longest drafts are asked for, to see what they save, at first and later; and steps until the next
#: such trial, at first and when many of them have changed nothing.
_FIRST_TRIAL, _TRIAL, _FIRST_WAIT, _LONGEST_WAIT = 32, 4, 64, 2048
#: How much a step moves the mean of what a length saves and takes, and how much one of a trial does, of which there are
#: few.
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
class _Mean:
    """A running mean."""

    value: float = 0.0
    count: int = 0

    def move(self, value: float, step: float) -> None:
        """Takes one more value, which moves the mean by this part of its distance, or more if there are few."""
        self.count += 1
        self.value += max(step, 1 / self.count) * (value - self.value)


class _Load:
    """What is known for about so many rows.

    Attributes:
        more: For each length what its last token saves, in seconds for each step, if it is there.
        asking: What asking takes, and learning from what came of it, of lengths that have been asked for.
        length: Which one is asked for.
        steps_left: For how many steps.
        trying: Whether these are steps of a trial.
        best: The one that was best at the last look.
        wait: For how many steps it is taken then.
    """

    def __init__(self, longest: int) -> None:
        self.more = [_Mean() for _ in range(longest + 1)]
        self.asking = {0: _Mean()}
        self.length, self.steps_left, self.trying = longest, _FIRST_TRIAL, True
        self.best, self.wait = longest, _FIRST_WAIT

    def learned(self, saved: Sequence[float], asking_s: float) -> None:
        """See :class:`Asking`."""
        step, before = _TRIAL_STEP if self.trying else _MEAN_STEP, 0.0
        for k in range(self.length + 1):
            now = saved[min(k, len(saved) - 1)]
            self.more[k].move(now - before, step)
            before = now
        self.asking.setdefault(self.length, _Mean()).move(asking_s, step)
        self.steps_left = max(0, self.steps_left - 1)

    def go_on(self) -> None:
        """Takes the best length for a while, then the longest one for a few steps."""
        longest = len(self.more) - 1
        if not self.trying and self.best < longest:
            self.length, self.steps_left, self.trying = longest, _TRIAL, True
            return
        best = self._best()
        # Neighbours are so nearly equal that going to and fro between them is no news.
        self.wait = min(2 * self.wait, _LONGEST_WAIT) if abs(best - self.best) <= 1 else _FIRST_WAIT
        self.best, self.length, self.steps_left, self.trying = best, best, self.wait, False

    def _best(self) -> int:
        """The length that saves most, less what asking for it takes, which lies between that of the known ones."""
        known = sorted(self.asking)
        takes = np.interp(range(len(self.more)), known, [self.asking[k].value for k in known])
        return int((np.cumsum([one.value for one in self.more]) - takes).argmax())


class Asking:
    """For drafts of which length the drafters are asked: the one that saves most, less the time that it takes.

    Whether a draft is taken is decided when it is there; this decides whether it is made. A draft tells what each of
    its beginnings would have saved, so that lengths are compared on the same steps and need not be tried one by one.
    The longest one is tried now and then, the less often the longer that has changed nothing.
    """

    def __init__(self) -> None:
        self._loads: dict[tuple[int, int], _Load] = {}

    def length(self, rows: int, longest: int) -> int:
        """What to ask for in the next step, 0 for nothing, up to ``longest``."""
        load = self._load(rows, longest)
        if load.steps_left == 0:
            load.go_on()
        return load.length

    def learned(self, rows: int, longest: int, saved: Sequence[float], asking_s: float) -> None:
        """Learns from a step, once for each.

        Args:
            rows: As for :meth:`length`.
            longest: As for :meth:`length`.
            saved: Seconds that it has saved, had it been asked for drafts of 0, 1 … tokens; longer ones save what the
                last one does.
            asking_s: What asking took, and learning from what came of it.
        """
        self._load(rows, longest).learned(saved, asking_s)

    def _load(self, rows: int, longest: int) -> _Load:
        key = rows.bit_length(), longest
        if key not in self._loads:
            self._loads[key] = _Load(longest)
        return self._loads[key]


class Goodput:
    """The controller: from proposals to drafts, for one engine.

    Args:
        cost: Of the model on this machine, from :func:`calibrated`; None to begin with a guess.

    Attributes:
        cost: It goes on learning.
        acceptance: Of all sources.
        asking: For how long drafts it pays to ask.
        saved: Seconds that the drafts of the last step are expected to save, had they been asked for with 0, 1 …
            tokens, up to the longest one.
    """

    def __init__(self, cost: Cost | None = None) -> None:
        self.cost = cost or Cost()
        self.acceptance = Acceptance()
        self.asking = Asking()
        self.saved = [0.0]
        self._steps = 0

    def choose(
        self,
        candidates: Sequence[Sequence[Proposal]],
        decided: Sequence[int],
        keys: int,
        *,
        given: Sequence[int] = (),
        longest: bool = False,
    ) -> list[Proposal]:
        """The drafts of one step.

        Args:
            candidates: What the drafters propose for each row, perhaps nothing.
            decided: Tokens that each row reads in any case.
            keys: Slots of the longest row before the step.
            given: Tokens at the beginning of each row's proposals for which no drafter was asked; left out: none.
            longest: Whether to take the drafts whole, whatever they cost.

        Returns:
            For each row its best candidate, cut where the row with the most tokens ends: so many that tokens per second
            are highest. What other rows read up to there is padding otherwise.
        """
        best, gains = list[Proposal](), list[list[float]]()
        for proposals in candidates:
            found = [(self.acceptance.gains(one), one) for one in proposals if one.sure]
            gain, proposal = max(found, key=lambda one: sum(one[0]), default=([], Proposal()))
            best.append(proposal)
            gains.append(gain)
        self.saved = [0.0]
        if longest or not any(gains):
            return best
        least, brought = _advances(gains, decided, given or [0] * len(gains))
        widths = range(least, least + len(brought[0]))
        seconds = [self.cost.seconds(Shape(len(gains), max(1, width), keys + width)) for width in widths]
        worth = seconds[0] / max(brought[0][0], 1e-9)
        self.saved = [max(b * worth - s for b, s in zip(some, seconds, strict=True)) for some in brought]
        more = max(range(len(seconds)), key=lambda i: brought[-1][i] / seconds[i])
        self._steps += 1
        if self._steps % EXPLORE_EVERY == 0:
            longer = more == 0 or (self._steps // EXPLORE_EVERY % 2 == 0 and more + 1 < len(seconds))
            more += 1 if longer else -1
        return [one.first(max(0, least + more - n)) for one, n in zip(best, decided, strict=True)]


def _advances(
    gains: Sequence[Sequence[float]], decided: Sequence[int], given: Sequence[int]
) -> tuple[int, list[list[float]]]:
    """By how many tokens all rows advance. Who reads advances by one, and by what the draft brings.

    Returns:
        How many tokens the longest row reads without drafts; and for drafters that were asked for 0, 1 … tokens, what
        comes of it if no row may read more than 0, 1 … tokens beyond those.
    """
    rows = list(zip(decided, given, gains, strict=True))
    least, widest = max(decided), max(n + len(gain) for n, _, gain in rows)
    found, advances = [float(sum(n > 0 for n in decided))] * (widest - least + 1), []
    for k in range(1 + max(0, *(len(gain) - free for _, free, gain in rows))):
        more = [0.0] * len(found)
        for n, free, gain in rows:
            for i in range(free + k - 1 if k else 0, min(free + k, len(gain))):
                more[max(0, n + i + 1 - least)] += gain[i]
        found = [before + new for before, new in zip(found, accumulate(more), strict=True)]
        advances.append(found)
    return least, advances
