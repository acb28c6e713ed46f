"""One translator: a language model, its tokenizer, and how the two were trained to interpret.

The folder is that of a language model (:func:`models.llm.load_llm`) with a tokenizer, and a ``"translation"`` object in
its ``config.json``. A folder without that object is a plain causal model: it translates by its chat template, under a
policy that decides from outside when to write.

Source: Fu et al., "LLMs Can Achieve High-quality Simultaneous Machine Translation as Efficiently as Offline" (EAST,
arXiv 2504.09570), for the two symbols and for the sentence that a published model is prompted with.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Final, Literal

import torch
from torch import Tensor

from models.folder import CONFIG, read_object, required_file, write_model
from models.graphs import CudaCapture, LlmGraphs
from models.llm import Llm, load_llm
from models.llm_config import LlmConfig
from models.tokenizer import SENTENCEPIECE, ChatTemplate, SentencePieceTokenizer, Tokenizer, decode, load_tokenizer
from streaming.errors import DragomanError

Latency = Literal["low", "low-medium", "medium", "medium-high", "high", "offline"]
Policy = Literal["interleaved", "wait-k", "local-agreement"]

#: The model in the repository, used when none is named.
EMBEDDED_TRANSLATOR: Final = Path(__file__).parent / "en-esdefr-small"
END_OF_READ: Final = "<|end-of-read|>"
END_OF_WRITE: Final = "<|end-of-write|>"
LATENCIES: Final[tuple[Latency, ...]] = ("low", "low-medium", "medium", "medium-high", "high", "offline")
#: Policies for a model that was not trained on interleaved text.
FALLBACKS: Final[tuple[Policy, ...]] = ("wait-k", "local-agreement")
OWN_PROMPT: Final = "<s><|{source}|><|{target}|><|{latency}|>"
OWN_ENDPOINT: Final = "</s>"
EAST_PROMPT: Final = (
    "You are a professional simultaneous interpreter, your task is to translate the following {source_name} text into"
    " {target_name} with {latency} latency."
)
FALLBACK_PROMPT: Final = (
    "Translate the following {source_name} text into {target_name}. Answer with the translation only.\n\n{text}"
)
PROMPT_FIELDS: Final = ("source", "target", "latency", "source_name", "target_name", "text")
_TEXT: Final = "\ue000"  # stands for the source until the prompt is rendered: no template knows it
#: What a context must hold beside the prompt.
MIN_ROOM_TOKENS: Final = 32
MAX_FALLBACK_TOKENS: Final = 2048
#: Languages by the names that prompts in English use.
NAMES: Final[Mapping[str, str]] = {
    "ar": "Arabic", "bg": "Bulgarian", "ca": "Catalan", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "es": "Spanish", "et": "Estonian", "fi": "Finnish", "fr": "French", "ga": "Irish",
    "gl": "Galician", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "it": "Italian", "ja": "Japanese",
    "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian", "mt": "Maltese", "nl": "Dutch", "no": "Norwegian",
    "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian",
    "sv": "Swedish", "tr": "Turkish", "uk": "Ukrainian", "zh": "Chinese",
}  # fmt: skip


@dataclass(frozen=True)
class TranslationConfig:
    """The ``"translation"`` object of a model's ``config.json``.

    Attributes:
        kind: ``interleaved``: the model decides itself when to write. Not in a file: one of :data:`FALLBACKS`.
        prompt: What a session begins with, with the fields ``{source}``, ``{target}`` and ``{latency}``, and
            ``{source_name}`` and ``{target_name}`` for the languages' English names. A tokenizer with a chat template
            takes it as the user's message. In a fallback's, ``{text}`` is where the source goes.
        sources: Languages that are read.
        targets: Languages that are written.
        latencies: Levels that the model was trained on, of :data:`LATENCIES`.
        read_threshold: Probability of ``<|end-of-read|>`` from which on the model writes, 0 to 1.
        read_thresholds: The same for a language and a latency, where it is another one: ``{language: {latency: …}}``.
        max_context_tokens: Tokens of a row after which its oldest chunks are forgotten.
        endpoint: Symbol that the model reads at the end of a segment, behind its last word; None if it reads none.
        casing: ``any``, or ``lower`` if the model should be given lower-case words.
    """

    kind: Policy = "interleaved"
    prompt: str = OWN_PROMPT
    sources: tuple[str, ...] = ("en",)
    targets: tuple[str, ...] = ("es", "de", "fr")
    latencies: tuple[Latency, ...] = LATENCIES
    read_threshold: float = 0.5
    read_thresholds: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    max_context_tokens: int = 512
    endpoint: str | None = None
    casing: str = "any"

    def __post_init__(self) -> None:
        if self.kind not in ("interleaved", *FALLBACKS):
            raise _unsupported(f"translation's kind is {self.kind!r}; this engine knows 'interleaved'")
        if not self.sources or not self.targets:
            raise _unsupported("translation's sources and targets have to name a language each")
        for name in ("sources", "targets", "latencies"):
            if not isinstance(value := getattr(self, name), tuple):
                raise _unsupported(f"translation's {name} is {value!r}; it has to be a list")
        if unknown := [latency for latency in self.latencies if latency not in LATENCIES]:
            raise _unsupported(f"translation's latencies have {unknown[0]!r}; known are {', '.join(LATENCIES)}")
        for value in (self.read_threshold, *self._own_thresholds()):
            if not isinstance(value, float | int) or not 0.0 <= value <= 1.0:
                raise _unsupported(f"translation's read_threshold is {value!r}; it is a probability, 0 to 1")
        if not isinstance(self.max_context_tokens, int):
            raise _unsupported(f"translation's max_context_tokens is {self.max_context_tokens!r}; it is a number")
        if self.endpoint is not None and not isinstance(self.endpoint, str):
            raise _unsupported(f"translation's endpoint is {self.endpoint!r}; it is a symbol of the tokenizer, or null")
        _check_prompt(self.prompt)
        if self.casing not in ("any", "lower"):
            raise _unsupported(f"translation's casing is {self.casing!r}; it is 'any' or 'lower'")

    def _own_thresholds(self) -> list[float]:
        try:
            by_language = {x: dict(levels.items()) for x, levels in self.read_thresholds.items()}
        except AttributeError:
            raise _unsupported(
                f"translation's read_thresholds are {self.read_thresholds!r}; they are an object of objects"
            ) from None
        known = {(language, latency) for language in self.targets for latency in self.latencies}
        for language, levels in by_language.items():
            if unknown := [latency for latency in levels if (language, latency) not in known]:
                raise _unsupported(f"translation's read_thresholds have {language!r} at {unknown[0]!r}, which it lacks")
        return [value for levels in by_language.values() for value in levels.values()]

    def threshold(self, language: str, latency: str) -> float:
        """Probability of ``<|end-of-read|>`` from which on the model writes in a language at a latency."""
        return self.read_thresholds.get(language, {}).get(latency, self.read_threshold)

    def to_dict(self) -> dict[str, Any]:
        """The object as it stands in the file."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> TranslationConfig:
        """Reads the object.

        Raises:
            DragomanError: ``unsupported_model`` for unknown keys and values.
        """
        if not isinstance(data, dict):
            raise _unsupported(f"config.json has a translation that is a JSON {type(data).__name__}, not an object")
        try:
            fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
            return cls(**fields)
        except TypeError as error:
            known = ", ".join(field.name for field in dataclasses.fields(cls))
            raise _unsupported(f"translation of config.json: {error}; known keys are {known}") from error


@dataclass(frozen=True)
class Direction:
    """What one row translates, and how it begins.

    Attributes:
        source: Language that is read.
        target: Language that is written.
        latency: Level of :data:`LATENCIES`.
        prompt: Ids that come before the first word.
        answer: Ids that a fallback puts between the source and its translation.
    """

    source: str
    target: str
    latency: Latency
    prompt: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()


class AnyTranslator:
    """What a session has to know of a language model that translates, wherever its weights are.

    Args:
        tokenizer: Its tokenizer.
        config: How it was trained to interpret, or by which policy it is made to.
        name: What it calls itself.

    Raises:
        DragomanError: ``unsupported_model`` if a policy decides and the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Tokenizer, config: TranslationConfig, name: str) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.name = name
        if config.kind != "interleaved" and _chat(tokenizer) is None:
            raise _unsupported(
                f'model {name!r} has no "translation" in its config.json and no chat template, so that nothing'
                " tells how it translates; use a model that was trained to interpret, or one that answers to a chat"
            )

    @property
    def policy(self) -> Policy:
        """Who decides when to write: the model itself (``interleaved``) or a declared fallback."""
        return self.config.kind

    def direction(self, target: str, latency: str = "medium", *, source: str | None = None) -> Direction:
        """What a row that translates so begins with.

        Args:
            target: Language to write.
            latency: Level.
            source: Language to read; None for the model's first.

        Raises:
            DragomanError: ``unsupported_language`` or ``unsupported_latency``, saying what there is;
                ``unsupported_model`` if the prompt fills the context.
        """
        source = self.config.sources[0] if source is None else source
        self._require(source, self.config.sources, "unsupported_language", "read the language")
        self._require(target, self.config.targets, "unsupported_language", "write the language")
        self._require(latency, self.config.latencies, "unsupported_latency", "translate at the latency")
        level = next(known for known in LATENCIES if known == latency)
        direction = Direction(source, target, level)
        prompt, answer = prompt_ids(self.tokenizer, self.config, source, target, latency)
        used = len(prompt) + len(answer)
        if (room := self.config.max_context_tokens - used) < MIN_ROOM_TOKENS:
            raise _unsupported(
                f"the prompt of model {self.name!r} has {used} tokens, which leaves {room} of its"
                f" max_context_tokens {self.config.max_context_tokens}; {MIN_ROOM_TOKENS} are needed"
            )
        return dataclasses.replace(direction, prompt=prompt, answer=answer)

    def encode_word(self, word: str) -> tuple[int, ...]:
        """Ids of a source word, in the casing that the model knows."""
        return source_ids(self.tokenizer, word.lower() if self.config.casing == "lower" else word)

    def _require(self, value: str, known: tuple[str, ...], code: str, what: str) -> None:
        if value not in known:
            raise DragomanError(code, f"model {self.name!r} cannot {what} {value!r}; it knows {', '.join(known)}")


class Translator(AnyTranslator):
    """A frozen language model that interprets; immutable, and shared by every session.

    On a GPU, its steps are replayed as graphs (:mod:`models.graphs`).

    Args:
        llm: The weights, frozen, on their device and in their dtype.
        tokenizer: As in :class:`AnyTranslator`.
        config: As there.
        name: What it calls itself; None for the language model's name.

    Raises:
        DragomanError: ``bad_checkpoint`` if the tokenizer has more ids than the model, ``unsupported_model`` if an
            interleaved model's tokenizer lacks the two symbols, or a fallback's a chat template.

    Attributes:
        end_of_read: Id of ``<|end-of-read|>``; -1 in a fallback.
        end_of_write: Id of ``<|end-of-write|>``; in a fallback, -1.
        endpoint: Ids that are read at the end of a segment, one or none.
        unwritable: ``bool[vocab_size]`` on the model's device: controls but ``<|end-of-write|>``, and ids without text.
        unable_to_begin: ``bool[vocab_size]``: what may not stand first in a chunk either, because it begins no word.
        marks: Tokens that close what was shown: signs of punctuation, and ``<|end-of-write|>``.
    """

    def __init__(self, llm: Llm, tokenizer: Tokenizer, config: TranslationConfig, *, name: str | None = None) -> None:
        super().__init__(tokenizer, config, name or llm.config.name)
        self.llm = llm
        if llm.device.type == "cuda" and llm.graphs is None:
            llm.graphs = LlmGraphs(llm, CudaCapture(llm.device))
        vocab_size = llm.config.vocab_size
        if tokenizer.size > vocab_size:
            raise DragomanError(
                "bad_checkpoint", f"the tokenizer has {tokenizer.size} pieces, the model of {self.name!r} {vocab_size}"
            )
        self.end_of_read, self.end_of_write = -1, -1
        self.endpoint: tuple[int, ...] = ()
        if config.kind == "interleaved":
            self.end_of_read, self.end_of_write = self._symbol(END_OF_READ), self._symbol(END_OF_WRITE)
            self.endpoint = () if config.endpoint is None else (self._symbol(config.endpoint),)
        self.unwritable, self.unable_to_begin = write_masks(tokenizer, self.end_of_write, vocab_size).to(llm.device)
        self.marks = closing_marks(tokenizer, self.end_of_write)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.llm.device

    def _symbol(self, symbol: str) -> int:
        found = self.tokenizer.id_of(symbol)
        if found is None:
            raise _unsupported(
                f"the tokenizer of model {self.name!r} has no symbol {symbol}, which an interleaved model needs as one"
                ' control piece; take "translation" out of its config.json to run it by its chat template'
            )
        return found


def source_ids(tokenizer: Tokenizer, word: str) -> tuple[int, ...]:
    """Ids of a source word, in training as in use.

    What a model of our own family could only read as bytes, such as emoji and other scripts, is left out: it does not
    learn to, and would say what nobody said.
    """
    ids = tokenizer.encode_word(word)
    if not isinstance(tokenizer, SentencePieceTokenizer) or tokenizer.byte_pieces.isdisjoint(ids):
        return ids
    known = tuple(token for token in ids if token not in tokenizer.byte_pieces)
    return known if decode(tokenizer, known).strip() else ()


def write_masks(tokenizer: Tokenizer, end_of_write: int, vocab_size: int) -> Tensor:
    """What may not be written, and what may not stand first in a chunk: ``bool[2, vocab_size]``."""
    writable = [i for i in range(tokenizer.size) if i not in tokenizer.controls or i == end_of_write]
    starts = tokenizer.word_starts
    begin = writable if starts is None else [i for i in writable if i in starts or i == end_of_write]
    return torch.stack([_all_but(ids, vocab_size) for ids in (writable, begin)])


def closing_marks(tokenizer: Tokenizer, end_of_write: int) -> frozenset[int]:
    """What may be written upon an endpoint alone: pieces that are punctuation, and ``<|end-of-write|>``."""
    return frozenset(i for i in range(tokenizer.size) if i == end_of_write or _is_mark(tokenizer.bytes_of(i)))


def prompt_ids(
    tokenizer: Tokenizer, config: TranslationConfig, source: str, target: str, latency: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of the filled-in prompt, before the place of the source and after it."""
    filled = config.prompt.format(
        source=source,
        target=target,
        latency=latency,
        source_name=NAMES.get(source, source),
        target_name=NAMES.get(target, target),
        text=_TEXT,
    )
    chat = _chat(tokenizer)
    before, _, after = (filled if chat is None else chat.render(filled)).partition(_TEXT)
    return tokenizer.encode_prompt(before), tokenizer.encode_prompt(after)


def _chat(tokenizer: Tokenizer) -> ChatTemplate | None:
    chat = getattr(tokenizer, "chat", None)
    return chat if isinstance(chat, ChatTemplate) else None


def load_translator(
    folder: Path | None = None, *, device: str = "cpu", dtype: str = "float32", fallback: Policy = "wait-k"
) -> Translator:
    """Reads a model folder as a translator; without a folder, the embedded one.

    Args:
        folder: In the layout of :func:`models.llm.load_llm`, with a tokenizer.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``float32`` or ``bfloat16``.
        fallback: Of :data:`FALLBACKS`, for a model whose config has no ``"translation"``.

    Raises:
        DragomanError: As :func:`models.llm.load_llm`, :func:`models.tokenizer.load_tokenizer` and
            :class:`Translator`.
    """
    if folder is None:
        if not EMBEDDED_TRANSLATOR.is_dir():
            raise DragomanError(
                "model_not_found", "this installation has no translator; name the folder of one with --translator"
            )
        folder = EMBEDDED_TRANSLATOR
    data = read_object(required_file(folder, CONFIG, "a translator's folder is that of a language model"))
    if "translation" in data:
        config = TranslationConfig.from_dict(data["translation"])
    else:
        context = min(LlmConfig.from_hf(data).max_positions, MAX_FALLBACK_TOKENS)
        config = TranslationConfig(fallback, FALLBACK_PROMPT, ("en", *NAMES), tuple(NAMES), max_context_tokens=context)
    tokenizer = load_tokenizer(folder)
    llm = load_llm(folder, device=device, dtype=dtype)
    return Translator(llm, tokenizer, config, name=data.get("name", folder.name))


def save_translator(
    folder: Path, llm: LlmConfig, weights: Mapping[str, Tensor], tokenizer: bytes, config: TranslationConfig
) -> None:
    """Writes a translator of our own family, as :func:`load_translator` reads it.

    Args:
        folder: Made if it is not there.
        llm: Shape and name of the language model.
        weights: The state dict of one that is not frozen, in the dtype to be stored.
        tokenizer: A SentencePiece model, serialised.
        config: How the model was trained to interpret.
    """
    write_model(folder, {**llm.to_dict(), "translation": config.to_dict()}, weights)
    (folder / SENTENCEPIECE).write_bytes(tokenizer)


def _check_prompt(prompt: str) -> None:
    try:
        fields = [name for _, name, _, _ in Formatter().parse(prompt) if name is not None]
    except (TypeError, ValueError) as error:
        raise _unsupported(f"translation's prompt is not a text with fields in braces: {error}") from error
    if unknown := [name for name in fields if name not in PROMPT_FIELDS]:
        known = ", ".join(PROMPT_FIELDS)
        raise _unsupported(f"translation's prompt has the field {{{unknown[0]}}}; known are {known}")


def _is_mark(piece: bytes) -> bool:
    """Whether a piece consists of punctuation, perhaps behind a space."""
    text = piece.decode("utf-8", errors="replace").strip()
    return bool(text) and all(unicodedata.category(character)[0] == "P" for character in text)


def _all_but(ids: list[int], size: int) -> Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[ids] = False
    return mask


def _unsupported(sentence: str) -> DragomanError:
    return DragomanError("unsupported_model", sentence)
