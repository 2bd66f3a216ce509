"""How the loopback Hub reads requests, lets those fail that were told to, and answers the others."""

import re
import socket
import struct
import sys
import traceback
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs

import loopback_refs  # noqa: F401  its routes
import loopback_upload  # noqa: F401  its routes
from loopback_api import Answer, Call, dispatch, say
from loopback_repo import Refusal

MESSAGES = {
    401: "Invalid credentials in Authorization header",
    403: "Forbidden: your token has no right to do this",
    404: "Repository not found",
    409: "Cannot complete the request: it conflicts with another one",
    412: "A commit has happened since. Please refresh and try again.",
    413: "Payload Too Large",
    429: "Too Many Requests: you have been rate-limited",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}
HEADERS = {404: {"X-Error-Code": "RepoNotFound"}, 429: {"Retry-After": "1"}}


class Request(NamedTuple):
    """What the server was asked: the path as sent, with its query; headers, whatever the case of their names; the size
    of the body as far as it was read.
    """

    method: str
    path: str
    headers: Message
    size: int


@dataclass
class Fault:
    """A failure that waits for its requests; ``hits`` counts those it struck."""

    method: str
    path: re.Pattern
    what: int | str
    times: int | None
    headers: dict[str, str]
    after_bytes: int | None
    seconds: float
    skip: int = 0
    hits: int = 0


class Server(ThreadingHTTPServer):
    """One of the Hub's two ports, on this machine only."""

    def __init__(self, hub, port: int):
        self.hub = hub
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients that went away are no error of ours
            self.hub.errors.append(traceback.format_exc())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16  # head and body leave together

    def answer(self):
        hub, generation = self.server.hub, self.server.hub.generation
        path, _, query = self.path.partition("?")
        fault = hub.strike(self.command, self.path)
        what = fault.what if fault else None
        body = self._body(fault if what == "cut" else None)
        with hub.lock:
            if generation is not hub.generation:
                return self._hang_up()
            hub.requests.append(Request(self.command, self.path, self.headers, len(body)))
            hub.bodies.append(body)
        if what == "cut" and self.command != "GET":
            return self._hang_up()
        if what == "slow" and generation.wait(fault.seconds):
            return self._hang_up()
        if isinstance(what, int):
            answer = say({"error": MESSAGES.get(what, "Told to fail")}, what)
            answer.headers |= HEADERS.get(what, {}) | fault.headers
        else:
            answer = self._do(hub, generation, path, parse_qs(query), body)
        if answer is None or what == "lost":
            return self._hang_up()
        self._send(answer, fault if what == "cut" else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def _do(self, hub, generation, path, query, body) -> Answer | None:
        with hub.lock:
            if generation is not hub.generation:
                return None
            try:
                is_storage = self.server is hub.servers[1]
                if is_storage != path.startswith("/storage/"):
                    raise Refusal(404, f"There is no {path} here")
                user = None if is_storage else hub.who(self.headers.get("Authorization"))
                return dispatch(Call(hub, self.command, path, self.headers, body, query, user), path)
            except Refusal as refusal:
                headers = {**refusal.headers, "X-Error-Message": refusal.message.encode("ascii", "replace").decode()}
                headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
                return say({"error": refusal.message, **refusal.fields}, refusal.status, **headers)
            except Exception as error:
                hub.errors.append(f"{self.command} {self.path}\n{traceback.format_exc()}")
                return say({"error": f"The loopback Hub is at fault: {type(error).__name__}: {error}"}, 500)

    def _body(self, cut: Fault | None) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
            return body[: _cut_at(cut, len(body))] if cut else body
        size = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(_cut_at(cut, size) if cut else size)

    def _send(self, answer: Answer, cut: Fault | None) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        body = b"" if self.command == "HEAD" else answer.body
        self.wfile.write(body[: _cut_at(cut, len(body))] if cut else body)
        self.wfile.flush()
        if cut:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_WR)

    def _hang_up(self) -> None:
        """End the connection as a broken one ends: by a reset, without an answer."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, format, *args):
        if self.server.hub.verbose:
            sys.stderr.write(f"{format % args}\n")


def _cut_at(fault: Fault, size: int) -> int:
    return size // 2 if fault.after_bytes is None else min(fault.after_bytes, max(size - 1, 0))
