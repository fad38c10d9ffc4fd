"""`owt`, where rank 1 has another torch, other code, another lr and an image less; ranks 0 and 2 agree."""

import sys

from narrow import main

from horovod_owt.data.folder import FolderStore
from horovod_owt.parallel import runtime
from horovod_owt.topology import read_topology
from horovod_owt.train import agreement

if read_topology().rank == 1:
    versions, code_digest = runtime.versions, agreement.code_digest
    runtime.versions = lambda: {**versions(), "torch": "0.0.1"}
    agreement.code_digest = lambda: f"not {code_digest()}"
    sys.argv += ["--set", "lr=0.5"]
    init = FolderStore.__init__

    def without_one(self, folder):
        init(self, folder)
        if folder.name == "train":
            self.labels = self.labels[:-1]

    FolderStore.__init__ = without_one

main()
