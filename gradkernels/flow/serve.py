"""The report of a training run that is still going on, served to a browser on the same machine."""

from __future__ import annotations

import hmac
import json
import math
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlsplit

from gradkernels.flow.payload import Snapshot, last, payload, snapshots
from gradkernels.flow.report import as_json, page

if TYPE_CHECKING:
    from typing_extensions import Self

# However many browsers ask, and however often: training is interrupted for one snapshot in so many seconds.
SECONDS = 0.5
POLL_MILLISECONDS = 1000
LOOPBACK = ("127.0.0.1", "localhost")
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # the token is in the address
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def serve(monitor: Any, port: int = 0, host: str = "127.0.0.1", *, comparison: Any = None) -> Server:
    """Show a training run in the browser while it goes on: the page of :func:`report`, which keeps itself up to date.

    The address, with the token that it takes to see the page, is printed to stderr and is the ``url`` of what is returned. Training
    never waits: the page asks once a second, a thread answers from a snapshot of the monitor, and a browser that is slow or goes
    away holds up nobody. It can be read and not changed.

    Args:
        monitor: a monitor (:func:`gradkernels.flow.watch`), or a mapping from names to monitors, side by side.
        port: to listen at; 0 takes a free one.
        host: the address to listen at. Another than the loopback lets other machines ask; they need the token, and what they
            are sent is not encrypted. A tunnel is better: ``ssh -L 8000:127.0.0.1:<port> <machine>``, and the address printed, with
            port 8000.
        comparison: what :func:`gradkernels.flow.compare` returned, or its ``to_dict()``, to be shown too.

    Returns:
        A :class:`Server`: a context manager with ``url``, ``close()``, and ``wait()``, which keeps a script's page up after training.

    Raises:
        TypeError: `monitor` or `comparison` is something else.
        OSError: the port is taken, or the host is not an address of this machine.

    >>> nothing = {"format": 1, "model": "Model", "every": 1, "step": 0, "steps": [], "layers": []}
    >>> with serve(nothing) as server:
    ...     server.url.startswith("http://127.0.0.1:")
    True
    """
    server = Server(monitor, port, host, comparison)
    print(f"gradient flow: {server.url}", file=sys.stderr, flush=True)
    return server


class Server:
    """What :func:`serve` returns: a thread that answers browsers, until it is closed or the process ends. A context manager, which closes it.

    Arguments and errors are those of `serve`, which also prints the address. Snapshots are taken at most twice a second, however many browsers
    ask; whoever asks without the token gets 403.

    Attributes:
        url: the address with its token, ``http://host:port/?token=...``.
        host, port: what it listens at; the port is the one it got.
        token: 16 random bytes as text, new for every server.

    Example:
        >>> import urllib.request
        >>> nothing = {"format": 1, "model": "Model", "every": 1, "step": 0, "steps": [], "layers": []}
        >>> with Server(nothing) as server:
        ...     page = urllib.request.urlopen(server.url).read()
        >>> page[:15], server
        (b'<!doctype html>', <Server http://127.0.0.1:... (closed)>)
    """

    def __init__(self, monitor: Any, port: int = 0, host: str = "127.0.0.1", comparison: Any = None) -> None:
        snapshots(monitor)  # raises here, and not in a thread that nobody sees
        self.comparison = as_json(comparison)
        self._monitor, self.host, self.token = monitor, host, secrets.token_urlsafe(16)
        self._snapshots: dict[str, Snapshot] = {}
        self._taken, self._lock, self._complaint = -math.inf, threading.Lock(), ""
        try:
            self._http = _Http((host, port), _Handler)
        except OSError as error:
            advice = "; port=0 takes a free one" if port else ""
            raise type(error)(error.errno, f"cannot listen at {host}:{port}: {error.strerror}{advice}") from None
        self._http.owner = self
        self.port: int = self._http.server_address[1]
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(0.1,), name="gradkernels.flow.serve", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{self.host}:{self.port}/?token={quote(self.token)}"

    def current(self) -> dict[str, Snapshot]:
        """The snapshots of all runs, taken again when they are older than SECONDS."""
        with self._lock:
            if time.monotonic() - self._taken >= SECONDS:
                self._snapshots = snapshots(self._monitor)
                self._taken = time.monotonic()
            return self._snapshots

    def complain(self, error: Exception) -> None:
        """Print where an error came from, unless it is the one of a second ago again."""
        text = repr(error)
        if text != self._complaint:
            self._complaint = text
            traceback.print_exception(error)

    def wait(self) -> None:
        """Return when the server is closed, or on Ctrl-C, which closes it."""
        try:
            while self._thread.is_alive():
                self._thread.join(1)
        except KeyboardInterrupt:
            self.close()

    def close(self) -> None:
        """Stop answering. The page stays in the browser as it is; a second call does nothing."""
        if self._thread.is_alive():
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Server {self.url}{'' if self._thread.is_alive() else ' (closed)'}>"


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a browser that hangs must not hold up close()
    owner: Server

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is nobody's error; everything else is told as usual."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Http
    server_version, sys_version = "gradkernels", ""
    timeout = 10

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        if not self._asked_of_us() or not self._knows_token(query):
            return self._answer(HTTPStatus.FORBIDDEN, "text/plain", "This page needs the address with its token.\n")
        try:
            answer = self._found(address.path, query)
        except Exception as error:  # noqa: BLE001 - whatever a monitor raises, here it would end a thread and nothing else
            self.server.owner.complain(error)
            text = f"{type(error).__name__}: {error}\n"
            answer = HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", text
        return self._answer(*answer)

    do_HEAD = do_GET

    def _found(self, path: str, query: Mapping[str, list[str]]) -> tuple[Any, ...]:
        """What there is at a path: the arguments of `_answer`."""
        owner = self.server.owner
        if path == "/":
            live = {"live": {"milliseconds": POLL_MILLISECONDS}, "comparison": owner.comparison}
            return HTTPStatus.OK, "text/html", page(payload(owner.current()) | live, connect=True)
        if path == "/report.html":
            data = payload(owner.current()) | {"comparison": owner.comparison}
            return HTTPStatus.OK, "text/html", page(data), "gradient-flow.html"
        if path == "/data":
            found, seen = owner.current(), _seen(query)
            if seen == {name: last(snapshot) for name, snapshot in found.items()}:
                return (HTTPStatus.NO_CONTENT,)
            text = json.dumps(payload(found, seen), allow_nan=False, separators=(",", ":"))
            return HTTPStatus.OK, "application/json", text
        return HTTPStatus.NOT_FOUND, "text/plain", "There is nothing here.\n"

    def _asked_of_us(self) -> bool:
        """Whether the browser meant this machine: a page of another site, under a name that was made to lead here, did not.

        Any port will do, as that of a tunnel.
        """
        name = self.headers.get("Host", "").rpartition(":")[0]
        return self.server.owner.host not in LOOPBACK or name in LOOPBACK

    def _knows_token(self, query: Mapping[str, list[str]]) -> bool:
        return hmac.compare_digest(query.get("token", [""])[0].encode(), self.server.owner.token.encode())

    def _answer(self, status: HTTPStatus, kind: str = "text/plain", text: str = "", download: str = "") -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        if download:
            self.send_header("Content-Disposition", f'attachment; filename="{download}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: a request a second would bury what the training prints."""


def _seen(query: Mapping[str, list[str]]) -> dict[str, list[int]]:
    """What the page has of every run, from its query, see `payload`; a page that asks oddly is sent everything."""
    try:
        seen = json.loads(query.get("seen", ["{}"])[0])
        return {str(name): [int(step), int(spectrum)] for name, (step, spectrum) in seen.items()}
    except (ValueError, TypeError, AttributeError):
        return {}
