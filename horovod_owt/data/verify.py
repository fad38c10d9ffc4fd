"""Decode every image of a data set completely, and list the bad and the unusual ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from horovod_owt.data.decode import pillow_fault
from horovod_owt.data.faults import check_image, read_fault
from horovod_owt.data.header import Header
from horovod_owt.data.machine import EXHAUSTED, is_of_the_file, machine_error, reason_of
from horovod_owt.data.order import validation_slice
from horovod_owt.data.prefetch import Prefetched
from horovod_owt.data.remarks import remark
from horovod_owt.data.store import Store

READERS = 4  # I/O threads
GROUP = 64  # images decoded together, at most
GROUP_PIXELS = 2**26  # decoded together, at most, unless one image has more: 200 MB when decoded


@dataclass(frozen=True)
class Finding:
    """A fault or remark of one image."""

    split: str
    index: int  # into the split's store
    path: str
    text: str


Progress = Callable[[int, list[Finding]], None]  # images done since the last call, the bad ones of them


@dataclass
class Findings:
    """What a rank has found so far."""

    images: int = 0
    bad: list[Finding] = field(default_factory=list)
    unread: list[Finding] = field(default_factory=list)  # the machine could not read or decode them
    remarks: list[Finding] = field(default_factory=list)
    stopped: bool = False  # by Ctrl-C, before the end

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def pieces(self, most: int) -> list[Findings]:
        """The same in pieces of at most `most` findings of each sort, for `merged`."""
        longest = max(len(self.bad), len(self.unread), len(self.remarks))
        rows = [slice(start, start + most) for start in range(0, max(1, longest), most)]
        pieces = [Findings(0, self.bad[part], self.unread[part], self.remarks[part]) for part in rows]
        pieces[0].images, pieces[0].stopped = self.images, self.stopped
        return pieces


@dataclass(frozen=True)
class _Read:
    """An image that passed the cheap checks."""

    index: int
    data: bytes
    header: Header


class Decoder(Protocol):
    """Decodes whole images, many at a time."""

    def faults(self, images: Sequence[bytes]) -> dict[int, str]:
        """position in `images` -> fault, for those that it fails to decode"""


class PillowDecoder:
    """Decodes as pipeline=torchvision does."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="verify-image")

    def faults(self, images: Sequence[bytes]) -> dict[int, str]:
        said = self._threads.map(pillow_fault, images)
        return {number: f"undecodable: {fault}" for number, fault in enumerate(said) if fault}


def make_decoder(pipeline: str, *, threads: int, device_id: int | None) -> Decoder:
    """The decoder of a pipeline, dali or torchvision; only dali uses a GPU."""
    if pipeline == "torchvision":
        return PillowDecoder(threads)
    from horovod_owt.data.dali_decoder import DaliDecoder

    return DaliDecoder(threads, device_id, GROUP)


def verify(
    stores: dict[str, Store], decoder: Decoder, *, rank: int, world_size: int, progress: Progress
) -> Findings:
    """Check this rank's share of each split's images. Ctrl-C ends it with what was found so far.

    RunError if the machine has no more memory or open files, because then every later image would fail.
    """
    found = Findings()
    try:
        for split, store in stores.items():
            share = validation_slice(len(store), rank, world_size)
            _verify_split(split, store, share, decoder, found, progress)
    except KeyboardInterrupt:
        found.stopped = True
    except MemoryError as error:
        raise machine_error(error, "cannot decode an image") from error
    return found


def merged(parts: Sequence[dict[str, Any]]) -> Findings:
    """The findings of all ranks, in file order."""
    whole = Findings()
    for part in parts:
        whole.images += part["images"]
        whole.bad += [Finding(**finding) for finding in part["bad"]]
        whole.unread += [Finding(**finding) for finding in part["unread"]]
        whole.remarks += [Finding(**finding) for finding in part["remarks"]]
        whole.stopped |= part["stopped"]
    for findings in (whole.bad, whole.unread, whole.remarks):
        findings.sort(key=lambda finding: (finding.split, finding.index))
    return whole


def _verify_split(
    split: str, store: Store, share: range, decoder: Decoder, found: Findings, progress: Progress
) -> None:
    def note(index: int, text: str, findings: list[Finding]) -> None:
        findings.append(Finding(split, index, store.path(index), text))

    groups = Prefetched(_groups(store, share), 2, "read-groups")
    try:
        for images, faults, unread in groups:
            known = len(found.bad)
            for index, reason in unread.items():
                note(index, reason, found.unread)
            refused = decoder.faults([image.data for image in images]) if images else {}
            for index, fault in faults.items():
                note(index, fault, found.bad)
            for number, image in enumerate(images):
                if number in refused:
                    note(image.index, refused[number], found.bad)
                elif odd := remark(store.path(image.index), image.header):
                    note(image.index, odd, found.remarks)
            done = len(images) + len(faults)
            found.images += done
            progress(done, found.bad[known:])
    finally:
        groups.close()


class _Unread(str):
    """Why the machine could not read an image."""


def _groups(store: Store, share: range) -> Iterator[tuple[list[_Read], dict[int, str], dict[int, str]]]:
    """Groups of images to decode together, and those known bad or unread (index -> fault or reason)."""

    def read(index: int) -> _Read | _Unread | str:
        try:
            data = store.read(index)
            if fault := store.check(index, data):
                return f"differs from the image that was packed: {fault}"
            return _Read(index, data, check_image(data))
        except OSError as error:
            if is_of_the_file(error):
                return read_fault(error)
            if error.errno in EXHAUSTED:
                raise machine_error(error, f"cannot read {store.path(index)}") from error
            return _Unread(reason_of(error))
        except ValueError as error:
            return str(error)

    images: list[_Read] = []
    faults: dict[int, str] = {}
    unread: dict[int, str] = {}
    pixels = 0
    with ThreadPoolExecutor(READERS, thread_name_prefix="read-image") as readers:
        for start in range(share.start, share.stop, GROUP):
            chunk = range(start, min(start + GROUP, share.stop))
            for index, seen in zip(chunk, readers.map(read, chunk), strict=True):
                if isinstance(seen, str):
                    (unread if isinstance(seen, _Unread) else faults)[index] = seen
                    continue
                own = seen.header.height * seen.header.width
                if images and (len(images) == GROUP or pixels + own > GROUP_PIXELS):
                    yield images, faults, unread
                    images, faults, unread, pixels = [], {}, {}, 0
                images.append(seen)
                pixels += own
    if images or faults or unread:
        yield images, faults, unread
