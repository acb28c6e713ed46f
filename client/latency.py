"""How far a translation lags behind its source, and what it takes back: the field's metrics, on one kind of log.

Each target word has a *delay*: how much of the source had come in when it was written, in words or in milliseconds.
A computation-aware delay adds the time that computing took. With X the source, Y the translation, R its reference and
d_1, d_2, … the delays, all in the unit of |X|:

- *AL*, average lagging: mean of d_i - (i - 1) |X| / |R|, up to the first word that had the whole source (Ma et al.
  2019).
- *LAAL*, length-adaptive: the same with max(|Y|, |R|) for |R|, so that wordiness gains nothing (Papi et al. 2022).
- *YAAL*: LAAL of the words before the first that had the whole source: of those that were simultaneous (Polák et al.
  2025, arXiv 2509.17349).
- *DAL*, differentiable: mean over all words of d'_i - (i - 1) |X| / |Y|, with d'_i at least d'_{i-1} + |X| / |Y|: what
  is late makes what follows late (Cherry and Foster 2019).
- *AP*, average proportion: sum of d_i over |X| |R| (Cho and Esipova 2016; normalised as SimulEval does).
- *NE*, normalized erasure: words that were taken back for each word of the final text (Arivazhagan et al. 2020).

They are, case for case, what SimulEval 1.1.4 and OmniSTEval 0.1.10 compute on short segments. A function returns
None where they leave a segment out of the mean. `Instance.to_json` is a line of the log that both tools read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from streaming.errors import DragomanError


def average_lagging(delays: Sequence[float], source_length: float, reference_length: int) -> float | None:
    """AL of one segment, in the unit of its source.

    Args:
        delays: Of each target word, how much of the source had come in; not negative.
        source_length: All of the source, in the same unit.
        reference_length: Words of the reference; 0, where there is none, stands for those of the translation.

    Returns:
        The lag; None where nothing was written or nothing said.
    """
    if not delays or source_length <= 0:
        return None
    if delays[0] > source_length:
        return float(delays[0])
    until = len(_before(delays, source_length)) + 1
    return _mean_lag(delays[:until], source_length, reference_length or len(delays))


def length_adaptive_average_lagging(
    delays: Sequence[float], source_length: float, reference_length: int
) -> float | None:
    """LAAL of one segment; arguments and result as of `average_lagging`."""
    return average_lagging(delays, source_length, max(len(delays), reference_length))


def simultaneous_average_lagging(delays: Sequence[float], source_length: float, reference_length: int) -> float | None:
    """YAAL of one segment; arguments and result as of `average_lagging`, and None where no word was simultaneous."""
    early = _before(delays, source_length)
    return _mean_lag(early, source_length, max(len(delays), reference_length)) if early else None


def differentiable_average_lagging(delays: Sequence[float], source_length: float) -> float | None:
    """DAL of one segment; arguments and result as of `average_lagging`."""
    if not delays or source_length <= 0:
        return None
    pace, late, total = source_length / len(delays), 0.0, 0.0
    for i, delay in enumerate(delays):
        late = max(delay, late + pace) if i else delay
        total += late - i * pace
    return total / len(delays)


def average_proportion(delays: Sequence[float], source_length: float, reference_length: int) -> float | None:
    """AP of one segment, about 0 to 1; arguments and result as of `average_lagging`."""
    if not delays or source_length <= 0:
        return None
    return sum(delays) / (source_length * (reference_length or len(delays)))


def normalized_erasure(segments: Iterable[Iterable[str]]) -> float | None:
    """NE of segments that were shown again and again as they grew.

    Args:
        segments: Of each, all the text that stood on the screen, after each change.

    Returns:
        Words that were taken back, over the words of the last texts: 0 where each text only continues the one
        before it. None if the last texts have no words.
    """
    erased = final = 0
    for texts in segments:
        shown = list[str]()
        for text in texts:
            words = text.split()
            kept = next((i for i, (old, new) in enumerate(zip(shown, words, strict=False)) if old != new), len(words))
            erased += max(0, len(shown) - kept)
            shown = words
        final += len(shown)
    return erased / final if final else None


def word_delays(deltas: Iterable[tuple[str, float]]) -> tuple[str, tuple[float, ...]]:
    """Put together a translation and the delays of its words.

    Args:
        deltas: Pieces of text to append verbatim, each with its delay. A word has the delay of its last piece.

    Returns:
        The text, and a delay for each of its words.
    """
    pieces, delays, within_word = list[str](), list[float](), False
    for delta, delay in deltas:
        words = len(delta.split())
        if within_word and words and not delta[0].isspace():
            delays[-1] = delay
            words -= 1
        delays += [delay] * words
        within_word = not delta[-1].isspace() if delta else within_word
        pieces.append(delta)
    return "".join(pieces).strip(), tuple(delays)


def _before(delays: Sequence[float], source_length: float) -> Sequence[float]:
    """The delays of the words before the first that had the whole source."""
    return delays[: next((i for i, delay in enumerate(delays) if delay >= source_length), len(delays))]


def _mean_lag(delays: Sequence[float], source_length: float, target_length: int) -> float:
    """How far the words are, on average, behind one that writes at the source's pace and waits for nothing."""
    pace = source_length / target_length
    return sum(delay - i * pace for i, delay in enumerate(delays)) / len(delays)


# -------------------------------------------------------------------------------------------------------------- log


@dataclass(frozen=True)
class Instance:
    """One segment as the log of SimulEval and OmniSTEval has it.

    Attributes:
        source: The source words, or the path of the recording.
        prediction: The translation.
        reference: One reference translation; empty where there is none.
        delays: Of each word of `prediction`, how much of the source had come in: words, or milliseconds of audio.
        source_length: All of the source, in the same unit.
        elapsed: The delays with the time of computing, in the same unit; empty where it was not measured.
        also: Further keys of the line.

    Raises:
        DragomanError: ``log_invalid`` when the words of `prediction` are not as many as `delays` or `elapsed`.
    """

    source: str
    prediction: str
    reference: str
    delays: tuple[float, ...]
    source_length: float
    elapsed: tuple[float, ...] = ()
    also: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that every word has its times."""
        words = len(self.prediction.split())
        if len(self.delays) != words or (self.elapsed and len(self.elapsed) != words):
            raise DragomanError(
                "log_invalid",
                f"a translation of {words} words has {len(self.delays)} delays and {len(self.elapsed)} elapsed times:"
                " give one of each for every word",
            )

    @property
    def reference_length(self) -> int:
        """Words of the reference; without one, of the translation."""
        return len(self.reference.split()) or len(self.delays)

    def to_json(self, index: int) -> str:
        """Line `index` of a log, counted from 0."""
        line = {
            "index": index,
            "source": self.source,
            "prediction": self.prediction,
            "reference": self.reference,
            "delays": self.delays,
            **({"elapsed": self.elapsed} if self.elapsed else {}),
            "prediction_length": len(self.delays),
            "source_length": self.source_length,
            **self.also,
        }
        return json.dumps(line, ensure_ascii=False)


def write_log(instances: Iterable[Instance], file: Path) -> None:
    """Write instances as JSON lines, for ``omnisteval shortform --word_level --hypothesis_file``."""
    lines = (f"{instance.to_json(index)}\n" for index, instance in enumerate(instances))
    file.write_text("".join(lines), encoding="utf-8")


@dataclass(frozen=True)
class Lagging:
    """Means over the segments that have a figure, in the unit of their delays; None where none has.

    Attributes:
        al: Average lagging.
        laal: Length-adaptive average lagging.
        yaal: Lagging of the simultaneous words.
        dal: Differentiable average lagging.
        ap: Average proportion, which has no unit.
    """

    al: float | None = None
    laal: float | None = None
    yaal: float | None = None
    dal: float | None = None
    ap: float | None = None

    @classmethod
    def of(cls, instances: Sequence[Instance], *, computation_aware: bool = False) -> Self:
        """Sum up the delays of a set, or with `computation_aware` its elapsed times.

        A segment without a reference takes its own translation's length for it.
        """
        return cls(**{name: _mean(_figures(metric, instances, computation_aware)) for name, metric in _METRICS.items()})


_Metric = Callable[[Sequence[float], float, int], float | None]
_METRICS: Final[dict[str, _Metric]] = {
    "al": average_lagging,
    "laal": length_adaptive_average_lagging,
    "yaal": simultaneous_average_lagging,
    "dal": lambda delays, source_length, _: differentiable_average_lagging(delays, source_length),
    "ap": average_proportion,
}


def _figures(metric: _Metric, instances: Iterable[Instance], computation_aware: bool) -> Iterator[float]:
    for instance in instances:
        times = instance.elapsed if computation_aware else instance.delays
        figure = metric(times, instance.source_length, instance.reference_length)
        if figure is not None:
            yield figure


def _mean(figures: Iterable[float]) -> float | None:
    values = list(figures)
    return sum(values) / len(values) if values else None
