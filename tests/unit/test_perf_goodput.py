"""What failures cost: closed forms against each other, against a simulation, against sums by hand."""

import pytest

from horovod_owt.perf.goodput import DAY_S, Faults, goodput_report, of_nodes, simulate
from horovod_owt.perf.machine import load_machine

# a failure every 5 hours, a checkpoint of a minute, ten minutes to restart
OFTEN = Faults(mtbf_s=18_000, checkpoint_s=60, restart_s=600)


def test_young_and_daly_by_hand():
    assert OFTEN.young_s == pytest.approx(1469.69, abs=0.01)  # sqrt(2 * 60 * 18000)
    assert OFTEN.daly_s == pytest.approx(1429.9, abs=0.5)
    hopeless = Faults(mtbf_s=10, checkpoint_s=60, restart_s=0)
    assert hopeless.daly_s == 10


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("faults", "interval_s"),
    [(OFTEN, OFTEN.daly_s), (OFTEN, 7200.0), (Faults(3600, 300, 1200), 1200.0)],
)
def test_the_simulation_agrees_with_the_closed_form(faults, interval_s, seed):
    played = simulate(faults, interval_s, periods=40_000, seed=seed)
    assert played == pytest.approx(faults.goodput(interval_s), rel=0.02)


def test_dalys_interval_is_the_best():
    best = OFTEN.goodput(OFTEN.daly_s)
    assert all(OFTEN.goodput(factor * OFTEN.daly_s) < best for factor in (0.5, 0.8, 1.25, 2))


def test_without_failures_only_checkpoints_cost():
    assert Faults(1e15, 10, 0).goodput(90) == pytest.approx(0.9)


def test_hopeless_jobs_make_no_progress():
    assert Faults(mtbf_s=0.9, checkpoint_s=0.1, restart_s=300).goodput(3600) == 0


def test_nodes_divide_the_time_between_failures():
    machine = load_machine("boston-k80")
    assert of_nodes(machine, 64).mtbf_s == pytest.approx(machine["mtbf_days"] * DAY_S / 64)


def test_one_slow_node_costs_all_of_them():
    machine = load_machine("boston-k80")
    report = goodput_report(machine, 16, step_s=1.0, slow_step_s=1.4)
    assert report["slow_node_costs"] == pytest.approx(1 - 1 / 1.4)
    assert report["without_it_costs"] == 1 / 16
