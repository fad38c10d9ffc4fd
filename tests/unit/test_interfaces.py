"""Addresses and interfaces of hosts with IPv4, with IPv6 and with both."""

import socket
from types import SimpleNamespace

import pytest

from horovod_owt.errors import ConfigError
from horovod_owt.parallel import interfaces
from horovod_owt.parallel.interfaces import (
    address_of,
    addresses_of,
    interface_between,
    interface_of_lone_rank,
    interface_towards,
    ipv4_address_of,
    listening_addresses,
    own_addresses,
    source_address,
    usable,
)

V4, V6 = socket.AF_INET, socket.AF_INET6
HOST = {
    "lo": [(V4, "127.0.0.1"), (V6, "::1")],
    "eth0": [
        (socket.AF_PACKET, "02:fc:00:00:00:01"),
        (V6, "fe80::1%eth0"),
        (V6, "fd00::2"),
        (V4, "10.0.0.2"),
    ],
    "ib0": [(V6, "fe80::2%ib0"), (V6, "fd01::2")],
    "down0": [(socket.AF_PACKET, "02:fc:00:00:00:02")],
}


@pytest.fixture
def host(monkeypatch):
    table = {
        name: [SimpleNamespace(family=family, address=address) for family, address in addresses]
        for name, addresses in HOST.items()
    }
    monkeypatch.setattr(interfaces.psutil, "net_if_addrs", lambda: table)


def test_an_interface_has_ipv4_first_and_no_address_of_one_link_only(host):
    assert addresses_of("eth0") == ["10.0.0.2", "fd00::2"] and addresses_of("ib0") == ["fd01::2"]
    assert own_addresses() == ["10.0.0.2", "fd00::2", "fd01::2", "127.0.0.1", "::1"]
    assert address_of("ib0") == "fd01::2"
    with pytest.raises(ConfigError, match="interface down0 has no address"):
        address_of("down0")


def test_a_lone_rank_needs_no_name_that_resolves(host, monkeypatch):
    table = interfaces.psutil.net_if_addrs()
    assert interface_of_lone_rank() == "lo"
    table["lo"] = table["lo"][1:]  # IPv6 alone
    assert interface_of_lone_rank() == "eth0"
    del table["eth0"]
    with pytest.raises(ConfigError, match="no interface of this host has an IPv4 address.*lo up"):
        interface_of_lone_rank()


def test_horovods_own_store_needs_ipv4_and_that_is_said(host):
    assert ipv4_address_of("eth0") == "10.0.0.2"
    with pytest.raises(ConfigError, match="interface ib0 has only the IPv6 address fd01::2; wanted an IPv4"):
        ipv4_address_of("ib0")


@pytest.mark.parametrize(
    ("env", "one_host", "wanted"),
    [
        ({"HOROVOD_GLOO_IFACE": "eth0"}, True, ["127.0.0.1"]),
        ({"HOROVOD_GLOO_IFACE": "eth0", "NCCL_SOCKET_IFNAME": "ib0"}, False, ["10.0.0.2"]),
        ({"HOROVOD_GLOO_IFACE": "lo"}, False, ["127.0.0.1"]),
        ({"NCCL_SOCKET_IFNAME": "ib0"}, False, ["fd01::2"]),
        ({"OMPI_MCA_btl_tcp_if_include": "eth0"}, False, ["10.0.0.2"]),
        # not the name of one interface
        ({"NCCL_SOCKET_IFNAME": "^lo,docker"}, False, ["10.0.0.2", "fd00::2", "fd01::2"]),
        ({"OMPI_MCA_btl_tcp_if_include": "10.0.0.0/8"}, False, ["10.0.0.2", "fd00::2", "fd01::2"]),
        ({"HOROVOD_GLOO_IFACE": "down0"}, False, ["10.0.0.2", "fd00::2", "fd01::2"]),
        ({}, False, ["10.0.0.2", "fd00::2", "fd01::2"]),
    ],
)
def test_a_server_listens_on_loopback_or_the_chosen_interface_else_where_others_reach_it(
    host, env, one_host, wanted
):
    assert listening_addresses(env, one_host=one_host) == wanted


def test_a_route_is_found_by_either_family(monkeypatch):
    assert source_address("127.0.0.1") == "127.0.0.1" and interface_towards("127.0.0.1") == "lo"
    if "::1" not in addresses_of("lo"):
        pytest.skip("no IPv6 here")
    assert source_address("::1") == "::1" and interface_between(["::1", "localhost"]) == "lo"
    both = [(V6, None, 0, "", ("::1", 9, 0, 0)), (V4, None, 0, "", ("127.0.0.1", 9))]
    monkeypatch.setattr(interfaces.socket, "getaddrinfo", lambda *_, **__: both)
    assert source_address("host") == "127.0.0.1"  # as horovodrun, which knows no other
    unreachable = [(V4, None, 0, "", ("0.0.0.0.0", 9)), both[0]]
    monkeypatch.setattr(interfaces.socket, "getaddrinfo", lambda *_, **__: unreachable)
    assert source_address("host") == "::1"


def test_of_a_names_addresses_those_that_are_used_are_compared():
    assert usable({"10.0.0.2", "fd00::2", "fe80::1%eth0"}) == {"10.0.0.2"}
    assert usable({"fd00::2", "fe80::1%eth0"}) == {"fd00::2"} and usable({"fe80::1%eth0"}) == set()
