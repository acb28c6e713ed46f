"""The forms in which scores leave: a table for people, Markdown for a model card, JSON, and a curve."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from client.evaluate import NORMALISER, Delay, Score
from client.evaluate_translation import WORD_MS, TranslationScore
from client.latency import Lagging
from streaming.errors import DragomanError

_PACKAGES: Final = ("dragoman", "torch", "numpy", "jiwer", "num2words", "sacrebleu")
_PICTURES: Final = (".png", ".svg")
_NOTHING: Final = "–"
# A pipe has no width; a row of a table fits in this.
_PIPE_COLUMNS: Final = 200
_TRANSLATION_HEADINGS: Final = (
    *("segments", "left out", "BLEU", "chrF", "from text", "as text", "lag words", "lag ms", "live", "with computing"),
    *("delay ms", "NE", "push ms"),
)


@dataclass(frozen=True)
class Conditions:
    """What scores were measured with, and how busy the machine was.

    Attributes:
        command: The settings, by their names.
        model: What the recogniser calls itself; None where nothing was recognised.
        translator: What the translator calls itself; None where nothing was translated.
        threads: Threads of PyTorch.
        load_before: Load average over 1, 5 and 15 minutes before the first score.
        load_after: And after the last.
    """

    command: Mapping[str, Any]
    model: str | None
    translator: str | None
    threads: int
    load_before: tuple[float, float, float]
    load_after: tuple[float, float, float]

    @classmethod
    def now(
        cls,
        command: Mapping[str, Any],
        load_before: tuple[float, float, float],
        *,
        model: str | None = None,
        translator: str | None = None,
    ) -> Conditions:
        """The conditions after the last score."""
        return cls(command, model, translator, torch.get_num_threads(), load_before, os.getloadavg())


def percent(wer: float | None) -> str:
    """A word error rate in per cent to one decimal, or a dash where there is none."""
    return _NOTHING if wer is None else f"{100 * wer:.1f}"


def print_scores(scores: Sequence[Score], conditions: Conditions) -> None:
    """Print the scores as a table to standard output, and below it what they were measured with."""
    console = _console()
    table = Table("set", "decoder", title=conditions.model)
    for heading in ("look-ahead", "files", "left out", "words", "WER %", "sub/del/ins"):
        table.add_column(heading, justify="right")
    for heading in ("delay ms", "with computing ms", "× real time", "live, of a core"):
        table.add_column(heading, justify="right")
    for score in scores:
        table.add_row(*_cells(score))
    console.print(table)
    console.print(f"Delays are p50/p95/mean. Words are compared as {NORMALISER} writes them. {_load(conditions)}")


def print_translations(scores: Sequence[TranslationScore], conditions: Conditions) -> None:
    """Print scores of translations as a table to standard output, and below it what they were measured with."""
    console = _console()
    table = Table("set", "to", "latency", title=conditions.translator)
    for heading in _TRANSLATION_HEADINGS:
        table.add_column(heading, justify="right", overflow="fold")
    for score in scores:
        table.add_row(*_translation_cells(score))
    console.print(table)
    for signature in dict.fromkeys(_signatures(scores)):
        console.print(signature)
    console.print(
        f"Lag is AL/LAAL/DAL/YAAL; live, and with computing, LAAL in ms of the replayed segments. A word of text takes"
        f" {WORD_MS} ms. From text: BLEU of speech had it been recognised without error; as text: BLEU against what"
        f" would then have been written. Delay of source words and time of a push: p50/p95. NE: normalized erasure."
        f" {_load(conditions)}"
    )


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_COLUMNS
    return console


def _load(conditions: Conditions) -> str:
    load = " and ".join(f"{load[0]:.2f}" for load in (conditions.load_before, conditions.load_after))
    return f"Load average before and after: {load}; threads: {conditions.threads}."


def _signatures(scores: Sequence[TranslationScore]) -> Iterator[str]:
    for score in scores:
        for quality in (score.quality, score.agreement):
            if quality is not None:
                yield f"BLEU {quality.bleu_signature}"
                yield f"chrF2 {quality.chrf_signature}"


def _translation_cells(score: TranslationScore) -> list[str]:
    live, quality, from_text, agreement = score.live, score.quality, score.quality_from_text, score.agreement
    return [
        score.manifest,
        score.language,
        score.latency,
        str(score.segments),
        str(score.left_out),
        _decimal(quality.bleu if quality else None),
        _decimal(quality.chrf if quality else None),
        _decimal(from_text.bleu if from_text else None),
        _decimal(agreement.bleu if agreement else None),
        "/".join(map(_decimal, _lags(score.lag_words))),
        "/".join(map(_whole, _lags(score.lag_ms))),
        _whole(live.lag_ms.laal if live else None),
        _whole(live.total_lag_ms.laal if live else None),
        _NOTHING if score.delay is None else "/".join(map(_whole, (score.delay.p50_ms, score.delay.p95_ms))),
        _NOTHING if score.erasure is None else f"{score.erasure:.2f}",
        _NOTHING if live is None else "/".join(map(_decimal, (live.push_p50_ms, live.push_p95_ms))),
    ]


def _lags(lag: Lagging) -> tuple[float | None, ...]:
    return lag.al, lag.laal, lag.dal, lag.yaal


def _decimal(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.1f}"


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


def translation_table(scores: Sequence[TranslationScore]) -> str:
    """Scores of translations for a model card; lag in source words and ms without computing."""
    rows = [
        "| set | to | latency | segments | BLEU | chrF | AL / LAAL / DAL / YAAL (words) | LAAL (ms) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for s in scores:
        quality = (_decimal(value) for value in ((s.quality.bleu, s.quality.chrf) if s.quality else (None, None)))
        lags = " / ".join(map(_decimal, _lags(s.lag_words)))
        rows.append(
            f"| {s.manifest} | {s.language} | {s.latency} | {s.segments} | {' | '.join(quality)} | {lags}"
            f" | {_whole(s.lag_ms.laal)} |"
        )
    return "\n".join(rows)


def json_report(scores: Sequence[Score], conditions: Conditions, translations: Sequence[TranslationScore] = ()) -> str:
    """Everything about the scores as one JSON object.

    Its keys are ``command``, ``model``, ``translator``, ``normaliser``, ``versions`` (null for what runs without being
    installed), ``machine`` (``cpu_count``, ``threads``, ``load_before``, ``load_after``), ``scores``, a list with the
    fields of `client.evaluate.Score`, and ``translations``, with those of
    `client.evaluate_translation.TranslationScore`.
    """
    report = {
        "command": conditions.command,
        "model": conditions.model,
        "translator": conditions.translator,
        "normaliser": NORMALISER,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {
            "cpu_count": os.cpu_count(),
            "threads": conditions.threads,
            "load_before": conditions.load_before,
            "load_after": conditions.load_after,
        },
        "scores": [asdict(score) for score in scores],
        "translations": [asdict(score) for score in translations],
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


def translation_points(scores: Sequence[TranslationScore]) -> dict[str, list[tuple[float, float, str]]]:
    """What the curve of translations shows.

    Returns:
        For each set and language, ``"SET, LANGUAGE"``, a point for each latency, in the order of lag: length-adaptive
        average lagging in words, BLEU, latency. A score without either has none.
    """
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for score in scores:
        if score.quality is not None and score.lag_words.laal is not None:
            points = lines.setdefault(f"{score.manifest}, {score.language}", [])
            points.append((score.lag_words.laal, score.quality.bleu, score.latency))
    return {name: sorted(points) for name, points in lines.items()}


def draw_curve(
    scores: Sequence[Score], model: str | None, file: Path, translations: Sequence[TranslationScore] = ()
) -> None:
    """Draw word error rate over delay, a line for each set and decoder, and BLEU over lag, one for each language.

    Args:
        scores: As measured.
        model: Name of the model, for a title.
        file: A PNG or SVG, by its suffix; `require_curve` has allowed it.
        translations: As measured.
    """
    from matplotlib.figure import Figure

    curves: list[tuple[str | None, str, str, dict[str, list[tuple[float, float, str]]]]] = []
    if scores or not translations:
        points = {name: [(x, y, f"{ms} ms") for x, y, ms in line] for name, line in curve_points(scores).items()}
        curves.append((model, "mean emission delay, ms of audio", "word error rate, %", points))
    if translations:
        lags = translation_points(translations)
        curves.append((model, "length-adaptive average lagging, source words", "BLEU", lags))
    figure = Figure(figsize=(8 * len(curves), 5), layout="constrained")
    for axes, (title, x_label, y_label, lines) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True
    ):
        for name, line in lines.items():
            xs, ys, labels = zip(*line, strict=True)
            axes.plot(xs, ys, marker="o", label=name)
            for x, y, label in zip(xs, ys, labels, strict=True):
                axes.annotate(label, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.margins(0.1)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)
