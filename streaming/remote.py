"""Interpreting with a language model that another program runs, behind OpenAI's completions API.

The policies, the prompts and what is told are those of :mod:`streaming.fallback`; only the next tokens come from
``POST {url}/completions``, many with one request. Within a segment a request repeats the one before it up to its new
words, so that a server with a prefix cache reads little anew. A server that takes and gives token ids (vLLM) is asked
with ids, so that it reads exactly what was written; any other one with text, whose tokens are whole words here.

A step does not wait for what it asks, but for a few milliseconds at most: the answers stand in the state until they are
there, and meanwhile other sessions go on. A request that fails is tried again, and one that takes too long given up;
then the session is told ``translator_unavailable``, is translated no more, and its transcript goes on.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx2

from models.folder import CONFIG, read_object
from models.llm_config import LlmConfig
from models.tokenizer import ChatTemplate, HuggingFaceTokenizer, Tokenizer, decode, load_tokenizer
from models.translator import (
    FALLBACK_PROMPT,
    MAX_FALLBACK_TOKENS,
    NAMES,
    AnyTranslator,
    Direction,
    Policy,
    TranslationConfig,
)
from streaming.errors import DragomanError
from streaming.fallback import ByPolicy, FallbackRow
from streaming.glossary import Glossary
from streaming.translation import TranslatedChunk

#: Time that a request may take, with all that is tried again.
TIMEOUT_S: Final = 10.0
#: Time that the first request may take, for which a server may have to load its model.
FIRST_TIMEOUT_S: Final = 180.0
#: How often a request is made that fails for a reason that may pass, and the pause after the first time.
ATTEMPTS: Final = 3
PAUSE_S: Final = 0.2
#: Time that a step waits for answers if none is there.
WAIT_S: Final = 0.005
#: Tokens that one request asks for at most.
MAX_ANSWER_TOKENS: Final = 256
#: Tokens of a word, generously: what is asked for where the policy lets so many words through.
_TOKENS_PER_WORD: Final = 6
#: A "word" of text is cut here, so that no single one can fill a model's context.
_MAX_WORD_CHARACTERS: Final = 256
#: Words with the space before them; of scripts without spaces, characters.
_PIECE: Final = re.compile(r"\s*[\u2e80-\uffef]|\s*[^\s\u2e80-\uffef]+|\s+")

logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """What a model adds to a sequence.

    Attributes:
        tokens: The most probable ones, as many as were asked for.
        ended: Whether its answer ends with them.
    """

    tokens: tuple[int, ...]
    ended: bool


class _Completion(NamedTuple):
    """What a server makes of a prompt: text, its tokens' ids if it tells them, and whether it ended by itself."""

    text: str
    ids: tuple[int, ...] | None
    ended: bool


class _RefusedError(Exception):
    """The server does not take such a request: its status, and what it says."""


class CompletionServer:
    """A server with OpenAI's completions API; asked from a thread of its own, many requests at a time.

    Args:
        url: Where the API is, such as ``http://127.0.0.1:8000/v1``.
        model: The model's name there.
        key: Secret that the server asks for; None for none.

    Raises:
        DragomanError: ``translator_unavailable`` if the URL is none.
    """

    def __init__(self, url: str, model: str, key: str | None = None) -> None:
        if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
            raise _unavailable(f"{url!r} is no URL of a server: write it as in http://127.0.0.1:8000/v1")
        self.url = url.rstrip("/")
        self.model = model
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._client: httpx2.AsyncClient | None = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="translator", daemon=True).start()

    def complete(
        self, prompt: str | Sequence[int], max_tokens: int, timeout_s: float | None = None
    ) -> Future[_Completion]:
        """Begins to ask for the most probable continuation of a text, or of token ids.

        Args:
            prompt: The text, or its ids.
            max_tokens: Tokens to ask for at most.
            timeout_s: Time that it may take; None for :data:`TIMEOUT_S`.

        Returns:
            What will hold it, or a ``DragomanError``, ``translator_unavailable``, or a `_RefusedError`.
        """
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        if not isinstance(prompt, str):
            body |= {"prompt": list(prompt), "return_token_ids": True}
        return asyncio.run_coroutine_threadsafe(self._complete(body, timeout_s or TIMEOUT_S), self._loop)

    def max_tokens(self) -> int | None:
        """Tokens that the model's context has, if the server tells."""
        return asyncio.run_coroutine_threadsafe(self._max_tokens(), self._loop).result()

    async def _complete(self, body: dict[str, Any], timeout_s: float) -> _Completion:
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._post(body)
        except TimeoutError:
            raise _unavailable(f"the translator's server did not answer within {timeout_s:g} s") from None
        if not response.is_success:
            raise _RefusedError(f"{response.status_code}: {response.text[:200]}")
        try:
            return _read(response.json())
        except (ValueError, LookupError, TypeError):
            raise _unavailable("the translator's server answered with what is no completion") from None

    async def _post(self, body: dict[str, Any]) -> httpx2.Response:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                response = await self._http().post(f"{self.url}/completions", json=body)
            except httpx2.TransportError as error:
                failure = f"cannot be reached ({type(error).__name__})"
            else:
                if response.status_code < 500 and response.status_code != 429:
                    return response
                failure = f"answers with status {response.status_code}"
            if attempt < ATTEMPTS:
                await asyncio.sleep(PAUSE_S * attempt)
        raise _unavailable(f"the translator's server {failure}")

    async def _max_tokens(self) -> int | None:
        try:
            response = await self._http().get(f"{self.url}/models", timeout=TIMEOUT_S)
            found = [model.get("max_model_len") for model in response.json()["data"] if model["id"] == self.model]
        except (httpx2.HTTPError, ValueError, LookupError, TypeError, AttributeError):
            return None  # not every server tells, and the first request will say what is wrong
        return found[0] if found and isinstance(found[0], int) else None

    def _http(self) -> httpx2.AsyncClient:
        """The connections, which belong to the thread."""
        if self._client is None:
            limits = httpx2.Limits(max_connections=256, max_keepalive_connections=64)
            self._client = httpx2.AsyncClient(headers=self._headers, timeout=None, limits=limits)
        return self._client


def _read(data: Any) -> _Completion:
    choice = data["choices"][0]
    text, ids, ended = choice["text"], choice.get("token_ids"), choice["finish_reason"] != "length"
    if not isinstance(text, str) or not (ids is None or all(isinstance(token, int) and token >= 0 for token in ids)):
        raise TypeError("no completion")
    text = text.encode("utf-8", errors="replace").decode()  # JSON can have halves of surrogate pairs
    return _Completion(text if ended else text.rstrip("\ufffd"), None if ids is None else tuple(ids), ended)


class Words:
    """Text whose tokens are words with the space before them: a :class:`models.tokenizer.Tokenizer` without a list.

    An id is its text's UTF-8, read as a number.

    Args:
        chat: Renders prompts.
        symbols: Control symbols of the server's tokenizer, which a word must not spell.
    """

    size = 0  # there is no largest id
    controls: frozenset[int] = frozenset()
    word_starts: frozenset[int] | None = None

    def __init__(self, chat: ChatTemplate | None, symbols: Sequence[str] = ()) -> None:
        self.chat = chat
        self._symbols = symbols

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text, and nothing but it."""
        return tuple(int.from_bytes(b"\x01" + piece.encode()) for piece in _PIECE.findall(text))

    def encode_word(self, word: str) -> tuple[int, ...]:
        """See :class:`models.tokenizer.Tokenizer`."""
        word = word.encode("utf-8", errors="replace").decode()[:_MAX_WORD_CHARACTERS]
        for symbol in self._symbols:
            word = word.replace(symbol, f"{symbol[:1]}\u200b{symbol[1:]}")  # a space without width
        return self.encode(" " + word)

    def encode_prompt(self, prompt: str) -> tuple[int, ...]:
        """See :class:`models.tokenizer.Tokenizer`."""
        return self.encode(prompt)

    def bytes_of(self, token: int) -> bytes:
        """See :class:`models.tokenizer.Tokenizer`."""
        return token.to_bytes((token.bit_length() + 7) // 8)[1:]

    def id_of(self, symbol: str) -> int | None:
        """None: text has no control symbols."""
        return None


class RemoteTranslator(AnyTranslator):
    """A language model that a server runs; shared by every session.

    Args:
        server: Where it runs.
        tokenizer: The model's own, where the server takes and gives ids; else :class:`Words`.
        config: By which policy it is made to interpret.
        opening: What the server puts before every text by itself, and must not be sent.
    """

    def __init__(
        self, server: CompletionServer, tokenizer: Tokenizer, config: TranslationConfig, opening: str = ""
    ) -> None:
        super().__init__(tokenizer, config, server.model)
        self.server = server
        self._opening = opening
        self._max_answer_tokens = min(MAX_ANSWER_TOKENS, config.max_context_tokens // 8)

    def ask(self, sequence: Sequence[int], max_tokens: int | None = None) -> Future[Answer]:
        """Begins to ask how the model goes on with a sequence; for so many tokens at most, if bounded."""
        max_tokens = min(self._max_answer_tokens, max_tokens or self._max_answer_tokens)
        words = self.tokenizer if isinstance(self.tokenizer, Words) else None
        prompt = sequence if words is None else decode(words, sequence).removeprefix(self._opening)
        asked, answered = self.server.complete(prompt, max_tokens), Future[Answer]()
        asked.add_done_callback(lambda done: _answer(done, words, answered))
        return answered


def _answer(done: Future[_Completion], words: Words | None, answered: Future[Answer]) -> None:
    """Passes on what a server has said, as tokens."""
    try:
        completion = done.result()
        tokens = completion.ids if words is None else words.encode(completion.text)
        if tokens is None:
            raise _unavailable("the translator has ceased to answer with token ids: restart the service")
        answered.set_result(Answer(tokens, completion.ended or not tokens))
    except DragomanError as error:
        answered.set_exception(error)
    except _RefusedError as error:  # what it says may repeat the prompt
        answered.set_exception(_unavailable(f"the translator refuses a request with status {str(error)[:3]}"))
    except Exception:
        logger.exception("a request to the translator failed")
        answered.set_exception(_unavailable("a request to the translator failed"))


@dataclass(frozen=True)
class RemoteState:
    """The past of one session; a value. What it has asked for is decided by its rows, though not there yet.

    Attributes:
        rows: One for each target language.
        asked: What each row waits for; None where it waits for nothing.
        problem: Why nothing more will be translated; None if all is well.
    """

    rows: tuple[FallbackRow, ...]
    asked: tuple[Future[Answer] | None, ...]
    problem: DragomanError | None = None


@dataclass(frozen=True)
class Remote(ByPolicy):
    """Runs a model of another program under a policy; a :class:`streaming.interpreter.Interpreter`.

    Attributes:
        translator: The model; shared.
    """

    translator: RemoteTranslator

    def init_state(self, directions: Sequence[Direction], glossary: Glossary | None = None) -> RemoteState:
        """The state of one session, which has read nothing; the glossary has no effect."""
        return RemoteState(tuple(map(FallbackRow, directions)), (None,) * len(directions))

    def feed(self, state: RemoteState, words: Sequence[str], *, closes: bool = False) -> RemoteState:
        """Queues words for every row; see :meth:`streaming.translation.Interleaved.feed`."""
        return replace(state, rows=self.fed(state.rows, words, closes=closes))

    def ready(self, state: RemoteState) -> bool:
        """Whether a step would advance any row, or wait for what a row has asked."""
        return state.problem is None and any(row.busy for row in state.rows)

    def problem(self, state: RemoteState) -> DragomanError | None:
        """Why nothing more will be translated; None if all is well."""
        return state.problem

    def step(
        self, states: Sequence[RemoteState], *, max_forwards: int = 1
    ) -> tuple[list[list[TranslatedChunk]], list[RemoteState]]:
        """Asks for what the rows of several sessions need, and takes what is there.

        Args:
            states: Those of the sessions.
            max_forwards: Of no effect: the work is done elsewhere.
        """
        states = [self._asking(state) for state in states]
        wait([asked for state in states for asked in state.asked if asked is not None], WAIT_S, FIRST_COMPLETED)
        results = [self._taking(state) for state in states]
        return [chunks for chunks, _ in results], [state for _, state in results]

    def _asking(self, state: RemoteState) -> RemoteState:
        rows = tuple(self.read(row) for row in state.rows)
        return replace(
            state, rows=rows, asked=tuple(old or self._ask(row) for old, row in zip(state.asked, rows, strict=True))
        )

    def _ask(self, row: FallbackRow) -> Future[Answer] | None:
        if row.draft is None:
            return None
        words = self.words_left(row, row.draft)
        return self.translator.ask(row.sequence(), None if words is None else _TOKENS_PER_WORD * max(1, words) + 2)

    def _taking(self, state: RemoteState) -> tuple[list[TranslatedChunk], RemoteState]:
        rows, asked, chunks = list(state.rows), list(state.asked), list[TranslatedChunk]()
        for b, future in enumerate(state.asked):
            if future is None or not future.done():
                continue
            error = future.exception()
            if isinstance(error, DragomanError):
                return chunks, RemoteState(tuple(rows), (None,) * len(rows), error)
            rows[b], chunk = self._after(rows[b], future.result())
            asked[b] = None
            if chunk is not None:
                chunks.append(replace(chunk, row=b))
        return chunks, RemoteState(tuple(rows), tuple(asked))

    def _after(self, row: FallbackRow, answer: Answer) -> tuple[FallbackRow, TranslatedChunk | None]:
        """The row with an answer, as far as its write takes it, and what it shows if that ends the write."""
        chunk: TranslatedChunk | None = None
        for token in (*answer.tokens, *([None] if answer.ended else [])):
            if row.draft is not None:
                row, chunk = self.after_token(row, row.draft, token)
        return row, chunk


def load_remote_translator(
    url: str, model: str, folder: Path | None, *, policy: Policy = "wait-k", key: str | None = None
) -> RemoteTranslator:
    """A translator whose weights are behind OpenAI's completions API.

    Args:
        url: Where the API is, such as ``http://127.0.0.1:8000/v1``.
        model: The model's name there.
        folder: Holds the model's ``tokenizer.json`` and chat template; weights are not read.
        policy: Of :data:`models.translator.FALLBACKS`.
        key: Secret that the server asks for; None for none.

    Raises:
        DragomanError: ``translator_unavailable`` if the server does not answer, or refuses; ``model_not_found``,
            ``unsupported_model`` or ``bad_checkpoint`` for a folder that does not tell how the model is asked.
    """
    if folder is None:
        raise DragomanError(
            "model_not_found", f"name a folder with the tokenizer.json and the chat template of {model} as --translator"
        )
    data = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "translation" in data:
        raise DragomanError(
            "unsupported_model",
            f"the model of {folder} decides itself when to write, for which it has to run here: leave the URL out",
        )
    tokenizer = load_tokenizer(folder)
    if not isinstance(tokenizer, HuggingFaceTokenizer) or tokenizer.chat is None:
        raise DragomanError("unsupported_model", f"{folder} has no tokenizer.json with a chat template")
    server = CompletionServer(url, model, key)
    try:
        takes_ids = _takes_ids(server, tokenizer, tokenizer.chat.render("Hello"))
    except DragomanError as error:
        raise _unavailable(f"{url}: {error}") from None
    except _RefusedError as error:
        raise _unavailable(
            f"{url} refuses a request for {model!r} with {error}; the URL usually ends in /v1, and the name is one"
            " that its /models lists"
        ) from None
    known = [LlmConfig.from_hf(data).max_positions] if "model_type" in data else []
    context = min([server.max_tokens() or MAX_FALLBACK_TOKENS, MAX_FALLBACK_TOKENS, *known])
    config = TranslationConfig(policy, FALLBACK_PROMPT, ("en", *NAMES), tuple(NAMES), max_context_tokens=context)
    if takes_ids:
        return RemoteTranslator(server, tokenizer, config)
    return RemoteTranslator(server, Words(tokenizer.chat, tokenizer.symbols), config, tokenizer.opening)


def _takes_ids(server: CompletionServer, tokenizer: HuggingFaceTokenizer, prompt: str) -> bool:
    """Whether the server takes and gives token ids; it must at least take text."""
    try:
        if server.complete(tokenizer.encode_prompt(prompt), 1, FIRST_TIMEOUT_S).result().ids is not None:
            return True
    except _RefusedError:
        pass
    server.complete(prompt.removeprefix(tokenizer.opening), 1, FIRST_TIMEOUT_S).result()
    return False


def _unavailable(sentence: str) -> DragomanError:
    return DragomanError("translator_unavailable", sentence)
