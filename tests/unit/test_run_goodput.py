"""The goodput of run folders whose truth is known: simulated clocks, kills, requeues, regroupings."""

import json
import random
import tracemalloc
from pathlib import Path

import pytest
from click.testing import CliRunner

from horovod_owt.cli import cli
from horovod_owt.errors import ConfigError
from horovod_owt.logs import utc
from horovod_owt.runs.goodput import LOSSES, STEP_PARTS, Goodput, goodput


class Simulation:
    """A run with a clock of its own, which writes what a run records, and keeps account of what is true."""

    def __init__(self, run_dir: Path, seed: int = 0, every: int = 10) -> None:
        self.run_dir, self.draw, self.every = run_dir, random.Random(seed), every
        self.clock, self.attempt, self.step, self.saved = 1_790_000_000.0, 0, 0, 0
        self.true = dict.fromkeys((*STEP_PARTS, *LOSSES), 0.0)
        self.since_saved: dict[str, float] = {}  # would be lost with a kill now
        self.began = 0.0

    def write(self, kind: str, file: str = "metrics.jsonl", **values) -> None:
        record = {"kind": kind, "time": utc(self.clock), "attempt": self.attempt, "job_id": None, **values}
        with (self.run_dir / file).open("a") as lines:
            lines.write(json.dumps(record) + "\n")

    def spend(self, part: str, seconds: float) -> float:
        self.clock += seconds
        self.since_saved[part] = self.since_saved.get(part, 0.0) + seconds
        return seconds

    def keep(self) -> None:
        """What was done so far counts."""
        for part, seconds in self.since_saved.items():
            self.true[part] += seconds
        self.since_saved = {}

    def start(self, queue_s: float, start_up_s: float, regroup: bool = False) -> None:
        self.spend("lost work" if regroup else "queue", queue_s if self.attempt else 0.0)
        self.attempt += not regroup
        started = utc(self.clock)
        self.spend("start-up", start_up_s)
        if regroup:
            self.write("fault", fault="ranks regroup", world_size=2)
        self.write("run", started=started, first_step=self.saved, hosts=["a", "b"])
        self.spend("start-up", start_up_s / 3)
        self.step = self.saved
        self.keep()

    def steps(self, number: int) -> None:
        for _ in range(number):
            parts = {part: self.draw.uniform(0.1, 0.2) for part in STEP_PARTS}
            for part, seconds in parts.items():
                self.spend(part, seconds)
            self.step += 1
            self.write(
                "step",
                step=self.step,
                step_ms=1e3 * sum(parts.values()),
                data_wait_ms=1e3 * parts["data"],
                exposed_comm_ms=1e3 * parts["communication"],
            )
            if self.step % self.every == 0:
                self.save()
            self.spend("other", 0.001)

    def save(self) -> None:
        stall_s = self.spend("checkpoint", self.draw.uniform(0.3, 0.5))
        self.keep()
        self.saved = self.step
        self.write("checkpoint", step=self.step, stall_ms=1e3 * stall_s, write_s=1.0)

    def validate(self) -> None:
        took_s = self.spend("validation", self.draw.uniform(2.0, 3.0))
        self.write("validation", step=self.step, validation_s=took_s)

    def kill(self, after_s: float = 0.0, supervised: bool = True) -> None:
        """Within a step, `after_s` after the last record."""
        self.clock += after_s
        self.true["lost work"] += sum(self.since_saved.values()) + after_s
        self.since_saved = {}
        if supervised:
            self.write("attempt", "attempts.jsonl", exit_code=1)

    def end(self, exit_code: int, wait_s: float) -> None:
        self.spend("checkpoint", wait_s)
        self.keep()
        self.write("outcome", exit_code=exit_code)

    def check(self, tolerance: float = 0.01) -> Goodput:
        found = goodput(self.run_dir)
        wall_s = sum(self.true.values())
        assert found.wall_s == pytest.approx(wall_s, rel=tolerance)
        for part, share in found.shares().items():
            assert share == pytest.approx(self.true[part] / wall_s, abs=tolerance), part
        useful = sum(self.true[part] for part in STEP_PARTS) / wall_s
        assert found.share == pytest.approx(useful, abs=tolerance)
        return found


@pytest.fixture
def simulation(tmp_path):
    return Simulation(tmp_path)


@pytest.mark.parametrize("seed", range(5))
def test_three_kills_leave_each_part_within_a_percent(tmp_path, seed):
    run = Simulation(tmp_path, seed)
    for _ in range(3):
        run.start(run.draw.uniform(2, 30), run.draw.uniform(2, 6))
        run.steps(10 * run.draw.randrange(1, 5) + run.draw.randrange(4, 10))
        run.kill(run.draw.uniform(0, 0.4))
    run.start(10.0, 5.0)
    run.steps(run.draw.randrange(15, 60))
    run.end(0, 0.7)
    found = run.check()
    assert found.attempts == 4 and found.steps == run.step
    assert (
        found.shares()["lost work"] > 0.03 and found.shares()["queue"] > 0.05
    )  # there was something to find


def test_without_a_supervisor_only_the_unfinished_step_is_not_seen(simulation):
    for _ in range(3):
        simulation.start(5.0, 3.0)
        simulation.steps(24)
        simulation.kill(0.2, supervised=False)
    simulation.start(5.0, 3.0)
    simulation.steps(20)
    simulation.end(0, 0.5)
    assert simulation.check().steps_lost == 12


def test_validation_and_a_graceful_stop(simulation):
    simulation.start(0.0, 4.0)
    simulation.steps(40)
    simulation.validate()
    simulation.steps(10)
    simulation.end(75, 1.5)
    simulation.start(60.0, 4.0)
    simulation.validate()  # owed by the attempt before
    simulation.steps(30)
    simulation.validate()
    simulation.end(0, 1.0)
    assert simulation.check().steps_lost == 0


def test_ranks_that_regroup_stay_in_their_attempt(simulation):
    simulation.start(0.0, 4.0)
    simulation.steps(33)
    simulation.kill(1.0, supervised=False)
    simulation.start(2.0, 1.0, regroup=True)
    simulation.steps(20)
    simulation.end(0, 0.5)
    found = simulation.check(tolerance=0.02)
    assert (found.attempts, found.steps_lost) == (1, 3) and found.seconds["queue"] == 0


def test_a_run_that_goes_back_further_than_its_last_start_loses_both(simulation):
    simulation.start(0.0, 1.0)
    simulation.steps(20)
    first_checkpoint = 10
    simulation.write("outcome", exit_code=1)
    simulation.start(1.0, 1.0)
    simulation.steps(10)
    simulation.saved = first_checkpoint  # the newer ones are damaged
    simulation.start(1.0, 1.0)
    simulation.steps(5)
    found = goodput(simulation.run_dir)
    assert (found.steps, found.steps_lost) == (15, 20)


def test_steps_after_the_last_checkpoint_of_a_run_that_failed_do_not_count(simulation):
    simulation.start(0.0, 1.0)
    simulation.steps(27)
    assert goodput(simulation.run_dir).steps == 27  # under way
    simulation.write("outcome", exit_code=1)
    found = goodput(simulation.run_dir)
    assert (found.steps, found.steps_lost) == (20, 7) and found.seconds["lost work"] > 2


def test_a_start_that_failed_before_its_first_step_is_start_up(simulation):
    simulation.start(0.0, 3.0)
    simulation.kill()
    simulation.start(2.0, 3.0)
    simulation.steps(10)
    simulation.end(0, 0.1)
    simulation.check()


def test_records_of_older_versions_have_no_goodput(tmp_path):
    assert goodput(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run"}\n{"kind": "step", "step": 1, "step_ms": 5}\n')
    assert goodput(tmp_path) is None


def test_the_command_prints_shares_that_add_up(simulation):
    simulation.start(0.0, 4.0)
    simulation.steps(29)
    simulation.kill(0.2)
    simulation.start(3.0, 4.0)
    simulation.steps(10)
    simulation.end(0, 0.5)
    result = CliRunner().invoke(cli, ["goodput", str(simulation.run_dir)])
    wall, useful, *parts = result.output.splitlines()
    assert "2 attempts, 30 steps, 9 steps lost" in wall
    assert [line[:16].strip() for line in parts] == [*STEP_PARTS, *LOSSES]
    shares = [float(line.split()[-1].rstrip("%")) for line in [useful, *parts]]
    assert shares[0] == pytest.approx(sum(shares[1:4]), abs=0.2)
    assert sum(shares[1:]) == pytest.approx(100, abs=0.5)
    found = json.loads(CliRunner().invoke(cli, ["goodput", str(simulation.run_dir), "--json"]).output)
    assert found["wall_s"] == pytest.approx(sum(found["seconds"].values())) and found["steps_lost"] == 9


@pytest.mark.parametrize(("name", "says"), [(".", "has no records with times"), ("none", "does not exist")])
def test_a_folder_without_records_is_named_in_a_line(tmp_path, name, says):
    error = CliRunner().invoke(cli, ["goodput", str(tmp_path / name)]).exception
    assert isinstance(error, ConfigError) and str(error) == (
        f"{tmp_path / name} {says}; wanted the --run-dir of a run"
    )


def test_a_step_costs_40_bytes_of_memory(tmp_path):
    """A million of them take 40 MB, not 300 as objects."""
    run, count = Simulation(tmp_path), 5000
    run.start(queue_s=0, start_up_s=3)
    step = dict(step_ms=500.0, data_wait_ms=1.0, exposed_comm_ms=20.0)
    records = [{"kind": "step", "time": utc(run.clock), "step": number, **step} for number in range(1, count)]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    goodput(tmp_path)  # whatever is loaded or cached by the first one
    tracemalloc.start()
    try:
        assert goodput(tmp_path).steps == count - 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / count < 120  # with the reader's buffers, and a copy of a column


def test_a_clock_that_is_behind_on_the_next_host_makes_no_time_negative(simulation):
    simulation.start(0, 1)
    simulation.steps(15)
    simulation.clock -= 3
    simulation.start(0, 1)
    simulation.steps(15)
    assert min(goodput(simulation.run_dir).seconds.values()) >= 0
