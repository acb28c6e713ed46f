"""The transcript form: what is spelled out, what is kept, and that it is its own fixed point."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from client.normalize import normalize_transcript, spell_out

SPOKEN = {
    "It's a DOG-house, isn't it?": "it's a dog house isn't it",
    "“Don’t!” she said — twice…": "don't she said twice",
    "the students' 'hello' at five o'clock": "the students hello at five o'clock",
    "Café naïve, Straße, Łódź": "cafe naive strasse lodz",
    "Mr. and Mrs. Smith vs. Dr. No, etc.": "mister and missus smith versus doctor no et cetera",
    "OK, the U.S.A. at 7:30 a.m.": "okay the u s a at seven thirty a m",
    "0 7 21 100 999 1,000 123,456": (
        "zero seven twenty one one hundred nine hundred and ninety nine one thousand "
        "one hundred and twenty three thousand four hundred and fifty six"
    ),
    "in 1066, 1905, 1984, 2009 and 2024": (
        "in one thousand and sixty six nineteen oh five nineteen eighty four two thousand and nine "
        "and twenty twenty four"
    ),
    "the 1960s and the '90s": "the nineteen sixties and the nineties",
    "the 1st, 22nd, 3rd and 100th": "the first twenty second third and one hundredth",
    "$5, $1, $2.50, £3.00, €2 million": (
        "five dollars one dollar two dollars and fifty cents three pounds two million euros"
    ),
    "3.14 and -5 at 20% & 25°C": (
        "three point one four and minus five at twenty percent and twenty five degrees celsius"
    ),
    "at 7:00, 7:05 or 7:00 pm": "at seven o'clock seven oh five or seven pm",
    "agent 007 has CO₂, an mp3 and #4": ("agent zero zero seven has co two an mp three and number four"),
    "call 5551234567890": "call five five five one two three four five six seven eight nine zero",
    "soft\u00adhyphen and zero\u200bwidth": "softhyphen and zerowidth",
}


@pytest.mark.parametrize(("written", "spoken"), SPOKEN.items())
def test_written_text_becomes_the_spoken_words(written: str, spoken: str) -> None:
    assert normalize_transcript(written) == spoken


@pytest.mark.parametrize("text", ["", " ", "...", "'", "and/or", "smile 🙂", "привет", "x < y", "日本"])
def test_what_has_no_one_reading_is_unspeakable(text: str) -> None:
    assert normalize_transcript(text) is None


@given(st.text(max_size=60) | st.text(alphabet="aZ09 ,.'-$%:°s’é½#", max_size=30))
@example("ÒK")
@example("Mr.'s")
@example("o.k.")
@example("1.2.3")
@example("12:30:45")
@example("$1,000,000.50 billion")
def test_the_form_is_its_own_fixed_point(text: str) -> None:
    spoken = normalize_transcript(text)
    if spoken is not None:
        assert re.fullmatch(r"[a-z]+('[a-z]+)*( [a-z]+('[a-z]+)*)*", spoken)
        assert normalize_transcript(spoken) == spoken


@given(st.integers(min_value=0, max_value=10**15))
def test_every_integer_can_be_spoken(number: int) -> None:
    assert normalize_transcript(f"{number:,}") is not None
    assert normalize_transcript(str(number)) is not None


@pytest.mark.parametrize("written", SPOKEN)
def test_a_synthesiser_reads_what_the_transcript_says(written: str) -> None:
    spelled = spell_out(written)
    assert not re.search(r"[0-9$€£%&@#°]", spelled)
    assert normalize_transcript(spelled) == normalize_transcript(written)


def test_spelling_out_keeps_case_and_punctuation() -> None:
    assert spell_out("Mr. Poe, born in 1809, owed $9.") == ("Mister Poe, born in eighteen oh-nine, owed nine dollars.")
