"""promtool and prometheus, from Debian."""

from __future__ import annotations

import debian_packages
import pytest

PACKAGES = {"promtool": "prometheus", "prometheus": "prometheus"}


def installed(tool: str) -> str:
    """Its path; the test is skipped where it is missing and cannot be installed."""
    try:
        debian_packages.install(PACKAGES)
    except debian_packages.Unfit as unfit:
        pytest.skip(str(unfit))
    return debian_packages.find(tool)
