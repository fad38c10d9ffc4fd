"""How far a long child is, read from its log: shares of the time that it takes, not of the files done."""

import re

# Of building Horovod on two cores: what the log shows first, and the share of the time that has passed then.
# make's own percentages count files, and most of the time goes by between the last of them.
MILESTONES = (
    (re.compile(r"Building wheel for horovod"), 0.04),
    (re.compile(r"Configuring done"), 0.23),
    (re.compile(r"Built target gloo"), 0.32),
    (re.compile(r"Building CXX object \S*pytorch.dir/Unity/unity_1"), 0.57),  # make begins with the last
    (re.compile(r"Building CXX object \S*pytorch.dir/Unity/unity_0"), 0.73),
    (re.compile(r"Linking CXX shared library"), 0.97),
    (re.compile(r"Created wheel for horovod"), 1.0),
)
DOING = re.compile(r"^ *(?:Collecting|Downloading|Using cached) [^\s(]+", re.MULTILINE)
INSTALLING = re.compile(r"^Installing collected packages: (.*)$", re.MULTILINE)


class Progress:
    """What to show of one child beside the time that it has taken."""

    def __init__(self) -> None:
        self._passed = 0  # milestones
        self._at_s = 0.0  # when the last of them was seen

    def of(self, log: str, elapsed_s: float) -> str:
        """Share and seconds left of a build, or what pip is doing; empty where the log does not tell."""
        passed = sum(1 for pattern, _ in MILESTONES if pattern.search(log))
        if passed > self._passed:
            self._passed, self._at_s = passed, elapsed_s
        if self._passed:
            return self._of_build(elapsed_s)
        if found := INSTALLING.search(log):
            return f"installing {found[1].count(',') + 1} packages"
        doing = DOING.findall(log)
        return doing[-1].strip() if doing else ""

    def _of_build(self, elapsed_s: float) -> str:
        """Between two milestones the share grows as fast as it has so far, and stops before the next."""
        share = MILESTONES[self._passed - 1][1]
        next_share = MILESTONES[min(self._passed, len(MILESTONES) - 1)][1]
        all_s = self._at_s / share
        now = min(elapsed_s / all_s, next_share) if all_s else share
        return f"{100 * now:.0f} %, about {all_s * (1 - now):.0f} s left"
