"""What a user can get wrong is answered with one line, never called a bug."""

import os

import click
import pytest
from click.testing import CliRunner

from horovod_owt.cli import cli
from horovod_owt.config import resolve
from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.errors import ConfigError, OwtError, as_owt_error
from horovod_owt.files import read_user_text
from horovod_owt.launch.supervisor import Supervisor


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with good and bad files and folders, to which inputs refer as @/NAME."""
    root = tmp_path_factory.mktemp("bad-input")
    write_synthetic(root / "data", classes=2, train_per_class=1, val_per_class=1, size=(16, 16), workers=1)
    files = {
        "file": b"not a folder",
        "empty": b"",
        "binary": bytes(range(256)) * 4,
        "zeros": b"\0" * 100,
        "latin1.yaml": "batch: 4  # größer".encode("latin-1"),
        "half.utf16": "batch: 4".encode("utf-16")[:-1],
        "list.yaml": b"- 1\n- 2",
        "broken.yaml": b"batch: [1, 2",
        "date.yaml": b"batch: 2026-13-45",
        "comment.yaml": b"# nothing\n",
        "false.yaml": b"false",
        "complex-key.yaml": b"? [1, 2]\n: 3",
        "deep.yaml": b"[" * 1200,
        "tag.yaml": b"batch: !!python/object:os.system x",
        "types.yaml": b"batch: [1, 2]",
        "map.yaml": b"model: {a: 1}",
        "number-key.yaml": b"1: 2",
        "null.yaml": b"batch:",
        "bool.yaml": b"batch: true",
        "huge.yaml": b"batch: 1" + b"0" * 5000,
        "group.yaml": b"fc_group_size: 9" + b"9" * 5000,
        "nan.yaml": b"lr: .nan",
        "words.hosts": b"node1 four slots",
        "zero.hosts": b"node1:0",
        "superscript.hosts": "node1:²".encode(),
        "many.hosts": b"node1:" + b"9" * 5000,
        "comment.hosts": b"# nothing",
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    (root / "folder").mkdir()
    (root / "dangling").symlink_to(root / "nowhere")
    (root / "loop").symlink_to(root / "loop")
    (root / "no-train" / "val").mkdir(parents=True)
    for split in ("train", "val"):
        (root / "dangling-split" / split).mkdir(parents=True)
        (root / "dangling-split" / split / "a").symlink_to(root / "nowhere")
        (root / "file-class" / split).mkdir(parents=True)
        (root / "file-class" / split / "a").write_text("")
    return root


RECIPES = """empty comment.yaml false.yaml complex-key.yaml
file binary zeros latin1.yaml half.utf16 list.yaml broken.yaml date.yaml deep.yaml tag.yaml
types.yaml map.yaml number-key.yaml null.yaml bool.yaml huge.yaml group.yaml nan.yaml folder
dangling loop nowhere""".split()
SETTINGS = """batch batch= =4 batch=0 batch=-1 batch=1.5 batch=1e3 batch=nan batch=99999999999999999999
batch=True bacth=4 lr=nan lr=inf lr=1e400 lr=-1 lr=x epochs=0 epochs=1e300 image_size=8 image_size=1000000
momentum=1 dropout=1 dropout=-0.1 label_smoothing=2 seed=-1 seed=99999999999999999999 precision=fp8
precision= model=vgg schedule=never schedule=step(0) classes=-1 classes=1 decode_threads=1000000
stall_limit_s=1e12 clip_norm=-1 crop_scale_min=0 parallel=both fc_group_size=0 fc_group_size=x pipeline=none
bad_images=maybe schedule=[[ momentum_reset=true
channels_last=maybe keep_checkpoints=0 warmup_epochs=-1 compression=int8 compression=powersgd:0
compression=onebit,parallel=hybrid optimizer=lars,precision=fp16 elastic_batch=x precision=fp16
model=alexnet-owt-bn,batch=1 fc_batch=local sync_bn=true,owt_scheme=b,parallel=hybrid""".split()
HOSTS = """nowhere folder empty binary zeros words.hosts zero.hosts superscript.hosts many.hosts comment.hosts
dangling half.utf16""".split()
DATA = "nowhere file empty folder dangling loop no-train dangling-split file-class".split()

COMMANDS = [
    *(f"train @/data --recipe @/{name}" for name in RECIPES),
    *(f"train @/data --set {setting.replace(',', ' --set ')}" for setting in SETTINGS),
    *(f"launch hosts --hosts @/{name} -- @/data --run-dir @/run" for name in HOSTS),
    "launch mpirun --hosts @/binary -- @/data --run-dir @/run",
    *(f"{command} @/{name}" for name in DATA for command in ("train", "data stats", "data verify")),
    *(f"data pack @/{name} @/out" for name in DATA),
    *(f"data pack @/data @/{out}" for out in ("file", "data", "data/x", "file/x", "loop/x", "no-train")),
    *(f"data synth @/{out} --classes 2" for out in ("file", "file/x", "data", "loop/x", "no-train")),
    "data synth @/out --classes 0",
    "data synth @/out --classes 99999999999",
    "data synth @/out --seed -1",
    "data synth @/out --train-per-class x",
    "data pack @/data @/out --shard-mb 0",
    "data pack @/data @/out --short-side 0",
    "data pack @/data @/out --workers 0",
    "data prepare @/out --train @/file --val @/nowhere --devkit @/folder",
    "data prepare @/out --train @/file --val @/file --devkit @/file --checksums @/binary",
    *(f"checkpoint list @/{name}" for name in ("nowhere", "file", "folder")),
    *(f"checkpoint verify @/{name}" for name in ("nowhere", "file", "folder")),
    "launch local --ranks 0 -- @/data --run-dir @/run",
    "launch local --ranks 2 -- @/data",
    "launch local --interface nonsense0 -- @/data --run-dir @/run",
    "launch elastic --ranks 2 --min-ranks 3 -- @/data --run-dir @/run",
    "launch supervise -- @/nowhere --run-dir @/run",
    "launch supervise -- @/file --run-dir @/run",
    "job status --run-dir @/file",
    "job status nonsense",
    "bench step --strategies x",
    "bench step --steps 0",
    "bench scaling --steps 0",
]  # fmt: skip


def outcome(command: str, root) -> BaseException | None:
    try:
        cli.main([word.replace("@", str(root)) for word in command.split()], standalone_mode=False)
    except SystemExit as ended:
        return ended if ended.code else None
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_input_is_answered_in_one_line(root, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    # no adopting of orphans, no signal handlers: this process is that of other tests, too
    monkeypatch.setattr(Supervisor, "_set_up_process", lambda self: None)
    error = outcome(command, root)
    if isinstance(error, click.ClickException | SystemExit):
        return  # click's own line, exit code 2
    known = as_owt_error(error) if error else None
    assert known is not None, repr(error)
    assert "\n" not in str(known) and len(str(known)) < 800 and type(error).__name__ not in str(known)
    assert isinstance(error, OwtError), f"only the last resort explains {error!r}"


@pytest.mark.parametrize(
    "words",
    [["train", "d", "--run-dir", ""], ["report", ""], ["stop", ""], ["launch", "elastic", "--hosts=", "d"]],
)
def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 2 and "an empty path: is a variable not set?" in done.output
    assert os.listdir(tmp_path) == []


def test_home_is_found_where_no_shell_expands_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = CliRunner().invoke(cli, ["checkpoint", "list", "~/runs"])
    assert f"{tmp_path}/runs does not exist" in str(done.exception)


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_benchmark(tmp_path):
    pytest.importorskip("matplotlib")
    command = ["bench", "collectives", "--plot", str(tmp_path / "missing" / "a.svg")]
    with pytest.raises(ConfigError, match="--plot .*no folder"):  # not that one rank is too few
        cli.main(command, standalone_mode=False)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_recipe_may_have_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "mine.yaml").write_bytes("batch: 7  # größer\r\nmomentum: 0.5\r\n".encode(encoding))
    cfg = resolve(str(tmp_path / "mine.yaml"))
    assert cfg.batch == 7 and cfg.momentum == 0.5


def test_a_file_of_another_encoding_is_named_with_the_byte(tmp_path):
    (tmp_path / "hosts").write_bytes("node1:4 # größer".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8 text: .* at byte 12; wanted x; fix: iconv"):
        read_user_text(tmp_path / "hosts", wanted="x")


@pytest.mark.parametrize(
    ("text", "saw"),
    [
        ("lr: 0.1\nbatch: 4\nlr: 0.2\n", "has lr twice, again at line 3"),
        ("about:\n  summary: a\n  summary: b\n", "has summary twice, again at line 3"),
        ("# lost\n", "is empty"),
    ],
)
def test_a_recipe_that_says_two_things_or_nothing_is_refused(tmp_path, text, saw):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=f"r.yaml {saw}"):
        resolve(str(recipe))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_recipe_is_named(tmp_path):
    (tmp_path / "mine.yaml").touch(mode=0)
    with pytest.raises(ConfigError, match="Permission denied"):
        resolve(str(tmp_path / "mine.yaml"))
