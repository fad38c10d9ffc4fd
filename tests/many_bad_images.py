"""Rate and memory of the input pipeline with many bad images, against the same without any.

    python tests/many_bad_images.py --images 50000 --bad 10000 --kind mixed --pipeline dali

Small JPEGs from memory, so that decoding and recovering are all that takes time. One process per figure,
each a line of JSON with images per second and the growth of the peak RSS after the first 50 batches.
"""

import argparse
import json
import logging
import resource
import subprocess
import sys
import time

import numpy as np
from bad_files import BAD, encoded, undecodable

from horovod_owt.data.faults import BadImages
from horovod_owt.data.feed import TrainFeed
from horovod_owt.data.pipeline import make_pipeline

KINDS = {
    "mixed": [data for data, _ in BAD.values()],  # one of each
    "no tables": [BAD["no tables"][0]],  # a JPEG whose header shows it
    "junk": [undecodable()],  # a PNG that only decoding shows
}


class MemoryStore:
    """`images` small JPEGs, `bad` of them bad, spread evenly."""

    def __init__(self, images: int, bad: int, kind: str) -> None:
        draw = np.random.default_rng(0)
        sizes = draw.integers(80, 160, (200, 2)).tolist()
        self._good = [encoded(size=tuple(size), quality=90) for size in sizes]
        self._bad = KINDS[kind]
        self.bad = set(range(0, images, images // bad)) if bad else set()
        self.labels, self.classes = np.zeros(images, np.int64), ("class",)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> bytes:
        return self._bad[index % len(self._bad)] if index in self.bad else self._good[index % 200]


def measure(images: int, bad: int, kind: str, pipeline: str, batch: int) -> dict:
    """One epoch."""
    logging.disable()
    store, known = MemoryStore(images, bad, kind), BadImages()
    feed = TrainFeed(store, seed=0, batch=batch, bad_images=known)
    met, peak = 0, 0
    with make_pipeline(pipeline, feed, image_size=64, device_id=None, num_threads=2) as pipe:
        next(pipe)
        start, start_cpu = time.perf_counter(), time.process_time()
        for number in range(1, images // batch):
            met += len(next(pipe).faults)
            if number == 50:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    count = (images // batch - 1) * batch
    rates = {"images_per_s": round(count / seconds), "images_per_cpu_s": round(count / cpu_s)}
    return {"images": images, "bad": met, **rates, "rss_growth_mb": round(grown)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--bad", type=int, default=10_000)
    parser.add_argument("--kind", choices=KINDS, default="mixed")
    parser.add_argument("--pipeline", choices=["dali", "torchvision"], default="dali")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--alone", action="store_true", help="only this measurement, without the clean one")
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args.images, args.bad, args.kind, args.pipeline, args.batch)))
        sys.exit()
    found = []
    for bad in (0, args.bad):
        same = [
            "--images",
            args.images,
            "--kind",
            args.kind,
            "--pipeline",
            args.pipeline,
            "--batch",
            args.batch,
        ]
        command = [sys.executable, __file__, "--alone", "--bad", bad, *same]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True)
        print(done.stdout.decode(), end="", flush=True)
        found.append(json.loads(done.stdout))
    for rate in ("images_per_s", "images_per_cpu_s"):  # the second says more on a busy machine
        print(f"{found[1][rate] / found[0][rate]:.0%} of the clean {rate}")
