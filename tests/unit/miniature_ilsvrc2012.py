"""ILSVRC2012 in small: the same three files, nested and named as the real ones, with a few images in each."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from horovod_owt.data.synthetic import SyntheticSet, draw

SYNSETS = {4: "n01440764", 2: "n01443537", 3: "n02105855"}  # ILSVRC2012_ID -> WordNet id, not in one order
PNG, CMYK, SMALL = "n02105855_2933.JPEG", "n01440764_7.JPEG", "n01443537_3.JPEG"


@dataclass
class Miniature:
    """The paths of the three files and of their md5 sums, and what a data set made of them must hold."""

    folder: Path
    train_tar: Path
    val_tar: Path
    devkit: Path
    checksums: Path
    images: dict[str, bytes] = field(default_factory=dict)  # train/WNID/NAME -> bytes

    def options(self) -> list[str]:
        names = {"--train-tar": self.train_tar, "--val-tar": self.val_tar, "--devkit": self.devkit}
        return [str(word) for pair in {**names, "--checksums": self.checksums}.items() for word in pair]

    def write_checksums(self) -> None:
        files = (self.train_tar, self.val_tar, self.devkit)
        sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in files}
        self.checksums.write_text("".join(f"{md5}  {name}\n" for name, md5 in sums.items()))


def fabricate(folder: Path, *, train_per_class: int = 20, val_images: int = 12) -> Miniature:
    """Images of 96 pixels and more, one PNG and one CMYK JPEG among them, and one of 40 pixels."""
    spec = SyntheticSet(classes=3, size=(96, 160))
    mini = Miniature(
        folder,
        folder / "ILSVRC2012_img_train.tar",
        folder / "ILSVRC2012_img_val.tar",
        folder / "ILSVRC2012_devkit_t12.tar.gz",
        folder / "MD5SUMS",
    )
    with tarfile.open(mini.train_tar, "w", format=tarfile.GNU_FORMAT) as archive:
        for label, synset in enumerate(sorted(SYNSETS.values(), reverse=True)):  # unsorted
            names = [f"{synset}_{number}.JPEG" for number in range(train_per_class)]
            odd = [name for name in (PNG, CMYK, SMALL) if name.startswith(synset) and name not in names]
            images = {name: _odd(name, draw(spec, "train", label, n)) for n, name in enumerate(names + odd)}
            _add(archive, f"{synset}.tar", _tar(images))
            mini.images |= {f"train/{synset}/{name}": data for name, data in images.items()}
    ids = [sorted(SYNSETS)[number * 7 % 3] for number in range(val_images)]
    val = {
        f"ILSVRC2012_val_{n + 1:08d}.JPEG": draw(spec, "val", ids[n] % 3, n)
        for n in reversed(range(val_images))
    }
    mini.val_tar.write_bytes(_tar(val))
    mini.images |= {f"val/{SYNSETS[ids[n]]}/{name}": val[name] for n, name in enumerate(sorted(val))}
    write_devkit(mini.devkit, ids)
    mini.write_checksums()
    return mini


def write_devkit(path: Path, ids: list[int], synsets: dict[int, str] = SYNSETS) -> None:
    rows = [(id_, synset, "a fish", "it swims", 0, [], 0, 20) for id_, synset in synsets.items()]
    rows.insert(1, (9, "n00001740", "entity", "a group of classes, no class", 3, [4, 2, 3], 1, 0))
    names = "ILSVRC2012_ID WNID words gloss num_children children wordnet_height num_train_images".split()
    table = np.empty((len(rows), 1), [(name, object) for name in names])
    for row, values in enumerate(rows):
        table[row, 0] = values
    meta = io.BytesIO()
    savemat(meta, {"synsets": table}, do_compression=True)
    root = "ILSVRC2012_devkit_t12"
    with tarfile.open(path, "w:gz") as archive:
        _add(archive, f"{root}/readme.txt", b"The validation ground truth is in data/")
        _add(archive, f"{root}/data/meta.mat", meta.getvalue())
        truth = "".join(f"{id_}\n" for id_ in ids).encode()
        _add(archive, f"{root}/data/ILSVRC2012_validation_ground_truth.txt", truth)


def _odd(name: str, jpeg: bytes) -> bytes:
    if name not in (PNG, CMYK, SMALL):
        return jpeg
    image, out = Image.open(io.BytesIO(jpeg)), io.BytesIO()
    if name == SMALL:
        image.resize((40, 44)).save(out, "JPEG")
    else:
        image.convert("RGB").save(out, "PNG") if name == PNG else image.convert("CMYK").save(out, "JPEG")
    return out.getvalue()


def _tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in files.items():
            _add(archive, name, data)
    return out.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
