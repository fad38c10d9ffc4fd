"""The configuration of a run: resolved once from a recipe and the user's settings, then frozen."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from horovod_owt.compression import check_compression, keeps_errors
from horovod_owt.errors import ConfigError
from horovod_owt.recipe import DEFAULT_RECIPE, load_recipe
from horovod_owt.schedule import IMAGE_SIZES, Table, image_sizes_of, is_table, peak_of, schedule_of
from horovod_owt.text import nearest

UPPER_LIMIT = 1e9  # of keys without their own: more is a typing error, and integers and timers would overflow
CHOICES = {
    "model": ("alexnet-owt", "alexnet-owt-bn"),
    "optimizer": ("sgd", "lars"),
    "precision": ("fp32", "bf16", "fp16", "fp64"),
    "parallel": ("data", "hybrid", "auto"),
    "owt_scheme": ("a", "b"),
    "fc_batch": ("global", "local"),
    "pipeline": ("auto", "dali", "torchvision"),
    "bad_images": ("fail", "skip"),
    "elastic_batch": ("scale", "keep"),
    "tensorboard": ("auto", "always", "never"),
}


@dataclass(frozen=True)
class TrainConfig:
    """The configuration keys of recipes, --set and config.json."""

    model: str = "alexnet-owt"  # alexnet-owt-bn adds batch normalisation after each hidden layer
    classes: int = 0  # outputs; 0: as many as the data set has classes
    image_size: int = 224  # px, side of the square crops, at least 63; [[0, 128], [20, 224]]: see image_sizes
    image_sizes: Table = ()  # table [[EPOCHS_DONE, PX], ...] of training crops; validation has the last size
    crop_scale_min: float = 0.08  # minimum share of an image's area that a training crop covers

    epochs: int = 90  # length of the run, in passes over the training set
    max_steps: int = 0  # stop after this many optimizer updates; 0: no limit
    batch: int = 128  # images per rank in one forward pass (the micro-batch)
    accum_steps: int = 1  # micro-batches per optimizer update (gradient accumulation)

    lr: float = 0.01  # peak learning rate at a global batch of lr_batch images
    optimizer: str = "sgd"  # lars: SGD with a learning rate per layer, from its norms, for large batches
    lars_eta: float = 0.001  # lars: trust coefficient
    lr_batch: int = 256  # images; the peak is lr * global batch / lr_batch (linear scaling)
    momentum: float = 0.9  # of SGD
    weight_decay: float = 1e-4  # of SGD, on all parameters
    clip_norm: float = 0.0  # clip the gradient to this Euclidean norm over the whole model; 0: off
    warmup_epochs: float = 0.0  # linear ramp from 0 to the peak learning rate
    schedule: str | Table = (
        "step:30:0.1"  # after warm-up: constant, cosine, poly:POWER, step:EPOCHS:FACTOR, or a table by epoch
        # of learning rate and weight decay, instead of those keys: [[1, 0.01, 5e-4], [19, 0.005, 5e-4]]
    )
    momentum_reset: bool = False  # set the momentum to 0 at each new row of a schedule table
    ema: float = 0.0  # decay of a moving average of the weights, validated too, such as 0.9999; 0: off
    dropout: float = 0.5  # probability of zeroing an input of a hidden FC layer
    label_smoothing: float = 0.0  # probability mass spread over all classes

    precision: str = "fp32"  # bf16: autocast; fp16: autocast and loss scaling, GPU only; fp64: for tests
    channels_last: bool = True  # memory format of weights and images
    deterministic: bool = False  # only bitwise reproducible kernels; slower on a GPU
    seed: int = 0  # of initial weights, sample order, augmentation and dropout

    parallel: str = "data"  # hybrid: ranks share the FC layers (One Weird Trick); auto: the faster of the two
    fc_group_size: int | str = "node"  # ranks that share the FC layers: a number, all, or node (a host's)
    owt_scheme: str = "a"  # hybrid: a: the group's whole batch passes the FC layers at once; b: rank by rank
    fc_batch: str = "global"  # batch of an FC update; local (scheme b): one rank's images of each group
    sync_bn: bool = False  # batch statistics over all ranks' images instead of each rank's own
    compression: str = "none"  # of gradients: none, fp16, onebit or powersgd:R (see docs/compression.md)
    compression_start: int = 0  # steps with uncompressed gradients, before compression begins

    pipeline: str = "auto"  # auto: DALI where it is installed, else torchvision
    cache: str = "none"  # of images on each host: none, ram (decoded), or an absolute path on a local disk
    cache_side: int = 0  # px, shorter side of cached images; 0: 8/7 of image_size in ram, on disk the files
    decode_threads: int = 0  # per rank; 0: the rank's share of the cores
    bad_images: str = "fail"  # fail: a bad image ends the run; skip: it is reported once and not counted
    log_every: int = 10  # steps between progress lines
    checkpoint_every: int = 0  # steps between checkpoints, besides those at epoch ends; 0: epoch ends only
    keep_checkpoints: int = 3  # newest checkpoints kept on disk, besides the best by validation
    commit_every: int = 10  # elastic: steps between commits; at most so many are repeated after a lost rank
    elastic_batch: str = "scale"  # elastic: the global batch scales with the ranks; keep: it stays constant
    checkpoint_retries: int = 3  # consecutive failed checkpoint writes tolerated before the run ends
    hook: str = ""  # command that rank 0 runs on events, with EVENT RUN appended; no shell
    hook_limit_s: float = 20.0  # seconds after which the hook is killed
    stall_limit_s: float = 600.0  # seconds that a collective waits for a hung rank before the run ends

    tensorboard: str = "auto"  # files for TensorBoard; auto: if its package is installed; always; never
    grad_norm_every: int = 100  # steps between gradient norms in the records; 0: only with clip_norm
    metrics_port: int = 0  # port on rank 0's host that serves metrics to Prometheus; 0: none
    metrics_address: str = "127.0.0.1"  # to serve on: an address or interface of rank 0's host; 0.0.0.0: all
    profile: int = 0  # steps to profile on every rank, after the first five; 0: none
    timeline: bool = False  # write Horovod's timeline of all collectives; takes a core of rank 0's host

    def __post_init__(self) -> None:
        _check(self)

    def rank_batch(self) -> int:
        """Images per rank and step."""
        return self.batch * self.accum_steps

    def global_batch(self, world_size: int) -> int:
        """Images per optimizer update."""
        return self.rank_batch() * world_size

    def cached_side(self) -> int:
        """Shorter side to which cached images are downscaled; 0: files are cached unchanged."""
        if self.cache_side or self.cache != "ram":
            return self.cache_side
        return round(self.largest_image() * 8 / 7)  # 256 px for 224: what validation resizes to

    def largest_image(self) -> int:
        """The largest side of the training crops over the run, in px."""
        return max(self.image_size, *(size for _, size in self.image_sizes), 0)

    def ranks_per_classifier(self) -> int:
        """How many ranks share the FC layers; `parallel` and `fc_group_size` must have been resolved."""
        if self.parallel == "data":
            return 1
        assert self.parallel == "hybrid" and isinstance(self.fc_group_size, int)
        return self.fc_group_size

    def peak_lr(self, world_size: int) -> float:
        """Learning rate after warm-up: linear scaling, Goyal et al. 2017, arXiv:1706.02677, section 2.1."""
        lr = self.lr if isinstance(self.schedule, str) else peak_of(self.schedule)
        return lr * self.global_batch(world_size) / self.lr_batch

    def total_steps(self, num_samples: int, world_size: int, *, step: int = 0, consumed: int = 0) -> int:
        """Optimizer updates of the whole run over `num_samples` training images.

        A resumed run has done `step` of them, with `consumed` samples, perhaps on another number of ranks.
        """
        remaining = max(0, self.epochs * num_samples - consumed)
        steps = step + math.ceil(remaining / self.global_batch(world_size))
        return min(steps, self.max_steps) if self.max_steps else steps

    def to_dict(self) -> dict[str, Any]:
        """As JSON types: tables are lists."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def resolve(recipe: str | None = None, settings: Iterable[str] = ()) -> TrainConfig:
    """A recipe's values, overridden by `key=value` settings in order; raises ConfigError."""
    from_recipe = load_recipe(recipe or DEFAULT_RECIPE).values
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}", wanted="key=value", fix=f"--set {setting}=VALUE")
        overrides[key.strip()] = text.strip()
    _check_table_is_alone(from_recipe, overrides)
    return from_mapping(from_recipe | overrides)


def _check_table_is_alone(from_recipe: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Refuse an explicit learning rate or weight decay that a schedule table would override."""
    values = from_recipe | overrides
    schedule = schedule_of(values.get("schedule", TrainConfig.schedule))
    if isinstance(schedule, str):
        return
    beside = overrides if "schedule" in overrides or "schedule" not in from_recipe else values
    for key in ("lr", "weight_decay")[: len(schedule[0]) - 1]:
        if key in beside:
            raise ConfigError(
                f"{key}={beside[key]} beside a schedule table, which has its own",
                wanted=f"{key} in the table alone",
                fix=f"drop {key}, or --set schedule=constant",
            )


def from_mapping(values: Mapping[str, Any]) -> TrainConfig:
    """A configuration from keys and values; raises ConfigError for an unknown key or invalid value."""
    values = dict(values)
    if is_table(values.get("image_size")):
        values["image_sizes"] = sizes = image_sizes_of(values["image_size"], key="image_size")
        values["image_size"] = sizes[-1][1]
    return TrainConfig(**{key: _typed(key, value) for key, value in values.items()})


def _typed(key: str, value: Any) -> Any:
    """`value` as the field's type. --set gives strings, and so does YAML for numbers like 1e-4."""
    if key not in FIELDS:
        near = nearest(key, FIELDS)
        fix = f"use {near}" if near else f"known keys: {', '.join(FIELDS)}"
        raise ConfigError(f"unknown key {key!r}", wanted="a config key", fix=fix)
    if key == "schedule":
        return schedule_of(value)
    if key == "image_sizes":
        return image_sizes_of(value, key=key)
    kind = FIELDS[key].type  # a string, because of the __future__ import
    try:
        if kind == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if kind == "int":
            return int(str(value))  # from text, so that neither 1.5 nor True is accepted
        if kind == "float":
            if isinstance(value, bool) or not math.isfinite(float(value)):
                raise ValueError
            return float(value)
        if kind == "int | str" and str(value).isdecimal():
            return int(value)
    except (KeyError, TypeError, ValueError, OverflowError):
        names = {"bool": "true or false", "float": "a number"}
        wanted = names.get(kind, "a whole number")
        fix = f"{key}={FIELDS[key].default}"
        raise ConfigError(f"{key}={_short(value)}", wanted=wanted, fix=fix) from None
    return str(value)


def _check(cfg: TrainConfig) -> None:
    for key, allowed in CHOICES.items():
        value = getattr(cfg, key)
        if value not in allowed:
            fix = f"{key}={nearest(value, allowed) or allowed[0]}"
            raise ConfigError(f"{key}={value}", wanted=" or ".join(allowed), fix=fix)
    check_compression(cfg.compression)
    schedule_of(cfg.schedule)  # raises ConfigError
    if cfg.momentum_reset and isinstance(cfg.schedule, str):
        raise ConfigError(
            f"momentum_reset=true with schedule={cfg.schedule}",
            wanted="a table, whose rows say when",
            fix="--set momentum_reset=false",
        )
    _check_hook(cfg.hook)
    if cfg.image_sizes and cfg.image_sizes[-1][1] != cfg.image_size:
        raise ConfigError(
            f"image_size={cfg.image_size}, but image_sizes ends with {cfg.image_sizes[-1][1]}",
            wanted="the same",
            fix="the table in image_size alone",
        )
    _check_conflicts(cfg)
    positive = (
        "batch",
        "accum_steps",
        "epochs",
        "lr_batch",
        "keep_checkpoints",
        "log_every",
        "commit_every",
        "stall_limit_s",
        "hook_limit_s",
    )
    limits: dict[str, tuple[float, float]] = {
        **{key: (1, UPPER_LIMIT) for key in positive},
        **{key: (0, UPPER_LIMIT) for key in ("classes", "max_steps", "lr", "weight_decay", "warmup_epochs")},
        **{key: (0, UPPER_LIMIT) for key in ("checkpoint_every", "checkpoint_retries", "compression_start")},
        "clip_norm": (0, math.inf),
        "decode_threads": (0, 1024),
        "cache_side": (0, 10_000),
        "metrics_port": (0, 65535),
        "grad_norm_every": (0, UPPER_LIMIT),
        "profile": (0, 1000),
        "image_size": IMAGE_SIZES,
        "crop_scale_min": (0.01, 1),
        "momentum": (0, 0.9999),
        "lars_eta": (1e-6, 1),
        "dropout": (0, 0.9999),
        "ema": (0, 0.999999),
        "label_smoothing": (0, 0.9999),
        "seed": (0, 2**63 - 1),
    }
    for key, (low, high) in limits.items():
        value = getattr(cfg, key)
        if not low <= value <= high:
            wanted = f"at least {low:g}" if value < low else f"between {low:g} and {high:g}"
            fix = f"--set {key}={FIELDS[key].default}"
            raise ConfigError(f"{key}={value}", wanted=wanted, fix=fix)


def _check_hook(command: str) -> None:
    """Check that the command can be split into words; `train.hooks` looks for the program on rank 0."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(
            f"hook={_short(command)}: {error}", wanted="words as in a shell", fix="--set hook=PROGRAM"
        ) from None
    if command and not words:
        raise ConfigError(f"hook={_short(command)}", wanted="a command", fix="--set hook= for none")


def _check_conflicts(cfg: TrainConfig) -> None:
    """Reject settings that are incompatible."""
    size = cfg.fc_group_size
    if size not in ("node", "all") and not (isinstance(size, int) and size > 0):
        raise ConfigError(
            f"fc_group_size={size}",
            wanted="node, all or a number of ranks",
            fix="fc_group_size=node",
        )
    local, lars, fp16 = cfg.fc_batch == "local", cfg.optimizer == "lars", cfg.precision == "fp16"
    approximate = keeps_errors(cfg.compression)
    cached, largest = cfg.cache != "none", cfg.largest_image()
    conflicts = (  # whether there is one, what was seen, what is wanted, how to get it
        (
            local and cfg.owt_scheme != "b",
            "fc_batch=local with owt_scheme=a, where the FC layers process all images at once",
            "owt_scheme=b, where ranks take turns",
            "--set owt_scheme=b",
        ),
        (
            local and cfg.parallel != "hybrid",
            f"fc_batch=local with parallel={cfg.parallel}",
            "parallel=hybrid",
            "--parallel hybrid",
        ),
        (
            local and cfg.clip_norm,
            "clip_norm with fc_batch=local, whose FC layers are updated before the norm is known",
            "fc_batch=global",
            "--set fc_batch=global",
        ),
        (
            local and lars,
            "optimizer=lars with fc_batch=local, whose FC layers are updated in turns",
            "fc_batch=global",
            "--set fc_batch=global",
        ),
        (
            lars and fp16,
            "optimizer=lars with precision=fp16, whose gradients are scaled",
            "fp32 or bf16",
            "--set precision=bf16",
        ),
        (
            cfg.sync_bn and cfg.owt_scheme == "b" and cfg.parallel != "data",
            "sync_bn=true with owt_scheme=b, where no FC layer gets the whole batch",
            "owt_scheme=a",
            "--set owt_scheme=a",
        ),
        (
            fp16 and cfg.parallel == "hybrid",
            "precision=fp16 with parallel=hybrid, whose ranks would skip different steps",
            "fp32 or bf16",
            "--set precision=bf16, or --parallel data",
        ),
        (
            approximate and cfg.parallel == "hybrid",
            f"compression={cfg.compression} with parallel=hybrid, whose FC layers are split",
            "parallel=data",
            "--parallel data, or --set compression=fp16",
        ),
        (
            cfg.cache not in ("none", "ram") and not cfg.cache.startswith("/"),
            f"cache={cfg.cache}",
            "none, ram or an absolute path",
            "--set cache=ram, or a folder on a disk of each host",
        ),
        (
            cfg.cache_side and not cached,
            f"cache_side={cfg.cache_side} without a cache",
            "both",
            "--set cache=ram, or cache=/PATH",
        ),
        (
            0 < cfg.cache_side < largest,
            f"cache_side={cfg.cache_side} with crops of {largest} px",
            f"at least {largest}",
            f"--set cache_side={round(largest * 8 / 7)}",
        ),
        (
            approximate and fp16,
            f"compression={cfg.compression} with precision=fp16, whose gradients are scaled",
            "fp32 or bf16",
            "--set precision=bf16",
        ),
    )
    for there, saw, wanted, fix in conflicts:
        if there:
            raise ConfigError(saw, wanted=wanted, fix=fix)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_batch_norm(cfg: TrainConfig, world_size: int) -> None:
    """Refuse batch normalisation over a single image; `fc_group_size` must have been resolved."""
    if cfg.model != "alexnet-owt-bn" or cfg.batch > 1:
        return
    together = cfg.fc_group_size if cfg.parallel == "hybrid" and cfg.owt_scheme == "a" else 1
    if (world_size if cfg.sync_bn else together) < 2:
        raise ConfigError(
            f"model=alexnet-owt-bn normalises over a batch of {cfg.batch} image",
            wanted="at least 2 images",
            fix="--set batch=2, or sync_bn=true on several ranks",
        )
