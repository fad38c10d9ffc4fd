"""owt data verify: find bad images."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from horovod_owt.commands.options import JSON_OPTION, UsersPath
from horovod_owt.text import one_line

if TYPE_CHECKING:
    from horovod_owt.data.listing import LeftOut
    from horovod_owt.data.verify import Finding, Findings
    from horovod_owt.parallel.control_channel import ControlChannel

PIECE = 5000  # findings of a sort that travel together
SHARE_TIMEOUT_S = 7 * 86400.0  # for other ranks to finish; a dead rank is noticed at once


@click.command()
@click.argument("root", type=UsersPath())
@click.option("--split", type=click.Choice(["train", "val"]), help="Verify one split.  [default: both]")
@click.option(
    "--workers", type=click.IntRange(1), help="Decoding threads.  [default: the cores of this rank]"
)
@click.option(
    "--pipeline",
    type=click.Choice(["auto", "dali", "torchvision"]),
    default="auto",
    show_default=True,
    help="Decoder to use; choose the one that you train with.",
)
@JSON_OPTION
def verify(root: Path, split: str | None, workers: int | None, pipeline: str, as_json: bool) -> None:
    """Decode every image of the data set ROOT and list the bad ones. Exit code 3 if there are any.

    \b
    Examples:  owt data verify /tmp/synth
               owt data verify /tmp/synth --split val --json
               horovodrun --gloo -np 4 owt data verify /data/imagenet

    Under a launcher the ranks share the images, and rank 0 prints the report. Unusual images that decode (a
    PNG named .JPEG, a CMYK JPEG) are listed as remarks, not as bad; what looks like an image but is not read
    (a .webp, a dangling link, a folder in a class folder) as left out. Ctrl-C ends it with a report of what
    was found so far; mpirun leaves its ranks no time for that, so under a launcher bad images are also
    printed to stderr at once.
    """
    from horovod_owt.commands.log import log_to_stderr
    from horovod_owt.data.pipeline import resolve_kind
    from horovod_owt.data.store import SPLITS, fingerprint, open_data_set
    from horovod_owt.data.verify import make_decoder, merged
    from horovod_owt.data.verify import verify as verify_share
    from horovod_owt.errors import ProblemFound, RunError
    from horovod_owt.parallel.control_channel import open_control_channel
    from horovod_owt.topology import rank_topology

    log_to_stderr()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit: report what was found
    topology, started = rank_topology(), time.perf_counter()
    kind = resolve_kind(pipeline)
    data = open_data_set(root)
    stores = {name: getattr(data, name) for name in SPLITS if split in (None, name)}
    threads = workers or _own_cores(topology.local_size)
    decoder = make_decoder(kind, threads=threads, device_id=_own_gpu(topology) if kind == "dali" else None)
    images = sum(map(len, stores.values()))
    with open_control_channel(topology) as channel:
        check_same(channel, fingerprint(*stores.values()))
        with _bar(images, topology) as progress:
            found = verify_share(
                stores, decoder, rank=topology.rank, world_size=topology.world_size, progress=progress
            )
        parts = gathered(channel, found)
        whole = merged(parts) if parts else found
        bad, unread, done, stopped, lost = channel.broadcast(
            [len(whole.bad), len(whole.unread), whole.images, whole.stopped, sorted(channel.absent)],
            SHARE_TIMEOUT_S,
        )
    if topology.rank == 0:
        seconds = time.perf_counter() - started
        left_out = [each for store in stores.values() for each in store.left_out]
        click.echo(_json(whole, left_out) if as_json else _text(whole, left_out, images, kind, seconds))
    silent = f"no report from rank{'s'[: len(lost) > 1]} {', '.join(map(str, lost))}" if lost else ""
    rest = [
        f"stopped before the other {images - done - unread}" if stopped else silent,
        f"{unread} not read" if unread else "",
    ]
    rest = ", ".join(filter(None, rest))
    if bad:
        saw = f"bad images: {bad} of {done}" + (f" ({rest})" if rest else "")
        fix = "replace or remove them, or train with --set bad_images=skip"
        raise ProblemFound(saw, wanted="none", fix=fix).on_every_rank()
    if unread:
        saw = f"{unread} images could not be read, through no fault of theirs; of {done} others none is bad"
        fix = "check the permissions, the disk, the mount or the file server, and verify again"
        raise RunError(saw, wanted="to read all of them", fix=fix).on_every_rank()
    if stopped:
        raise RunError(f"stopped after {done} of {images} images, none of them bad").on_every_rank()
    if silent:
        saw = f"{silent}; of {done} of {images} images none is bad"
        raise RunError(saw, wanted="all of them", fix="see the output of those ranks").on_every_rank()


def check_same(channel: ControlChannel, fingerprint: str) -> None:
    """Raise DataError on every rank if ranks list different images: no rank would decode some of them."""
    from horovod_owt.errors import DataError

    seen = channel.gather(fingerprint, SHARE_TIMEOUT_S, "fingerprint")
    other = next(([rank, each] for rank, each in seen.items() if each != seen[0]), None)
    first = channel.broadcast(other, SHARE_TIMEOUT_S)
    if first is not None:
        saw = f"rank {first[0]} has {first[1]}, rank 0 others"
        fix = "copy the data set to every host, use a shared folder, or verify on each host by itself"
        raise DataError(saw, wanted="the same images on every rank", fix=fix).on_every_rank()


def gathered(channel: ControlChannel, found: Findings) -> list[dict[str, Any]]:
    """The findings of all ranks, on rank 0, for `merged`: in pieces, as a message has a largest size.

    Of PNGs that are all named .JPEG each is a finding.
    """
    pieces = found.pieces(PIECE)
    most = max(channel.gather(len(pieces), SHARE_TIMEOUT_S, "verify").values(), default=0)
    parts = []
    for number in range(channel.broadcast(most, SHARE_TIMEOUT_S)):
        piece = pieces[number].to_dict() if number < len(pieces) else None
        parts += channel.gather(piece, SHARE_TIMEOUT_S, "verify").values()
    return [part for part in parts if part is not None]


def _own_cores(ranks_on_host: int) -> int:
    """This rank's share of the host's cores."""
    from horovod_owt.data.workers import usable_cores

    return max(1, min(usable_cores(), (os.cpu_count() or 1) // ranks_on_host))


def _own_gpu(topology) -> int | None:
    """The index of the GPU that a training rank would use here, for torch and DALI."""
    from horovod_owt.parallel.device import claim_device

    _, _, number = claim_device(topology).name.partition(":")
    return int(number) if number else None


@contextmanager
def _bar(images: int, topology):
    """A progress bar on a terminal, extrapolated from rank 0's share.

    mpirun ends ranks at Ctrl-C before they can report: under a launcher bad images are logged at once too.
    """
    from tqdm import tqdm

    log, found = logging.getLogger("horovod_owt"), []
    hidden = topology.rank > 0 or not sys.stderr.isatty()
    with tqdm(total=images, unit="image", disable=hidden, desc="verifying") as bar:

        def show(done: int, bad: list[Finding]) -> None:
            found.extend(bad)
            bar.update(min(done * topology.world_size, images - bar.n))
            bar.set_postfix_str(f"{len(found)} bad" + (" on rank 0" if topology.world_size > 1 else ""))
            for one in bad if topology.world_size > 1 else ():
                log.warning("bad image %s: %s", one.path, one.text)

        yield show


def _json(found, left_out: list[LeftOut]) -> str:
    report = {
        "images": found.images,
        "bad": [{"path": bad.path, "fault": bad.text} for bad in found.bad],
        "unread": [{"path": unread.path, "error": unread.text} for unread in found.unread],
        "remarks": [{"path": odd.path, "remark": odd.text} for odd in found.remarks],
        "left_out": [each._asdict() for each in left_out],
    }
    return json.dumps(report | ({"stopped": True} if found.stopped else {}))


def _text(found, left_out: list[LeftOut], images: int, kind: str, seconds: float) -> str:
    lines = [f"bad     {bad.path}: {bad.text}" for bad in found.bad]
    lines += [f"unread  {unread.path}: {unread.text}" for unread in found.unread]
    lines += [f"remark  {odd.path}: {odd.text}" for odd in found.remarks]
    for each in left_out:
        count = f" ({each.images} images)" if each.images > 1 else ""
        lines.append(f"left out  {each.path}: {each.reason}{count}")
    of = f" of {images}" if found.stopped else ""
    lines.append(
        f"{found.images}{of} images decoded by {kind} in {seconds:.1f} s: "
        f"{len(found.bad)} bad, {len(found.remarks)} remarks"
        + (f", {len(found.unread)} not read" if found.unread else "")
        + (f", {sum(each.images for each in left_out)} left out" if left_out else "")
    )
    return "\n".join(map(one_line, lines))
