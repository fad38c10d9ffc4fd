"""File names that are not UTF-8, or not of the locale's encoding, are neither lost nor end a command."""

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bad_files import encoded

from horovod_owt import text
from horovod_owt.data.build import Form
from horovod_owt.data.pack import pack
from horovod_owt.data.store import open_data_set
from horovod_owt.files import write_text
from horovod_owt.runs.folder import read_outcome, write_outcome
from horovod_owt.runs.records import METRICS, MetricsLog, append_record, newest_records
from horovod_owt.slurm import client

pytestmark = pytest.mark.timeout(60)

LATIN, UTF8 = b"caf\xe9.JPEG", "bäckerei.JPEG".encode()
NAME = os.fsdecode(LATIN)


@pytest.fixture
def root(tmp_path):
    """A class, a bad image and a good one whose names are Latin-1, a bad one in UTF-8, and a stray link."""
    for split in ("train", "val"):
        folder = os.path.join(os.fsencode(tmp_path), b"set", split.encode(), b"caf\xe9")
        os.makedirs(folder)
        for name, data in ((LATIN, b""), (UTF8, b""), (b"good \xe9.JPEG", encoded())):
            with open(os.path.join(folder, name), "wb") as file:
                file.write(data)
        os.symlink("nowhere", os.path.join(folder, b"link \xe9.JPEG"))
    return tmp_path / "set"


def owt(*argv, encoding: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": encoding}
    return subprocess.run(
        [sys.executable, "-m", "horovod_owt", *map(str, argv)], env=env, capture_output=True
    )


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict", "latin-1:strict"])
def test_verify_reports_every_name(root, encoding):
    done = owt("data", "verify", root, "--pipeline", "torchvision", "--split", "val", encoding=encoding)
    assert done.returncode == 3 and b"Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith(b"bad ") for line in lines) == 2
    assert any(line.endswith(LATIN + b": empty file") for line in lines)  # with its own bytes
    assert any("bäckerei".encode("latin-1" if "latin" in encoding else "utf-8") in line for line in lines)
    assert b"left out" in done.stdout and b"link \xe9.JPEG: dangling link" in done.stdout


def test_json_and_statistics_too(root):
    done = owt("data", "verify", root, "--pipeline", "torchvision", "--json", encoding="utf-8:strict")
    report = json.loads(done.stdout)
    names = [os.fsencode(os.path.basename(bad["path"])) for bad in report["bad"]]
    assert sorted(names) == sorted([LATIN, UTF8] * 2)
    assert all(os.path.exists(bad["path"]) for bad in report["bad"])
    done = owt("data", "stats", root, encoding="utf-8:strict")
    assert done.returncode == 0 and b"in the smallest (caf\xe9)" in done.stdout


def test_a_packed_set_opens_them_again(root, tmp_path):
    pack(root, tmp_path / "packed", Form(), workers=1)
    folder, packed = open_data_set(root), open_data_set(tmp_path / "packed")
    assert packed.classes == folder.classes == (os.fsdecode(b"caf\xe9"),)
    assert [packed.train.read(i) for i in range(3)] == [folder.train.read(i) for i in range(3)]
    done = owt("data", "verify", tmp_path / "packed", "--pipeline", "torchvision", encoding="utf-8:strict")
    assert done.returncode == 3 and b"shard-000000.tar: caf\xe9/caf\xe9.jpg: empty file" in done.stdout


def test_an_error_that_names_one_is_one_line(root):
    shutil.rmtree(os.path.join(os.fsencode(root), b"val", b"caf\xe9"))
    (root / "val" / "other").mkdir()
    (root / "val" / "other" / "a.JPEG").touch()
    done = owt("data", "stats", root, encoding="utf-8:strict")
    assert (
        done.returncode == 2 and b"caf\\udce9 only there" in done.stderr and b"Traceback" not in done.stderr
    )


def test_records_get_the_name_back(tmp_path):
    metrics = MetricsLog(tmp_path)
    metrics.write("fault", path=NAME)
    metrics.close()
    append_record(tmp_path / "attempts.jsonl", {"path": NAME})
    for file in (METRICS, "attempts.jsonl"):
        (record,) = newest_records(tmp_path / file)
        assert os.fsencode(record["path"]) == LATIN
    write_outcome(tmp_path, {"exit_code": 1, "reason": NAME})
    assert read_outcome(tmp_path)["reason"] == NAME


def test_text_files_and_job_scripts_keep_the_bytes(tmp_path, monkeypatch):
    write_text(tmp_path / "file", f"cd {NAME}\n")
    assert (tmp_path / "file").read_bytes() == b"cd " + LATIN + b"\n"
    seen = []
    monkeypatch.setattr(client, "ask", lambda argv, **_: seen.append(open(argv[-1], "rb").read()) or "7\n")
    assert client.submit(f"cd {NAME}\n") == "7" and seen == [b"cd " + LATIN + b"\n"]


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("utf-8", b"caf\xe9 \xc3\xa4 \xe2\x82\xac"),
        ("latin-1", b"caf\xe9 \xe4 \\u20ac"),
        ("ascii", b"caf\xe9 \xc3\xa4 \xe2\x82\xac"),
    ],
)
def test_streams_take_any_name(monkeypatch, encoding, written):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", None)  # closed
    text.tolerant_streams()
    print("caf\udce9 ä €", end="", flush=True)
    assert out.buffer.getvalue() == written


def test_a_name_with_a_newline_or_a_terminals_codes_is_shown_in_one_line(root):
    """Nobody's file may write to an operator's terminal, or make up a line of a report."""
    name = "a\nremark  b.JPEG: \x1b[2Jfine\x9b.JPEG"
    (root / "train" / os.fsdecode(b"caf\xe9") / name).touch()
    done = subprocess.run(
        [sys.executable, "-m", "horovod_owt", "data", "verify", root, "--pipeline", "torchvision"],
        capture_output=True,
        text=True,
        errors="surrogateescape",
    )
    said = done.stdout + done.stderr
    assert done.returncode == 3 and "\x1b" not in said and "\x9b" not in said
    assert not [line for line in said.splitlines() if line.startswith("remark  b.JPEG")]
    assert r"a\nremark  b.JPEG: \x1b[2Jfine\x9b.JPEG: empty file" in done.stdout
    assert text.one_line("ä \ud8e9 b") == "ä \ud8e9 b"
    assert text.without_terminal_codes("a\n\x1bb") == "a\n\\x1bb"


def text_without_encoding(source: Path) -> list[str]:
    """Calls that read or write text in whatever encoding the locale has at that moment."""
    found = []
    for call in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        method, given = isinstance(call.func, ast.Attribute), {keyword.arg for keyword in call.keywords}
        modes = [each.value for each in call.args if isinstance(each, ast.Constant)]
        text = (
            (method and name in ("read_text", "write_text"))
            or (not method and name == "open" and not any("b" in str(mode) for mode in modes[-1:]))
            or "text" in given
        )
        if text and "encoding" not in given:
            found.append(f"{source.name}:{call.lineno}: {ast.unparse(call)}")
    return found


def test_text_has_an_encoding_whatever_a_library_makes_of_the_locale():
    """A C library may call setlocale: from then on Python would read ASCII. Seen with the k80 lane's."""
    launch = Path(text.__file__).resolve().parents[1] / "launch"
    scripts = [launch / name for name in ("setup", "quickstart", "two-hosts")]
    sources = [*Path(text.__file__).parent.rglob("*.py"), *launch.rglob("*.py"), *scripts]
    assert [call for source in sources for call in text_without_encoding(source)] == []
