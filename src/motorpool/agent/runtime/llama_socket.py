"""The few questions that xllamacpp answers only over HTTP: the chat template, and text to token ids and back.

Decides nothing. Must not: be reachable by anybody else. llama.cpp opens an address in any case, by default a TCP port
that every local user can reach; here it is a Unix socket in a private folder, whose name is removed as soon as the
server listens. This process alone can still connect, through a handle that it opened before.
Called by: ``llama``, from its worker threads.
"""

from __future__ import annotations

import http.client
import os
import socket
import tempfile
from pathlib import Path
from typing import Any, Final

import msgspec

from motorpool.errors import CallerError, EngineError

TIMEOUT_S: Final = 60.0  # these answers take about a millisecond, unless the machine is stopped in between
MAX_KEPT: Final = 4096  # answers about short texts that are kept
_MAX_TEXT_CHARS: Final = 200


class SocketFolder:
    """A private place for the server's socket until it listens."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="motorpool-engine-"))
        self._handle = os.open(self._folder, os.O_PATH | os.O_CLOEXEC)
        # llama.cpp takes an address that ends so for a Unix socket. A socket's address is 107 bytes at most, which the
        # folder's own path may be longer than.
        self.path = f"/proc/self/fd/{self._handle}/llama.sock"

    def hide(self) -> LlamaSocket:
        """Remove the name and return what still reaches the socket."""
        handle = os.open(self.path, os.O_PATH | os.O_CLOEXEC)
        self.remove()
        return LlamaSocket(handle)

    def remove(self) -> None:
        """Remove the folder and the name of the socket in it."""
        Path(self.path).unlink(missing_ok=True)
        os.close(self._handle)
        self._folder.rmdir()


class LlamaSocket:
    """Asks the server behind a hidden Unix socket."""

    def __init__(self, handle: int) -> None:
        self._address = f"/proc/self/fd/{handle}"
        self._kept: dict[str, list[int]] = {}

    def template(self, messages: bytes, extra: dict[str, Any]) -> str:
        """The prompt that the chat template makes of ``messages`` (JSON); raise CallerError if it refuses them."""
        fields = b"".join(b",%b:%b" % (msgspec.json.encode(k), msgspec.json.encode(v)) for k, v in extra.items())
        answer = self._post("/apply-template", b'{"messages":%b%b}' % (messages, fields), param="messages")
        return str(answer["prompt"])

    def tokens(self, text: str, *, prompt: bool) -> list[int]:
        """The token ids of ``text``; as a prompt, special tokens are recognised and added as the model wants them."""
        if not prompt and text in self._kept:
            return self._kept[text]
        body = msgspec.json.encode({"content": text, "add_special": prompt, "parse_special": prompt})
        ids = [int(token) for token in self._post("/tokenize", body, param=None)["tokens"]]
        if not prompt:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[text] = ids
        return ids

    def text(self, ids: list[int]) -> str:
        """The text of token ids."""
        return str(self._post("/detokenize", msgspec.json.encode({"tokens": ids}), param=None)["content"])

    def _post(self, path: str, body: bytes, *, param: str | None) -> dict[str, Any]:
        connection = _Connection(self._address)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer: dict[str, Any] = msgspec.json.decode(response.read(), type=dict[str, Any])
        except (OSError, http.client.HTTPException, msgspec.DecodeError) as error:
            raise EngineError("llama.cpp does not answer") from error
        finally:
            connection.close()
        if response.status >= 500:
            raise EngineError("llama.cpp failed")
        if response.status >= 400:
            raise refusal(answer.get("error"), param)
        return answer


def refusal(error: object, param: str | None) -> CallerError:
    """llama.cpp's complaint about a request, shortened to its first line."""
    said = str(error.get("message", "")) if isinstance(error, dict) else str(error)
    first = said.strip().split("\n", 1)[0][:_MAX_TEXT_CHARS]
    return CallerError(f"the model cannot run this request: {first}", code="invalid_request", param=param)


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, address: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._unix_address = address

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._unix_address)
