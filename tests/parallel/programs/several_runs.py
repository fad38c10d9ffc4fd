"""Several runs one after another, with few hidden units: starting ranks takes longer than all of them.

usage: several_runs.py RUNS     RUNS is a JSON list of {"data": ..., "run_dir": ..., "settings": {...}}

An error that a message explains ends its run, on all ranks; outcome.json there says how.
"""

import json
import sys
from pathlib import Path

from horovod_owt.model import alexnet_owt

alexnet_owt.HIDDEN = 98

from horovod_owt.commands.log import log_to_stderr  # noqa: E402
from horovod_owt.errors import OwtError, PrintedBy  # noqa: E402
from horovod_owt.parallel import runtime  # noqa: E402
from horovod_owt.parallel.device import CPU  # noqa: E402
from horovod_owt.runs.opening import Opened  # noqa: E402
from horovod_owt.train.loop import Run  # noqa: E402
from horovod_owt.train.prepare import prepare_request  # noqa: E402
from horovod_owt.train.stop import StopRequest  # noqa: E402

log_to_stderr()
world = runtime.init(CPU)
for run in json.loads(sys.argv[1]):
    settings = [f"{key}={value}" for key, value in run["settings"].items()]
    request = prepare_request(Path(run["data"]), str(Path(__file__).parents[1] / "small.yaml"), settings)
    run_dir = Path(run["run_dir"])
    run_dir.mkdir(exist_ok=True)
    try:
        Run(request.cfg, request, world, Opened(run_dir), StopRequest()).train()
    except OwtError as error:
        assert error.printed_by is PrintedBy.EVERY_RANK
runtime.shutdown()
