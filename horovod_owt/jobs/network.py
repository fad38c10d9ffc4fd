"""Which of a host's interfaces reaches the other hosts: asked of the kernel's routes, not guessed by name."""

from __future__ import annotations

import socket

import psutil

from horovod_owt.errors import ConfigError


def address_towards(host: str) -> str:
    """This host's own address on the way to `host`; nothing is sent."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, 9, socket.AF_INET, socket.SOCK_DGRAM
        )
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(
            f"{socket.gethostname()} does not reach {host}: {error.strerror or error}",
            wanted="a name that resolves, and a route",
            fix=f"see `getent hosts {host}` there",
        ) from None


def interface_towards(host: str) -> str:
    """The name of the interface that holds that address: eth0, ib0, or lo where `host` is this one alone."""
    own = address_towards(host)
    holders = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == own for address in addresses)
    ]
    return holders[0]
