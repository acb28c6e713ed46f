"""The translator in the repository: whole, described by its card, and able to interpret."""

from __future__ import annotations

import json
import re

import pytest

from models.translator import EMBEDDED_TRANSLATOR, LATENCIES, Translator, load_translator
from streaming.events import Event, TranslationDelta
from streaming.text_session import TextSession

pytestmark = pytest.mark.model
LANGUAGES = ("es", "de", "fr")


@pytest.fixture(scope="module")
def translator() -> Translator:
    return load_translator()


def translated(events: list[Event]) -> dict[str, str]:
    texts = dict.fromkeys(LANGUAGES, "")
    for event in events:
        if isinstance(event, TranslationDelta):
            texts[event.language] += event.delta
    return texts


def test_the_folder_is_whole_and_small() -> None:
    sizes = {file.name: file.stat().st_size for file in EMBEDDED_TRANSLATOR.iterdir()}
    needed = {"config.json", "model.safetensors", "tokenizer.model", "README.md", "curve.svg"}
    assert needed <= set(sizes) <= needed | {"drafts.safetensors", "heads.safetensors"}
    assert sum(sizes.values()) < 32e6
    config = json.loads((EMBEDDED_TRANSLATOR / "config.json").read_text())
    assert config["name"] == EMBEDDED_TRANSLATOR.name


def test_the_card_has_measured_scores() -> None:
    card = (EMBEDDED_TRANSLATOR / "README.md").read_text()
    assert "<!--" not in card and "BLEU `nrefs" in card
    for language in LANGUAGES:
        for latency in LATENCIES:
            assert re.search(rf"\| test, spoken \| {language} \| {latency} \| \d+ \| [\d.]+ \| [\d.]+ \|", card)


@pytest.mark.parametrize("latency", LATENCIES)
def test_any_cut_of_the_text_gives_the_same_translations(translator: Translator, latency: str) -> None:
    text = "we have been waiting for you since this morning and now it is raining"
    whole = TextSession(translator, LANGUAGES, latency=latency)
    expected = translated([*whole.push(text), *whole.finish()])
    singly = TextSession(translator, LANGUAGES, latency=latency)
    events = [event for word in text.split() for event in singly.push(word)]
    assert translated([*events, *singly.finish()]) == expected
    assert all(len(text.split()) >= 5 for text in expected.values())


def test_it_knows_a_sentence_that_any_beginner_knows(translator: Translator) -> None:
    session = TextSession(translator, LANGUAGES, latency="offline")
    said = translated([*session.push("where is the station"), *session.finish()])
    assert "estación" in said["es"] and "Bahnhof" in said["de"] and "gare" in said["fr"]
