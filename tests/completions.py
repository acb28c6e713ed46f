"""A server of OpenAI's completions API for tests, with a model or a plan in place of weights, and with faults."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from tokenizers import Tokenizer

from tests.models.test_tokenizer import hugging_face

Prompt = str | list[int]
#: What goes on with a prompt: text, ids or None, and whether that ends by itself.
Continue = Callable[[Prompt, int], tuple[str, list[int] | None, bool]]
CHAT = "<s>{{ messages[0]['content'] }}="


class Completions(ThreadingHTTPServer):
    """Answers `POST /v1/completions`.

    Attributes:
        requests: The bodies that have come.
        keys: What they had as `Authorization`.
        slow_s: Time that an answer takes.
        faults: What happens to the next requests: a status, `drop` for a connection that ends, `noise` for no JSON.
    """

    daemon_threads = True

    def __init__(self, go_on: Continue, *, takes_ids: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.go_on = go_on
        self.takes_ids = takes_ids
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.slow_s = 0.0
        self.faults: list[int | str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has left is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: Completions
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": "tiny", "max_model_len": 2048}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.keys.append(self.headers["Authorization"])
        time.sleep(self.server.slow_s)
        match self.server.faults.pop(0) if self.server.faults else None:
            case "drop":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            case "noise":
                self._answer(200, ["noise"])
            case int(status):
                self._answer(status, {"error": "as asked"})
            case _ if not isinstance(body["prompt"], str) and not self.server.takes_ids:
                self._answer(422, {"error": "prompt must be a string"})
            case _:
                text, ids, ended = self.server.go_on(body["prompt"], body["max_tokens"])
                choice = {"index": 0, "text": text, "finish_reason": "stop" if ended else "length"}
                self._answer(200, {"choices": [choice | ({} if ids is None else {"token_ids": ids})]})

    def _answer(self, status: int, data: object) -> None:
        content = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def completions(go_on: Continue, *, takes_ids: bool = True) -> Iterator[Completions]:
    server = Completions(go_on, takes_ids=takes_ids)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def plain_folder(folder: Path, *, weights: bool = False) -> Path:
    """A folder with a small tokenizer and a chat template, and with the weights of a small Llama if asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    source = hugging_face("byte-level") / "tokenizer.json"
    (folder / "tokenizer.json").write_bytes(source.read_bytes())
    symbols = {"eos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT, **symbols}))
    if weights:
        _save_llama(folder, Tokenizer.from_file(str(source)))
    return folder


def _save_llama(folder: Path, tokenizer: Tokenizer) -> None:
    import transformers

    torch.manual_seed(3)
    end = tokenizer.token_to_id("<s>")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=end, pad_token_id=end,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3) if parameter.dim() > 1 else parameter.add_(0.05 * torch.randn_like(parameter))
        model.lm_head.weight[end] *= 4.0  # so that answers end now and then
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    model.save_pretrained(folder)
