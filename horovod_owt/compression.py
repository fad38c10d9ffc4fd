"""The values of `compression`, and the sizes of compressed gradients."""

from __future__ import annotations

from horovod_owt.errors import ConfigError

POWERSGD = "powersgd:"
WANTED = "none, fp16, onebit or powersgd:R"
MAX_RANK = 4096  # units of a hidden layer: no matrix of the classifier has a higher rank


def powersgd_rank(compression: str) -> int:
    """R of powersgd:R; 0 for other values."""
    return int(compression.removeprefix(POWERSGD)) if compression.startswith(POWERSGD) else 0


def keeps_errors(compression: str) -> bool:
    """Whether the compression is lossy, with error feedback: errors are added to later gradients."""
    return compression == "onebit" or compression.startswith(POWERSGD)


def check_compression(compression: str) -> None:
    """Raise ConfigError for an invalid value of `compression`."""
    if compression in ("none", "fp16", "onebit"):
        return
    saw, rank = f"compression={compression}", compression.removeprefix(POWERSGD)
    if not compression.startswith(POWERSGD):
        raise ConfigError(saw, wanted=WANTED, fix="compression=none")
    if not (rank.isdecimal() and rank.isascii()) or not 1 <= int(rank) <= MAX_RANK:
        raise ConfigError(saw, wanted=f"a rank from 1 to {MAX_RANK}", fix="compression=powersgd:4")


def one_bit_row_bytes(columns: int, number_bytes: int = 4) -> int:
    """Bytes of a matrix row under onebit: its signs, and the means of positive and negative numbers."""
    return -(-columns // 8) + 2 * number_bytes


def low_rank_pays(rows: int, columns: int, rank: int) -> bool:
    """Whether PowerSGD's factors of a matrix are smaller than the matrix; if not, it is sent uncompressed."""
    return (rows + columns) * rank < rows * columns
