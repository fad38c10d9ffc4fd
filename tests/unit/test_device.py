"""Ranks to devices, with GPUs as a launcher and a driver would show them."""

import pytest
from boxes import k80_box, rank_of, with_mig
from hypothesis import given
from hypothesis import strategies as st

from horovod_owt.errors import ConfigError, DeviceError, PrintedBy
from horovod_owt.parallel import device
from horovod_owt.parallel.device import SHARED, check_not_shared, claim_device, visible_devices, visible_gpus
from horovod_owt.topology import UNBOUND, rank_topology, read_topology

VISIBLE = "CUDA_VISIBLE_DEVICES"


@pytest.fixture
def box(monkeypatch):
    """Four GK210; the list may be changed."""
    gpus = k80_box()
    monkeypatch.setattr(device, "list_gpus", lambda: gpus)
    return gpus


def claims(ranks: int, env: dict | None = None, launcher: str = "horovodrun") -> list[device.Device]:
    """What each rank of the host takes, where all see the same."""
    return [
        claim_device(rank_of(launcher, local_rank=rank, local_size=ranks), dict(env or {}))
        for rank in range(ranks)
    ]


def indices(visible: str) -> list[int]:
    """Which GPUs of the box a value of CUDA_VISIBLE_DEVICES shows."""
    return [one.gpu.index for one in visible_devices({VISIBLE: visible})]


def test_without_a_gpu_a_rank_takes_the_cpu(box):
    box.clear()
    assert {one.name for one in claims(8)} == {"cpu"}
    assert {one.name for one in claims(8, {VISIBLE: "0,1"})} == {"cpu"}  # as a fake gres of Slurm's sets it


@pytest.mark.parametrize("visible", ["", " ", "-1", "NoDevFiles", "none"])
def test_a_rank_that_may_see_no_gpu_takes_the_cpu_and_the_driver_is_not_queried(monkeypatch, visible):
    monkeypatch.setattr(device, "list_gpus", lambda: pytest.fail("asked"))
    assert claims(2, {VISIBLE: visible})[1].name == "cpu"


def test_each_rank_of_a_host_takes_the_gpu_of_its_local_rank(box):
    taken = claims(4)
    assert [one.name for one in taken] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert [one.uuid for one in taken] == [gpu.uuid for gpu in box]


def test_cuda_numbers_gpus_as_the_driver_does(box):
    env = {}
    claim_device(rank_of(), env)
    assert env == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_a_visible_number_stands_for_the_gpu_that_the_list_names(box):
    taken = claims(2, {VISIBLE: "3,1"})
    assert [(one.name, one.gpu.index) for one in taken] == [("cuda:0", 3), ("cuda:1", 1)]


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        ("2", [2]),
        ("0, 3", [0, 3]),
        ("1,0,-1,2", [1, 0]),
        ("1,9,2", [1]),
        ("1,x,2", [1]),
        ("GPU-2222aaaa-0000-0000-0000-000000000002,GPU-0", [2, 0]),
        ("GPU-1,3", [1]),
        ("3,GPU-1", [3]),
        ("GPU-1,GPU-,GPU-2", [1]),  # stands for all four, so for none
    ],
)
def test_the_list_of_visible_gpus_is_read_as_cuda_reads_it(box, visible, seen):
    assert indices(visible) == seen


@pytest.mark.parametrize("visible", ["9", "GPU-f", "GPU-", "2,2", "GPU-1,GPU-1111", "MIG-12bb"])
def test_a_list_that_shows_nothing_is_refused_with_what_is_there(box, visible):
    with pytest.raises(DeviceError) as caught:
        visible_devices({VISIBLE: visible})
    assert f"{VISIBLE}={visible} on host" in str(caught.value) and f"3 ({box[3].uuid})" in str(caught.value)


WORDS = ["0", "1", "3", "4", "-1", "", " 2", "1x", "GPU-1", "GPU-2", "GPU-"]


@given(st.lists(st.sampled_from(WORDS), max_size=4))
def test_torch_sees_the_same(words):
    from torch.cuda import _parse_visible_devices, _transform_uuid_to_ordinals

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "list_gpus", k80_box)
        patch.setenv(VISIBLE, ",".join(words))
        wanted = _parse_visible_devices()
        if wanted and isinstance(wanted[0], str):
            wanted = _transform_uuid_to_ordinals(wanted, [gpu.uuid for gpu in k80_box()])
        if 4 in wanted:  # there is none such
            wanted = wanted[: wanted.index(4)]
        try:
            assert indices(",".join(words)) == wanted
        except DeviceError:
            assert wanted == []


@pytest.mark.parametrize("launcher", ["srun", "mpirun", "horovodrun"])  # the last: srun by way of jobs.rank
def test_a_rank_that_was_shown_one_gpu_takes_it(box, launcher):
    own = claim_device(rank_of(launcher, local_rank=3, local_size=4), {VISIBLE: "3"})
    assert (own.name, own.uuid) == ("cuda:0", box[3].uuid)


@pytest.mark.parametrize("visible", [1, 2])
def test_more_ranks_than_gpus_are_refused(box, visible):
    del box[visible:]
    with pytest.raises(DeviceError) as caught:
        claims(3)
    assert caught.value.exit_code == 2
    assert f"3 ranks on host gpu07, and each sees {visible}" in str(caught.value)
    assert f"fix: -np {visible}" in str(caught.value)


def test_ranks_that_are_to_share_take_turns(box):
    del box[2:]
    assert [one.gpu.index for one in claims(5, {SHARED: "1"})] == [0, 1, 0, 1, 0]
    assert [one.gpu.index for one in claims(2, {SHARED: "1"})] == [0, 1]
    with pytest.raises(DeviceError):
        claims(5, {SHARED: "0"})


def test_each_rank_is_left_one_mig_instance(box):
    """CUDA shows a process the first instance it may see, so each may see its own only."""
    box[:] = [with_mig(box[0], 2), box[1], with_mig(box[2], 1)]
    taken, left = [], []
    for rank in range(4):
        env = {}
        taken.append(claim_device(rank_of(local_rank=rank, local_size=4), env))
        left.append(env[VISIBLE])
    assert left == ["MIG-00bb-0000", "MIG-01bb-0000", box[1].uuid, "MIG-20bb-0000"]
    assert [one.uuid for one in taken] == left
    assert {one.name for one in taken} == {"cuda:0"}
    assert [one.gpu.index for one in taken] == [0, 0, 1, 2]


def test_mig_instances_are_named_in_whole_in_part_and_as_old_drivers_do(box):
    box[1] = with_mig(box[1], 3)

    def instances(visible: str) -> list[str]:
        return [one.mig for one in visible_devices({VISIBLE: visible})]

    assert instances("MIG-12bb,MIG-10bb-0000") == ["MIG-12bb-0000", "MIG-10bb-0000"]
    assert instances("1") == instances(box[1].uuid) == [f"MIG-1{k}bb-0000" for k in range(3)]
    assert instances("0,1") == ["", *instances("1")]
    old = f"MIG-{box[1].uuid}/7/0"
    (one,) = visible_devices({VISIBLE: old})
    assert (one.mig, one.gpu) == (old, box[1])
    env = {VISIBLE: "MIG-12bb,MIG-10bb-0000"}
    assert claim_device(rank_of(local_rank=1, local_size=2), env).mig == env[VISIBLE] == "MIG-10bb-0000"


def test_a_box_has_as_many_places_as_gpus_and_mig_instances(box, monkeypatch):
    monkeypatch.delenv(VISIBLE, raising=False)
    box[1] = with_mig(box[1], 3)
    assert visible_gpus() == 6
    monkeypatch.setenv(VISIBLE, "0,1")
    assert visible_gpus() == 4


def row(host: str, uuid: str) -> tuple[str, str, str]:
    return host, uuid, f"Tesla K80 {uuid} (0000:05:00.0)"


def test_ranks_that_share_a_device_are_named_with_it_and_their_host():
    everyone = {0: row("gpu07", "GPU-1"), 1: row("gpu07", "GPU-1"), 2: row("gpu08", "GPU-2"), 3: row("n", "")}
    with pytest.raises(DeviceError) as caught:
        check_not_shared({**everyone, 4: row("n", "")}, {})
    assert str(caught.value).startswith(
        "ranks 0, 1 on host gpu07 share Tesla K80 GPU-1 (0000:05:00.0); wanted a device for each rank"
    )
    with pytest.raises(DeviceError, match="ranks 0, 1 on hosts pod0, pod1 share"):
        check_not_shared({0: row("pod0", "GPU-1"), 1: row("pod1", "GPU-1")}, {})
    check_not_shared(everyone, {SHARED: "1"})
    check_not_shared({rank: everyone[rank] for rank in (0, 2, 3)}, {})


def test_all_shared_devices_are_named():
    everyone = {rank: row("gpu07", f"GPU-{rank // 2}") for rank in range(4)}
    with pytest.raises(DeviceError, match="ranks 0, 1 on .* GPU-0 .*; ranks 2, 3 on .* GPU-1 "):
        check_not_shared(everyone, {})


OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
OPEN_MPI += ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
MVAPICH = ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE")
MVAPICH += ("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE")
HOROVODRUN = ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE")
# the third of three tasks on the second of two nodes, which has two; tasks per node were not asked for
SLURM = {"SLURM_NTASKS": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "1,2"}
SLURM |= {"SLURM_PROCID": "2"}
STEP = {**SLURM, "SLURM_STEP_NUM_TASKS": "3"}  # what only srun sets
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


def said(names, *values) -> dict[str, str]:
    return dict(zip(names, map(str, values), strict=True))


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, ("none", 0, 1, 0, 1)),
        (SLURM, ("none", 0, 1, 0, 1)),  # a batch script has these too
        (said(HOROVODRUN, 5, 8, 1, 4), ("gloo", 5, 8, 1, 4)),
        ({**STEP, **said(HOROVODRUN, 2, 3, 1, 2)}, ("gloo", 2, 3, 1, 2)),  # owt job rank
        (said(HOROVODRUN, 0, 1, 0, 1), ("gloo", 0, 1, 0, 1)),  # an elastic job may grow
        ({**STEP, **said(TORCHRUN, 3, 4, 1, 2, "x"), "PMIX_RANK": "1"}, ("torchrun", 3, 4, 1, 2)),
        ({**said(OPEN_MPI, 3, 4, 1, 2), "PMIX_RANK": "3"}, ("mpirun", 3, 4, 1, 2)),
        ({**SLURM, **said(OPEN_MPI, 3, 4, 0, 3), "PMIX_RANK": "3"}, ("mpirun", 3, 4, 0, 3)),
        (said(MPICH, 1, 2, 1, 2), ("mpiexec", 1, 2, 1, 2)),
        (said(MVAPICH, 3, 4, 1, 2), ("mpirun_rsh", 3, 4, 1, 2)),
        ({**STEP, "PMIX_RANK": "2"}, ("pmix", 2, 3, 1, 2)),
        ({**STEP, "SLURM_NTASKS_PER_NODE": "1", "PMIX_RANK": "2"}, ("pmix", 2, 3, 1, 2)),
        ({**STEP, "PMI_RANK": "2", "PMI_SIZE": "3"}, ("mpiexec", 2, 3, 1, 2)),  # srun --mpi=pmi2
        # leftovers, and worlds of one: a lone rank, which needs no MPI
        ({"PMIX_RANK": "0"}, ("none", 0, 1, 0, 1)),
        ({"PMIX_RANK": "0", "SLURM_NTASKS": "4"}, ("none", 0, 1, 0, 1)),
        ({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"}, ("none", 0, 1, 0, 1)),
        (said(OPEN_MPI, 0, 1, 0, 1), ("none", 0, 1, 0, 1)),
        (said(TORCHRUN, 0, 1, 0, 1, "x"), ("none", 0, 1, 0, 1)),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ("none", 0, 1, 0, 1)),
        ({"PMI_RANK": "zero", "PMI_SIZE": "", "RANK": "2", "WORLD_SIZE": "1"}, ("none", 0, 1, 0, 1)),
        ({"FLUX_JOB_SIZE": "4", "PALS_NRANKS": "4", "PMI_SIZE": "4"}, ("none", 0, 1, 0, 1)),
    ],
)
def test_the_launchers_word_is_read(env, expected):
    seen = read_topology(env)
    assert (seen.launcher, seen.rank, seen.world_size, seen.local_rank, seen.local_size) == expected
    assert rank_topology(env) == seen


def test_srun_tasks_without_pmi_are_refused_by_one_message():
    for rank in range(3):
        with pytest.raises(
            ConfigError, match="3 srun tasks started without PMI; .* fix: srun --mpi=pmix"
        ) as caught:
            rank_topology({**STEP, "SLURM_PROCID": str(rank)})
        assert (caught.value.printed_by, caught.value.rank) == (PrintedBy.RANK_0, rank)
    assert rank_topology({**STEP, "PMIX_RANK": "2"}).world_size == 3
    assert rank_topology({**SLURM, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}).launcher == "none"


@pytest.mark.parametrize(
    ("names", "speaks"),
    [
        (("PALS_RANKID", "PALS_NRANKS"), 0),
        (("PALS_RANKID", "PMI_SIZE"), 0),
        (("FLUX_TASK_RANK", "FLUX_JOB_SIZE"), 0),
        (("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"), 0),
        (("PMI_RANK", "PMI_SIZE"), 0),
        (("ALPS_APP_PE",), 1),  # tells no size: the first rank may be alone
        (("PMIX_RANK",), 1),
    ],
)
def test_ranks_of_an_unknown_launcher_are_refused_with_one_voice(names, speaks):
    for rank in range(speaks, 3):
        with pytest.raises(ConfigError, match=f"^{names[0]}={rank}.*fix: `owt launch hosts") as caught:
            rank_topology(said(names, rank, 3) if len(names) > 1 else said(names, rank))
        assert caught.value.exit_code == 2 and (caught.value.rank == 0) == (rank == speaks)
    lone = said(names, 0, 1) if len(names) > 1 else said(names, 0)
    assert rank_topology(lone).launcher == "none"
    # and not where a launcher that is known started them
    assert (
        rank_topology({**said(names, *[1, 4][: len(names)]), **said(OPEN_MPI, 1, 4, 1, 2)}).launcher
        == "mpirun"
    )


@pytest.mark.parametrize("rank", [0, 3])
def test_torchs_variables_without_torchrun_are_refused_by_each_process(rank):
    with pytest.raises(ConfigError, match=f"^RANK={rank} WORLD_SIZE=4: .*unset RANK WORLD_SIZE") as caught:
        rank_topology(said(("RANK", "WORLD_SIZE"), rank, 4))
    assert caught.value.printed_by is PrintedBy.ONE_RANK


def test_a_world_size_without_a_rank_is_refused():
    with pytest.raises(ConfigError, match="^WORLD_SIZE=4: .*unset WORLD_SIZE$"):
        rank_topology({"WORLD_SIZE": "4"})


def test_ranks_are_unbound_under_horovodrun_and_where_the_variable_is_set():
    mpirun = said(OPEN_MPI, 3, 4, 1, 2)
    assert [read_topology(env).unbound for env in (mpirun, {**mpirun, UNBOUND: "1"})] == [False, True]
    assert read_topology(said(HOROVODRUN, 5, 8, 1, 4)).unbound
