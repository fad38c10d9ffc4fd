"""A run folder has one owner at a time, whatever dies, wherever, and however many want it at once."""

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import asdict, replace

import pytest

from horovod_owt.errors import ConfigError
from horovod_owt.runs import owner
from horovod_owt.runs.owner import Ownership, this_process

ELSEWHERE = replace(this_process({}), host="node7", kernel="another boot", pid=12345)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The times of minutes in fractions of a second."""
    for name, seconds in {"RENEW_S": 0.02, "WATCH_S": 0.2, "STALE_S": 0.4, "POLL_S": 0.01}.items():
        monkeypatch.setattr(owner, name, seconds)


def files(run_dir):
    return sorted(os.listdir(run_dir / "owner"))


def say(run_dir, number, who):
    """What an owner has left in its file."""
    (run_dir / "owner").mkdir(exist_ok=True)
    file = run_dir / "owner" / f"{number:08d}.json"
    file.write_text(who if isinstance(who, str) else json.dumps(asdict(who)))
    return file


def forked(target, *args):
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


def hold(run_dir, ready):
    Ownership().take(run_dir)
    ready.set()
    time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Another process, which owns the folder and is alive."""
    ready = multiprocessing.get_context("fork").Event()
    process = forked(hold, tmp_path, ready)
    assert ready.wait(20)
    yield process
    process.kill()
    process.join()


def test_a_second_run_is_refused_with_host_process_and_time_of_the_first(tmp_path, holder):
    with pytest.raises(ConfigError) as caught, Ownership() as mine:
        mine.take(tmp_path)
    saw, wanted, fix = caught.value.args
    told = json.loads((tmp_path / "owner" / files(tmp_path)[0]).read_text())
    assert f"in use by process {holder.pid} on {told['host']}, since {told['started']}" in saw
    assert "another --run-dir" in fix and caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert files(tmp_path) == ["00000001.json"]


def test_the_folder_of_a_killed_process_is_taken_over_at_once_with_a_line(
    tmp_path, holder, caplog, monkeypatch
):
    monkeypatch.setattr(owner, "WATCH_S", 100)
    os.kill(holder.pid, signal.SIGKILL)  # and not waited for: a zombie is dead
    with Ownership() as mine:
        mine.take(tmp_path)
        assert f"taken over from process {holder.pid} on " in caplog.text and "it has ended" in caplog.text
        assert files(tmp_path) == ["00000002.json"]


def test_one_that_leaves_while_it_is_watched_is_followed_without_a_word(tmp_path, caplog):
    first, second = Ownership(), Ownership()
    first.take(tmp_path)
    follower = forked(lambda: (second.take(tmp_path), second.leave()))
    time.sleep(0.05)
    first.leave()
    follower.join(20)
    assert follower.exitcode == 0 and not caplog.records
    assert files(tmp_path) == ["00000002.json"]


def test_a_process_number_that_came_again_is_not_the_owner(tmp_path, caplog):
    say(tmp_path, 4, replace(this_process({}), start_ticks=1))
    with Ownership() as mine:
        mine.take(tmp_path)
        assert files(tmp_path) == ["00000005.json"] and "it has ended" in caplog.text


@pytest.mark.parametrize(
    "who", [ELSEWHERE, "", '{"host": "no', "[]"], ids=["another host", "", "half", "list"]
)
def test_an_owner_elsewhere_that_is_silent_is_taken_over_and_not_before(tmp_path, caplog, who):
    file = say(tmp_path, 1, who)
    silent_since = file.stat().st_mtime
    with Ownership() as mine:
        mine.take(tmp_path)
        assert (tmp_path / "owner" / "00000002.json").stat().st_ctime - silent_since >= 0.4
    assert "no sign of life for 0 s" in caplog.text and files(tmp_path) == ["00000002.json"]


def test_the_clock_is_the_file_systems_and_watching_still_comes_first(tmp_path):
    """After a file server's outage all files look old, those of living owners too."""
    file = say(tmp_path, 1, ELSEWHERE)
    os.utime(file, (time.time() - 3600,) * 2)
    began = time.monotonic()
    with Ownership() as mine:
        mine.take(tmp_path)
    assert 0.2 <= time.monotonic() - began


def renew(file, every_s):
    while True:
        os.utime(file)
        time.sleep(every_s)


def test_an_owner_elsewhere_that_renews_its_file_is_alive_however_wrong_its_clock(tmp_path):
    file = say(tmp_path, 1, ELSEWHERE)
    renewing = forked(renew, file, 0.05)
    try:
        with pytest.raises(ConfigError, match="in use by process 12345 on node7"):
            Ownership().take(tmp_path)
    finally:
        renewing.kill()
        renewing.join()


def test_the_next_rank_0_of_an_elastic_job_takes_over_from_a_living_one(
    tmp_path, holder, monkeypatch, caplog
):
    monkeypatch.setattr(owner, "WATCH_S", 100)
    for name, value in {"ELASTIC": "1", "GLOO_RENDEZVOUS_ADDR": "n1", "GLOO_RENDEZVOUS_PORT": "4"}.items():
        monkeypatch.setenv(f"HOROVOD_{name}", value)
    say(tmp_path, 1, replace(this_process({}), driver="n1:4"))
    with Ownership() as mine:
        mine.take(tmp_path)
        assert "another rank of this job is rank 0 now" in caplog.text
        mine.hand_over()
        assert not json.loads((tmp_path / "owner" / "00000002.json").read_text())["left"]
    monkeypatch.setattr(owner, "WATCH_S", 0.1)
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", "5")  # another job
    with pytest.raises(ConfigError, match="in use"):
        Ownership().take(tmp_path)


def test_an_owner_that_was_held_for_dead_learns_of_it(tmp_path):
    lost = []
    with Ownership(on_loss=lost.append) as mine:
        mine.take(tmp_path)
        say(tmp_path, 2, ELSEWHERE)
        end = time.monotonic() + 20
        while not lost and time.monotonic() < end:
            time.sleep(0.01)
    assert "was taken over by process 12345 on node7" in lost[0]


def test_a_file_system_that_is_gone_for_a_while_is_no_loss(tmp_path):
    lost = []
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with Ownership(on_loss=lost.append) as mine:
        mine.take(run_dir)
        run_dir.rename(tmp_path / "away")
        time.sleep(0.1)
        (tmp_path / "away").rename(run_dir)
        before = (run_dir / "owner" / "00000001.json").stat().st_mtime_ns
        end = time.monotonic() + 20
        while (run_dir / "owner" / "00000001.json").stat().st_mtime_ns == before:
            assert time.monotonic() < end
    assert not lost


def test_a_full_disk_leaves_no_owner_behind(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(owner.json, "dumps", refuse)
        with pytest.raises(OSError):
            Ownership().take(tmp_path)
    assert files(tmp_path) == []


def take_turns(run_dir, seed, turns):
    """Own the folder so often, each time alone in it, and now and then die as its owner."""
    chance = random.Random(seed)
    owner.WATCH_S = 100  # nobody gives up
    for turn in range(turns):
        mine = Ownership(on_loss=lambda why: os._exit(9))
        mine.take(run_dir)
        try:
            os.mkdir(run_dir / "inside")
        except FileExistsError:
            os._exit(8)
        time.sleep(chance.random() * 0.003)
        os.rmdir(run_dir / "inside")
        with (run_dir / "turns").open("a") as file:
            file.write(f"{seed} {turn}\n")
        if chance.random() < 0.2:
            os._exit(7)
        mine.leave()
    os._exit(0)


def test_of_many_takers_one_wins_each_time(tmp_path, monkeypatch):
    """Also when the folder's owner has just died, and all of them see that."""
    seed = int(os.environ.get("OWT_TEST_SEED", time.time_ns() % 10**6))
    print(f"OWT_TEST_SEED={seed}")
    monkeypatch.setattr(owner, "POLL_S", 0.0005)
    say(tmp_path, 1, replace(this_process({}), start_ticks=1))
    takers = [forked(take_turns, tmp_path, seed + n, 6) for n in range(12)]
    for taker in takers:
        taker.join(60)
    codes = [taker.exitcode for taker in takers]
    assert set(codes) <= {0, 7}, codes
    done = (tmp_path / "turns").read_text().splitlines()
    assert len(set(done)) == len(done) >= 12
    assert len(files(tmp_path)) == 1


def test_a_number_that_others_have_passed_meanwhile_is_not_taken(tmp_path, monkeypatch):
    """This process was stopped between its look and its own file; two others have come and gone."""
    say(tmp_path, 5, replace(ELSEWHERE, left=True))
    look, stale = owner._wait_for_turn, [3]
    monkeypatch.setattr(owner, "_wait_for_turn", lambda *who: stale.pop() if stale else look(*who))
    with Ownership() as mine:
        mine.take(tmp_path)
        assert files(tmp_path) == ["00000006.json"] and not stale
