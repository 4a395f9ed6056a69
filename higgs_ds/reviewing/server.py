"""The page on which clips are checked by ear, served on this machine.

Only who knows the address, which holds a random token, can read or change anything. No part of a request is used as a
path: clips are requested by their numbers in the list.
"""

from __future__ import annotations

import functools
import hmac
import ipaddress
import json
import re
import secrets
import socket
import sys
import urllib.parse
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any, BinaryIO

import jinja2

from higgs_ds.common.errors import InputError, SaveError
from higgs_ds.data.audio import AudioError
from higgs_ds.model.sample import AudioClip
from higgs_ds.reviewing.pair_list import CHOSEN, REJECTED
from higgs_ds.reviewing.review_list import ALL, SHOWN, ReviewList, StaleError
from higgs_ds.reviewing.sound import Sound, byte_range, sound_of
from higgs_ds.reviewing.view import counts_of, page_of, row_of

LARGEST_BODY = 1 << 16  # bytes
BLOCK = 1 << 16  # bytes of a sound that are sent at a time
IDLE_S = 60.0  # after which a connection without a request is closed
ANY_ADDRESS = ("0.0.0.0", "::")
_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)


class RefusedError(Exception):
    """A request that is not answered, with the HTTP status that says why."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class ReviewServer(ThreadingHTTPServer):
    """Serves one list at `url`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, review: ReviewList, host: str = "127.0.0.1", port: int = 0) -> None:
        """Raises OSError if nothing can be served at that address."""
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.review, self.host, self.token = review, host, secrets.token_urlsafe(24)
        super().__init__((host, port), _Handler)
        shown = socket.gethostname() if host in ANY_ADDRESS else f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server_port}/{self.token}/"

    def is_own_name(self, host: str) -> bool:
        """Return whether a Host header names this server: other sites cannot make a browser send such a request.

        The port is not compared, as it may be forwarded (ssh -L).
        """
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        if name is None or name in ("localhost", self.host):
            return name is not None
        if self.is_local():
            return name in ("127.0.0.1", "::1")
        return name == socket.gethostname().casefold() or _is_address(name)

    def is_local(self) -> bool:
        """Return whether only this machine reaches the server."""
        return self.host == "localhost" or (_is_address(self.host) and ipaddress.ip_address(self.host).is_loopback)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print errors, except that a browser has left, as it does whenever a clip is not played to its end."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "higgs-ds", ""
    timeout = IDLE_S
    server: ReviewServer

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, *_: Any) -> None:
        """Requests are not logged: their addresses hold the token."""

    def _answer(self, action: Callable[[list[str], dict[str, str]], None]) -> None:
        try:
            action(*self._checked_address())
        except RefusedError as error:
            self.close_connection = True  # its body was not read
            self._send_json({"error": str(error)}, error.status)
        except StaleError as error:
            self._send_json({"error": str(error)}, HTTPStatus.CONFLICT)
        except (InputError, AudioError) as error:
            self._send_json({"error": str(error)}, HTTPStatus.UNPROCESSABLE_ENTITY)
        except SaveError as error:
            self._send_json({"error": str(error)}, HTTPStatus.INSUFFICIENT_STORAGE)

    def _checked_address(self) -> tuple[list[str], dict[str, str]]:
        """Return the words of the address after the token, and its query."""
        if not self.server.is_own_name(self.headers.get("Host", "")):
            raise RefusedError(HTTPStatus.FORBIDDEN, "the address does not name this server; use the one it printed")
        address, _, query = self.path.partition("?")
        token, *words = address.split("/")[1:] or [""]
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            raise RefusedError(HTTPStatus.FORBIDDEN, "the address has another token; use the one that was printed last")
        return words, dict(urllib.parse.parse_qsl(query))

    def _get(self, words: list[str], query: dict[str, str]) -> None:
        review = self.server.review
        if words == [""]:
            self._send_page()
        elif not words:
            address = {"Location": f"/{self.server.token}/", "Content-Length": "0"}
            self._send_head(HTTPStatus.PERMANENT_REDIRECT, address)
        elif words == ["rows"]:
            with review.writing:
                review.refresh()
                answer = self._page(query)
            self._send_json(answer)
        elif len(words) == 2 and words[0] == "audio":
            with review.writing:
                review.check(_number(query.get("generation", "")))
                number = self._row_number(_number(words[1]))
                clip = self._asked_clip(number, query.get("which", CHOSEN))
                review.move_to(number)
            if clip is None:
                raise AudioError("the row names no audio file")
            with sound_of(clip) as sound:
                self._send_sound(sound)
        else:
            raise RefusedError(HTTPStatus.NOT_FOUND, "no such page")

    def _asked_clip(self, number: int, which: str) -> AudioClip | None:
        if which not in (CHOSEN, REJECTED):
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"which must be {CHOSEN} or {REJECTED}")
        if which == CHOSEN:
            return self.server.review.clip(number)
        pair = self.server.review.pair(number)
        return None if pair is None else pair.rejected

    def _post(self, words: list[str], _: dict[str, str]) -> None:
        """Change a row. Only the page itself may ask for it: another one has another origin."""
        if self.headers.get("Origin") != f"http://{self.headers['Host']}":
            raise RefusedError(HTTPStatus.FORBIDDEN, "a change must come from the page of this server")
        if self.headers.get("Content-Type") != "application/json":
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a change must be JSON")
        if words not in (["edit"], ["drop"], ["swap"]):
            raise RefusedError(HTTPStatus.NOT_FOUND, "no such page")
        given = self._body()
        review = self.server.review
        with review.writing:
            review.check(_given(given, "generation", int))
            number = self._row_number(_given(given, "row", int))
            if words == ["edit"]:
                review.edit(number, _given(given, "text", str), _given(given, "before", str))
            elif words == ["swap"]:
                review.swap(number, _given(given, "before", str))
            else:
                review.drop(number, _given(given, "dropped", bool))
            review.move_to(number)
            answer = {"row": row_of(review, number)} | counts_of(review)
        self._send_json(answer)

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not _NUMBER.fullmatch(length):
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "a change must come with its length")
        if int(length) > LARGEST_BODY:
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a change may have {LARGEST_BODY} bytes at most")
        try:
            given = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "a change must be a JSON object")
        return given

    def _page(self, query: dict[str, str]) -> dict[str, Any]:
        shown = query.get("shown", ALL)
        if shown not in SHOWN:
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"shown must be one of {', '.join(SHOWN)}")
        start, at = (_number(query[name]) if name in query else None for name in ("start", "at"))
        return page_of(self.server.review, query.get("words", ""), shown, start, at)

    def _row_number(self, number: int) -> int:
        if not 0 <= number < len(self.server.review.rows):
            raise RefusedError(HTTPStatus.NOT_FOUND, "no such row")
        return number

    def _send_page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        content = _template().render(name=self.server.review.path.absolute(), nonce=nonce).encode("utf-8", "replace")
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; media-src 'self'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self._send_head(
            HTTPStatus.OK,
            {"Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(content)),
             "Content-Security-Policy": policy},
        )  # fmt: skip
        self.wfile.write(content)

    def _send_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        content = json.dumps(value).encode()
        self._send_head(status, {"Content-Type": "application/json", "Content-Length": str(len(content))})
        self.wfile.write(content)

    def _send_sound(self, sound: Sound) -> None:
        wanted = byte_range(self.headers.get("Range"), sound.num_bytes)
        sent = range(sound.num_bytes) if wanted is None else wanted
        headers = {"Content-Type": sound.content_type, "Accept-Ranges": "bytes", "Content-Length": str(len(sent))}
        status = HTTPStatus.OK if wanted is None else HTTPStatus.PARTIAL_CONTENT
        if wanted is not None:
            headers["Content-Range"] = f"bytes {sent.start}-{sent.stop - 1}/{sound.num_bytes}"
            if not sent:
                status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
                headers["Content-Range"] = f"bytes */{sound.num_bytes}"
        self._send_head(status, headers)
        self._copy(sound.file, sent)

    def _copy(self, file: BinaryIO, sent: range) -> None:
        file.seek(sent.start)
        for start in range(sent.start, sent.stop, BLOCK):
            block = file.read(min(BLOCK, sent.stop - start))
            self.wfile.write(block)
            if len(block) < min(BLOCK, sent.stop - start):
                self.close_connection = True  # the file has become shorter
                return

    def _send_head(self, status: HTTPStatus, headers: dict[str, str]) -> None:
        self.send_response(status)
        always = {
            "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }  # fmt: skip
        if self.close_connection:
            always["Connection"] = "close"
        for name, value in (always | headers).items():
            self.send_header(name, value)
        self.end_headers()


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    text = files("higgs_ds.reviewing").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text)


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise RefusedError(HTTPStatus.BAD_REQUEST, "a number must have up to nine digits")
    return int(text)


def _given(values: dict[str, Any], name: str, kind: type) -> Any:
    """Return a value of a change; true and false are not numbers."""
    if type(values.get(name)) is not kind:
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"{name} must be of type {kind.__name__}")
    return values[name]
