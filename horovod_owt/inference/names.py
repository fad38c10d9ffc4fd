"""Names of classes, from a file of synsets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from horovod_owt.errors import ConfigError
from horovod_owt.files import read_user_text

SYNSET = re.compile(r"(n\d{8})\s+(\S.*)")
WANTED = "lines `n01440764 tench, Tinca tinca`, or a name in the line of each label"


def class_words(path: Path, classes: Sequence[str]) -> list[str]:
    """The words for each class, from a file of synsets, or of names in the order of labels.

    `classes` are the names of the class folders, or numbers if these are unknown; labels are then assumed to
    follow the sorted synsets. A class missing in the file has no words. Raises ConfigError.
    """
    lines = [line.strip() for line in read_user_text(path, wanted=WANTED).splitlines() if line.strip()]
    synsets = dict(found.groups() for found in map(SYNSET.fullmatch, lines) if found)
    known = [synsets.get(name, "") for name in classes]
    if any(known):
        return known
    if synsets and not all(name.isdecimal() for name in classes):
        saw = f"{path} has none of the classes: {classes[0]} and others"
        raise ConfigError(saw, wanted="the synsets that the model was trained on")
    if len(lines) != len(classes):
        saw = f"{path} has {len(lines)} names, the model {len(classes)} classes"
        raise ConfigError(saw, wanted=WANTED)
    return [synsets[synset] for synset in sorted(synsets)] if len(synsets) == len(lines) else lines
