"""Remarks on files that decode but are not what their name suggests."""

from __future__ import annotations

from pathlib import PurePath

from horovod_owt.data.header import Header

KINDS = {".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG"}
CMYK = 4  # components

# All in the training set. Source: tensorflow/models, build_imagenet_data.py.
ILSVRC2012_PNG = {"n02105855_2933"}
ILSVRC2012_CMYK = {
    "n01739381_1309", "n02077923_14822", "n02447366_23489", "n02492035_15739", "n02747177_10752",
    "n03018349_4028", "n03062245_4620", "n03347037_9675", "n03467068_12171", "n03529860_11437",
    "n03544143_17228", "n03633091_5218", "n03710637_5125", "n03961711_5286", "n04033995_2932",
    "n04258138_17003", "n04264628_27969", "n04336792_7448", "n04371774_5854", "n04596742_4225",
    "n07583066_647", "n13037406_4650",
}  # fmt: skip


def remark(path: str, header: Header) -> str:
    """What is unusual about an image that decodes; empty if nothing is."""
    name = PurePath(path)
    if header.kind != KINDS.get(name.suffix.lower(), header.kind):
        known = header.kind == "PNG" and name.stem in ILSVRC2012_PNG
        return f"{header.kind} named {name.suffix}" + _known(known)
    if header.kind == "JPEG" and header.components == CMYK:
        return "CMYK JPEG" + _known(name.stem in ILSVRC2012_CMYK)
    return ""


def _known(known: bool) -> str:
    return ", known in ILSVRC2012" if known else ""
