"""Jobs of more ranks than a test can train with."""

import sys

from real_ranks import PROGRAMS

RANKS = 256


def test_hundreds_of_ranks_meet_in_seconds(run):
    """Without torch. More of them than a listener keeps unproven connections, and all from one address."""
    met = run([sys.executable, PROGRAMS / "stub_ranks.py", RANKS], launcher="none", limit_s=60).json()
    assert met["met"] == RANKS
