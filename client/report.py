"""The forms in which scores leave: a table for people, Markdown for a model card, JSON, and a curve."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from client.evaluate import NORMALISER, Delay, Score
from streaming.errors import DragomanError

_PACKAGES: Final = ("dragoman", "torch", "numpy", "jiwer", "num2words")
_PICTURES: Final = (".png", ".svg")
_NOTHING: Final = "–"
# A pipe has no width; a row of the table fits in this.
_PIPE_COLUMNS: Final = 160


@dataclass(frozen=True)
class Conditions:
    """What scores were measured with, and how busy the machine was.

    Attributes:
        command: The settings, by their names.
        model: What the model calls itself.
        threads: Threads of PyTorch.
        load_before: Load average over 1, 5 and 15 minutes before the first score.
        load_after: And after the last.
    """

    command: Mapping[str, Any]
    model: str
    threads: int
    load_before: tuple[float, float, float]
    load_after: tuple[float, float, float]

    @classmethod
    def now(cls, command: Mapping[str, Any], model: str, load_before: tuple[float, float, float]) -> Conditions:
        """The conditions after the last score."""
        return cls(command, model, torch.get_num_threads(), load_before, os.getloadavg())


def percent(wer: float | None) -> str:
    """A word error rate in per cent to one decimal, or a dash where there is none."""
    return _NOTHING if wer is None else f"{100 * wer:.1f}"


def print_scores(scores: Sequence[Score], conditions: Conditions) -> None:
    """Print the scores as a table to standard output, and below it what they were measured with."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_COLUMNS
    table = Table("set", "decoder", title=conditions.model)
    for heading in ("look-ahead", "files", "left out", "words", "WER %", "sub/del/ins"):
        table.add_column(heading, justify="right")
    for heading in ("delay ms", "with computing ms", "× real time", "live, of a core"):
        table.add_column(heading, justify="right")
    for score in scores:
        table.add_row(*_cells(score))
    console.print(table)
    load = " and ".join(f"{load[0]:.2f}" for load in (conditions.load_before, conditions.load_after))
    console.print(
        f"Delays are p50/p95/mean. Words are compared as {NORMALISER} writes them."
        f" Load average before and after: {load}; threads: {conditions.threads}."
    )


def _cells(score: Score) -> list[str]:
    errors, replay = score.errors, score.replay
    return [
        score.manifest,
        score.decoder,
        score.lookahead,
        str(score.utterances),
        str(score.left_out),
        str(errors.words),
        percent(errors.wer),
        f"{errors.substitutions}/{errors.deletions}/{errors.insertions}",
        _milliseconds(score.delay),
        _NOTHING if replay is None else _milliseconds(replay.total),
        f"{score.times_real_time:.1f}",
        _NOTHING if replay is None else f"{100 * replay.real_time_factor:.1f} %",
    ]


def _milliseconds(delay: Delay) -> str:
    return "/".join(map(_whole, (delay.p50_ms, delay.p95_ms, delay.mean_ms)))


def _whole(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.0f}"


def markdown_table(scores: Sequence[Score]) -> str:
    """The scores for a model card; the delay is algorithmic, and so the same on every machine."""
    rows = [
        "| set | utterances | words | decoder | look-ahead | WER | delay p50 / p95 (ms) |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in scores:
        rows.append(
            f"| {s.manifest} | {s.utterances} | {s.errors.words} | {s.decoder} | {s.lookahead}"
            f" | {percent(s.errors.wer)} % | {_whole(s.delay.p50_ms)} / {_whole(s.delay.p95_ms)} |"
        )
    return "\n".join(rows)


def json_report(scores: Sequence[Score], conditions: Conditions) -> str:
    """Everything about the scores as one JSON object.

    Its keys are ``command``, ``model``, ``normaliser``, ``versions`` (null for what runs without being installed),
    ``machine`` (``cpu_count``, ``threads``, ``load_before``, ``load_after``) and ``scores``, a list with the fields
    of `client.evaluate.Score`.
    """
    report = {
        "command": conditions.command,
        "model": conditions.model,
        "normaliser": NORMALISER,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {
            "cpu_count": os.cpu_count(),
            "threads": conditions.threads,
            "load_before": conditions.load_before,
            "load_after": conditions.load_after,
        },
        "scores": [asdict(score) for score in scores],
    }
    return json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------------------ curve


def require_output(file: Path) -> None:
    """Make sure, before anything is measured, that a report can be written there.

    Raises:
        DragomanError: ``output_unwritable``.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise DragomanError("output_unwritable", f"{file} cannot be written: name a file in a folder that is there")


def require_curve(file: Path) -> None:
    """Make sure, before anything is measured, that a curve can be drawn there.

    Raises:
        DragomanError: ``output_unwritable``, ``unsupported_picture`` or ``missing_package``.
    """
    require_output(file)
    if file.suffix.lower() not in _PICTURES:
        raise DragomanError("unsupported_picture", f"{file}: the curve can be {' or '.join(_PICTURES)}; choose one")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise DragomanError(
            "missing_package", "the curve needs matplotlib, which is not installed: pip install matplotlib"
        ) from None


def curve_points(scores: Sequence[Score]) -> dict[str, list[tuple[float, float, int]]]:
    """What the curve shows.

    Returns:
        For each set and decoder, ``"SET, DECODER"`` or ``"SET, DECODER, adaptive"``, a point for each look-ahead,
        ascending: mean algorithmic delay in ms, word error rate in per cent, look-ahead in ms. A score without words or
        timed words has none.
    """
    lines: dict[str, list[tuple[float, float, int]]] = {}
    for score in scores:
        if score.errors.wer is not None and score.delay.mean_ms is not None:
            name = f"{score.manifest}, {score.decoder}{', adaptive' if score.adaptive else ''}"
            points = lines.setdefault(name, [])
            points.append((score.delay.mean_ms, 100 * score.errors.wer, score.lookahead_ms))
    return {name: sorted(points, key=lambda point: point[2]) for name, points in lines.items()}


def draw_curve(scores: Sequence[Score], model: str, file: Path) -> None:
    """Draw word error rate over delay, a line for each set and decoder.

    Args:
        scores: As measured.
        model: Name of the model.
        file: A PNG or SVG, by its suffix; `require_curve` has allowed it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in curve_points(scores).items():
        delays_ms, rates, _ = zip(*points, strict=True)
        axes.plot(delays_ms, rates, marker="o", label=name)
        for delay_ms, rate, lookahead_ms in points:
            axes.annotate(f"{lookahead_ms} ms", (delay_ms, rate), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(title=model, xlabel="mean emission delay, ms of audio", ylabel="word error rate, %")
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)
