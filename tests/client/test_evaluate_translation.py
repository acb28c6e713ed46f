"""Scores of translations are those of plain sessions, and other people's tools compute the same from the log."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count, zip_longest
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
import soundfile
from typer.testing import CliRunner, Result

import client.evaluate_translation
import models.checkpoint
import models.translator
from client.cli import app
from client.evaluate import Sentence, SpeechSet, TextSet, read_all_sets
from client.evaluate_translation import WORD_MS, Scored, score_speech, score_text, translation_jobs
from client.latency import write_log
from streaming.audio import AudioFormat
from streaming.errors import DragomanError
from streaming.events import SessionClosed, TranscriptDelta, TranslationDelta
from streaming.session import Session, SessionConfig
from streaming.text_session import TextSession
from tests import tiny

RECOGNIZER = tiny.recognizer(2)
TRANSLATOR = tiny.translator(2)
TEXTS = [
    {"text": "the Speaker is still talking, and nothing", "es": ["el hablante sigue", "hablando y nada"], "de": "der"},
    {"text": "words go on", "es": ["nada se retira"]},
    {"en": "once", "es": "hablando", "de": ["noch", "nur", "redet"]},
    {"text": "and/or 😀", "de": ["der Sprecher redet noch"]},
    {"text": "while words go on the speaker is still talking", "es": ["y nada se retira mientras el hablante sigue"]},
]
SHAPES = ((16_000, 1, 2.5), (44_100, 2, 3.1), (8_000, 1, 1.7), (16_000, 1, 4.0))


def write(path: Path, records: Sequence[object]) -> Path:
    lines = (record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("text") / "texts.jsonl", TEXTS)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of noise that swells and fades."""
    folder = tmp_path_factory.mktemp("speech")
    records = []
    for i, (rate_hz, channels, seconds) in enumerate(SHAPES):
        rng = np.random.default_rng(i)
        swell = np.repeat(rng.random(100), rate_hz // 16)[: int(seconds * rate_hz), None]
        soundfile.write(folder / f"{i}.wav", rng.normal(0, 0.1, (len(swell), channels)) * swell, rate_hz)
        records.append({"audio": f"{i}.wav", "text": "Words, go on!", "es": ["nada se retira", "sigue"]})
    records[1]["de"] = ["noch"]
    return write(folder / "talks.jsonl", records)


def text_set(path: Path) -> TextSet:
    (one,) = read_all_sets([path])
    assert isinstance(one, TextSet)
    return one


def speech_set(path: Path) -> SpeechSet:
    (one,) = read_all_sets([path])
    assert isinstance(one, SpeechSet)
    return one


def bleu(texts: list[str], references: list[Sequence[str]]) -> float:
    return float(sacrebleu.corpus_bleu(texts, list(zip_longest(*references))).score)


def read_out(text: str, language: str, latency: str) -> list[tuple[str, int]]:
    """The words of a translation, each with the number of source words after which it came."""
    session, told = TextSession(TRANSLATOR, [language], latency), []
    words = text.split()
    for i, events in enumerate([*map(session.push, words), session.finish()]):
        told += [(e.delta, min(i + 1, len(words))) for e in events if isinstance(e, TranslationDelta)]
    return told


def timed_words(told: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Pieces to words, by the naive way: each character has a time, and a word that of its last."""
    characters = [(character, at) for delta, at in told for character in delta] + [(" ", -1)]
    words, word = [], ""
    for (character, at), (after, _) in zip(characters, characters[1:], strict=False):
        word = "" if character.isspace() else word + character
        if word and after.isspace():
            words.append((word, at))
    return words


# ------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("latency", ["low", "offline"])
def test_the_figures_of_text_are_those_of_plain_sessions(texts: Path, latency: str) -> None:
    results = score_text(TRANSLATOR, text_set(texts), ["es", "de"], latency)
    for language, (score, log) in zip(("es", "de"), results, strict=True):
        records = [record for record in TEXTS if language in record]
        sources = [str(record.get("text", record.get("en"))) for record in records]
        references = [[ref] if isinstance(ref := record[language], str) else ref for record in records]
        told = [read_out(source, language, latency) for source in sources]
        assert [instance.prediction for instance in log] == ["".join(delta for delta, _ in one).strip() for one in told]
        assert [list(instance.delays) for instance in log] == [[at for _, at in timed_words(one)] for one in told]
        assert [(i.source, i.reference, i.source_length) for i in log] == [
            (source, refs[0], len(source.split())) for source, refs in zip(sources, references, strict=True)
        ]
        assert score.quality is not None
        assert score.quality.bleu == pytest.approx(bleu([i.prediction for i in log], references))
        assert "nrefs:var" in score.quality.bleu_signature
        assert (score.segments, score.left_out, score.erasure) == (len(records), len(TEXTS) - len(records), 0)
        assert score.live is None
        for in_words, in_ms in zip(
            (score.lag_words.al, score.lag_words.laal, score.lag_words.dal, score.lag_words.yaal),
            (score.lag_ms.al, score.lag_ms.laal, score.lag_ms.dal, score.lag_ms.yaal),
            strict=True,
        ):
            assert in_ms == (None if in_words is None else pytest.approx(in_words * WORD_MS))
        if latency == "offline":
            assert all(delay == i.source_length for i in log for delay in i.delays)
    assert sum(len(i.delays) for _, log in results for i in log) > 5, "the test is empty if nothing is written"


def test_the_batch_size_and_the_other_languages_change_nothing(texts: Path) -> None:
    (one,) = score_text(TRANSLATOR, text_set(texts), ["de"], "low", batch_size=1)
    two, _ = score_text(TRANSLATOR, text_set(texts), ["de", "es"], "low", batch_size=2)
    three = score_text(TRANSLATOR, text_set(texts), ["es", "de"], "low", batch_size=16)[1]
    assert one == two == three


def test_text_as_a_recogniser_writes_it(texts: Path) -> None:
    results = score_text(TRANSLATOR, text_set(texts), ["es", "de"], "medium", spoken=True)
    assert [i.source for i in results[0][1]][:2] == ["the speaker is still talking and nothing", "words go on"]
    assert results[1][1][2].source == "and/or 😀", "what has no such form is read as it is"


@pytest.mark.parametrize("push_ms", [100.0, 700.0])
def test_live_text_adds_the_backlog(texts: Path, monkeypatch: pytest.MonkeyPatch, push_ms: float) -> None:
    ticks = count()
    clock = SimpleNamespace(perf_counter=lambda: next(ticks) * push_ms / 1e3, process_time=time.process_time)
    monkeypatch.setattr(client.evaluate_translation, "time", clock)
    score, log = score_text(TRANSLATOR, text_set(texts), ["es"], "low", replay=2)[0]
    assert score.live is not None
    assert (score.live.segments, score.live.push_p50_ms, score.live.push_p95_ms) == (
        2, pytest.approx(push_ms), pytest.approx(push_ms),
    )  # fmt: skip
    assert [bool(i.elapsed) for i in log] == [bool(log[0].delays), False, bool(log[2].delays), False]
    for i in (0, 2):
        words = log[i].source.split()
        # Each push takes push_ms, and what exceeds the time of a word waits; the end comes with the last word.
        backlogs = [push_ms + push * max(0.0, push_ms - WORD_MS) for push in range(len(words))]
        session, expected = TextSession(TRANSLATOR, ["es"], "low"), []
        for push, events in enumerate([*map(session.push, words), session.finish()]):
            late_ms = backlogs[push] if push < len(words) else backlogs[-1] + push_ms
            read_ms = min(push + 1, len(words)) * WORD_MS
            for event in events:
                if isinstance(event, TranslationDelta):
                    expected += [(read_ms + late_ms) / WORD_MS] * len(event.delta.split())
        assert list(log[i].elapsed) == pytest.approx(expected)


def omnisteval_scores(log: Scored, tmp_path: Path) -> dict[str, float]:
    pytest.importorskip("omnisteval")
    from omnisteval.io import load_shortform_instances
    from omnisteval.scoring import evaluate_instances

    write_log(log[1], tmp_path / "log.jsonl")
    read = load_shortform_instances(str(tmp_path / "log.jsonl"), None, "delays", "elapsed")
    return dict(evaluate_instances(read, is_longform=False)[0])


def test_omnisteval_finds_the_same_in_the_log(texts: Path, tmp_path: Path) -> None:
    single = [
        Sentence(s.text, {"es": s.translations["es"][:1]}) for s in text_set(texts).sentences if "es" in s.translations
    ]
    (result,) = score_text(TRANSLATOR, TextSet("x", tuple(single)), ["es"], "low", replay=9)
    score, theirs = result[0], omnisteval_scores(result, tmp_path)
    assert score.quality is not None and score.live is not None
    assert (score.quality.bleu, score.quality.chrf) == (pytest.approx(theirs["bleu"]), pytest.approx(theirs["chrf"]))
    for name in ("al", "laal", "dal", "yaal", "ap"):
        ours = getattr(score.lag_words, name)
        assert (ours is None and np.isnan(theirs[name])) or ours == pytest.approx(theirs[name])
    assert score.live.total_lag_ms.laal == pytest.approx(theirs["ca_laal"] * WORD_MS)


def test_a_translator_that_says_nothing_scores_nothing(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.evaluate_translation, "_translations", lambda events: [])
    score, log = score_text(TRANSLATOR, text_set(texts), ["es"], "low", replay=2)[0]
    assert score.quality is not None
    assert (score.quality.bleu, score.lag_words.laal, score.erasure) == (0, None, None)
    assert [i.prediction for i in log] == [""] * 4


# ----------------------------------------------------------------------------------------------------------- speech


def test_the_figures_of_speech_are_those_of_plain_sessions(speech: Path) -> None:
    config = SessionConfig(decoder="ctc", languages=("es", "de"), latency="low")
    results = score_speech(RECOGNIZER, TRANSLATOR, speech_set(speech), config, batch_size=3)
    (score, log), (german, german_log) = results
    delays_ms: list[int] = []
    for i, (instance, (rate_hz, channels, _)) in enumerate(zip(log, SHAPES, strict=True)):
        samples, _ = soundfile.read(speech.parent / f"{i}.wav", dtype="float32", always_2d=True)
        own = replace(config, audio=AudioFormat("f32le", rate_hz, channels))
        session = Session(RECOGNIZER, own, TRANSLATOR)
        before = [e for start in range(0, len(samples), 999) for e in session.push(samples[start : start + 999])]
        events = before + session.finish()
        spanish = [e for e in events if isinstance(e, TranslationDelta) and e.language == "es"]
        ends_ms = [word.end_ms for e in events if isinstance(e, TranscriptDelta) for word in e.words]
        closed = events[-1]
        assert isinstance(closed, SessionClosed)
        assert instance.source_length == closed.audio_ms
        assert instance.prediction == "".join(e.delta for e in spanish).strip()
        expected = timed_words([(e.delta, e.emitted_ms or 0) for e in spanish])
        assert list(instance.delays) == [at for _, at in expected]
        covered = 0
        for e in spanish:
            if e.delta:
                if e in before:
                    delays_ms += [(e.emitted_ms or 0) - ms for ms in ends_ms[covered : e.source_words[1] + 1]]
                covered = e.source_words[1] + 1
    assert score.delay is not None
    assert score.delay.words_timed == len(delays_ms) > 5
    assert (score.delay.p50_ms, score.delay.mean_ms) == (np.median(delays_ms), pytest.approx(np.mean(delays_ms)))
    assert (score.segments, score.recognition) == (4, "ctc, 480 ms")
    assert (german.segments, german.left_out, len(german_log)) == (1, 3, 1)
    from_text = [read_out("words go on", "es", "low")] * 4
    assert score.quality_from_text is not None and score.quality is not None
    references = [["nada se retira", "sigue"]] * 4
    texts = ["".join(delta for delta, _ in told) for told in from_text]
    assert score.quality_from_text.bleu == pytest.approx(bleu(texts, references))
    assert score.quality.bleu == pytest.approx(bleu([i.prediction for i in log], references))
    assert score.agreement is not None
    assert score.agreement.bleu == pytest.approx(bleu([i.prediction for i in log], [[text] for text in texts]))


def test_speech_without_references_is_scored_against_the_translation_of_its_text(speech: Path) -> None:
    config = SessionConfig(decoder="ctc", languages=("es",), latency="low")
    with_references = speech_set(speech)
    without = replace(with_references, utterances=[replace(u, translations={}) for u in with_references.utterances])
    (job,) = translation_jobs(TRANSLATOR, [without], ["es"], ["low"], recognizer=RECOGNIZER, configs=[config])
    ((score, log),) = job()
    ((expected, known),) = score_speech(RECOGNIZER, TRANSLATOR, with_references, config)
    assert (score.segments, score.left_out, score.quality, score.quality_from_text) == (4, 0, None, None)
    assert score.agreement == expected.agreement is not None
    assert [line.prediction for line in log] == [line.prediction for line in known]
    assert [line.reference for line in log] == ["".join(text for text, _ in read_out("words go on", "es", "low"))] * 4
    assert not translation_jobs(TRANSLATOR, [without], [], ["low"], recognizer=RECOGNIZER, configs=[config])


def test_live_speech(speech: Path, tmp_path: Path) -> None:
    config = SessionConfig(decoder="ctc", languages=("es",), latency="low", max_lookahead_ms=80)
    (result,) = score_speech(RECOGNIZER, TRANSLATOR, speech_set(speech), config, replay=99)
    score, log = result
    assert score.live is not None and score.live.delay is not None and score.live.total_delay is not None
    assert score.live.segments == 4
    assert score.live.lag_ms == score.lag_ms
    assert score.live.delay == score.delay
    assert (score.live.total_delay.p50_ms or 0) > (score.live.delay.p50_ms or 0)
    assert (score.live.real_time_factor or 0) > 0
    assert all(late > early for i in log for early, late in zip(i.delays, i.elapsed, strict=True))
    theirs = omnisteval_scores(result, tmp_path)
    assert score.lag_ms.laal == pytest.approx(theirs["laal"])
    assert score.live.total_lag_ms.dal == pytest.approx(theirs["ca_dal"])


# ---------------------------------------------------------------------------------------------------------- command


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.checkpoint, "load_recognizer", lambda path, **_: RECOGNIZER)
    monkeypatch.setattr(models.translator, "load_translator", lambda path, **_: TRANSLATOR)
    monkeypatch.setattr(models.translator, "EMBEDDED_TRANSLATOR", Path("no seed of another model"))


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def cells(result: Result) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("│").split("│")] for row in result.stdout.splitlines() if "│" in row]


def test_text_needs_no_recogniser(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.checkpoint, "load_recognizer", None)
    report, log = tmp_path / "report.json", tmp_path / "new" / "log"
    result = evaluate(texts, "--latency", "low,offline", "--replay", 2, "--json", report, "--log", log)
    assert (result.exit_code, result.stderr) == (0, "")
    expected = [
        scored
        for level in ("low", "offline")
        for scored in score_text(TRANSLATOR, text_set(texts), ["es", "de"], level)
    ]
    read = json.loads(report.read_text())
    assert (read["model"], read["translator"], read["scores"]) == (None, "tiny", [])
    assert [(s["language"], s["latency"], s["quality"]["bleu"]) for s in read["translations"]] == [
        (s.language, s.latency, s.quality and s.quality.bleu) for s, _ in expected
    ]
    assert read["translations"][0]["live"]["segments"] == 2
    assert sorted(path.name for path in log.iterdir()) == sorted(
        f"texts.{language}.{level}.jsonl" for language in ("es", "de") for level in ("low", "offline")
    )
    lines = [json.loads(line) for line in (log / "texts.es.low.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["prediction"] for line in lines] == [i.prediction for i in expected[0][1]]
    rows = [row for row in cells(result) if row[0] == "texts"]
    assert [row[1:5] for row in rows] == [
        [s.language, s.latency, str(s.segments), str(s.left_out)] for s, _ in expected
    ]
    assert "nrefs:var|" in result.stdout
    assert "Load average" in result.stdout


def test_speech_is_translated_where_it_is_asked_for(speech: Path, texts: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = (speech, texts, "--to", "es", "--max-lookahead-ms", 0, "--replay", 1, "--json", report, "--log", tmp_path)
    result = evaluate(*command)
    assert (result.exit_code, result.stderr) == (0, "")
    read = json.loads(report.read_text())
    assert [s["manifest"] for s in read["scores"]] == ["talks"]
    assert [(s["manifest"], s["medium"], s["latency"]) for s in read["translations"]] == [
        ("talks", "speech", "medium"),
        ("texts", "text", "medium"),
    ]
    assert (tmp_path / "talks.es.medium.rnnt-0-ms.jsonl").exists()
    without = evaluate(speech, "--replay", 0)
    assert without.exit_code == 0
    assert "BLEU" not in without.stdout


def test_each_set_is_scored_at_each_latency_in_the_languages_that_it_has(texts: Path, speech: Path) -> None:
    sets = read_all_sets([texts, speech])
    configs = [SessionConfig(), SessionConfig(decoder="ctc")]

    def jobs(languages: Sequence[str], *latencies: str) -> int:
        return len(translation_jobs(TRANSLATOR, sets, languages, latencies, recognizer=RECOGNIZER, configs=configs))

    assert jobs((), "low", "low", "high") == 2 * (1 + 2)
    assert jobs(("es",), "all") == 6 * (1 + 2)
    only = replace(sets[0], sentences=sets[0].sentences[1:2])  # type: ignore[type-var,union-attr]
    assert len(translation_jobs(TRANSLATOR, [only], ("es",), ("low",))) == 1
    with pytest.raises(DragomanError, match="there are references in es only"):
        translation_jobs(TRANSLATOR, [only], ("de",), ("low",))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to", "xx"], "cannot write the language 'xx'"),
        (["--to", "fr"], "texts: no reference in 'fr'; there are references in de, es only"),
        (["--latency", "low,slow"], "cannot translate at the latency 'slow'"),
        (["--curve", "curve.gif"], ".png or .svg"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_measured(
    texts: Path, arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.evaluate_translation, "score_text", None)
    result = evaluate(texts, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(rf"dragoman: [^\n]*{re.escape(sentence)}[^\n]*\n", result.stderr)


@pytest.mark.parametrize(
    "line", [{"text": "x"}, {"audio": "x.wav", "text": "x", "es": "y"}, {"es": "y"}, {"text": 3, "es": "y"}]
)
def test_a_line_that_is_no_text_with_a_translation(line: dict[str, object], tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.jsonl", [{"text": "x", "es": "y"}, line])
    result = evaluate(path)
    assert result.exit_code == 2
    assert re.fullmatch(rf"dragoman: {re.escape(str(path))}, line 2 is no line of a manifest[^\n]*\n", result.stderr)


def test_recordings_that_cannot_be_read_are_named_and_the_others_translated(speech: Path, tmp_path: Path) -> None:
    good = {"audio": str(speech.parent / "0.wav"), "text": "words", "es": "nada"}
    path = write(tmp_path / "damaged.jsonl", [{"audio": "gone.wav", "text": "x", "es": "y"}, good])
    report = tmp_path / "report.json"
    result = evaluate(path, "--to", "es", "--json", report)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and "gone.wav: there is no such file" in result.stderr
    (score,) = json.loads(report.read_text())["translations"]
    assert (score["segments"], score["left_out"]) == (1, 1)
