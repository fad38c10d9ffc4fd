"""One rank of the installation test: an allreduce with a known sum, and a report in one line."""

import json
import sys

import horovod.torch as hvd
import torch


def main(use_gpu: bool) -> None:
    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    device = torch.device("cuda", hvd.local_rank()) if use_gpu else torch.device("cpu")
    mine = torch.arange(1000, dtype=torch.float32, device=device) + rank
    summed = hvd.allreduce(mine, op=hvd.Sum, name="proof").cpu()
    wanted = size * torch.arange(1000, dtype=torch.float32) + size * (size - 1) / 2
    proof = {
        "rank": rank,
        "size": size,
        "sum_is_right": bool(torch.equal(summed, wanted)),
        "controller": "mpi" if hvd.mpi_enabled() else "gloo" if hvd.gloo_enabled() else "none",
        "gloo_built": bool(hvd.gloo_built()),
        "mpi_built": bool(hvd.mpi_built()),
        "nccl_built": int(hvd.nccl_built()),
        "gpus": torch.cuda.device_count(),
        "libmpi": mapped_libmpi(),
        "mpi4py_size": mpi4py_size(),
    }
    print(f"PROOF {json.dumps(proof)} END", flush=True)
    hvd.barrier()  # the first rank to leave ends MPI for the others, which may still use mpi4py
    hvd.shutdown()


def mapped_libmpi() -> list[str]:
    """The MPI libraries loaded in this process; there must not be two."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        paths = {line.rstrip("\n").split(maxsplit=5)[5] for line in maps if "/libmpi" in line}
    return sorted(path for path in paths if "libmpi.so" in path.rpartition("/")[2])


def mpi4py_size() -> int | None:
    """The number of ranks that mpi4py sees, if Horovod uses MPI; 0 where it cannot load its MPI."""
    if not hvd.mpi_enabled():
        return None
    try:
        from mpi4py import MPI
    except ModuleNotFoundError:
        return None
    except ImportError:
        return 0
    return MPI.COMM_WORLD.Get_size()


if __name__ == "__main__":
    main(use_gpu="--gpu" in sys.argv)
