"""What torchrun tells its ranks, in Horovod's words."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from horovod_owt.parallel import torchrun
from horovod_owt.parallel.gloo import use_interface
from horovod_owt.topology import Launcher, Topology


@pytest.fixture
def network(monkeypatch):
    """A head node reached by ib1 from the others, which it reaches by ib0; its server has port 4711."""
    servers = []

    def start_rendezvous(nodes, ip):
        servers.append(nodes)
        return f"{ip}:4711/secret", 4711, lambda: None

    monkeypatch.setattr(torchrun, "start_rendezvous", start_rendezvous)
    monkeypatch.setattr(torchrun, "source_address", lambda host: f"10.0.0.2 to {host}")
    monkeypatch.setattr(torchrun, "interface_towards", lambda host: {"head": "ib1"}[host])
    ways = {(): "lo", ("10.0.0.2 to head",): "ib0"}
    monkeypatch.setattr(torchrun, "interface_between", lambda hosts: ways[tuple(hosts)])
    monkeypatch.setattr(torchrun, "ipv4_address_of", {"lo": "127.0.0.1", "ib0": "10.0.0.1"}.get)
    return servers


def met(ranks_of: dict[str, int], hosts: list[str] | None = None) -> list[dict[str, str]]:
    """What each rank's environment gets, by rank; nodes have names, in `hosts` those of their hosts."""
    store, places = HashStore(), []
    for node, ranks in enumerate(ranks_of.values()):
        host = (hosts or list(ranks_of))[node]
        variables = {
            "GROUP_RANK": str(node),
            "GROUP_WORLD_SIZE": str(len(ranks_of)),
            "MASTER_ADDR": "head",
        }
        for local_rank in range(ranks):
            topology = Topology(
                Launcher.TORCHRUN, len(places), sum(ranks_of.values()), local_rank, ranks, host, unbound=True
            )
            places.append((topology, variables))
    with ThreadPoolExecutor(len(places)) as pool:  # they wait for each other
        found = [pool.submit(torchrun.exchange_addresses, store, *place) for place in places]
        return [
            variables | {"HOROVOD_GLOO_IFACE": way} for variables, way in (each.result(30) for each in found)
        ]


def words(found: list[dict[str, str]], *names: str) -> list[list[str]]:
    return [[each[f"HOROVOD_{name}"] for name in names] for each in found]


def test_ranks_of_two_nodes_know_their_places_and_one_server(network):
    found = met({"head": 1, "n2": 2})
    assert words(found, "RANK", "SIZE") == [["0", "3"], ["1", "3"], ["2", "3"]]
    assert words(found, "LOCAL_RANK", "LOCAL_SIZE") == [["0", "1"], ["0", "2"], ["1", "2"]]
    assert words(found, "CROSS_RANK", "CROSS_SIZE") == [["0", "2"], ["1", "2"], ["0", "1"]]
    assert words(found, "HOSTNAME", "GLOO_IFACE") == [["head", "ib0"], ["n2", "ib1"], ["n2", "ib1"]]
    server = ["gloo", "10.0.0.1:4711/secret", "4711"]
    assert words(found, "CONTROLLER", "GLOO_RENDEZVOUS_ADDR", "GLOO_RENDEZVOUS_PORT") == [server] * 3
    assert [[(node.host, node.ranks) for node in nodes] for nodes in network] == [[("head", 1), ("n2", 2)]]


def test_one_node_meets_at_home(network):
    assert (
        words(met({"head": 2}), "GLOO_RENDEZVOUS_ADDR", "GLOO_IFACE") == [["127.0.0.1:4711/secret", "lo"]] * 2
    )


def test_the_interface_that_the_user_named_stays():
    env = {"HOROVOD_GLOO_IFACE": "eth7"}
    use_interface(env, "ib0")
    assert env == {"HOROVOD_GLOO_IFACE": "eth7", "NCCL_SOCKET_IFNAME": "=ib0"}


def test_nodes_of_one_host_get_different_names(network):
    assert words(met({"a": 1, "b": 1}, ["box", "box"]), "HOSTNAME") == [["box-0"], ["box-1"]]


def test_ranks_that_do_not_meet_are_named_with_the_store(monkeypatch):
    """Nobody listens at this port: what torch says of it is told in a line."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 9}.items():
        monkeypatch.setitem(os.environ, name, str(value))
    monkeypatch.setattr(torchrun, "RENDEZVOUS_LIMIT_S", 1)
    with pytest.raises(
        torchrun.RunError, match="^rank 1 on n1 cannot reach the others .* at 127.0.0.1:9: "
    ) as caught:
        torchrun.join_torchrun(Topology(Launcher.TORCHRUN, 1, 2, 0, 1, "n1"))
    assert "\n" not in str(caught.value)
