"""Network interfaces: the one that reaches the other hosts, and this host's addresses."""

from __future__ import annotations

import socket

import psutil

from horovod_owt.errors import ConfigError


def interface_towards(host: str) -> str:
    """The interface by which this host routes packets to `host`.

    Raises ConfigError when the name does not resolve or there is no route.
    """
    source = source_address(host)
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == source for a in addresses):
            return name
    raise ConfigError(f"no interface has the address {source}, by which {host} is reached")


def source_address(host: str) -> str:
    """This host's address on the route to `host`; raises ConfigError as above.

    Nothing is sent: connecting a UDP socket only looks up the route.
    """
    try:
        address = socket.getaddrinfo(host, 9, socket.AF_INET, socket.SOCK_DGRAM)[0][4]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(
            f"no route from here to host {host}: {error.strerror or error}",
            wanted="a name that resolves, and a route",
            fix=f"check `getent hosts {host}` and `ip route get ADDRESS`, or pass --interface NAME",
        ) from None


def interface_between(hosts: list[str]) -> str:
    """The interface that reaches all of `hosts` other than this one; `lo` when there are none.

    Raises ConfigError when they are reached by different interfaces: Gloo uses one.
    """
    routes = {host: interface_towards(host) for host in hosts}
    found = sorted(set(routes.values()) - {"lo"})
    if len(found) > 1:
        table = ", ".join(f"{host} by {name}" for host, name in routes.items())
        raise ConfigError(
            f"hosts are reached by different interfaces: {table}",
            wanted="one network that connects all hosts",
            fix="--interface NAME",
        )
    return found[0] if found else "lo"


def chosen_interface(asked: str | None, hosts: list[str]) -> str:
    """The interface asked for, which must exist here, else the one between `hosts`."""
    here = sorted(psutil.net_if_addrs())
    if asked is not None and asked not in here:  # horovodrun would pass it to a shell, then hang
        raise ConfigError(f"--interface {asked}", wanted=f"one of {', '.join(here)}")
    return asked or interface_between(hosts)


def interface_environment(interface: str) -> dict[str, str]:
    """Variables that select the interface for Open MPI 4 and 5, and NCCL."""
    names = ("OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_oob_tcp_if_include", "PRTE_MCA_prte_if_include")
    return {**dict.fromkeys(names, interface), **nccl_interface(interface)}


def nccl_interface(interface: str) -> dict[str, str]:
    """NCCL takes a name for a prefix: eth1 would be eth10 too. `=` asks for the very name."""
    return {"NCCL_SOCKET_IFNAME": f"={interface}"}


def address_of(interface: str) -> str:
    """Its first IPv4 address."""
    (address,) = [a.address for a in psutil.net_if_addrs()[interface] if a.family == socket.AF_INET][:1]
    return address


def own_addresses() -> list[str]:
    """This host's IPv4 addresses, loopback last."""
    found = [a.address for all_ in psutil.net_if_addrs().values() for a in all_ if a.family == socket.AF_INET]
    return sorted(found, key=lambda address: address.startswith("127."))
