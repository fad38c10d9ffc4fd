"""The stand-ins and the operators on the CPU, before ranks are put on them."""

import sys

from conftest import PROGRAMS


def test_pretended_gpus_have_devices_memory_streams_and_no_kernels(run, on_gpus):
    run([sys.executable, PROGRAMS / "one_process.py"], launcher="none", **on_gpus)


def test_owt_sees_them(run, on_gpus):
    seen = run(["owt", "devices", "--json"], launcher="none", **on_gpus).stdout
    assert "GPU-00000000-0000-0000-0000-000000000001" in seen and "Pretended GPU" in seen
