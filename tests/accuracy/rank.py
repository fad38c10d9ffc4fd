"""One rank that trains some cells, one after another: starting ranks takes longer than a cell.

usage: rank.py FOLDER UNTIL CELLS     CELLS is a JSON list of [way, data, seed, plateau], of one number of
                                      ranks; none is begun after UNTIL, in seconds since 1970

FOLDER/results/CELL.json gets the losses of all steps and the top-1 accuracy on the validation images.
"""

import json
import shutil
import sys
import time
from pathlib import Path

from horovod_owt.model import alexnet_owt

# a tenth of the arithmetic of AlexNet-OWT on these small images, and FC layers of 1.9 M weights
alexnet_owt.CHANNELS, alexnet_owt.HIDDEN = (16, 32, 64, 64, 256), 192

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy import plain  # noqa: E402
from accuracy.cells import WAYS, Cell  # noqa: E402
from horovod_owt.files import write_text  # noqa: E402
from horovod_owt.parallel import runtime  # noqa: E402
from horovod_owt.parallel.collectives import broadcast_object  # noqa: E402
from horovod_owt.parallel.device import CPU  # noqa: E402
from horovod_owt.runs.opening import Opened  # noqa: E402
from horovod_owt.train.loop import Run  # noqa: E402
from horovod_owt.train.prepare import prepare_request  # noqa: E402
from horovod_owt.train.stop import StopRequest  # noqa: E402


def main(folder: Path, until: float, cells: list[Cell]) -> None:
    world = runtime.init(CPU)
    for number, cell in enumerate(cells):
        if not broadcast_object(time.time() < until, f"go on.{number}"):
            break
        start = time.time()
        settings = tuple(f"{key}={value}" for key, value in cell.settings().items())
        request = prepare_request(folder / "data" / cell.data, None, settings)
        if WAYS[cell.way].plain:
            losses, top1 = plain.train(request)
        else:
            losses, top1 = _ours(request, world, folder / "runs" / cell.name)
        if world.is_root:
            result = {"losses": losses, "top1": top1, "seconds": round(time.time() - start, 1)}
            write_text(folder / "results" / f"{cell.name}.json", json.dumps(result))
            print(f"{cell.name}: top-1 {top1:.2f} %, {result['seconds']} s", flush=True)
    runtime.shutdown()


def _ours(request, world: runtime.World, run_dir: Path) -> tuple[list[float], float]:
    """On rank 0; the others have nothing."""
    if world.is_root:
        shutil.rmtree(run_dir, ignore_errors=True)  # of a run that was ended
        run_dir.mkdir(parents=True)
    Run(request.cfg, request, world, Opened(run_dir), StopRequest()).train()
    if not world.is_root:
        return [], 0.0
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    top1 = [record["top1"] for record in records if record["kind"] == "validation"]
    shutil.rmtree(run_dir)
    return losses, top1[-1]


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), [Cell(*cell) for cell in json.loads(sys.argv[3])])
