"""What setup shows of a long child: true shares of the time, and what pip is at."""

import re

from set_up_support import place
from steps.progress import MILESTONES, Progress

CONFIGURED = "Building wheel for horovod (setup.py): started\n-- Configuring done\n"
GLOO_BUILT = CONFIGURED + "[ 40%] Built target gloo\n"


def percent(shown: str) -> int:
    return int(re.match(r"(\d+) %", shown)[1])


def left_s(shown: str) -> int:
    return int(re.search(r"about (\d+) s left", shown)[1])


def test_shares_are_of_time_and_grow_to_the_next_milestone_only():
    progress = Progress()
    (_, configured), (_, gloo), (_, unity) = MILESTONES[1:4]
    first = progress.of(CONFIGURED, 20.0)
    assert percent(first) == round(100 * configured)
    assert left_s(first) == round(20 / configured - 20)
    later = progress.of(CONFIGURED, 22.0)
    assert percent(first) < percent(later) and left_s(later) < left_s(first)
    assert percent(progress.of(CONFIGURED, 1000.0)) == round(100 * gloo)  # a slow step does not run ahead
    slow = progress.of(GLOO_BUILT, 1000.0)
    assert percent(slow) == round(100 * gloo) and left_s(slow) == round(1000 / gloo - 1000)
    assert percent(progress.of(GLOO_BUILT, 1e6)) == round(100 * unity)


def test_shares_and_milestones_are_in_order():
    shares = [share for _, share in MILESTONES]
    assert shares == sorted(shares) and shares[-1] == 1


def test_pip_shows_what_it_collects_and_how_many_packages_it_installs():
    progress = Progress()
    assert progress.of("$ pip install\n", 1) == ""
    collecting = "Collecting torch==2.14.1 (from -c cpu.txt)\n  Downloading torch-2.14.1.whl (500 MB)\n"
    assert progress.of(collecting, 2) == "Downloading torch-2.14.1.whl"
    assert progress.of(collecting + "Installing collected packages: a, b, c\n", 3) == "installing 3 packages"


def test_the_unity_build_has_the_units_that_the_milestones_name():
    patch = next(patch for patch in place.PATCHES if patch.stem == "build-unity").read_text()
    batch = int(
        re.search(r"PYTORCH_TARGET_LIB\} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE (\d+)", patch)[1]
    )
    assert 35 / batch > 1  # 35 files without GPU operations: there is a unity_1
