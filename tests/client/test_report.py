"""The forms of the scores: a report that can be parsed, a card's table, and a curve that shows the right points."""

from __future__ import annotations

import json
import os
import re
import sys
import xml.etree.ElementTree
from pathlib import Path

import av
import numpy as np
import pytest

from client.evaluate import Delay, Replay, Score, WordErrors
from client.evaluate_translation import Quality, TranslationScore
from client.latency import Lagging
from client.report import (
    Conditions,
    curve_points,
    draw_curve,
    json_report,
    markdown_table,
    print_translations,
    require_curve,
    translation_points,
    translation_table,
)
from streaming.errors import DragomanError

LIVE = Replay(2, 8.0, 0.1, Delay(9, 2, 150.0, 400.0, 200.0), Delay(9, 2, 160.5, 420.5, 215.5))
CONDITIONS = Conditions({"manifests": [Path("dev.jsonl")]}, "tiny", "es-tiny", 2, (0.5, 0.4, 0.3), (1.5, 0.6, 0.4))


def a_score(lookahead_ms: int, mean_ms: float | None, wer: float | None, **other: object) -> Score:
    delay = Delay(0, 3) if mean_ms is None else Delay(20, 3, mean_ms - 10, 2 * mean_ms, mean_ms)
    fields = {"manifest": "dev", "decoder": "rnnt", "adaptive": False, "replay": LIVE, "problems": ()}
    return Score(
        lookahead_ms=lookahead_ms, utterances=4, left_out=1, errors=WordErrors(40, 5, 3, 2, wer), delay=delay,
        audio_s=12.5, times_real_time=40.0, **{**fields, **other},
    )  # type: ignore[arg-type]  # fmt: skip


SCORES = [
    a_score(480, 420.0, 0.2),
    a_score(480, 400.0, 0.25, decoder="ctc", replay=None),
    a_score(0, 160.0, 0.3),
    a_score(80, None, 0.4),
    a_score(0, 150.0, 0.9, manifest="other"),
    a_score(0, 150.0, None, manifest="gone", problems=("x.wav: there is no such file",)),
]


def a_translation(latency: str, laal: float | None, bleu: float | None, **other: object) -> TranslationScore:
    lag = Lagging() if laal is None else Lagging(laal - 0.5, laal, None, laal + 1, 0.5)
    quality = None if bleu is None else Quality(bleu, bleu + 20, "nrefs:var|tok:13a", "nrefs:var|nc:6")
    fields = {"manifest": "dev", "medium": "text", "language": "es", "recognition": None, "delay": None, "live": None}
    return TranslationScore(
        latency=latency, segments=4, left_out=1, quality=quality, quality_from_text=None, agreement=None, lag_words=lag,
        lag_ms=Lagging(laal=None if laal is None else 400 * laal), erasure=0.0, **{**fields, **other},
    )  # type: ignore[arg-type]  # fmt: skip


TRANSLATIONS = [
    a_translation("high", 6.0, 33.0),
    a_translation("low", 2.0, 25.0),
    a_translation("low", 2.5, 18.0, language="de", manifest="talks", medium="speech", recognition="rnnt, 480 ms"),
    a_translation("medium", None, 30.0),
    a_translation("medium", None, None, language="fr"),
]


def test_the_json_report_has_what_it_promises() -> None:
    report = json.loads(json_report(SCORES, CONDITIONS, TRANSLATIONS))
    assert list(report) == [
        *("command", "model", "translator", "normaliser", "versions", "machine", "scores", "translations")
    ]
    assert report["translator"] == "es-tiny"
    assert report["translations"][1]["lag_words"] == {"al": 1.5, "laal": 2.0, "yaal": None, "dal": 3.0, "ap": 0.5}
    assert report["translations"][2]["recognition"] == "rnnt, 480 ms"
    assert report["command"] == {"manifests": ["dev.jsonl"]}
    assert report["model"] == "tiny"
    assert report["normaliser"] == "client.normalize.normalize_transcript"
    assert {"python", "dragoman", "torch", "jiwer"} <= set(report["versions"])
    assert report["machine"] == {
        "cpu_count": os.cpu_count(), "threads": 2, "load_before": [0.5, 0.4, 0.3], "load_after": [1.5, 0.6, 0.4],
    }  # fmt: skip
    first, second, *_, last = report["scores"]
    assert first["errors"] == {"words": 40, "substitutions": 5, "deletions": 3, "insertions": 2, "wer": 0.2}
    assert first["delay"] == {
        "words_timed": 20, "words_at_end": 3, "p50_ms": 410.0, "p95_ms": 840.0, "mean_ms": 420.0,
    }  # fmt: skip
    assert first["replay"]["total"]["p50_ms"] == 160.5
    assert (first["manifest"], first["decoder"], first["lookahead_ms"]) == ("dev", "rnnt", 480)
    assert second["replay"] is None
    assert (last["errors"]["wer"], last["problems"]) == (None, ["x.wav: there is no such file"])


def test_the_table_of_a_card() -> None:
    rows = markdown_table(SCORES).splitlines()
    assert rows[0].endswith("| WER | delay p50 / p95 (ms) |")
    assert rows[2] == "| dev | 4 | 40 | rnnt | 480 ms | 20.0 % | 410 / 840 |"
    assert rows[5].endswith("| 40.0 % | – / – |")
    assert len({row.count("|") for row in rows}) == 1
    assert len(re.findall(r"\| (?:rnnt|ctc) \| \d+ ms \| [\d.]+ % \|", "\n".join(rows))) == 5


def test_the_table_of_translations() -> None:
    rows = translation_table(TRANSLATIONS).splitlines()
    assert rows[3] == "| dev | es | low | 4 | 25.0 | 45.0 | 1.5 / 2.0 / 3.0 / – | 800 |"
    assert rows[6] == "| dev | fr | medium | 4 | – | – | – / – / – / – | – |"
    assert len({row.count("|") for row in rows}) == 1


def test_the_printed_table_of_translations(capsys: pytest.CaptureFixture[str]) -> None:
    print_translations(TRANSLATIONS, CONDITIONS)
    shown = capsys.readouterr().out
    assert "1.5/2.0/3.0/–" in shown
    assert shown.count("nrefs:var|tok:13a") == 1
    assert "threads: 2" in shown


def test_the_points_of_a_curve_of_translations() -> None:
    assert translation_points(TRANSLATIONS) == {
        "dev, es": [(2.0, 25.0, "low"), (6.0, 33.0, "high")],
        "talks, de": [(2.5, 18.0, "low")],
    }


def test_the_points_of_a_curve() -> None:
    assert curve_points(SCORES) == {
        "dev, rnnt": [(160.0, 30.0, 0), (420.0, 20.0, 480)],
        "dev, ctc": [(400.0, 25.0, 480)],
        "other, rnnt": [(150.0, 90.0, 0)],
    }


def test_a_curve_as_png(tmp_path: Path) -> None:
    file = tmp_path / "curve.PNG"
    require_curve(file)
    draw_curve(SCORES, "tiny", file)
    with av.open(str(file)) as picture:
        pixels = next(picture.decode(video=0)).to_ndarray(format="rgb24")
    assert min(pixels.shape[:2]) > 500
    colours = {tuple(colour) for colour in np.unique(pixels.reshape(-1, 3), axis=0)}
    # matplotlib's first three colours: a line for each set and decoder
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours


def test_a_curve_as_svg(tmp_path: Path) -> None:
    file = tmp_path / "curve.svg"
    draw_curve(SCORES, "tiny", file)
    root = xml.etree.ElementTree.parse(file).getroot()
    assert root.tag.endswith("svg")
    assert len(list(root.iter())) > 100
    draw_curve([], "tiny", file)  # nothing to show is no error
    draw_curve(SCORES, "tiny", file, TRANSLATIONS)
    text = file.read_text()
    assert "average lagging" in text and "word error rate" in text
    draw_curve([], "tiny", file, TRANSLATIONS)
    assert "word error rate" not in file.read_text()


def test_a_curve_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DragomanError, match="pip install matplotlib"):
        require_curve(tmp_path / "curve.png")
