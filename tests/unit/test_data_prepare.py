import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest
from miniature_ilsvrc2012 import CMYK, PNG, SMALL, fabricate, write_devkit
from PIL import Image

from horovod_owt.data import ilsvrc2012
from horovod_owt.data.build import Form
from horovod_owt.data.prepare import Originals, prepare
from horovod_owt.data.store import open_data_set
from horovod_owt.errors import DataError

pytestmark = pytest.mark.timeout(120)


def tree(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return fabricate(tmp_path_factory.mktemp("mini"))


@pytest.fixture
def own(mini, tmp_path):
    """Copies of the three files that a test may spoil."""
    shutil.copytree(mini.folder, tmp_path / "mini")
    names = {name: tmp_path / "mini" / getattr(mini, name).name for name in
             ("train_tar", "val_tar", "devkit", "checksums")}  # fmt: skip
    return type(mini)(tmp_path / "mini", **names)


def originals(mini, official: bool = False) -> Originals:
    return Originals.named(mini.train_tar, mini.val_tar, mini.devkit, None if official else mini.checksums)


def run(mini, out: Path, form: Form | None = None) -> bool:
    return prepare(out, originals(mini), form or Form("folder"), workers=1)[1]


def test_the_folder_is_the_archives_unpacked(mini, tmp_path):
    assert run(mini, tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix(): path.read_bytes()
             for path in (tmp_path / "out").rglob("*.JPEG")}  # fmt: skip
    assert found == mini.images
    data = open_data_set(tmp_path / "out")
    assert (len(data.train), len(data.val), len(data.classes)) == (61, 12, 3)
    assert Image.open(tmp_path / "out" / "train" / PNG[:9] / PNG).format == "PNG"
    assert sorted(os.listdir(tmp_path / "out")) == ["owt-data.json", "train", "val"]


def test_shards_hold_what_the_folder_holds_in_its_order(mini, tmp_path):
    run(mini, tmp_path / "folder")
    run(mini, tmp_path / "shards", Form("shards"))
    folder, packed = open_data_set(tmp_path / "folder"), open_data_set(tmp_path / "shards")
    assert folder.classes == packed.classes
    for one, two in [(folder.train, packed.train), (folder.val, packed.val)]:
        assert one.labels.tolist() == two.labels.tolist()
        assert [one.read(i) for i in range(len(one))] == [two.read(i) for i in range(len(two))]


@pytest.mark.parametrize("format", ["folder", "shards"])
def test_images_are_made_smaller_but_for_small_ones(mini, tmp_path, format):
    run(mini, tmp_path / "out", Form(format, short_side=64))
    data = open_data_set(tmp_path / "out")
    seen = {}
    for store in (data.train, data.val):
        for index in range(len(store)):
            path = tmp_path / "image"
            path.write_bytes(store.read(index))
            with Image.open(path) as image:
                seen[store.name(index).partition(b".")[0].decode()] = (
                    image.format,
                    image.mode,
                    min(image.size),
                )
    assert seen.pop(SMALL[:-5]) == ("JPEG", "RGB", 40)
    assert seen[PNG[:-5]] == seen[CMYK[:-5]] == ("JPEG", "RGB", 64)
    assert {(kind, side) for kind, _, side in seen.values()} == {("JPEG", 64)} and len(seen) == 72


# ---- killed and continued ----


def start(mini, out: Path, format: str, workers: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-m", "horovod_owt", "data", "prepare", str(out), *mini.options()]
    command += ["--format", format, "--short-side", "90", "--shard-mb", "1", "--workers", str(workers)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=env, start_new_session=True, **pipes)


def written(out: Path) -> int:
    """Bytes of images and shards so far, those on their way included."""
    total = 0
    for part in ("train", "val", "scratch"):
        for at, _, names in os.walk(out / ".unfinished" / part):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += os.stat(os.path.join(at, name)).st_size
    return total


def group(number: int) -> list[psutil.Process]:
    """The processes of this process group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == number:
                found.append(process)
    return found


def stop_when(process: subprocess.Popen, out: Path, enough: int, sign: signal.Signals) -> bool:
    """Kill it as soon as that much is written; False if it was done before. Its workers must go too."""
    try:
        while process.poll() is None and written(out) < enough:
            time.sleep(0.005)
        killed = process.poll() is None
        if killed and sign == signal.SIGINT:
            os.killpg(process.pid, sign)  # as a terminal does
        elif killed:
            process.send_signal(sign)  # the workers are not told
        _, trouble = process.communicate(timeout=30)
        assert "Traceback" not in trouble
        _, left = psutil.wait_procs(group(process.pid), timeout=20)  # a zombie has ended, whoever reaps it
        assert not left, "workers outlive the command"
        return killed
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    return fabricate(tmp_path_factory.mktemp("larger"), train_per_class=150)


@pytest.mark.parametrize("format", ["shards", pytest.param("folder", marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_continued_it_writes_the_same_bytes(larger, tmp_path, format):
    seed = int(os.environ.get("OWT_TEST_SEED") or random.randrange(10**6))
    print(f"OWT_TEST_SEED={seed}")
    rng = random.Random(seed)
    run(larger, tmp_path / "unbroken", Form(format, 1, 90))
    whole = sum(path.stat().st_size for path in (tmp_path / "unbroken").rglob("*") if path.is_file())
    out, killed = tmp_path / "broken", 0
    for sign, most in [(signal.SIGKILL, 0.4), (signal.SIGINT, 0.7)]:
        enough = int(whole * rng.uniform(0.001, most))
        killed += stop_when(start(larger, out, format), out, enough, sign)
        if not (out / "owt-data.json").exists():
            with pytest.raises(
                DataError, match="is not finished; .*fix: run the command that makes it again"
            ):
                open_data_set(out)
    assert killed
    last = start(larger, out, format, workers=1)
    said, trouble = last.communicate(timeout=60)
    assert last.returncode == 0 and said.endswith("s\n") and "463 images, 3 classes" in said, trouble
    assert tree(out) == tree(tmp_path / "unbroken")


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from horovod_owt.files import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as file:\n"
        "    file.write(bytes(100_000)); file.flush(); os.kill(os.getpid(), 9)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.JPEG")], env=env).returncode == -9
    assert not (tmp_path / "a.JPEG").exists() and len(os.listdir(tmp_path)) == 1


class Killed(Exception):
    pass


@pytest.mark.parametrize("format", ["folder", "shards"])
def test_a_kill_between_the_last_renames_is_recovered(mini, tmp_path, format, monkeypatch):
    """Dies before the first, second, ... call of os.replace, until none is left."""
    run(mini, tmp_path / "unbroken", Form(format))
    real, left = os.replace, 0

    def replace(source, target):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return real(source, target)

    monkeypatch.setattr("horovod_owt.filesystem.os.replace", replace)
    step = 2 if format == "shards" else 11
    for survived in range(0, 200, step):
        out = tmp_path / f"out-{survived}"
        left = survived
        try:
            run(mini, out, Form(format))
        except Killed:
            left = 10**6
            run(mini, out, Form(format))
            assert tree(out) == tree(tmp_path / "unbroken"), survived
        else:
            break
        shutil.rmtree(out)
    assert survived > 10


def test_the_md5_is_not_taken_again_while_a_file_is_the_same(own, tmp_path, monkeypatch):
    taken, real = [], ilsvrc2012.HashedStream.md5
    monkeypatch.setattr(ilsvrc2012.HashedStream, "md5", lambda self: taken.append(1) or real(self))
    monkeypatch.setattr("horovod_owt.data.prepare.make", lambda *args, **how: ({}, True))  # never finishes
    for _ in range(2):
        run(own, tmp_path / "out")
        assert len(taken) == 3
    os.utime(own.val_tar)
    run(own, tmp_path / "out")
    assert len(taken) == 4


def test_a_finished_set_is_left_alone_and_other_options_are_refused(mini, tmp_path):
    assert run(mini, tmp_path / "out")
    (tmp_path / "out" / ".owt-index-train.npz").touch()  # as training leaves it in large ones
    (tmp_path / "out" / "notes.txt").touch()
    before = tree(tmp_path / "out")
    assert not run(mini, tmp_path / "out")
    with pytest.raises(
        DataError, match=r'contains another data set \(format "folder", not "shards", shard_mb'
    ):
        run(mini, tmp_path / "out", Form("shards"))
    with pytest.raises(DataError, match=r"contains another data set \(short_side null, not 64\)"):
        run(mini, tmp_path / "out", Form("folder", short_side=64))
    assert tree(tmp_path / "out") == before


def test_two_commands_do_not_write_to_one_folder(mini, tmp_path, monkeypatch):
    def meanwhile(*args, **how):
        with pytest.raises(DataError, match="is being written by another command"):
            run(mini, tmp_path / "out")
        raise Killed

    monkeypatch.setattr("horovod_owt.data.prepare.make", meanwhile)
    with pytest.raises(Killed):
        run(mini, tmp_path / "out")


# ---- what can be wrong with the files ----


def spoil(mini, what: str) -> None:
    ids = [2, 4, 3] * 4
    if what == "missing":
        mini.val_tar.unlink()
    elif what == "cut":
        os.truncate(mini.train_tar, mini.train_tar.stat().st_size // 2 + 100)
    elif what == "cut within a header":
        os.truncate(mini.val_tar, 5 * 512 + 100)
    elif what == "bit":
        data = bytearray(mini.val_tar.read_bytes())
        data[5000] ^= 1
        mini.val_tar.write_bytes(data)
    elif what == "no tar":
        mini.train_tar.write_bytes(b"<html>" * 1000)
    elif what == "val as train":
        shutil.copy(mini.val_tar, mini.train_tar)
    elif what == "train as val":
        shutil.copy(mini.train_tar, mini.val_tar)
    elif what == "devkit is no archive":
        mini.devkit.write_bytes(b"<html>")
    elif what == "devkit of task 3":
        with tarfile.open(mini.devkit, "w:gz") as archive:
            archive.add(mini.checksums, "ILSVRC2012_devkit_t3/readme.txt")
    elif what == "devkit of other synsets":
        write_devkit(mini.devkit, ids, {2: "n01440764", 3: "n01443537", 4: "n09999999"})
    elif what == "devkit of more images":
        write_devkit(mini.devkit, [*ids, 2])
    elif what == "id of no class":
        write_devkit(mini.devkit, [*ids[:-1], 9])
    elif what == "checksums":
        mini.checksums.write_text("what is this\n")
    elif what == "checksums of others":
        mini.checksums.write_text(f"{'0' * 32}  other.tar\n")
    if what not in ("missing", "bit", "checksums", "checksums of others"):
        mini.write_checksums()


@pytest.mark.parametrize(
    ("what", "saw"),
    [
        ("missing", "ILSVRC2012_img_val.tar cannot be read: No such file"),
        ("cut", "ILSVRC2012_img_train.tar is truncated within n0"),
        ("cut within a header", "ILSVRC2012_img_val.tar is truncated"),
        ("bit", "ILSVRC2012_img_val.tar has md5 [0-9a-f]{32}; wanted [0-9a-f]{32}; fix: download it again"),
        ("no tar", "ILSVRC2012_img_train.tar is not a tar archive, or is damaged"),
        ("val as train", "ILSVRC2012_img_train.tar contains ILSVRC2012_val_.*, which is no tar of a synset"),
        ("train as val", "ILSVRC2012_img_val.tar has 3 images, the devkit labels 12"),
        ("devkit is no archive", "devkit_t12.tar.gz is not a devkit: "),
        ("devkit of task 3", "devkit_t12.tar.gz is not a devkit: 'data/meta.mat'; wanted"),
        ("devkit of other synsets", r"has 3 synsets \(n02105855 only there\), the devkit 3 \(n09999999"),
        ("devkit of more images", "has 12 images, the devkit labels 13"),
        ("id of no class", "validation images of class id 9, which is unknown"),
        ("checksums", "MD5SUMS: 'what is this'; wanted md5sum.s format"),
        ("checksums of others", "MD5SUMS has no line for ILSVRC2012_img_train.tar"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(own, tmp_path, what, saw):
    spoil(own, what)
    with pytest.raises(DataError, match=saw) as caught:
        run(own, tmp_path / "out")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert not (tmp_path / "out" / "train").exists()


def test_the_official_sizes_are_asked_for_at_once(mini, tmp_path):
    with pytest.raises(DataError, match=r"img_train.tar has \d+ bytes; wanted 147897477120; fix: download"):
        prepare(tmp_path / "out", originals(mini, official=True), Form("folder"))
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused(mini, tmp_path):
    (tmp_path / "train" / "n01").mkdir(parents=True)
    with pytest.raises(DataError, match="is not empty: it contains train; wanted a new or empty folder"):
        run(mini, tmp_path)
    assert os.listdir(tmp_path) == ["train"]


def test_a_disk_of_its_own_is_empty_enough(mini, tmp_path):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".snapshot").mkdir()
    assert run(mini, tmp_path)
