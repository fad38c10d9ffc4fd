"""What a user can get wrong: one line, exit code 2 before any collective, and nobody is left waiting."""

import shutil

import pytest
from real_ranks import NARROW, OWT, PROGRAMS, SMALL, records


@pytest.fixture
def copy(images, tmp_path):
    return shutil.copytree(images, tmp_path / "copy")


def first_class(root, split="train"):
    return sorted((root / split).iterdir())[0]


def no_folder(root):
    shutil.rmtree(root)


def empty_folder(root):
    shutil.rmtree(root)
    root.mkdir()


def class_without_image(root):
    for path in first_class(root).iterdir():
        path.unlink()


def other_val_classes(root):
    first_class(root, "val").rename(root / "val" / "n99999999_other")


def unreadable_folder(root):
    first_class(root).chmod(0)


BAD_DATA = {
    no_folder: "copy",
    empty_folder: "train",
    class_without_image: "no image",
    other_val_classes: "n99999999_other",
    unreadable_folder: "read",
}

# Root may read everything: take that right away.
WITHOUT_ROOTS_RIGHTS = [
    "setpriv",
    "--inh-caps=-dac_override,-dac_read_search",
    "--bounding-set=-dac_override,-dac_read_search",
]


def the_one_line(done) -> str:
    """What the ranks said: exactly one line of ours, and no traceback of theirs."""
    said = [line for line in (done.stdout + done.stderr).splitlines() if "owt:" in line]
    assert len(said) == 1, done.stderr
    assert "File " not in done.stderr.partition("owt:")[0]
    return said[0]


@pytest.mark.parametrize("spoil", BAD_DATA)
def test_bad_data_is_refused(run, copy, spoil):
    import os

    spoil(copy)
    guard = WITHOUT_ROOTS_RIGHTS if os.geteuid() == 0 and spoil is unreadable_folder else []
    alone = run([*guard, *OWT, "train", copy], launcher="none", exit_code=2, limit_s=60)
    assert BAD_DATA[spoil] in the_one_line(alone) and "fix:" in the_one_line(alone)


def test_ranks_refuse_bad_data_with_one_voice(run, copy):
    class_without_image(copy)
    both = run([*OWT, "train", copy], exit_code=None, limit_s=60)
    assert both.exit_code != 0 and "no image" in the_one_line(both)


BAD_SETTINGS = {
    "batch=0": "batch=0; wanted at least 1",
    "bach=3": "unknown key 'bach'; wanted a config key; fix: use batch",
    "classes=1": "classes=1, but",
    "precision=fp16": "precision=fp16 on a CPU",
}


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_a_bad_setting_is_refused(run, images, setting):
    command = [*OWT, "train", images, "--set", setting]
    assert BAD_SETTINGS[setting] in the_one_line(run(command, launcher="none", exit_code=2, limit_s=60))


def test_ranks_that_make_no_whole_groups_are_refused_with_the_choices(run, images):
    command = [*OWT, "train", images, "--parallel", "hybrid", "--set", "fc_group_size=3"]
    done = run(command, ranks=4, exit_code=None, limit_s=60)
    assert done.exit_code != 0
    said = the_one_line(done)
    assert (
        "fc_group_size=3 in a job of 4 ranks; wanted whole groups: 1, 2, 4" in said and "fix: --set" in said
    )


def test_more_ranks_than_gpus_are_refused(run, images):
    done = run(
        ["python", PROGRAMS / "gpus.py", "train", images],
        ranks=3,
        exit_code=None,
        limit_s=60,
        OWT_TEST_GPUS="2",
    )
    assert done.exit_code != 0
    assert "3 ranks on host" in the_one_line(done) and "fix: -np 2" in the_one_line(done)


def test_an_mpirun_ends_with_our_exit_code(run, images):
    done = run([*OWT, "train", images, "--set", "batch=0"], launcher="mpirun", exit_code=2, limit_s=60)
    assert "batch=0" in the_one_line(done)


def test_a_finished_run_is_not_overwritten(run, images, tmp_path):
    command = [*NARROW, "train", images, "--run-dir", tmp_path, *SMALL]
    run([*command, "--set", "max_steps=1"], launcher="none")
    done = run([*command, "--resume", "never"], exit_code=None)
    assert done.exit_code != 0 and "contains a run with checkpoints" in the_one_line(done)
    other = run([*command, "--set", "seed=9"], launcher="none", exit_code=2)
    assert "seed=0, now seed=9" in the_one_line(other)
    assert len(records(tmp_path, "step")) == 1
