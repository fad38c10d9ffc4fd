"""The harness that tries setup on other machines: its cells, its commands, how it reads a log, its table."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests"))

from machines import __main__ as harness  # noqa: E402
from machines import cells, host, machine, results, trial, workshop  # noqa: E402
from machines.cells import CELLS, SUITES, Cell, Mount  # noqa: E402

FINISHED = """\
setup: pip install (mpi): done in 12 s
setup: pip install (packages): done in 85 s
setup: building Horovod 0.28.1+owt.1234: done in 70 s
setup: pip install (horovod-install): done in 3 s
Python                3.13.5
MPI, mpi4py           mpirun (Open MPI) 5.0.11 from pip, 4.1.2
compiler              g++-13 (Debian 13.3.0-16) 13.3.0
validation top-1  96.2 % (481 of 500 images)
time              104 s in training steps, 121 s in all
=========== 949 passed, 3 skipped in 93.1s (0:01:33) ===========
"""
SEEN = """\
debian: 13.8
compiler: c++ (Debian 14.2.0-19) 14.2.0
cmake: cmake version 3.31.6
python: Python 3.13.5
mpi: \n"""
WHOLE = Cell("whole", "trixie", "as it comes", ("quickstart", "tests"))
REFUSED = Cell("refused", "trixie", "no CMake", refused="no CMake: apt-get install cmake")


def judge(cell: Cell, code: int, said: str) -> results.Result:
    return results.judge(cell, "2026-11-26", "abc1234", code, {"quickstart": 300}, said, SEEN)


# cells


def test_every_cell_can_be_made():
    documented = cells.documented_packages()
    for at, (name, cell) in enumerate(CELLS.items()):
        assert cell.suite in SUITES and cell.user in cells.HOMES, name
        assert cell.stages and set(cell.stages) <= set(cells.STAGES), name
        assert set(cell.lacking) <= set(documented), name
        assert cell.refused is None or cell.stages == ("setup",), name
        if cell.start is not None:  # a finished machine of the same Debian, made before
            start = CELLS[cell.start]
            assert list(CELLS).index(cell.start) < at and start.suite == cell.suite, name
            assert start.refused is None and start.user == cell.user and start.start is None, name


def test_no_two_cells_share_a_name():
    groups = (
        cells.whole_systems,
        cells.compilers,
        cells.mpis,
        cells.pythons,
        cells.odd_places,
        cells.refusals,
    )
    assert sum(len(list(group())) for group in groups) == len(CELLS)


def test_the_packages_are_those_of_the_document(tmp_path):
    assert "g++" in cells.documented_packages() and "cmake" in cells.documented_packages()
    (tmp_path / "setup.md").write_text("```sh\napt-get install make ninja-build\n```\n")
    assert cells.documented_packages(tmp_path / "setup.md") == ("make", "ninja-build")
    (tmp_path / "setup.md").write_text("nothing to install")
    with pytest.raises(ValueError, match="names no packages"):
        cells.documented_packages(tmp_path / "setup.md")


# commands


def test_a_path_with_blanks_reaches_make_whole(tmp_path):
    checkout = tmp_path / "Übung mit 'Leerzeichen'"
    checkout.mkdir()
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\npwd\numask\nprintf "%s\\n" "$@"\n')
    make.chmod(0o755)
    cell = Cell("x", "trixie", "", umask="077", checkout=str(checkout), venv=f"{checkout}/an env")
    done = subprocess.run(
        ["sh", "-c", trial.stage_script(cell, "quickstart", Path("/opt/p y/python3.12"))],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    where, umask, *words = done.stdout.splitlines()
    assert (where, int(umask, 8)) == (str(checkout), 0o077)
    assert words == [
        "quickstart",
        "PYTHON=/opt/p y/python3.12",
        f"VENV={checkout}/an env",
    ]


def test_a_new_user_types_no_more_than_the_readme_says():
    script = trial.stage_script(WHOLE, "quickstart", Path("python3"))
    assert script.splitlines()[-2:] == ["cd /home/user/horovod_owt", "make quickstart"]


def test_all_is_mounted_before_the_command_runs_as_the_user(monkeypatch):
    monkeypatch.setattr(machine, "overlays_work", lambda folder: True)
    made = machine.Machine(Path("/m/cell"), (Path("/m/debian/written"), Path("/m/base/written")))
    script = made.script(
        ["sh", "-c", "echo 'two words'"],
        user="user",
        environ={"LANG": "C", "X": "a b"},
        binds=[machine.Bind(Path("/opt/pypi"), "/opt/pypi")],
        mounts=[Mount("/srv", "noexec"), Mount("/home/user", "size=64m", tmpfs=True)],
    )
    *mounts, command, last = [shlex.split(line) for line in script.splitlines()]
    assert "lowerdir=/m/debian/written:/m/base/written,upperdir=/m/cell/written" in mounts[1][4]
    assert command[:2] == ["chroot", "/m/cell/root"] and last == ["exit", "0"]
    assert command[command.index("env") :] == ["env", "-i", "LANG=C", "X=a b", "sh", "-c", "echo 'two words'"]
    assert command[command.index("--reuid") + 1] == "user"
    assert ["mount", "-o", "remount,bind,ro", "/m/cell/root/opt/pypi"] in mounts
    assert ["mount", "-o", "remount,bind,noexec", "/m/cell/root/srv"] in mounts
    assert ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", "/m/cell/root/home/user"] in mounts


def test_nothing_outlives_a_killed_harness(tmp_path):
    if why := host.lacking():
        pytest.skip(why)
    naps = f"{600 + os.getpid() % 100}.{time.time_ns() % 10**6}"  # an argument that no other process has
    script = f"setsid sleep {naps} & mount -t tmpfs none {tmp_path} && touch {tmp_path}/there && sleep {naps}"
    code = f"import subprocess; subprocess.run({machine.in_namespaces(script)!r})"
    harness = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: len(processes_with(naps)) == 2)
    harness.send_signal(signal.SIGKILL)
    harness.wait(10)
    wait_for(lambda: not processes_with(naps))
    assert not list(tmp_path.iterdir())  # it was never mounted out here


@pytest.mark.parametrize(("words", "code"), [(["debian-13"], None), (["--if-possible", "debian-13"], 0)])
def test_without_room_no_machine_is_made(words, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(host, "lacking", lambda: None)
    monkeypatch.setattr(workshop.shutil, "disk_usage", lambda _: SimpleNamespace(free=12e9))
    monkeypatch.setattr(workshop.Workshop, "clone_checkout", lambda _: pytest.fail("it began"))
    monkeypatch.setattr(sys, "argv", ["machines", *words])
    if code is None:
        with pytest.raises(machine.Ended, match=r"12\.0 GB free for .*machines, wanted 20 GB"):
            harness.main()
    else:
        assert harness.main() == code
        assert "12.0 GB free" in capsys.readouterr().err


def processes_with(argument: str) -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[:2] == [b"sleep", argument.encode()]:
            found.append(file.parent.name)
    return found


def wait_for(condition, limit_s: float = 20) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_the_hosts_pip_settings_are_handed_in(tmp_path):
    etc, home, index = tmp_path / "etc", tmp_path / "home", tmp_path / "index"
    for folder in (etc / "xdg" / "pip", home / ".config" / "pip", index / "simple"):
        folder.mkdir(parents=True)
    authority = tmp_path / "authority.pem"
    authority.write_text("-")
    (etc / "pip.conf").write_text(f"[global]\ncert = {authority}\n")
    own = home / ".config" / "pip" / "pip.conf"
    own.write_text(f"[global]\nextra-index-url = https://example.org/simple file://{index}/simple\n")
    found = host.pip(
        {"HOME": str(home), "PIP_TIMEOUT": "9", "PIP_TARGET": "/x", "https_proxy": "p", "SHELL": "/bin/sh"},
        etc,
    )
    kept = found.environ["PIP_CONFIG_FILE"]
    assert found.environ == {"PIP_TIMEOUT": "9", "https_proxy": "p", "PIP_CONFIG_FILE": kept}
    assert found.files == {
        etc / "pip.conf": str(etc / "pip.conf"),
        own: kept,
        authority: str(authority),
    }
    assert found.folders == (index,)  # its files lie beside simple/


# results


def test_a_finished_cell_is_read_from_its_log():
    result = judge(WHOLE, 0, FINISHED)
    assert result.as_wanted and result.exit_code == 0
    assert (result.top1, result.tests) == (96.2, "949 passed, 3 skipped")
    assert result.seconds == {"pip": 100, "build": 70, "quickstart": 121}
    assert result.versions == {
        "debian": "13.8",
        "compiler": "g++ 13.3.0",  # what setup says that it used, not the machine's c++
        "cmake": "3.31.6",
        "python": "3.13.5",
        "mpi": "Open MPI 5.0.11 from pip",
    }


@pytest.mark.parametrize(
    "code, said",
    [
        (0, FINISHED.replace("96.2", "89.9")),  # it ran and did not learn
        (0, re.sub("validation.*\n", "", FINISHED)),  # it says nothing of having learnt
        (1, FINISHED),
    ],
)
def test_a_cell_that_should_learn_and_did_not_is_no_success(code, said):
    assert not judge(WHOLE, code, said).as_wanted


@pytest.mark.parametrize(
    "code, line, as_wanted",
    [
        (2, "setup: no CMake: apt-get install cmake", True),
        (1, "setup: no CMake: apt-get install cmake", False),
        (2, "setup: no C++ compiler: apt-get install g++", False),
        (0, "setup: no CMake: apt-get install cmake", False),
    ],
)
def test_a_refusal_wants_its_exit_code_and_its_line(code, line, as_wanted):
    assert (
        judge(REFUSED, code, f"setup: lane cpu: nvidia-smi lists no GPU here\n{line}\n").as_wanted
        == as_wanted
    )


def test_a_failed_test_hides_no_training():
    failed = FINISHED.replace("949 passed, 3 skipped", "2 failed, 947 passed")
    assert results.outcome(judge(WHOLE, 1, failed)) == "top-1 96.2 %, 2 failed, 947 passed"


def test_the_exit_code_is_that_of_the_command_under_make():
    said = (
        "setup: building Horovod failed (exit 1): error: x; log: y\nmake: *** [Makefile:13: setup] Error 1\n"
    )
    result = judge(WHOLE, 2, said)
    assert (result.exit_code, result.line) == (1, said.splitlines()[0])


@pytest.mark.parametrize(
    "said, shown",
    [
        ("c++ (Debian 12.2.0-14+deb12u1) 12.2.0", "g++ 12.2.0"),
        ("g++-16 (Debian 16.2.0-4) 16.2.0 20260801 (prerelease)", "g++ 16.2.0"),
        ("Debian clang version 19.1.7 (3+b1)", "clang 19.1.7"),
        ("mpirun (Open MPI) 4.1.4", "Open MPI 4.1.4"),
        ("Version: 4.2.1", "MPICH 4.2.1"),
        ("Intel(R) MPI", "Intel(R) MPI"),
    ],
)
def test_versions_are_short(said, shown):
    assert results.short(said) == shown


def test_results_are_kept_and_a_cell_without_one_says_so(tmp_path):
    first, *others = CELLS
    result = judge(CELLS[first], 0, FINISHED)
    results.keep(tmp_path, result)
    kept, *rest = results.kept(tmp_path)
    assert kept == result
    assert [(other.cell, other.exit_code) for other in rest] == [(name, None) for name in others]
    assert all("not run" in results.row(other) for other in rest)


def test_a_bar_in_a_line_does_not_break_the_table():
    name = next(iter(CELLS))
    said = results.Result(name, "2026-11-26", "abc1234", False, 1, "a | b")
    head, _, row = results.markdown([said]).splitlines()
    assert len(re.findall(r"(?<!\\)\|", head)) == len(re.findall(r"(?<!\\)\|", row))
    assert "1 (!)" in row and r"a \| b" in row


def test_the_table_takes_its_place_in_the_document_and_keeps_the_rows_of_other_hosts(tmp_path):
    first, second, *_ = CELLS
    elsewhere = results.Result(second, "2026-11-25", "abc1234", True, 2, "seen on another host")
    document = tmp_path / "setup.md"
    document.write_text(f"before\n{results.BEGIN}\n{results.markdown([elsewhere])}\n{results.END}\nafter\n")
    results.write_into(document, results.kept(tmp_path))
    before, *table, after = document.read_text().split("\n\n")
    assert before == f"before\n{results.BEGIN}" and after == f"{results.END}\nafter\n"
    rows = "".join(table).splitlines()[2:]
    assert len(rows) == len(CELLS) and f"| {first} " in rows[0] and "not run" in rows[0]
    assert f"| {second} " in rows[1] and "seen on another host" in rows[1]
    document.write_text("no place")
    with pytest.raises(ValueError, match="has no place for the table"):
        results.write_into(document, [])
    assert document.read_text() == "no place"


def test_an_unknown_cell_is_refused_before_anything_is_made():
    argv = [sys.executable, REPO / "tests" / "machines", "debian-7"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no cell named debian-7: --list has them all" in done.stderr
