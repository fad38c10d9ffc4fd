"""Collectives by the alpha-beta model, against sums by hand."""

import pytest

from horovod_owt.perf.links import Links
from horovod_owt.perf.predict import Sum

GB = 1e9
# a node of four: 10 GB/s and 5 us inside; 1 GB/s and 50 us between nodes
BOX = Links(ranks_per_node=4, link_gb_s=10, link_us=5, net_gb_s=1, net_us=50)


def test_one_rank_sends_nothing():
    assert BOX.allreduce(GB, 1) == Sum() == BOX.exchange(GB, 3, 1)


def test_a_ring_in_a_node():
    # 6 messages of 5 us; 2 * 3/4 of 1 GB at 10 GB/s
    assert BOX.allreduce(GB, 4).wire_s == pytest.approx(6 * 5e-6 + 0.15)


def test_a_ring_over_two_nodes_goes_at_the_speed_of_the_network():
    # 14 messages of 50 us; 2 * 7/8 of 1 GB at 1 GB/s
    assert BOX.allreduce(GB, 8).wire_s == pytest.approx(14 * 50e-6 + 1.75)


def test_a_two_level_ring_sends_less_between_nodes():
    # inside 2 * 3/4 at 10 GB/s, between two nodes 2 * 1/2 at 1 GB/s
    both = BOX.allreduce(GB, 8, two_level=True).wire_s
    assert both == pytest.approx(6 * 5e-6 + 0.15 + 2 * 50e-6 + 1.0)


def test_rings_of_shards_share_the_network_of_their_node():
    # four shards of a quarter GB, each summed over two ranks on two nodes: 4 * 2 * 1/2 * 0.25 GB at 1 GB/s
    assert BOX.allreduce(GB / 4, 2, rings=4).wire_s == pytest.approx(2 * 50e-6 + 1.0)
    # also with two levels: each of these rings has one rank on a node
    assert BOX.allreduce(GB / 4, 2, rings=4, two_level=True) == BOX.allreduce(GB / 4, 2, rings=4)
    # two shards of half a GB over four ranks, two of them on each node: 2 * 2 * 3/4 * 0.5 GB
    assert BOX.allreduce(GB / 2, 4, rings=2).wire_s == pytest.approx(6 * 50e-6 + 1.5)


def test_an_exchange_in_a_node_and_over_two():
    assert BOX.exchange(GB, 3, 4).wire_s == pytest.approx(3 * 5e-6 + 0.1)
    # of 7 peers 4 are on the other node, and 4 ranks share its adapter
    assert BOX.exchange(0.7 * GB, 7, 8).wire_s == pytest.approx(7 * 50e-6 + 4 * 0.4)


def test_cpu_ranks_are_busy_with_what_they_send():
    cpu = Links(ranks_per_node=2, link_gb_s=1e6, link_us=0, net_gb_s=1, net_us=0, core_gb_s=2)
    summed = cpu.allreduce(GB, 2)
    assert summed.busy_s == pytest.approx(0.5) and summed.wire_s == pytest.approx(1e-6)
