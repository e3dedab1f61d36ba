"""`workbench explore`: the session's page on loopback, for people without Jupyter.

Only this machine reaches it (127.0.0.1), only who has the token in the URL, only under its own name or one that was
allowed (Host, once; against DNS rebinding), and only from its own page (Origin, and JSON, which no foreign form can
post). The page loads nothing from elsewhere, and its policy forbids it to. A connection that does not say what it wants
in time is closed, and so is one too many: neither holds a thread for long.
"""

import hmac
import json
import logging
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from workbench.errors import InputError
from workbench.explorer.session import Session

STATIC = Path(__file__).parent / "static"
FILES = {"/explorer.js": "text/javascript", "/page.js": "text/javascript", "/explorer.css": "text/css"}
LARGEST = 1 << 20
"""Bytes of a command at most."""
READ_SECONDS = 10.0
"""In which a request must have been read."""
MOST_CONNECTIONS = 32
"""At a time, each with a thread of its own."""
log = logging.getLogger("workbench")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src "
    "data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Workbench explorer</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="explorer.css?token={token}">
</head>
<body class="wbx-page">
<main id="explorer"></main>
<script type="module" src="page.js?token={token}"></script>
</body>
</html>
"""


class Refused(Exception):
    """A request that is not answered: the status and why."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class ExplorerServer(ThreadingHTTPServer):
    """One session on one port of this machine."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, session: Session, *, port: int = 0, allowed: Sequence[str] = ()) -> None:
        """`allowed`: other addresses (`name:port`) that the page may be opened by, such as the near end of an ssh
        tunnel. Errors: `InputError` when the port is taken or none, and for an address of another form. Port 0 takes a
        free one."""
        for name in allowed:
            if not re.fullmatch(r"([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?", name, re.IGNORECASE):
                raise InputError(f"{name!r} is no address; write for example --allow-host localhost:9000.")
        if not 0 <= port <= 65535:
            raise InputError(f"there is no port {port}; choose one from 1024 to 65535, or leave --port out.")
        self._places, self._reading = threading.BoundedSemaphore(MOST_CONNECTIONS), dict[socket.socket, float]()
        self._guard = threading.Lock()
        self.session, self.token = session, secrets.token_urlsafe(24)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise InputError(
                f"port {port} can't be used ({error.strerror}); choose another with --port, or leave it out."
            ) from None
        own = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]
        self.names = tuple(name.lower() for name in (*own, *allowed))

    @property
    def url(self) -> str:
        """The page, with its token."""
        return f"http://127.0.0.1:{self.server_port}/?token={self.token}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for a connection, where one is free; else it is closed at once."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        with self._guard:
            self._reading[request] = time.monotonic()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Give the connection's place free at its end, whatever the end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.has_read(request)
            self._places.release()

    def has_read(self, request: Any) -> None:
        """A request is read: it is answered without haste."""
        with self._guard:
            self._reading.pop(request, None)

    def service_actions(self) -> None:
        """Close the connections that have not been read in time, also those that send a byte now and then."""
        late = time.monotonic() - READ_SECONDS
        with self._guard:
            stalled = [request for request, since in self._reading.items() if since < late]
        for request in stalled:
            try:
                request.shutdown(socket.SHUT_RDWR)
            except OSError:
                self.has_read(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that was closed is no error; anything else is one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # a broken pipe, a reset, a time-out
            log.warning("the explorer could not answer a request (%s: %s)", type(error).__name__, error)


class _Handler(BaseHTTPRequestHandler):
    server: ExplorerServer  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version, sys_version = "workbench", ""
    timeout = READ_SECONDS

    def do_GET(self) -> None:
        """The page and its files."""
        self._answer(self._file)

    def do_POST(self) -> None:
        """A command."""
        self._answer(self._command)

    def _answer(self, make: Any) -> None:
        try:
            self._refuse_foreign()
            body, kind = make()
            status = HTTPStatus.OK
        except Refused as refused:
            body, kind, status = f"{refused}\n".encode(), "text/plain", refused.status
        self.server.has_read(self.request)
        self.send_response(status)
        for name, value in {
            **HEADERS,
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _refuse_foreign(self) -> None:
        """Another name for this machine, another page, or no token."""
        hosts, origins = self.headers.get_all("Host") or [], self.headers.get_all("Origin") or []
        if len(hosts) != 1 or hosts[0].lower() not in self.server.names:
            raise Refused(
                HTTPStatus.FORBIDDEN,
                f"this page is served as {', '.join(self.server.names)} only; behind a tunnel, start it with "
                "--allow-host NAME:PORT",
            )
        ours = [f"{scheme}://{name}" for name in self.server.names for scheme in ("http", "https")]
        if len(origins) > 1 or any(origin.lower() not in ours for origin in origins):
            raise Refused(HTTPStatus.FORBIDDEN, "requests from other pages are not answered")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise Refused(HTTPStatus.FORBIDDEN, "requests from other pages are not answered")
        given = self.headers.get("X-Workbench-Token") or parse_qs(self._url().query).get("token", [""])[0]
        if not hmac.compare_digest(given.encode(errors="replace"), self.server.token.encode()):
            raise Refused(
                HTTPStatus.FORBIDDEN, "the token is missing or wrong; open the address that `workbench explore` printed"
            )

    def _url(self) -> SplitResult:
        try:
            return urlsplit(self.path)
        except ValueError:
            raise Refused(HTTPStatus.BAD_REQUEST, "this is no address") from None

    def _file(self) -> tuple[bytes, str]:
        path = self._url().path
        if path == "/":
            return PAGE.format(token=self.server.token).encode(), "text/html"
        if path not in FILES:
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
        text = (STATIC / path[1:]).read_text(encoding="utf-8")
        return text.replace("__TOKEN__", self.server.token).encode(), FILES[path]

    def _command(self) -> tuple[bytes, str]:
        if self._url().path != "/command":
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
        if self.headers.get("Content-Type", "").split(";")[0].strip() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a command is JSON")
        lengths = self.headers.get_all("Content-Length") or []
        if len(lengths) != 1 or not re.fullmatch("[0-9]{1,7}", lengths[0]) or int(lengths[0]) > LARGEST:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "a command has one length, of 1 MB at most")
        if self.headers.get("Transfer-Encoding") is not None:
            raise Refused(HTTPStatus.NOT_IMPLEMENTED, "a command comes in one piece")
        try:
            command = json.loads(self.rfile.read(int(lengths[0])))
        except (ValueError, RecursionError):
            raise Refused(HTTPStatus.BAD_REQUEST, "this is not JSON") from None
        except OSError:
            raise Refused(HTTPStatus.REQUEST_TIMEOUT, "the command did not come in time") from None
        if not isinstance(command, Mapping):
            raise Refused(HTTPStatus.BAD_REQUEST, "a command is a JSON object")
        self.server.has_read(self.request)
        return json.dumps(self.server.session.handle(command), allow_nan=False).encode(), "application/json"

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: the URL holds the token, and a log of polls helps nobody."""
