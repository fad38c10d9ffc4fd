"""What ranks on CPU cores tell MPI before it starts."""

import pytest

from horovod_owt.parallel import mpi, runtime
from horovod_owt.parallel.device import CPU, Device
from horovod_owt.parallel.mpi import YIELD, yield_when_idle


def test_each_mpi_is_told_to_yield():
    env = {"HOME": "/root"}
    yield_when_idle(env)
    assert env.pop("HOME") == "/root" and env == YIELD
    assert {name.partition("_")[0] for name in YIELD} == {"OMPI", "I", "MPIR"}


@pytest.mark.parametrize("name", YIELD)
def test_what_the_user_has_set_is_kept(name):
    env = {name: "0"}
    yield_when_idle(env)
    assert env == YIELD | {name: "0"}


@pytest.mark.parametrize(("device", "told"), [(CPU, True), (Device("cuda:0", gpu=object()), False)])
def test_ranks_on_gpus_keep_mpis_default(monkeypatch, device, told):
    class Started(Exception):
        pass

    def start_horovod(**options):
        raise Started

    monkeypatch.setattr(runtime.os, "environ", env := {})
    monkeypatch.setattr(runtime, "use_own_cores", lambda topology, device: 1)
    monkeypatch.setattr(runtime.torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(runtime, "yield_when_idle", lambda: mpi.yield_when_idle(env))
    monkeypatch.setattr(runtime.hvd, "init", start_horovod)
    with pytest.raises(Started):
        runtime.init(device)
    assert (YIELD.items() <= env.items()) is told
