"""Jobs of more ranks than a test can train with."""

import sys

from real_ranks import PROGRAMS


def met(run, what: str, ranks: int) -> int:
    command = [sys.executable, PROGRAMS / "stub_ranks.py", what, ranks]
    return run(command, launcher="none", limit_s=60).json()["met"]


def test_hundreds_of_ranks_meet_in_seconds(run):
    """Without torch. More of them than a listener keeps unproven connections, and all from one address."""
    assert met(run, "meet", 256) == 256


def test_dozens_of_ranks_ask_for_each_others_addresses_as_gloo_does(run):
    """10,000 requests."""
    assert met(run, "gloo", 64) == 64
