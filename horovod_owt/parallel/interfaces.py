"""Network interfaces: the one that reaches the other hosts, and this host's addresses, IPv4 and IPv6."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from horovod_owt.errors import ConfigError

FAMILIES = (socket.AF_INET, socket.AF_INET6)  # in this order, as horovodrun: Horovod's Gloo needs IPv4
SYSFS_NET = Path("/sys/class/net")
# Variables in which horovodrun, this package or the user sets a job's interface.
INTERFACE_VARIABLES = (
    "HOROVOD_GLOO_IFACE",
    "NCCL_SOCKET_IFNAME",
    "OMPI_MCA_btl_tcp_if_include",
    "PRTE_MCA_prte_if_include",
)


def interface_towards(host: str) -> str:
    """The interface through which this host reaches `host`.

    Raises ConfigError if the name does not resolve or there is no route.
    """
    source = source_address(host)
    for name in psutil.net_if_addrs():
        if source in addresses_of(name):
            return name
    raise ConfigError(f"no interface has the address {source}, through which {host} is reached")


def source_address(host: str) -> str:
    """This host's address on the route to `host`, IPv4 if there is one; ConfigError if there is no route.

    Nothing is sent: connecting a UDP socket only looks up the route.
    """
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
        return _source(sorted(found, key=lambda info: FAMILIES.index(info[0])))
    except OSError as error:
        raise ConfigError(
            f"no route from here to host {host}: {error.strerror or error}",
            wanted="a name that resolves, and a route",
            fix=f"check `getent hosts {host}` and `ip route get ADDRESS`, or pass --interface NAME",
        ) from None


def _source(destinations: list[tuple]) -> str:
    """The source address to the first destination that has a route; raises the last one's OSError."""
    for number, (family, _, _, _, address) in enumerate(destinations, start=1):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
        except OSError:
            if number == len(destinations):
                raise
    raise OSError("no address")


def interface_between(hosts: list[str]) -> str:
    """The interface that reaches all of `hosts` other than this one; `lo` if there are none.

    Raises ConfigError if they are reached through different interfaces: Gloo uses only one.
    """
    routes = {host: interface_towards(host) for host in hosts}
    found = sorted(set(routes.values()) - {"lo"})
    if len(found) > 1:
        table = ", ".join(f"{host} by {name}" for host, name in routes.items())
        raise ConfigError(
            f"hosts are reached through different interfaces: {table}",
            wanted="one network that connects all hosts",
            fix="--interface NAME",
        )
    return found[0] if found else "lo"


def interface_of_lone_rank() -> str:
    """One with an IPv4 address, loopback if it has one; raises ConfigError.

    Gloo wants one of a single rank too. By itself it looks for the address of the host's name, which need not
    resolve, or may have IPv6 alone, and ends the process if there is none.
    """
    for name in ("lo", *psutil.net_if_addrs()):
        if any(":" not in address for address in addresses_of(name)):
            return name
    raise ConfigError(
        "no interface of this host has an IPv4 address",
        wanted="one, loopback at least",
        fix="ip link set lo up",
    )


def chosen_interface(asked: str | None, hosts: list[str]) -> str:
    """The requested interface, else the one between `hosts`; ConfigError if it does not exist here."""
    here = sorted(psutil.net_if_addrs())
    if asked is not None and asked not in here:  # horovodrun would pass it to a shell, then hang
        raise ConfigError(f"--interface {asked}", wanted=f"one of {', '.join(here)}")
    return asked or interface_between(hosts)


def interface_environment(interface: str) -> dict[str, str]:
    """Variables that select the interface for Open MPI 4 and 5, and NCCL."""
    names = ("OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_oob_tcp_if_include", "PRTE_MCA_prte_if_include")
    return {**dict.fromkeys(names, interface), **nccl_interface(interface)}


def nccl_interface(interface: str) -> dict[str, str]:
    """NCCL's variable; without `=`, NCCL takes the name as a prefix: eth1 would also match eth10."""
    return {"NCCL_SOCKET_IFNAME": f"={interface}"}


def interface_of_job(env: Mapping[str, str]) -> str | None:
    """The interface set for the job, if it is set by name and exists on this host."""
    here = psutil.net_if_addrs()
    names = (env.get(variable, "") for variable in INTERFACE_VARIABLES)
    return next((name for name in names if name in here and addresses_of(name)), None)


def listening_addresses(env: Mapping[str, str], *, one_host: bool) -> list[str]:
    """The addresses on which a server for the ranks of this job should listen.

    Loopback if all ranks are on this host; else the address of the job's interface, if it is set by name;
    else every address of this host that others may reach.
    """
    if one_host:
        return [address_of("lo")]
    if name := interface_of_job(env):
        return [address_of(name)]
    return [address for address in own_addresses() if not is_loopback(address)] or [address_of("lo")]


def address_of(interface: str) -> str:
    """The interface's first address, IPv4 if it has one; raises ConfigError if it has none."""
    found = addresses_of(interface)
    if not found:
        raise ConfigError(
            f"interface {interface} has no address", wanted="an IPv4 or IPv6 address", fix="--interface NAME"
        )
    return found[0]


def ipv4_address_of(interface: str) -> str:
    """The interface's first IPv4 address; raises ConfigError if it has none."""
    address = address_of(interface)
    if ":" in address:
        raise ConfigError(
            f"interface {interface} has only the IPv6 address {address}",
            wanted="an IPv4 address, which Horovod needs without MPI",
            fix="--interface NAME of another network, or start the ranks by mpirun",
        )
    return address


def addresses_of(interface: str) -> list[str]:
    """The interface's addresses without link-local ones, IPv4 first."""
    found = [a for a in psutil.net_if_addrs().get(interface, []) if a.family in FAMILIES]
    ordered = sorted(found, key=lambda a: FAMILIES.index(a.family))
    return [a.address for a in ordered if not ipaddress.ip_address(a.address).is_link_local]


def link(interface: str, net: Path = SYSFS_NET) -> dict[str, int | None]:
    """The interface's MTU and speed; None if the driver reports none, or -1."""
    return {"mtu": _number(net / interface / "mtu"), "mbit_per_s": _number(net / interface / "speed")}


def _number(file: Path) -> int | None:
    try:
        return max(0, int(file.read_text(encoding="utf-8"))) or None
    except (OSError, ValueError):
        return None


def usable(addresses: set[str]) -> set[str]:
    """The addresses to use for a host: IPv4 if there are any, else IPv6 that are not link-local."""
    beyond = {address for address in addresses if not ipaddress.ip_address(address).is_link_local}
    return {address for address in beyond if ":" not in address} or beyond


def own_addresses() -> list[str]:
    """This host's addresses, loopback last."""
    found = [address for interface in psutil.net_if_addrs() for address in addresses_of(interface)]
    return sorted(found, key=is_loopback)


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
