"""Findings of the checks, and helpers to make them from the ranks' answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    ok: bool
    saw: str
    wanted: str = ""
    fix: str = ""
    hosts: tuple[str, ...] = ()  # the affected ones; empty if none, or all

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """One rank's answer to a probe of all ranks."""

    rank: int
    host: str
    value: Any


def hosts_of(answers: Iterable[Answer]) -> tuple[str, ...]:
    """Each host once, in rank order."""
    return tuple(dict.fromkeys(answer.host for answer in answers))


def who(answers: Iterable[Answer]) -> str:
    """Hosts and ranks as `n1 (ranks 0-3), n2 (rank 4)`; at most the first four hosts."""
    ranks: dict[str, list[int]] = {}
    for answer in answers:
        ranks.setdefault(answer.host, []).append(answer.rank)
    words = [f"{host} (rank{'s'[: len(numbers) > 1]} {spans(numbers)})" for host, numbers in ranks.items()]
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more hosts" if words[4:] else "")


def spans(numbers: Iterable[int]) -> str:
    """Numbers as `0-3, 7`."""
    found = []
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        first, *_, last = [number for _, number in run] * 2
        found.append(f"{first}-{last}" if last > first else str(first))
    return ", ".join(found)


def grouped(answers: Iterable[Answer], key: Callable[[Any], T]) -> dict[T, list[Answer]]:
    """The answers grouped by `key` of their values, in order of appearance."""
    groups: dict[T, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(key(answer.value), []).append(answer)
    return groups


def differing(groups: dict[T, list[Answer]]) -> tuple[str, tuple[str, ...]]:
    """A description of the groups, and the hosts that are not in the largest."""
    most = max(groups.values(), key=len)
    others = [answer for having in groups.values() if having is not most for answer in having]
    return "; ".join(f"{value} on {who(having)}" for value, having in groups.items()), hosts_of(others)


def agreement(check: str, answers: Sequence[Answer], *, fix: str) -> list[Finding]:
    """All ranks have the same values: one bad finding for each name whose value differs.

    Each answer's value is a dict of name -> text; a missing name counts as `none`. A finding's hosts are
    those without the value that most ranks have.
    """
    names = dict.fromkeys(name for answer in answers for name in answer.value)
    findings, same = [], []
    for name in names:
        groups = grouped(answers, lambda value, name=name: str(value.get(name, "none")))
        saw, hosts = differing(groups)
        if len(groups) == 1:
            same.append(f"{name} {next(iter(groups))}")
        else:
            findings.append(Finding(f"{check}: {name}", False, saw, "the same on every rank", fix, hosts))
    if same:
        findings.insert(0, Finding(check, True, ", ".join(same)))
    return findings


def at_least(
    check: str,
    answers: Sequence[Answer],
    least: float,
    *,
    unit: str,
    wanted: str,
    fix: str,
    scale: float = 1.0,
) -> Finding:
    """Each answer's value is at least `least`; the report divides values by `scale`."""
    low = [answer for answer in answers if answer.value < least]
    shown = [answer.value / scale for answer in low or answers]
    least_shown, max_shown = (f"{v:.3g}" if v < 1000 else f"{v:.0f}" for v in (min(shown), max(shown)))
    span = least_shown + (f" to {max_shown}" if max_shown != least_shown else "")
    saw = f"{span} {unit}" + (f" on {who(low)}" if low else "")
    return Finding(check, not low, saw, wanted, fix if low else "", hosts_of(low))


def or_inf(free_bytes: int | None) -> float:
    """Free bytes, infinite if the file system does not report them, so that no check fails."""
    return float("inf") if free_bytes is None else free_bytes
