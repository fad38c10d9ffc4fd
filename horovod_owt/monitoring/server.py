"""The HTTP server of the metrics: on one address, in threads, with limits."""

from __future__ import annotations

import errno
import socket
import sys
import threading
from socketserver import TCPServer, ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import psutil
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.registry import Collector

from horovod_owt.errors import ConfigError, fix_of
from horovod_owt.parallel.admission import family_of
from horovod_owt.parallel.interfaces import address_of

MAX_CONNECTIONS = 16  # at a time; a new one displaces the oldest
REQUEST_S = 5.0  # for the next bytes of a request


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_S

    def log_message(self, *_: object) -> None:
        """Do not log scrapes."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # connections that the kernel queues; the default is 5

    def __init__(self, address: tuple[str, int]) -> None:
        self.address_family = family_of(address[0])
        self._open: list[socket.socket] = []  # oldest first
        self._one_at_a_time = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Like WSGIServer's, without the lookup of the host name, which may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]
        self.setup_environ()

    def process_request(self, request: socket.socket, client_address: object) -> None:
        with self._one_at_a_time:
            if len(self._open) >= MAX_CONNECTIONS:
                _hang_up(self._open.pop(0))
            self._open.append(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        with self._one_at_a_time:
            if request in self._open:
                self._open.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect or are too slow."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def _hang_up(connection: socket.socket) -> None:
    """Shut down a connection that another thread reads from; that thread closes it."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


class MetricsServer:
    """Serves metrics at this address until `close`, without authentication."""

    def __init__(self, metrics: Collector, *, address: str, port: int) -> None:
        """`address` is one of this host, or an interface's name. Raises ConfigError if it can't listen."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(metrics)
        ip = address_of(address) if address in psutil.net_if_addrs() else address
        try:
            self._server = _Server((ip, port))
        except (OSError, OverflowError) as error:
            raise _refused(ip, port, error) from None
        self._server.set_app(make_wsgi_app(registry))
        self.place = f"{f'[{ip}]' if ':' in ip else ip}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _refused(ip: str, port: int, error: OSError) -> ConfigError:
    saw = f"metrics_port={port} on {ip}: {error.strerror or error}"
    if error.errno == errno.EADDRINUSE:
        fix = f"--set metrics_port={port + 1}, or stop what listens there (`ss -ltnp`)"
        return ConfigError(saw, wanted="a free port", fix=fix)
    if error.errno in (errno.EACCES, errno.EPERM):
        return ConfigError(saw, wanted="a port from 1024 on, or root", fix="--set metrics_port=9400")
    if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        here = ", ".join(sorted(psutil.net_if_addrs()))
        wanted = f"an address of this host or one of its interfaces ({here})"
        return ConfigError(saw, wanted=wanted, fix="--set metrics_address=127.0.0.1")
    return ConfigError(saw, wanted="an address and port to listen on", fix=fix_of(error))
