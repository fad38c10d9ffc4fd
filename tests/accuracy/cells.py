"""What is trained: ways to train, data sets, seeds."""

from collections.abc import Iterator
from dataclasses import dataclass, field

SEEDS = (0, 1, 2)
GLOBAL_BATCH = 32
COMMON = {
    "model": "alexnet-owt-bn",
    "image_size": 64,
    "crop_scale_min": 0.5,
    "lr": 0.02,
    "lr_batch": GLOBAL_BATCH,
    "weight_decay": 5e-4,
    "warmup_epochs": 0.5,
    "schedule": "cosine",
    "pipeline": "torchvision",
    "decode_threads": 1,
    "checkpoint_every": 0,
    "keep_checkpoints": 1,
    "tensorboard": "never",
    "log_every": 1000,
}
DATA = {"digits": 4, "synthetic": 4, "synthetic-hard": 8}  # epochs
START = 50  # steps, a little more than the first epoch, for ways that compress later


@dataclass(frozen=True)
class Way:
    """A way to train: the plain torch loop, or our settings on so many ranks."""

    name: str
    ranks: int
    settings: dict[str, object] = field(default_factory=dict)
    plain: bool = False


LARS = {"optimizer": "lars", "lr": 4.0, "lars_eta": 0.001}
HYBRID = {"parallel": "hybrid", "fc_group_size": "all"}
WAYS = {
    way.name: way
    for way in (
        Way("plain torch loop", 1, plain=True),
        Way("data, 1 rank", 1),
        Way("data, 1 rank, LARS", 1, LARS),
        Way("data, 2 ranks", 2),
        Way("hybrid a, 2 ranks", 2, HYBRID),
        Way("hybrid b, 2 ranks", 2, {**HYBRID, "owt_scheme": "b"}),
        Way("hybrid b, FC batch local, 2 ranks", 2, {**HYBRID, "owt_scheme": "b", "fc_batch": "local"}),
        Way("compression=fp16, 2 ranks", 2, {"compression": "fp16"}),
        Way("compression=onebit, 2 ranks", 2, {"compression": "onebit"}),
        Way("compression=powersgd:4, 2 ranks", 2, {"compression": "powersgd:4"}),
        Way("compression=onebit, later, 2 ranks", 2, {"compression": "onebit", "compression_start": START}),
        Way(
            "compression=powersgd:4, later, 2 ranks",
            2,
            {"compression": "powersgd:4", "compression_start": START},
        ),
        Way("data, 2 ranks, LARS", 2, LARS),
        Way("hybrid a, 2 ranks, LARS", 2, {**HYBRID, **LARS}),
        Way("data, 1 rank, bf16", 1, {"precision": "bf16"}),
        Way("data, 2 ranks, bf16", 2, {"precision": "bf16"}),
        Way("hybrid a, 2 ranks, bf16", 2, {**HYBRID, "precision": "bf16"}),
    )
}
# The net without batch normalisation stays at log(classes) for its first steps. Its curves are compared
# without dropout.
PLATEAU = {
    "model": "alexnet-owt",
    "dropout": 0,
    "epochs": 8,
    "lr": 0.03,
    "warmup_epochs": 0,
    "schedule": "constant",
}


@dataclass(frozen=True)
class Cell:
    """One run."""

    way: str
    data: str
    seed: int
    plateau: bool = False

    @property
    def name(self) -> str:
        """Of its files."""
        words = f"{self.data} {self.way} {'plateau ' * self.plateau}{self.seed}"
        return "-".join(words.replace(",", "").replace("=", "-").replace(":", "").split())

    @property
    def ranks(self) -> int:
        return WAYS[self.way].ranks

    def settings(self) -> dict[str, object]:
        own = {"batch": GLOBAL_BATCH // self.ranks, "seed": self.seed, "epochs": DATA[self.data]}
        return {**COMMON, **own, **WAYS[self.way].settings, **(PLATEAU if self.plateau else {})}


def cells() -> Iterator[Cell]:
    """All of them, a data set after another, and of each a seed after another; bf16 last.

    On a CPU without its instructions bf16 takes five times as long.
    """
    for way in ("plain torch loop", "data, 1 rank", "data, 2 ranks"):
        yield Cell(way, "digits", 0, plateau=True)
    for slow in (False, True):
        for data in DATA:
            for seed in SEEDS:
                for name, way in WAYS.items():
                    if ("precision" in way.settings) == slow:
                        yield Cell(name, data, seed)
