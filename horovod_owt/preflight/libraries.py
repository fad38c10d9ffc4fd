"""Load torch and Horovod and print their properties as JSON.

Run as a separate process, because broken libraries may crash or hang it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def main() -> None:
    print(json.dumps({"torch": _tried(_torch), "horovod": _tried(_horovod)}))


def _tried(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return look()
    except Exception as error:  # a broken installation may raise anything
        return {"fault": f"{type(error).__name__}: {error}"}


def _torch() -> dict[str, Any]:
    import torch

    return {
        "torch's CUDA": torch.version.cuda or "none",
        "torch's architectures": " ".join(torch.cuda.get_arch_list()) or "CPU only",
        "torch's threads": torch.get_num_threads(),
    }


def _horovod() -> dict[str, Any]:
    from horovod_owt.parallel import runtime
    from horovod_owt.versions import installed_versions

    version = installed_versions().get("horovod", "unknown")
    return {"version": version, "patched": "+owt" in version, "operations": runtime.operations()}
