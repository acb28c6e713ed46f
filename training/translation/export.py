"""Turns a training checkpoint into a translator's folder with a card whose scores were measured on what is in it.

    python -m training.translation.export --run runs/mt --tokenizer tokenizer.model --calibrate corpus/dev.jsonl \
        --notes training/translation/CARD.md --manifest corpus/test.jsonl --out models/en-esdefr-small

With ``--calibrate``, the probabilities from which on the model writes are first set by other sentences
(:mod:`training.translation.calibrate`). Every manifest is read as a recogniser would write it, at each latency, and
offline also as it is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from client.evaluate import LANGUAGES, SpeechSet, TextSet, read_all_sets
from client.evaluate_translation import Scored, TranslationScore, translation_jobs
from client.progress import counted
from client.report import draw_curve, require_curve, translation_table
from models.llm_config import LlmConfig
from models.tokenizer import SentencePieceTokenizer
from models.translator import OWN_ENDPOINT, TranslationConfig, Translator, load_translator, save_translator
from streaming.errors import DragomanError
from training.translation.calibrate import calibrated
from training.translation.chunks import OFFLINE
from training.translation.train import read_tasks

CURVE = "curve.svg"
SCORES_MARK = "<!-- scores -->"
SIGNATURES_MARK = "<!-- signatures -->"
STEPS_MARK = "<!-- steps -->"
#: 99 of 100 sequences of training have no more ids; what a model has not seen it does badly.
MAX_CONTEXT_TOKENS = 150


def export(run: Path, tokenizer: Path, out: Path, card: str, translation: TranslationConfig) -> None:
    """Writes the averaged weights of ``run/last.pt`` in bf16.

    Args:
        run: Folder of a training run.
        tokenizer: The SentencePiece model that it was trained with.
        out: The model folder.
        card: Its model card, Markdown.
        translation: How the model is made to interpret.

    Raises:
        DragomanError: ``bad_tokenizer`` if the tokenizer has not as many pieces as the model.
    """
    state = torch.load(run / "last.pt", map_location="cpu", weights_only=True)
    config, model = LlmConfig.from_hf(state["config"]), tokenizer.read_bytes()
    if (size := SentencePieceTokenizer(model).size) != config.vocab_size:
        raise DragomanError(
            "bad_tokenizer",
            f"{tokenizer} has {size} pieces and {run / 'last.pt'} {config.vocab_size}; give the one that it was"
            " trained with",
        )
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in state["average"].items()}
    save_translator(out, config, weights, model, translation)
    (out / "README.md").write_text(card.replace(STEPS_MARK, f"{state['step']:,}"), encoding="utf-8")


def read_texts(manifests: Sequence[Path], limit: int | None) -> list[TextSet]:
    """Reads manifests of text.

    Raises:
        DragomanError: As `read_all_sets`; ``no_references`` for a manifest of speech.
    """
    sets = []
    for one in read_all_sets(manifests, limit):
        if isinstance(one, SpeechSet):
            raise DragomanError(
                "no_references",
                f"{one.name} is a manifest of speech, and the card has scores of text; score speech with dragoman eval",
            )
        sets.append(one)
    return sets


def scoring_jobs(translator: Translator, sets: Sequence[TextSet], batch_size: int) -> list[Callable[[], list[Scored]]]:
    """What there is to score: each set in spoken form at every latency, and as it is written offline."""
    jobs: list[Callable[[], list[Scored]]] = []
    for one in sets:
        spoken, written = replace(one, name=f"{one.name}, spoken"), replace(one, name=f"{one.name}, written")
        jobs += translation_jobs(translator, [spoken], (), ["all"], spoken=True, batch_size=batch_size)
        jobs += translation_jobs(translator, [written], (), [OFFLINE], batch_size=batch_size)
    return jobs


def signatures(scores: Iterable[TranslationScore]) -> str:
    """How sacrebleu computed BLEU and chrF, each way once."""
    found = dict.fromkeys(
        text
        for score in scores
        if (quality := score.quality)
        for text in (f"BLEU `{quality.bleu_signature}`", f"chrF `{quality.chrf_signature}`")
    )
    return ", ".join(found)


def run_export(
    run: Annotated[Path, typer.Option(help="Folder of a training run.")],
    tokenizer: Annotated[Path, typer.Option(help="SentencePiece model that it was trained with.")],
    notes: Annotated[Path, typer.Option(help=f"Text of the card; {SCORES_MARK} becomes the table of scores.")],
    out: Annotated[Path, typer.Option(help="The model folder.")],
    manifest: Annotated[list[Path], typer.Option(help="Text to score; may be given several times.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Score the first so many sentences of each.")] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Sentences with references, as --valid of training, to find the thresholds on.")
    ] = None,
    calibrate_sentences: Annotated[int, typer.Option(min=1, help="How many of them.")] = 300,
    max_context_tokens: Annotated[
        int, typer.Option(help="Tokens after which the model forgets the oldest ones.")
    ] = MAX_CONTEXT_TOKENS,
    batch_size: Annotated[int, typer.Option(min=1, help="Sentences at a time.")] = 32,
    threads: int = 2,
) -> None:
    """Exports, scores every manifest in every language at every latency, and writes card and curve."""
    require_curve(out.parent / CURVE)
    torch.set_num_threads(threads)
    sets = read_texts(manifest, limit)
    card, translation = notes.read_text(encoding="utf-8"), TranslationConfig(endpoint=OWN_ENDPOINT)
    translation = replace(translation, max_context_tokens=max_context_tokens)
    export(run, tokenizer, out, card, translation)
    if calibrate is not None:
        tasks, pieces = (
            read_tasks(calibrate, LANGUAGES, calibrate_sentences),
            SentencePieceTokenizer(tokenizer.read_bytes()),
        )
        thresholds = calibrated(load_translator(out).llm, pieces, tasks)
        export(run, tokenizer, out, card, replace(translation, read_thresholds=thresholds))
    translator = load_translator(out)
    scores = [score for job in counted(scoring_jobs(translator, sets, batch_size)) for score, _ in job()]
    (run / "scores.json").write_text(json.dumps([asdict(s) for s in scores], indent=2) + "\n", encoding="utf-8")
    draw_curve([], translator.name, out / CURVE, scores)
    table, card = translation_table(scores), (out / "README.md").read_text(encoding="utf-8")
    card = card.replace(SCORES_MARK, table).replace(SIGNATURES_MARK, signatures(scores))
    (out / "README.md").write_text(card, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    typer.run(run_export)
