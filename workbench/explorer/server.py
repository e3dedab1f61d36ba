"""`workbench explore`: the session's page on loopback, for people without Jupyter.

Only this machine reaches it (127.0.0.1), only who has the token in the URL, only under its own name (Host; against DNS
rebinding), and only from its own page (Origin, and JSON, which no foreign form can post). The page loads nothing from
elsewhere, and its policy forbids it to.
"""

import hmac
import json
import secrets
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from workbench.errors import InputError
from workbench.explorer.session import Session

STATIC = Path(__file__).parent / "static"
FILES = {"/explorer.js": "text/javascript", "/page.js": "text/javascript", "/explorer.css": "text/css"}
LARGEST = 1 << 20
"""Bytes of a command at most."""
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

    def __init__(self, session: Session, *, port: int = 0) -> None:
        """Errors: `InputError` when the port is taken. Port 0 takes a free one."""
        self.session, self.token = session, secrets.token_urlsafe(24)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise InputError(
                f"port {port} can't be used ({error.strerror}); choose another with --port, or leave it out."
            ) from None
        self.names = tuple(f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost"))

    @property
    def url(self) -> str:
        """The page, with its token."""
        return f"http://127.0.0.1:{self.server_port}/?token={self.token}"


class _Handler(BaseHTTPRequestHandler):
    server: ExplorerServer  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version, sys_version = "workbench", ""

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
        if self.headers.get("Host") not in self.server.names:
            raise Refused(HTTPStatus.FORBIDDEN, "this page is served as 127.0.0.1 and localhost only")
        origin = self.headers.get("Origin")
        if origin is not None and origin not in [f"http://{name}" for name in self.server.names]:
            raise Refused(HTTPStatus.FORBIDDEN, "requests from other pages are not answered")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise Refused(HTTPStatus.FORBIDDEN, "requests from other pages are not answered")
        given = self.headers.get("X-Workbench-Token") or parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        if not hmac.compare_digest(given.encode(), self.server.token.encode()):
            raise Refused(
                HTTPStatus.FORBIDDEN, "the token is missing or wrong; open the address that `workbench explore` printed"
            )

    def _file(self) -> tuple[bytes, str]:
        path = urlsplit(self.path).path
        if path == "/":
            return PAGE.format(token=self.server.token).encode(), "text/html"
        if path not in FILES:
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
        text = (STATIC / path[1:]).read_text(encoding="utf-8")
        return text.replace("__TOKEN__", self.server.token).encode(), FILES[path]

    def _command(self) -> tuple[bytes, str]:
        if urlsplit(self.path).path != "/command":
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
        if self.headers.get("Content-Type", "").split(";")[0].strip() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a command is JSON")
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LARGEST:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "a command has a length, of 1 MB at most")
        try:
            command = json.loads(self.rfile.read(int(length)))
        except ValueError:
            raise Refused(HTTPStatus.BAD_REQUEST, "this is not JSON") from None
        if not isinstance(command, Mapping):
            raise Refused(HTTPStatus.BAD_REQUEST, "a command is a JSON object")
        return json.dumps(self.server.session.handle(command), allow_nan=False).encode(), "application/json"

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: the URL holds the token, and a log of polls helps nobody."""
