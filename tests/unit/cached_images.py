"""A small data set for tests of caches, and what a cache's place holds."""

from horovod_owt.data.synthetic import write_synthetic

ENOUGH = 73  # shorter side of what validation at 64 px sees


def write_images(root):
    write_synthetic(root, classes=3, train_per_class=12, val_per_class=4, size=(80, 160), workers=1)
    return root


def folders(base):
    return sorted(path.name for path in base.glob("horovod_owt-*/*"))
