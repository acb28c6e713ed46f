"""One transcript form for training and for scoring: lower-case words of letters and apostrophes.

The same function makes the training targets and normalises both sides of every word error rate, so that what
a model is asked to learn and what it is judged by cannot drift apart. The rules, in order:

1. Unicode NFKC; curly quotes become straight, dashes become hyphens, soft hyphens and zero-width marks go.
2. Amounts (``$5``, ``€3.50``), per cent, degrees, ``&``, ``@``, ``+``, ``=``, ``#5``, clock times, ordinals,
   decades, decimals and integers are spelled out as an English speaker reads them (`spell_out`); 1100-1999
   and 2010-2099 are read as years.
3. ``Mr``, ``Mrs``, ``Dr``, ``vs``, ``etc`` and ``OK`` become the words that are spoken; dotted initials
   become letters (``u s a``).
4. Accents are stripped, letters are lower-cased, hyphens and punctuation become spaces.
5. An apostrophe stays only between two letters; runs of spaces become one.
6. Anything left that is not a-z, an apostrophe or a space makes the text unspeakable: the result is None.
"""

from __future__ import annotations

import re
import unicodedata

from num2words import num2words

__all__ = ["normalize_transcript", "spell_out"]

# The characters that rule 1 unifies before NFKC would change them ("º" would become the letter "o").
_UNIFY = str.maketrans(
    {
        "‘": "'",
        "’": "'",
        "ʼ": "'",
        "´": "'",
        "`": "'",
        "“": '"',
        "”": '"',
        "„": '"',
        "º": "°",
        "–": "-",
        "—": " - ",
        "―": " - ",
        "−": "-",
        "‐": "-",
        "‑": "-",
        "\u00ad": None,
        "\u200b": None,
        "\u200c": None,
        "\u200d": None,
        "\u2060": None,
        "\ufeff": None,
    }
)
# Letters that have no decomposition into a base letter and an accent.
_LETTERS = str.maketrans({"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ı": "i"})
_ABBREVIATIONS = {
    "mr": "mister",
    "mrs": "missus",
    "dr": "doctor",
    "vs": "versus",
    "etc": "et cetera",
    "ok": "okay",
}
_CURRENCIES = {"$": ("dollar", "cent"), "€": ("euro", "cent"), "£": ("pound", "penny")}
_SYMBOLS = {
    "%": " percent ",
    "&": " and ",
    "@": " at ",
    "+": " plus ",
    "=": " equals ",
    "°C": " degrees celsius ",
    "°F": " degrees fahrenheit ",
    "°": " degrees ",
}

_NUMBER = r"(\d+(?:\.\d+)?)"
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)")
_AMOUNT = re.compile(rf"([$€£])\s?{_NUMBER}(\s(?:hundred|thousand|million|billion|trillion))?\b")
_CLOCK = re.compile(r"\b([01]?\d|2[0-3]):([0-5]\d)\b(\s?[ap]\.?m\b\.?)?", re.IGNORECASE)
_ORDINAL = re.compile(r"\b(\d+)(?:st|nd|rd|th)\b", re.IGNORECASE)
_DECADE = re.compile(r"(?:\b|')((?:1[1-9]|20)?\d0)'?s\b")
_DECIMAL = re.compile(r"\b(\d+)\.(\d+)\b")
_INTEGER = re.compile(r"\d+")
_LETTER_BY_DIGIT = re.compile(r"(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])")
_MINUS = re.compile(r"(?<!\S)-(?=\d)")
_ABBREVIATION = re.compile(rf"\b({'|'.join(_ABBREVIATIONS)})\b(?!')\.?", re.IGNORECASE)
_INITIALS = re.compile(r"\b(?:[^\W\d_]\.){2,}")
_PUNCTUATION = re.compile(r"[-.,!?;:\"()\[\]{}«»‹›¿¡|~•]")
_STRAY_APOSTROPHE = re.compile(r"(?<![a-z])'|'(?![a-z])")
_TRANSCRIPT = re.compile(r"[a-z' ]+")
# Longer runs of digits are read one by one, as telephone numbers are.
_MAX_SPELLED_DIGITS = 12


def _cardinal(digits: str) -> str:
    """Spells an integer: as a year, digit by digit (leading zero, too long), or as a plain number."""
    if len(digits) > _MAX_SPELLED_DIGITS or (len(digits) > 1 and digits[0] == "0"):
        return " ".join(num2words(int(digit)) for digit in digits)
    value = int(digits)
    if len(digits) == 4 and (1100 <= value <= 1999 or 2010 <= value <= 2099):
        return str(num2words(value, to="year"))
    return str(num2words(value)).replace(",", "")


def _plural(word: str, count: str) -> str:
    if count == "1":
        return word
    return "pence" if word == "penny" else word + "s"


def _spell_amount(match: re.Match[str]) -> str:
    unit, cent = _CURRENCIES[match[1]]
    whole, _, fraction = match[2].partition(".")
    if match[3]:
        return f"{match[2]}{match[3]} {unit}s"
    if len(fraction) != 2:
        return f"{match[2]} {_plural(unit, match[2])}"
    spelled = f"{whole} {_plural(unit, whole)}"
    return spelled if fraction == "00" else f"{spelled} and {int(fraction)} {_plural(cent, str(int(fraction)))}"


def _spell_clock(match: re.Match[str]) -> str:
    hour, minute, half = match[1], match[2], match[3] or ""
    if minute == "00":
        return f" {int(hour)}{half}" if half else f" {int(hour)} o'clock"
    return f" {int(hour)} {'oh ' if minute[0] == '0' else ''}{int(minute)}{half}"


def _spell_decade(match: re.Match[str]) -> str:
    words = _cardinal(match[1])
    return f" {words[:-1]}ies" if words.endswith("y") else f" {words}s"


def _strip_accents(text: str) -> str:
    return "".join(char for char in unicodedata.normalize("NFD", text) if not unicodedata.combining(char))


def spell_out(text: str) -> str:
    """Writes the numbers, amounts and symbols of a text as the words that a reader says (rules 1 to 3).

    Case, accents and punctuation stay, so that the result can be given to a speech synthesiser, and what it
    says is then what `normalize_transcript` makes of the same text.

    Args:
        text: Any English text.
    """
    text = unicodedata.normalize("NFKC", text.translate(_UNIFY))
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    text = _AMOUNT.sub(_spell_amount, text)
    for symbol, word in _SYMBOLS.items():
        text = text.replace(symbol, word)
    text = re.sub(r"#(?=\d)", "number ", text)
    text = _MINUS.sub("minus ", text)
    text = _CLOCK.sub(_spell_clock, text)
    text = _ORDINAL.sub(lambda match: f" {num2words(int(match[1]), to='ordinal').replace(',', '')} ", text)
    text = _DECADE.sub(_spell_decade, text)
    text = _DECIMAL.sub(
        lambda match: f"{_cardinal(match[1])} point {' '.join(num2words(int(d)) for d in match[2])}", text
    )
    text = _LETTER_BY_DIGIT.sub(" ", text)
    text = _INTEGER.sub(lambda match: _cardinal(match[0]), text)
    text = _ABBREVIATION.sub(lambda match: _keep_case(match[1], _ABBREVIATIONS[match[1].lower()]), text)
    return re.sub(r"\s+([,.!?;:])", r"\1", " ".join(text.split()))


def _keep_case(written: str, spoken: str) -> str:
    return spoken.capitalize() if written[0].isupper() else spoken


def normalize_transcript(text: str) -> str | None:
    """Turns a written text into the words that are spoken.

    The module's docstring states the rules. Applying the function to its own result changes nothing.

    Args:
        text: Any English text.

    Returns:
        Words of a-z and inner apostrophes with one space between them, or None where nothing is left to speak
        or where something is left that has no one reading (``and/or``, emoji, other scripts).
    """
    # Accents go first and last: an accented "OK" is an abbreviation too, and lower case brings new accents ("İ").
    text = spell_out(_strip_accents(text))
    text = _INITIALS.sub(lambda match: " ".join(match[0].replace(".", "")) + " ", text)
    text = _strip_accents(unicodedata.normalize("NFKC", text.lower().translate(_LETTERS)))
    text = _STRAY_APOSTROPHE.sub(" ", _PUNCTUATION.sub(" ", text))
    text = " ".join(text.split())
    return text if _TRANSCRIPT.fullmatch(text) else None
