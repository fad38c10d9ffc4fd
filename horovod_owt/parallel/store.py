"""Horovod's rendezvous server, restricted to the ranks of one job.

Horovod's server is a key-value store over HTTP: it has the addresses of all ranks, and in elastic jobs it
unpickles what ranks put there. It listens on all interfaces and serves anyone. This one listens on one
address and serves only requests below a secret path, which the ranks get as part of its address.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import socket
import socketserver
import threading
from collections.abc import Callable, Sequence
from typing import Any

from horovod.runner import gloo_run
from horovod.runner.common.util import network
from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer, RendezvousServer
from horovod.runner.util.threads import in_thread

from horovod_owt.parallel.gloo import ADDRESS, Node

MAX_PENDING = 128  # connections that have not sent the secret yet
HEAD_BYTES = 1 << 16  # of a request
GET = re.compile(rb"GET /([^/: ]+)[^/ ]*/([^/ ]+)/([^/ ]+) HTTP/1\.(?s:.*)\r\n\r\n")
SEND_S = 5.0  # for the kernel to accept a response
VALUE_BYTES = 1 << 20  # of a value; those of ranks are a few kB


class Store(RendezvousServer):
    """Horovod's rendezvous server on one address, for requests that carry a secret."""

    def __init__(self, ip: str, verbose: int = 0) -> None:
        super().__init__(verbose)
        self._ip, self._secret = ip, secrets.token_hex(16)

    def start(self, handler_cls: type[RendezvousHandler] = RendezvousHandler) -> int:
        """Start serving; returns the port."""
        handler = type("Handler", (_Guarded, handler_cls), {"secret": self._secret})
        self._httpd = _Server(self._secret, (self._ip, 0), handler, self._verbose)
        self._listen_thread = in_thread(target=self._httpd.serve_forever)
        return self._httpd.server_port

    def stop(self) -> None:
        """Stop serving and listening; Horovod's own method only stops serving."""
        super().stop()
        self._httpd.server_close()

    def address(self, ip: str, port: int) -> str:
        """HOROVOD_GLOO_RENDEZVOUS_ADDR for ranks that reach this server at `ip`.

        Horovod requests `http://{address}:{port}/SCOPE/KEY`, so the address may contain a path.
        """
        return f"{ip}:{port}/{self._secret}"


class _Server(RendezvousHTTPServer):
    """Limits the number of connections that have not sent the secret: the newest displaces the oldest."""

    daemon_threads = True  # a connection must not keep the process from ending
    request_queue_size = 1024

    def __init__(self, secret: str, *args: Any) -> None:
        self._secret = secret.encode()
        self._pending: dict[socket.socket, None] = {}  # oldest first
        self._lock = threading.Lock()
        super().__init__(*args)

    def server_bind(self) -> None:
        """Skip HTTPServer's lookup of the host name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        if self._answered(request):
            return
        with self._lock:
            if len(self._pending) >= MAX_PENDING:
                oldest = next(iter(self._pending))
                del self._pending[oldest]
                _shut(oldest)
            self._pending[request] = None
        super().process_request(request, client_address)

    def _answered(self, request: socket.socket) -> bool:
        """Answer a GET of a rank's address if it has arrived completely; otherwise read nothing.

        N ranks over Gloo send 2.5 N^2 requests before their first step. A thread for each request, with full
        parsing of its headers, would take five times as long.
        """
        try:
            head = request.recv(HEAD_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            return False
        asked = GET.fullmatch(head)
        if not asked or not hmac.compare_digest(asked[1], self._secret):
            return False
        scope, key = asked[2].decode(errors="replace"), asked[3].decode(errors="replace")
        if scope not in self.scope_size:  # the driver of an elastic job delays the answer to some requests
            return False
        with self.cache_lock:
            value = self.cache.get(scope, {}).get(key)
        code, body = ("404 Not Found", b"") if value is None else ("200 OK", value)
        try:
            request.recv(len(head))
            request.settimeout(SEND_S)
            request.sendall(f"HTTP/1.0 {code}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        except OSError:  # the rank is gone
            pass
        self.shutdown_request(request)
        return True

    def shutdown_request(self, request: socket.socket) -> None:
        self.proven(request)
        super().shutdown_request(request)

    def proven(self, request: socket.socket) -> None:
        with self._lock:
            self._pending.pop(request, None)

    def handle_error(self, request: socket.socket, client_address: Any) -> None:
        """Print nothing; Horovod's own method prints a traceback for any invalid request."""


class _Guarded:
    """Mixin for a RendezvousHandler: refuses requests without the secret before reading further."""

    secret: str

    def parse_request(self) -> bool:
        _, _, target = self.raw_requestline.partition(b" /")
        shown, _, _ = target.partition(b"/")
        # Horovod's clients append the port to the address, hence to the secret
        if not hmac.compare_digest(shown.partition(b":")[0], self.secret.encode()):
            self.close_connection = True
            return False
        self.raw_requestline = self.raw_requestline.replace(shown + b"/", b"", 1)
        self.server.proven(self.connection)
        return super().parse_request() and self._is_small()

    def _is_small(self) -> bool:
        length = self.headers.get("Content-Length", "0")
        small = self.path.count("/") == 2 and length.isdecimal() and int(length) <= VALUE_BYTES
        if not small:
            self.send_status_code(400)
        return small


def _shut(connection: socket.socket) -> None:
    """Shut the connection down, which wakes the thread that reads from it."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # closed meanwhile
        pass


def start_rendezvous(nodes: Sequence[Node], ip: str) -> tuple[str, int, Callable[[], None]]:
    """Start the rendezvous server on this address of this host.

    Returns its address, which contains the job's secret, its port, and a function that stops it.
    """
    slots = ",".join(f"{node.host}:{node.ranks}" for node in nodes)
    server = Store(ip)
    port = server.start()
    server.init(get_host_assignments(parse_hosts(slots), sum(node.ranks for node in nodes)))
    return server.address(ip, port), port, server.stop


def guard_launcher(interface: str) -> None:
    """Make horovodrun, in this process, start a `Store` on this interface and pass the secret to its ranks.

    Ranks on this host inherit the secret with the environment. Horovod would put the environment on the
    command line of their shell, which every user of the host can read; for other hosts it is still on the
    command line of ssh.
    """
    ip = gloo_run.network.get_driver_ip([interface])  # the address that horovodrun passes to its ranks
    run_command, rank_command = gloo_run.get_run_command, gloo_run._slot_info_to_command_fn
    stores: list[Store] = []

    def start(verbose: int = 0) -> Store:
        stores.append(Store(ip, verbose))
        return stores[-1]

    def with_secret(command: list[str], ip: str, nics: Any, port: int, elastic: bool = False) -> str:
        os.environ[ADDRESS] = stores[-1].address(ip, port)
        return run_command(command, os.environ[ADDRESS], nics, port, elastic=elastic)

    def inherited(command: str, env: dict[str, str]) -> Callable[[Any], str]:
        new = {name: value for name, value in env.items() if os.environ.get(name) != value}
        here = rank_command(command.replace(f"{ADDRESS}={os.environ[ADDRESS]} ", ""), new)
        elsewhere = rank_command(command, env)
        return lambda slot: (here if _is_here(slot.hostname) else elsewhere)(slot)

    gloo_run.RendezvousServer, gloo_run.get_run_command = start, with_secret
    gloo_run._slot_info_to_command_fn = inherited
    listen_on(ip)


def _is_here(host: str) -> bool:
    """Whether horovodrun would start the rank without ssh."""
    return gloo_run.network.resolve_host_address(host) in gloo_run.network.get_local_host_addresses()


def listen_on(ip: str) -> None:
    """Make Horovod's authenticated services in this process listen on one address instead of on all."""

    def find_port(server_factory: Callable[[tuple[str, int]], socketserver.TCPServer]) -> tuple:
        server = server_factory((ip, 0))
        return server, server.server_address[1]

    network.find_port = find_port
