"""Closed streams, and readers that leave, end no command; a result that is lost otherwise is an error."""

import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from horovod_owt.cli import cli
from horovod_owt.commands.streams import _stream, stdout_is_read
from horovod_owt.errors import ConfigError, RunError, as_owt_error

OWT = f"{sys.executable} -m horovod_owt"


def shell(command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_command_works_with_closed_streams(tmp_path, closed):
    """Worker processes included, and none of its files gets what is written to a closed stream."""
    out = tmp_path / "out"
    numbers = "--classes 2 --train-per-class 30 --val-per-class 1"
    done = shell(f"{OWT} data synth {out} {numbers} {closed}")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "synthetic.json").read_text())["classes"] == 2


def test_a_reader_may_leave_and_a_full_disk_is_named():
    assert shell(f"{OWT} devices --json | true").returncode == 0
    done = shell(f"{OWT} devices --json >/dev/full")
    assert done.returncode == 1
    assert done.stderr == (
        "owt: cannot write to stdout: No space left on device; fix: write it elsewhere, or free some space\n"
    )


@pytest.fixture
def pipe():
    """The reading and the writing end; the test closes the first."""
    read, write = os.pipe()
    yield read, write
    os.close(write)


@pytest.mark.parametrize("is_log", [True, False])
def test_what_nobody_reads_is_dropped(pipe, is_log):
    read, write = pipe
    stream = _stream(write, None, errors="strict", is_log=is_log)
    print("first", file=stream, flush=True)
    assert os.read(read, 100) == b"first\n"
    os.close(read)
    for _ in range(3):
        print("x" * 100_000, file=stream, flush=True)


def test_a_command_can_ask_whether_its_output_is_still_read(pipe, monkeypatch):
    read, write = pipe
    monkeypatch.setattr(sys, "stdout", _stream(write, None, errors="strict", is_log=False))
    print("first", flush=True)
    assert stdout_is_read()
    os.close(read)
    print("second", flush=True)
    assert not stdout_is_read()


def test_a_slow_reader_of_a_non_blocking_pipe_gets_everything(pipe):
    """As when ssh or another process of the same terminal has set O_NONBLOCK."""
    read, write = pipe
    os.set_blocking(write, False)
    text, got = "0123456789" * 30_000, []

    def drain():
        while sum(map(len, got)) < len(text):
            got.append(os.read(read, 4096))

    reader = threading.Thread(target=drain)
    reader.start()
    print(text, end="", file=_stream(write, None, errors="strict", is_log=True), flush=True)
    reader.join(10)
    os.close(read)
    assert b"".join(got).decode() == text


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), EOFError("Ran out of input")])
def test_a_lost_connection_is_not_taken_for_a_lost_reader(monkeypatch, error):
    """click would end with 1 and no word."""

    def lose(*_args, **_options):
        raise error

    monkeypatch.setattr(cli.commands["devices"], "callback", lose)
    with pytest.raises(RuntimeError, match=type(error).__name__):
        cli.main(["devices"], standalone_mode=False)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "out of memory; fix: use fewer ranks"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory:"), "a smaller batch"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "a smaller batch"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasC"), "a smaller batch"),
        (RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), "a smaller batch"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might"), "dmesg"),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), "nvidia-smi"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "out of memory"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (OSError(errno.EMFILE, "Too many open files", "/data/x"), "ulimit -n"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "/data/x: Permission denied; fix"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; fix"),
    ],
)  # fmt: skip
def test_what_the_machine_lacks_is_no_bug(error, text):
    known = as_owt_error(error)
    assert isinstance(known, RunError) and text in str(known) and "fix: " in str(known)


def test_bugs_stay_bugs_and_explained_errors_stay_themselves():
    own = ConfigError("x")
    assert as_owt_error(own) is own
    for bug in (KeyError("x"), RuntimeError("shape mismatch"), FileNotFoundError(2, "No such file", "x")):
        assert as_owt_error(bug) is None
