"""Render summaries of runs as an HTML page. Whatever comes from a run folder is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from horovod_owt import __version__
from horovod_owt.report import formats
from horovod_owt.runs.records import utc

PAGE = "horovod_owt.report.page"
MAX_ROWS = 200  # of a table
MAX_RANKS = 32  # with a bar
MAX_LINKS = 24
MAX_SETTING = 60  # characters
STATES = {
    "done": "Done",
    "running": "Running",
    "stopped": "Stopped",
    "failed": "Failed",
    "ended": "Ended without recording an outcome",
}
PARTS = (("compute_ms", "compute"), ("data_wait_ms", "wait"), ("exposed_comm_ms", "comm"))
GOODPUT = {  # parts of the wall time: their names here, and their colours' classes
    "compute": ("steps that count: compute", "compute"),
    "data": ("steps that count: images", "wait"),
    "communication": ("steps that count: communication", "comm"),
    "start-up": ("start-up", "startup"),
    "validation": ("validation", "checking"),
    "checkpoint": ("checkpoints", "saving"),
    "lost work": ("lost work", "lossy"),
    "queue": ("between attempts", "queue"),
    "other": ("other", "rest"),
}
GLYPHS = {  # of events: an outline in a square of 12, and a name
    "start": ("M-4,-4.5L5,0L-4,4.5Z", "start"),
    "regroup": ("M0,-5L5,0L0,5L-5,0Z", "ranks regroup"),
    "fault": (
        "M-4.5,-2.5L-2.5,-4.5L0,-2L2.5,-4.5L4.5,-2.5L2,0L4.5,2.5L2.5,4.5L0,2L-2.5,4.5L-4.5,2.5L-2,0Z",
        "fault",
    ),
    "straggler": ("M-4.5,4L0,-4.5L4.5,4Z", "slow rank"),
    "stop": ("M-4,-4H4V4H-4Z", "stop"),
    "done": ("M-4.5,0A4.5,4.5 0 1 1 4.5,0A4.5,4.5 0 1 1 -4.5,0Z", "done"),
}


def page(runs: Sequence[dict[str, Any]], *, max_points: int, folder: Path) -> str:
    """The whole HTML document, to be written to `folder`: links to traces are relative to it."""
    per_point = max(run["curves"]["steps_per_point"] for run in runs)
    happened = {event["what"] for run in runs for event in run["events"]}
    glyphs = {name: path for name, (path, _) in GLYPHS.items()} | {"failure": GLYPHS["fault"][0]}
    script = _file("page.js")
    return _template().render(
        runs=runs,
        several=len(runs) > 1,
        title=runs[0]["name"]
        if len(runs) == 1
        else f"{len(runs)} runs: {', '.join(r['name'] for r in runs)}",
        version=__version__,
        generated=utc(),
        css=Markup(_file("page.css")),
        script=Markup(script),
        policy=_policy(script),
        curves=Markup(_script_json({"runs": [_drawn(run) for run in runs], "glyphs": glyphs})),
        rows=list(zip(*map(tiles, runs), strict=True)),
        differing=_differing(runs),
        sections=_sections(runs),
        state_names=STATES,
        glyphs=glyphs,
        shown_glyphs=[
            (name, text)
            for name, (_, text) in GLYPHS.items()
            if name in happened or (name == "fault" and "failure" in happened)
        ],
        parts=PARTS,
        bars=[_bars(run["step_shares"]) for run in runs],
        links=[_links(run["traces"], folder) for run in runs],
        bucketed=f"{per_point:,} steps" if per_point > 1 else "",
        max_points=max_points,
        max_rows=MAX_ROWS,
        max_ranks=MAX_RANKS,
        all_times=all(run["has_times"] for run in runs),
        has_gradient=any("grad_norm" in segment for run in runs for segment in run["curves"]["segments"]),
        any_checkpoints=any(run["checkpoints"] for run in runs),
        any_lost=any(run["figures"]["lost_steps"] for run in runs),
        goodput_parts=GOODPUT,
        any_goodput=any(run.get("goodput") for run in runs),
        any_bad_images=any(run["bad_images"]["count"] for run in runs),
        any_evaluation=any(run.get("evaluation") for run in runs),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.ChainableUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": formats.number,
        "plain": formats.plain,
        "percent": formats.percent,
        "duration": formats.duration,
        "size": formats.size,
        "moment": formats.moment,
        "count": formats.count,
        "places": formats.places,
        "setting": _setting,
        "hosts": _hosts,
        "difference": _difference,
    }
    return environment.from_string(_file("page.html.j2"))


def _file(name: str) -> str:
    return resources.files(PAGE).joinpath(name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """A Content-Security-Policy without network or foreign scripts, should the escaping have a hole."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _script_json(value: Any) -> str:
    """JSON that neither ends its script element nor opens a comment."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _drawn(run: Mapping[str, Any]) -> dict[str, Any]:
    """What the script draws."""
    return {
        "name": run["name"],
        "curves": run["curves"],
        "validations": [
            {key: row[key] for key in ("step", "epoch", "time", "top1", "top5")} for row in run["validations"]
        ],
        "starts": [{key: row[key] for key in ("start", "time", "end_time")} for row in run["starts"]],
        "events": [{key: row[key] for key in ("what", "text", "time")} for row in run["events"]],
        "checkpoints": [{"time": row["time"]} for row in run["checkpoints"]],
    }


def tiles(run: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures at the top of the page: name, value, unit and a remark (`more`)."""
    figures, number = run["figures"], formats.number
    rate, step_ms, best = figures["images_per_s"] or {}, figures["step_ms"] or {}, figures["best"] or {}
    lost = figures["lost_steps"]
    bad = run["bad_images"]["count"]
    regroupings = sum(start["how"] == "regroup" for start in run["starts"])
    waits = (("images", "data_wait_share"), ("communication", "exposed_comm_share"))
    shares = ", ".join(f"{formats.percent(figures[key], 0)} {name}" for name, key in waits)
    rows = [
        ("Top-1", formats.places(figures["top1"], 2), "%", _best_of(best, figures["top1"])),
        ("Top-5", formats.places(figures["top5"], 2), "%", ""),
        ("Training loss", formats.number(figures["loss"]), "", "last step"),
        ("Images per second", number(rate.get("median")), "", _middle(rate)),
        ("Step", number(step_ms.get("median")), "ms", shares if step_ms else ""),
        ("Steps", number(figures["steps"]), "", f"{number(lost)} repeated" if lost else ""),
        ("Wall time", formats.duration(run["wall_s"]), "", "" if run["has_times"] else "of the steps only"),
        (
            "Starts",
            number(len(run["starts"])),
            "",
            f"{regroupings} of them regroupings" if regroupings else "",
        ),
        ("Bad images", number(bad), "", ""),
    ]
    if goodput := run.get("goodput"):
        rows.insert(6, ("Goodput", formats.percent(goodput["goodput"]), "", "of wall time"))
    return [dict(zip(("name", "value", "unit", "more"), row, strict=True)) for row in rows]


def _best_of(best: Mapping[str, Any], newest: Any) -> str:
    if not best or best["top1"] == newest:
        return "last validation, the best" if best else "no validation yet"
    return f"best {formats.places(best['top1'], 2)} at epoch {formats.plain(best['epoch'])}"


def _middle(spread: Mapping[str, Any]) -> str:
    """The range of the middle half."""
    if not spread:
        return ""
    return f"median; half within {formats.number(spread['p25'], 3)} to {formats.number(spread['p75'], 3)}"


def _sections(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Anchors and names of the sections that the page has."""
    there = {
        "figures": ("Side by side", len(runs) > 1),
        "training": ("Training", True),
        "throughput": ("Throughput", True),
        "step": ("A step", True),
        "goodput": ("Goodput", any(run.get("goodput") for run in runs)),
        "images": ("Bad images", any(run["bad_images"]["count"] for run in runs)),
        "classes": ("Classes", any(run.get("evaluation") for run in runs)),
        "setup": ("What ran where", True),
    }
    return [(anchor, name) for anchor, (name, is_there) in there.items() if is_there]


def _differing(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Settings, number of ranks and data set that differ between the runs, with each run's value."""
    settings = [{"ranks": run["world_size"], "data": run["data"], **run["config"]} for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each)
    rows = [(key, [_setting(each.get(key)) for each in settings]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _bars(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their sum, and the width of each part in percent; of many ranks the MAX_RANKS slowest."""
    if len(rows) > MAX_RANKS:
        own_ms = {row["rank"]: row["compute_ms"] + row["data_wait_ms"] for row in rows}
        rows = sorted(rows, key=lambda row: -own_ms[row["rank"]])[:MAX_RANKS]
    sums = [sum(row[name] for name, _ in PARTS) for row in rows]
    longest = max(sums, default=0) or 1
    return [
        {**row, "sum_ms": sum_ms, "widths": [(kind, 100 * row[name] / longest) for name, kind in PARTS]}
        for row, sum_ms in zip(rows, sums, strict=True)
    ]


def _links(files: Sequence[str], folder: Path) -> list[tuple[str, str]]:
    """Address and name of the first MAX_LINKS files."""
    found = []
    for file in files[:MAX_LINKS]:
        address = quote(os.path.relpath(file, folder), errors="surrogateescape")
        found.append((f"./{address}", "/".join(Path(file).parts[-2:])))  # ./: a colon is no scheme
    return found


def _setting(value: Any) -> str:
    if value is None:
        return formats.UNKNOWN
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
    return text if len(text) <= MAX_SETTING else f"{text[:MAX_SETTING]}…"


def _hosts(ranks: Mapping[str, int], limit: int = 4) -> str:
    """`node1 × 4, node2 × 4`."""
    shown = [f"{host} × {count}" for host, count in list(ranks.items())[:limit]]
    return ", ".join(shown) + (f" and {len(ranks) - limit} more hosts" if len(ranks) > limit else "")


def _difference(sent_and_expected: tuple[float | None, float | None]) -> Markup | str:
    """Sent minus expected bytes. Up to 8 bytes are rounding of the ring's chunks."""
    sent, expected = sent_and_expected
    if sent is None or expected is None:
        return formats.UNKNOWN
    off = round(sent) - expected
    text = "0" if not off else f"{off:+,}".replace("-", "−")
    return Markup('<span class="{}">{}</span>').format("same" if abs(off) <= 8 else "other", text)
