"""The server of a watched folder: on this machine's loopback alone, for reading alone."""

from __future__ import annotations

import errno
import os
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from stepdistill.errors import UserError
from stepdistill.watching.site import POLICY, Answer, Site

ADDRESS = "127.0.0.1"
_HOSTS = {"localhost", "127.0.0.1", "::1"}
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Server(ThreadingHTTPServer):
    """Answers for a site.

    Args:
        site: what is served.
        port: 0 takes any that is free.

    Raises:
        UserError: the port is taken, or not one that may be used.
    """

    daemon_threads = True

    def __init__(self, site: Site, port: int) -> None:
        self.site = site
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise UserError(f"--port {port} {why}: give another, or 0 for any that is free") from None

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return f"http://{ADDRESS}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 60
    server_version, sys_version = "stepdistill", ""

    def do_GET(self) -> None:
        self._give(with_content=True)

    def do_HEAD(self) -> None:
        self._give(with_content=False)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def _give(self, *, with_content: bool) -> None:
        if not self._for_this_machine():
            self._send(Answer(HTTPStatus.FORBIDDEN, text="This page is for localhost alone.\n"), with_content)
            return
        self._send(self.server.site.answer(self.path, self.headers.get("If-None-Match", "")), with_content)

    def _for_this_machine(self) -> bool:
        """Whether the browser asked for this machine by its own name: not another site whose name leads here."""
        hosts = self.headers.get_all("Host", [])
        try:
            return len(hosts) == 1 and urlsplit(f"//{hosts[0]}").hostname in _HOSTS
        except ValueError:
            return False

    def _send(self, answer: Answer, with_content: bool) -> None:
        content = answer.text.encode("utf-8", "replace")
        opened = _opened(answer.file) if answer.file is not None else None
        if answer.file is not None and opened is None:
            answer, content = Answer(HTTPStatus.NOT_FOUND), b"It went away.\n"
        length = os.fstat(opened.fileno()).st_size if opened else len(content)
        self.send_response(answer.status)
        for name, value in {**_HEADERS, **answer.headers}.items():
            self.send_header(name, value)
        if answer.status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if opened is not None:
            with opened:
                if with_content:
                    _copy(opened, self.wfile, length)
        elif with_content and answer.status != HTTPStatus.NOT_MODIFIED:
            self.wfile.write(content)


def _opened(file: Path) -> BinaryIO | None:
    """A file to read; None where it is gone, or became a link."""
    try:
        return os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb")
    except OSError:
        return None


def _copy(source: BinaryIO, to: Any, length: int) -> None:
    """So many bytes: stats.jsonl grows while it is read."""
    left = length
    while left and (part := source.read(min(left, 1 << 20))):
        to.write(part)
        left -= len(part)
