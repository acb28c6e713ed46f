"""Finds for each language and latency the threshold at which the translator lags as its level says.

The levels are learnt from chunks of so many words, and how long a model then waits depends on the language and on how
sure it is. Its users choose a lag; so the probability of ``<|end-of-read|>`` from which on it writes is set, by
bisection on sentences that the scores do not use, so that the mean lag (LAAL) is the level's share of what waiting for
the whole sentence would be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from models.llm import Llm
from models.tokenizer import SentencePieceTokenizer
from training.translation.data import Encoder
from training.translation.validate import Task, laal, translate

#: Mean lag of a level, as a share of the sentences' mean length.
LEVEL_LAGS: Final = {"low": 0.4, "low-medium": 0.54, "medium": 0.68, "medium-high": 0.79, "high": 0.89}
_STEPS: Final = 5
_LOWEST, _HIGHEST = 0.05, 0.95


def calibrated(
    net: Llm,
    tokenizer: SentencePieceTokenizer,
    tasks: Sequence[Task],
    lags: Mapping[str, float] = LEVEL_LAGS,
) -> dict[str, dict[str, float]]:
    """The thresholds, as :attr:`models.translator.TranslationConfig.read_thresholds` has them.

    Args:
        net: The model.
        tokenizer: Its tokenizer.
        tasks: Sentences in every language that is to be calibrated.
        lags: Of each level, as of `LEVEL_LAGS`.
    """
    encoder, languages = Encoder(tokenizer), list(dict.fromkeys(task.language for task in tasks))
    found: dict[str, dict[str, float]] = {language: {} for language in languages}
    words = {x: [len(task.source) for task in tasks if task.language == x] for x in languages}
    for latency, share in lags.items():
        bounds = {language: (_LOWEST, _HIGHEST) for language in languages}
        for _ in range(_STEPS):
            middle = {language: sum(bounds[language]) / 2 for language in languages}
            rows = translate(net, encoder, tasks, latency, middle)
            for language in languages:
                own = [laal(t, row, tokenizer) for t, row in zip(tasks, rows, strict=True) if t.language == language]
                low, high = bounds[language]
                late = sum(own) > share * sum(words[language])
                bounds[language] = (low, middle[language]) if late else (middle[language], high)
        for language in languages:
            found[language][latency] = round(sum(bounds[language]) / 2, 3)
    return found
