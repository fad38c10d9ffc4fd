"""owt devices: the device and cores of each rank."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from horovod_owt.commands.options import JSON_OPTION

LIMIT_S = 30.0  # for all ranks to connect, and then to answer
COLUMNS = {
    "rank": "rank",
    "host": "host",
    "local_rank": "local rank",
    "device": "device",
    "uuid": "UUID",
    "pci": "PCI",
    "numa": "NUMA",
    "cores": "cores",
    "name": "name",
}


@click.command()
@JSON_OPTION
def devices(as_json: bool) -> None:
    """Print the device and cores that each rank would train on. Exit code 2 if ranks would share a device.

    \b
    Examples:  owt devices
               horovodrun -np 4 owt devices
               mpirun -np 8 --host gpu07:4,gpu08:4 --bind-to none owt devices

    Use the same launcher as for `owt train`; rank 0 prints the table. UUID is that of the MIG instance, if
    the rank has one; NUMA is the node that the device is attached to.
    """
    from horovod_owt.data.machine import raise_open_file_limit
    from horovod_owt.errors import DeviceError, RunError
    from horovod_owt.parallel.control_channel import open_control_channel
    from horovod_owt.parallel.device import check_not_shared
    from horovod_owt.topology import rank_topology

    raise_open_file_limit()
    topology = rank_topology()
    own = _own_row(topology)
    with open_control_channel(topology, limit_s=LIMIT_S) as channel:
        answers = channel.gather(own, LIMIT_S, "devices")
        if not channel.is_root:
            return
    silent = {rank: {"rank": rank, "host": host or None} for rank, (host, _) in channel.absent.items()}
    rows = [dict.fromkeys(COLUMNS) | row for _, row in sorted({**silent, **answers}.items())]
    click.echo(json.dumps({"devices": rows}) if as_json else _text(rows))
    if errors := dict.fromkeys(row["error"] for row in rows if "error" in row):
        raise DeviceError("; ".join(errors))
    check_not_shared(
        {
            row["rank"]: (row["host"], row["uuid"], f"{row['name']} {row['uuid']} ({row['pci']})")
            for row in rows
        }
    )
    if silent:
        raise RunError(
            f"no answer from rank{'s'[: len(silent) > 1]} {', '.join(map(str, sorted(silent)))}",
            wanted=f"one within {LIMIT_S:.0f} s",
            fix="see the launcher's output about their hosts",
        )


def _own_row(topology) -> dict[str, Any]:
    """This rank's row, or a row with `error` for rank 0 to report."""
    from horovod_owt.errors import DeviceError
    from horovod_owt.parallel.cores import SYSFS, numa_node, own_cores
    from horovod_owt.parallel.device import claim_device

    row = {"rank": topology.rank, "host": topology.host, "local_rank": topology.local_rank}
    try:
        device = claim_device(topology)
    except DeviceError as error:
        return row | {"error": str(error)}
    row["device"] = device.name
    row["cores"] = own_cores(topology, device, os.sched_getaffinity(0), os.cpu_count() or 1, SYSFS)
    if gpu := device.gpu:
        row |= {"uuid": device.uuid, "pci": gpu.pci, "numa": numa_node(gpu.pci, SYSFS), "name": gpu.name}
    return row


def _text(rows: list[dict[str, Any]]) -> str:
    table = [list(COLUMNS.values()), *([_cell(row[key]) for key in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)
    return "\n".join(lines)


def _cell(value: Any) -> str:
    from horovod_owt.parallel.cores import cpu_list

    return "-" if value is None else cpu_list(value) if isinstance(value, list) else str(value)
