"""What is exported is the run's average, and the card says what the evaluation measures on it."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from client.evaluate import read_all_sets
from client.evaluate_translation import score_text
from models.translator import OWN_ENDPOINT, TranslationConfig, load_translator
from streaming.errors import DragomanError
from tests import tiny
from tests.training.translation.test_train import CONFIG, RECIPE, TOKENIZER, Trainer, corpus
from training.translation.chunks import LEVEL_WORDS
from training.translation.data import Encoder, Packed
from training.translation.export import CURVE, export, run_export

NOTES = Path("training/translation/CARD.md")
pytest.importorskip("matplotlib")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of a few steps; the tokenizer stands beside it."""
    packed, _ = corpus(tmp_path)
    trainer = Trainer(CONFIG, RECIPE, Encoder(TOKENIZER).end_of_read, "cpu", bf16=False)
    batches = Packed(packed).batches(RECIPE.batch_ids, RECIPE.seed)
    for _ in range(40):
        trainer.train_step(next(batches), 1.0)
    (tmp_path / "run").mkdir()
    trainer.save(tmp_path / "run" / "last.pt")
    return tmp_path / "run"


def manifest(folder: Path) -> Path:
    lines = [
        {"text": "The speaker is talking.", "es": ["el hablante sigue hablando"], "de": ["der Sprecher redet"]},
        {"text": "Still talking!", "es": ["noch hablando", "sigue hablando"], "fr": ["nada"]},
        {"text": "Talking", "es": ["hablando"], "de": ["redet"]},
    ]
    file = folder / "few.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def test_the_folder_is_the_average_and_the_card_what_is_measured(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = run.parent / "model", manifest(run.parent)
    run_export(
        run, run.parent / "tokenizer.model", NOTES, out, [file], limit=2, max_context_tokens=90, threads=1,
        calibrate=file, calibrate_sentences=2,
    )  # fmt: skip
    translator = load_translator(out)
    thresholds = translator.config.read_thresholds
    assert {(x, level) for x in thresholds for level in thresholds[x]} == set(product(("es", "de", "fr"), LEVEL_WORDS))
    assert translator.config == TranslationConfig(
        max_context_tokens=90, endpoint=OWN_ENDPOINT, read_thresholds=thresholds
    )
    average = torch.load(run / "last.pt", weights_only=True)["average"]
    for name, tensor in load_translator(out, dtype="bfloat16").llm.state_dict().items():
        if tensor.numel():  # a frozen model has given up its matrices
            torch.testing.assert_close(tensor, average[name].bfloat16(), rtol=0, atol=0)

    card = (out / "README.md").read_text(encoding="utf-8")
    assert "made 40 more" in card and "<!--" not in card and (out / CURVE).is_file()
    assert card.count("| few, spoken | ") == 3 * 6 and card.count("| few, written | ") == 3
    assert "BLEU `nrefs:var|case:mixed" in card and "CC BY 2.0" in card
    (texts,) = read_all_sets([file], 2)
    for score, _ in score_text(translator, texts, ["es", "fr"], "low", spoken=True):
        assert score.quality is not None
        row = next(line for line in card.splitlines() if f"| few, spoken | {score.language} | low | " in line)
        assert f"| {score.segments} | {score.quality.bleu:.1f} | {score.quality.chrf:.1f} | " in row
    assert "| few, spoken | es | low |" in capsys.readouterr().out
    assert len(json.loads((run / "scores.json").read_text())) == 21


def test_what_does_not_belong_together_is_refused(run: Path) -> None:
    other = run.parent / "other.model"
    other.write_bytes(tiny.tokenizer())
    with pytest.raises(DragomanError, match=r"other.model has 64 pieces and .*last.pt 309; give the one"):
        export(run, other, run.parent / "model", "", TranslationConfig())
    speech = run.parent / "speech.jsonl"
    speech.write_text('{"audio": "a.wav", "text": "hi"}\n', encoding="utf-8")
    with pytest.raises(DragomanError, match="speech is a manifest of speech"):
        run_export(run, run.parent / "tokenizer.model", NOTES, run.parent / "model", [speech])
    assert not (run.parent / "model").exists()
