"""Draw docs/memory.svg: memory of a process that reads a data set epoch after epoch, with both pipelines.

    python docs/measure_memory.py [DATA] [EPOCHS]

Each pipeline runs in a process of its own; its resident memory is read at the end of each epoch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

KINDS = {"dali": "#2a6f97", "torchvision": "#c8553d"}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 260, 60, 20, 110, 40
BATCH, IMAGE_SIZE, THREADS = 64, 224, 2
SVG = Path(__file__).with_name("memory.svg")


def measure(kind: str, data: Path, epochs: int) -> list[float]:
    """MB at the end of each epoch."""
    import psutil

    from horovod_owt.data.feed import TrainFeed
    from horovod_owt.data.pipeline import make_pipeline
    from horovod_owt.data.store import open_data_set

    store = open_data_set(data).train
    feed = TrainFeed(store, seed=0, batch=BATCH)
    pipeline = make_pipeline(kind, feed, image_size=IMAGE_SIZE, device_id=None, num_threads=THREADS)
    used = []
    with pipeline:
        for number, _ in enumerate(pipeline, 1):
            if number * BATCH // len(store) > len(used):
                used.append(psutil.Process().memory_info().rss / 1e6)
                if len(used) == epochs:
                    return used
    raise AssertionError("the stream of samples has an end")


def draw(used_mb: dict[str, list[float]]) -> str:
    """The curves as SVG."""
    epochs = len(next(iter(used_mb.values())))
    top_mb = 500 * (1 + int(max(map(max, used_mb.values()))) // 500)

    def place(epoch: float, mb: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (epoch - 1) / max(1, epochs - 1)
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * mb / top_mb
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
    ]
    parts[0] += ' font-size="12"><rect width="100%" height="100%" fill="white"/>'
    for mb in range(0, top_mb + 1, top_mb // 5):
        x, y = place(1, mb).split(",")
        parts.append(f'<line x1="{x}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{mb}</text>')
    for epoch in range(1, epochs + 1):
        x = place(epoch, 0).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{epoch}</text>')
    for kind, values in used_mb.items():
        points = " ".join(place(epoch, mb) for epoch, mb in enumerate(values, 1))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{KINDS[kind]}" stroke-width="2"/>')
        y = place(epochs, values[-1]).split(",")[1]
        parts.append(
            f'<text x="{WIDTH - RIGHT + 8}" y="{float(y) + 4:.1f}" fill="{KINDS[kind]}">{kind}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">epoch; resident memory in MB</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))))
        return
    from horovod_owt.data.synthetic import write_synthetic

    with tempfile.TemporaryDirectory() as scratch:
        data = Path(sys.argv[1]) if sys.argv[1:] else Path(scratch) / "images"
        if not sys.argv[1:]:
            write_synthetic(data, train_per_class=64, val_per_class=1, size=(300, 400))
        used_mb = {}
        for kind in KINDS:
            words = [sys.executable, __file__, "--one", kind, str(data), (sys.argv[2:] or ["20"])[0]]
            used_mb[kind] = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
            print(kind, [round(mb) for mb in used_mb[kind]], flush=True)
    SVG.write_text(draw(used_mb))


if __name__ == "__main__":
    main()
