"""owt info: complete where everything works, useful where torch or Horovod does not, and free of secrets."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from horovod_owt.cli import cli
from horovod_owt.preflight import info

KEYS = {"versions", "horovod", "devices", "host", "limits", "network"}
LOADED = {
    "torch": {"torch's CUDA": "13.0"},
    "horovod": {"version": "0.28.1+owt.1", "patched": True, "operations": "gloo mpi"},
}


@pytest.fixture
def loaded(monkeypatch):
    """What the libraries say, without loading them."""
    monkeypatch.setattr(info, "_loaded", lambda: LOADED)


def test_every_key_is_there_and_the_text_has_the_same_facts(loaded):
    document = json.loads(CliRunner().invoke(cli, ["info", "--json"]).stdout)
    assert document.keys() == KEYS
    assert document["versions"].keys() >= {"horovod_owt", "python", "torch", "code", "torch's CUDA", "mpirun"}
    assert document["horovod"] == LOADED["horovod"]
    assert document["devices"]["cpu"]["cores"] >= 1 and isinstance(document["devices"]["gpus"], list)
    assert document["limits"]["open_files"] and document["limits"]["free_bytes"]["/tmp"]
    assert "lo" in {each["name"] for each in document["network"]["interfaces"]}
    text = CliRunner().invoke(cli, ["info"]).stdout
    for fact in (
        document["versions"]["torch"],
        document["host"]["kernel"],
        "gloo mpi",
        "addresses=127.0.0.1",
    ):
        assert fact in text


def test_it_loads_the_installed_horovod(tmp_path, monkeypatch):
    """Whatever modules the user's folder has."""
    for name in ("random", "token", "psutil", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the user')")
    monkeypatch.chdir(tmp_path)
    assert info._loaded()["horovod"]["operations"].startswith("gloo")


def test_no_secret_and_no_home_is_shown(loaded, monkeypatch, tmp_path):
    secrets = {
        "_HOROVOD_SECRET_KEY": "s3cret",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1:4711/s3cret",
        "AWS_SECRET_ACCESS_KEY": "s3cret",
        "HF_TOKEN": "s3cret",
        "WANDB_API_KEY": "s3cret",
        "https_proxy": "http://alice:s3cret@proxy:3128",
        "SLURM_JOB_COMMENT": "s3cret",
    }
    shown = {
        "HOME": "/export/alice",
        "LD_LIBRARY_PATH": "/export/alice/lib:/home/bob/lib:/export/alice",
        "PYTHONPATH": "/opt/export/alice2",
    }
    for name, value in {**secrets, **shown}.items():
        monkeypatch.setenv(name, value)
    document = json.loads(CliRunner().invoke(cli, ["info", "--json"]).stdout)
    text = json.dumps(document) + CliRunner().invoke(cli, ["info"]).stdout
    assert "s3cret" not in text and not secrets.keys() & set(document["host"]["environment"])
    assert document["host"]["environment"]["LD_LIBRARY_PATH"] == "~/lib:~/lib:~"
    assert document["host"]["environment"]["PYTHONPATH"] == "/opt/export/alice2"


def test_no_listed_variable_is_one_that_holds_a_key():
    words = ("KEY", "TOKEN", "SECRET", "PASS", "ADDR", "CREDENTIAL", "PROXY", "COOKIE", "STORE")
    assert not [name for name in info.SHOWN_VARIABLES if any(word in name for word in words)]
    assert len(set(info.SHOWN_VARIABLES)) == len(info.SHOWN_VARIABLES)


@pytest.mark.parametrize(
    ("torch", "fault"),
    [
        ("raise ModuleNotFoundError(\"No module named 'torch'\")", "No module named 'torch'"),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("import os; os.abort()", "exit code -6"),
        ("import time; time.sleep(60)", "did not load within 2 s"),
    ],
)
def test_a_broken_torch_is_told_in_its_fields(torch, fault, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text(torch)
    monkeypatch.syspath_prepend(tmp_path)
    if "sleep" in torch:
        monkeypatch.setattr(info, "LOAD_S", 2.0)
    document = info.information()
    assert document.keys() == KEYS
    assert fault in document["horovod"]["fault"]
    assert fault in document["versions"]["torch cannot be loaded"]
    assert document["versions"]["python"] and document["network"]["interfaces"]


def test_what_cannot_be_looked_at_is_a_fault_of_its_field(loaded, monkeypatch):
    def broken():
        raise RuntimeError("the driver is another version")

    monkeypatch.setattr(info, "_gpus", broken)
    document = info.information()
    assert document["devices"]["gpus"] == {"fault": "RuntimeError: the driver is another version"}
    assert document["devices"]["cpu"]["cores"]


def test_a_programs_version_is_its_first_line(tmp_path, monkeypatch):
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\necho tool 1.2; echo more\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert info._told(("tool",)) == "tool 1.2"
    assert info._told(("no-such-tool",)) == "not on PATH"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(info, "PROGRAM_S", 0.2)
    assert "timed out" in info._told(("tool",))


def test_the_nearest_limit_of_a_cgroup_counts(tmp_path):
    group = tmp_path / "job" / "step"
    group.mkdir(parents=True)
    (tmp_path / "job" / "memory.max").write_text("8000\n")
    (tmp_path / "job" / "pids.max").write_text("max\n")
    (group / "pids.max").write_text("512\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    assert info._cgroup(tmp_path, own) == {"memory.max": "8000", "pids.max": "512"}
    assert info._cgroup(tmp_path, Path("/nowhere")) == {}
