"""What is cleaned away, what is held out, and that nothing held out is trained on."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from streaming.errors import DragomanError
from training.translation import corpus
from training.translation.corpus import (
    LanguageGuesser,
    NearDuplicates,
    Pair,
    draw_test,
    is_clean,
    read_pairs,
    read_references,
    sentence_key,
    tidy,
    without_held_out,
)


def test_two_spellings_of_a_sentence_have_one_key() -> None:
    assert sentence_key("I can’t  believe it’s true!") == sentence_key("i cannot believe it's TRUE")
    assert sentence_key("We won't.") == sentence_key("We will not")
    assert sentence_key("We will.") != sentence_key("We will not.")


def test_tidying_changes_quotes_and_spaces_alone() -> None:
    assert tidy("Qu’est-ce que «\u00a0c’est\u00a0»\u202f?") == "Qu'est-ce que « c'est » ?"


@pytest.mark.parametrize(
    ("source", "target", "clean"),
    [
        ("I am tired.", "Estoy cansado.", True),
        ("Tom.", "Tom.", True),
        ("I am tired.", "I am tired!", False),
        ("I am tired.", "?", False),
        ("I am tired.", "Я устал.", False),
        ("No.", "Eso no es lo que yo quería decir cuando llegué ayer por la tarde.", False),
    ],
)
def test_what_is_clean(source: str, target: str, clean: bool) -> None:
    assert is_clean(Pair("es", source, target)) is clean


def test_trigrams_tell_languages_apart() -> None:
    texts = {
        "de": ["Ich habe keine Zeit, weil ich noch arbeiten muss.", "Der Hund schläft nicht unter dem Tisch."] * 20,
        "es": ["No tengo tiempo porque todavía tengo que trabajar.", "El perro no duerme debajo de la mesa."] * 20,
    }
    guesser = LanguageGuesser(texts)
    assert guesser.foreign("El perro no tiene tiempo.", "de")
    assert not guesser.foreign("El perro no tiene tiempo.", "es")
    assert not guesser.foreign("Tom", "de"), "a name is in every language"


def test_near_duplicates_are_those_of_the_stated_rule() -> None:
    near = NearDuplicates([sentence_key("We saw the dog in the garden."), sentence_key("He left.")])
    for text in (
        "in the garden we saw the dog",  # the same set of words
        "We saw the cat in the garden.",  # replaced
        "We saw the old dog in the garden.",  # added
        "We saw the dog in garden.",  # left out
        "We saw the dog in the garden!",
    ):
        assert sentence_key(text) in near, text
    for text in ("We saw the dog in a house.", "She left.", "He left her."):
        assert sentence_key(text) not in near, text


def test_the_longer_of_near_duplicates_has_five_words() -> None:
    assert "we saw the old dog" in NearDuplicates(["we saw the dog"])
    assert "we saw the dog" in NearDuplicates(["we saw the old dog"])
    assert "we saw dog" not in NearDuplicates(["we saw the dog"])


def test_nothing_held_out_is_trained_on() -> None:
    pairs = [
        Pair("es", "We saw the dog in the garden.", "Vimos al perro en el jardín."),
        Pair("es", "We saw that dog in the garden.", "Vimos a ese perro en el jardín."),
        Pair("es", "The dog was seen by us.", "¡Vimos al perro en el jardín!"),
        Pair("es", "They do not know.", "No lo saben."),
        Pair("es", "It rains a lot in spring.", "Llueve mucho en primavera."),
    ]
    test = [{"en": ["We saw the dog in the garden."], "es": ["Vimos al perro en el jardín."]}]
    dev = [{"en": ["They don't know."], "es": ["Ellos no saben."]}]
    kept, dropped = without_held_out(pairs, dev, test)
    assert kept == pairs[-1:]
    assert dropped == {"sentence of dev or test": 3, "near-duplicate of test": 1}


def test_the_test_set_has_every_translation_in_every_language() -> None:
    pairs = [Pair(x, f"Sentence {k}.", f"{x} {k} {n}") for k in range(5) for x in ("es", "de") for n in range(2)]
    pairs = [pair for pair in pairs if (pair.language, pair.source) != ("de", "Sentence 3.")]
    drawn = draw_test(pairs, 4, seed=1)
    assert {row["en"][0] for row in drawn} == {f"Sentence {k}." for k in (0, 1, 2, 4)}
    assert all(len(row["es"]) == len(row["de"]) == 2 for row in drawn)
    assert drawn == draw_test(pairs, 4, seed=1)
    with pytest.raises(DragomanError, match=r"4 English sentences .* asks for 5"):
        draw_test(pairs, 5, seed=1)


def test_a_line_without_a_target_is_named(tmp_path: Path) -> None:
    file = tmp_path / "pairs.tsv.xz"
    file.write_bytes(lzma.compress(b"Yes.\tS\xc3\xad.\nNo.\n"))
    with pytest.raises(DragomanError, match="line 2"):
        list(read_pairs(file, "es"))


def test_the_command_writes_train_dev_and_test(tmp_path: Path) -> None:
    words = "red green blue black white brown grey pink".split()
    for language in ("es", "de"):
        lines = [f"The {a} thing fell on a {b} floor.\t{language} {a} {b} x\n" for a in words for b in words]
        (tmp_path / f"{language}.tsv").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "dev.jsonl").write_text(json.dumps({"en": "Nothing fell.", "es": ["Nada."], "de": ["Nichts."]}) + "\n")
    specs = [f"{language}={tmp_path / language}.tsv" for language in ("es", "de")]
    corpus.run(specs, tmp_path / "dev.jsonl", tmp_path / "out", test_sentences=3)
    test = read_references(tmp_path / "out" / "test.jsonl")
    assert len(test) == 3 and all(row["es"] and row["de"] for row in test)
    held_out = {sentence_key(row["en"][0]) for row in test}
    train = [line.split("\t") for line in (tmp_path / "out" / "train.tsv").read_text(encoding="utf-8").splitlines()]
    assert train and {sentence_key(source) for _, source, _ in train}.isdisjoint(held_out)
    assert read_references(tmp_path / "out" / "dev.jsonl")[0]["en"] == ["Nothing fell."]
    with pytest.raises(DragomanError, match="es=FILE"):
        corpus.run(["pairs.tsv"], tmp_path / "dev.jsonl", tmp_path / "out")
