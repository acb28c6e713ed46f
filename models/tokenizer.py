"""Text to ids and back, word by word: SentencePiece's models and Hugging Face's ``tokenizer.json``.

A word is always encoded by itself, with the space before it, so that the ids of a text are those of its words one
after another, whatever came in which portion. Nothing is ever encoded twice.

Every id stands for bytes: the ids of a text, as bytes one after another, are its UTF-8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from models.folder import read_object
from streaming.errors import DragomanError

SENTENCEPIECE = "tokenizer.model"
HUGGING_FACE = "tokenizer.json"
SPACE = "▁"
#: Languages without spaces between words; what is whole in UTF-8 counts as a word.
UNSPACED = ("ja", "zh")
#: A "word" is cut here, so that no single one can fill a model's context.
MAX_WORD_IDS = 64
_CACHED_WORDS = 16_384


class Tokenizer(Protocol):
    """What a translator asks of a tokenizer; ids are ``0 … size - 1``.

    Attributes:
        size: How many ids there are.
        controls: Ids that stand for no text, which a word can never become and a model may not write as text.
        word_starts: Ids that begin a word; None where words do not begin with certain ids.
    """

    size: int
    controls: frozenset[int]
    word_starts: frozenset[int] | None

    def encode_word(self, word: str) -> tuple[int, ...]:
        """Ids of one word without white space in it, its leading space included; never a control, perhaps none."""

    def encode_prompt(self, prompt: str) -> tuple[int, ...]:
        """Ids of a text in which control symbols count as what they are."""

    def bytes_of(self, token: int) -> bytes:
        """What an id adds to the text; nothing for a control."""

    def id_of(self, symbol: str) -> int | None:
        """The id of a control symbol, or None if there is no such control."""


def encode_words(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a text: those of its words, split at white space, one after another."""
    return tuple(token for word in text.split() for token in tokenizer.encode_word(word))


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids, its leading space included; what is not UTF-8 becomes U+FFFD."""
    return b"".join(tokenizer.bytes_of(token) for token in ids).decode("utf-8", errors="replace")


def begins_word(tokenizer: Tokenizer, language: str, before: Sequence[int], token: int) -> bool:
    """Whether a token that stands behind others of its text begins a word of a language."""
    if not before:
        return True
    if language in UNSPACED:
        return not decode(tokenizer, before).endswith("\ufffd")
    return tokenizer.bytes_of(token)[:1] in (b" ", b"\n")


class SentencePieceTokenizer:
    """A SentencePiece model whose control symbols are user-defined or control pieces; see :class:`Tokenizer`.

    Args:
        model: The model, serialised.

    Raises:
        DragomanError: ``bad_checkpoint``.
    """

    def __init__(self, model: bytes) -> None:
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:
            raise DragomanError("bad_checkpoint", f"{SENTENCEPIECE} is not a SentencePiece model") from error
        self.size: int = self._pieces.get_piece_size()
        self._bytes = [self._read_piece(i) for i in range(self.size)]
        self.controls = frozenset(i for i in range(self.size) if self._is_control(i))
        self.byte_pieces = frozenset(i for i in range(self.size) if self._pieces.is_byte(i))
        pieces = (self._pieces.id_to_piece(i) for i in range(self.size))
        self.word_starts: frozenset[int] | None = frozenset(i for i, p in enumerate(pieces) if p.startswith(SPACE))
        self.encode_word = lru_cache(_CACHED_WORDS)(self._encode_word)

    def encode_prompt(self, prompt: str) -> tuple[int, ...]:
        """See :class:`Tokenizer`."""
        ids: list[int] = []
        for part in re.split(r"(<[^<>\s]+>)", prompt):
            symbol = self.id_of(part)
            ids += [symbol] if symbol is not None else encode_words(self, part)
        return tuple(ids)

    def bytes_of(self, token: int) -> bytes:
        """See :class:`Tokenizer`."""
        return self._bytes[token]

    def id_of(self, symbol: str) -> int | None:
        """See :class:`Tokenizer`."""
        token: int = self._pieces.piece_to_id(symbol)
        return token if token in self.controls and self._pieces.id_to_piece(token) == symbol else None

    def _encode_word(self, word: str) -> tuple[int, ...]:
        word = _valid(word)
        ids: list[int] = self._pieces.encode(word)
        if not self.controls.isdisjoint(ids):
            # The word spells a control symbol, or has a character that is in no piece: write its bytes.
            space = self._pieces.piece_to_id(SPACE)
            ids = [] if space in self.controls else [space]
            ids += [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in word.encode()]
        return tuple(i for i in ids[:MAX_WORD_IDS] if i not in self.controls)

    def _is_control(self, token: int) -> bool:
        piece: str = self._pieces.id_to_piece(token)
        other = self._pieces.is_control(token) or self._pieces.is_unknown(token) or self._pieces.is_unused(token)
        return bool(other) or re.fullmatch(r"<\|.+\|>", piece) is not None

    def _read_piece(self, token: int) -> bytes:
        piece: str = self._pieces.id_to_piece(token)
        if self._is_control(token):
            return b""
        if self._pieces.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` of the byte-level kind (Llama 3, Qwen) or of SentencePiece's (Gemma, Mistral, EuroLLM).

    Args:
        folder: Holds the file, and ``tokenizer_config.json`` or ``chat_template.jinja`` where there is a chat template.

    Raises:
        DragomanError: ``bad_checkpoint``; ``missing_dependency`` without the package ``tokenizers``.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise DragomanError(
                "missing_dependency", f"{folder / HUGGING_FACE} needs the package tokenizers: pip install tokenizers"
            ) from error
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(folder / HUGGING_FACE))
        except Exception as error:
            raise DragomanError("bad_checkpoint", f"{folder / HUGGING_FACE} is not a tokenizer: {error}") from error
        data = json.loads(self._tokenizer.to_str())
        self._byte_level = "ByteLevel" in json.dumps(data.get("decoder"))
        self.size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = data.get("added_tokens", [])
        self._symbols: dict[str, int] = {token["content"]: token["id"] for token in added}
        self._special: dict[str, int] = {token["content"]: token["id"] for token in added if token["special"]}
        unknown = self._tokenizer.token_to_id(data["model"].get("unk_token") or "")
        self.controls = frozenset(self._special.values()) | ({unknown} if unknown is not None else set())
        self.word_starts: frozenset[int] | None = None
        self._adds_space = self._decode(self._encode("a")).startswith(b" ")
        #: What it would put before every text by itself, such as the symbol that begins a text.
        self.opening = "".join(self._tokenizer.encode("").tokens)
        self.chat = ChatTemplate.read(folder)
        self.encode_word = lru_cache(_CACHED_WORDS)(self._encode_word)

    def encode_prompt(self, prompt: str) -> tuple[int, ...]:
        """See :class:`Tokenizer`."""
        return self._encode(prompt)

    def bytes_of(self, token: int) -> bytes:
        """See :class:`Tokenizer`."""
        if token in self.controls:
            return b""
        piece: str = self._tokenizer.id_to_token(token) or ""
        if piece in self._symbols:
            return piece.encode()
        if self._byte_level:
            return bytes(_byte_of_character()[character] for character in piece)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()

    def id_of(self, symbol: str) -> int | None:
        """See :class:`Tokenizer`."""
        return self._special.get(symbol)

    @property
    def symbols(self) -> tuple[str, ...]:
        """Its control symbols, as they are spelt."""
        return tuple(self._special)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        text = _valid(word) if self._adds_space else " " + _valid(word)
        ids = self._encode(text)
        if not self.controls.isdisjoint(ids):
            # The word spells a control symbol, which no single character of it does.
            first, *rest = (self._encode(character) for character in text)
            ids = first + tuple(i for part in rest for i in part)
        return tuple(i for i in ids[:MAX_WORD_IDS] if i not in self.controls)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _decode(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.bytes_of(i) for i in ids)


class ChatTemplate:
    """The template that turns a conversation into a prompt, as Transformers renders it.

    Args:
        template: In Jinja.
        symbols: The texts that the template may ask for, such as ``bos_token``.
    """

    def __init__(self, template: str, symbols: dict[str, str]) -> None:
        # Jinja comes with PyTorch. A template is somebody else's program: it runs in the sandbox.
        import jinja2.sandbox

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: ""  # a prompt does not depend on the day
        self._template = environment.from_string(template)
        self._symbols = symbols

    def render(self, user: str) -> str:
        """The prompt of a conversation of one message, up to where the answer begins.

        Raises:
            DragomanError: ``bad_checkpoint`` if the template fails.
        """
        import jinja2

        messages = [{"role": "user", "content": user}]
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, enable_thinking=False, **self._symbols
            )
        except jinja2.TemplateError as error:
            raise DragomanError("bad_checkpoint", f"the chat template cannot be rendered: {error}") from error

    @classmethod
    def read(cls, folder: Path) -> ChatTemplate | None:
        """The template of a model folder; None if it has none."""
        file = folder / "tokenizer_config.json"
        config = read_object(file) if file.is_file() else {}
        own = folder / "chat_template.jinja"
        template = own.read_text(encoding="utf-8") if own.is_file() else config.get("chat_template")
        if isinstance(template, list):  # several with names
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        if not isinstance(template, str):
            return None
        names = {key: value for key, value in config.items() if key.endswith("_token")}
        symbols = {key: v["content"] if isinstance(v, dict) else v for key, v in names.items() if v}
        return cls(template, {key: value for key, value in symbols.items() if isinstance(value, str)})


def load_tokenizer(folder: Path) -> SentencePieceTokenizer | HuggingFaceTokenizer:
    """The tokenizer of a model folder.

    Raises:
        DragomanError: ``model_not_found`` if there is none, ``bad_checkpoint``.
    """
    if (folder / HUGGING_FACE).is_file():
        return HuggingFaceTokenizer(folder)
    if (folder / SENTENCEPIECE).is_file():
        return SentencePieceTokenizer((folder / SENTENCEPIECE).read_bytes())
    raise DragomanError(
        "model_not_found", f"{folder} has no tokenizer: a translator's folder holds {SENTENCEPIECE} or {HUGGING_FACE}"
    )


def _valid(word: str) -> str:
    """The word with "?" for each half of a surrogate pair, which UTF-8 does not have."""
    return word.encode("utf-8", errors="replace").decode()


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


@lru_cache(1)
def _byte_of_character() -> dict[str, int]:
    """The printable characters by which byte-level tokenizers write bytes (Radford et al., GPT-2, ``encoder.py``)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in set(plain))
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}
