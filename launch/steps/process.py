"""Child processes: each has a log file, shows progress on stderr, and is never left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from steps import diagnosis
from steps.progress import Progress

PLAIN_EVERY_S = 20  # between progress lines, if stderr is not a terminal
STOP_GRACE_S = 10  # horovodrun ends its ranks on SIGTERM; SIGKILL follows after this long


class Stopped(Exception):
    """Setup cannot continue; the message has what was seen, what was wanted and the fix."""

    exit_code = 1

    def report(self) -> int:
        say(str(self))
        return self.exit_code


class Missing(Stopped):
    """The machine lacks something that setup cannot install."""

    exit_code = 2


class Lacking(Missing):
    """A missing tool that a Debian package provides."""

    def __init__(self, seen: str, package: str):
        super().__init__(f"{seen}: apt-get install {package}")
        self.seen, self.package = seen, package


class Failed(Stopped):
    """A step failed."""


# Where commands run: `python -m` would import a random.py of the user's from the folder that setup starts in.
NEUTRAL = Path("/")


def say(line: str) -> None:
    print(f"setup: {line}", file=sys.stderr, flush=True)


def ask(
    argv: Sequence[str | Path], env: Mapping[str, str] | None = None, timeout_s: float = 30
) -> str | None:
    """The output of a command, or None if it is missing, fails or times out."""
    succeeded, output = outcome(argv, env, timeout_s)
    return output if succeeded else None


def outcome(
    argv: Sequence[str | Path], env: Mapping[str, str] | None = None, timeout_s: float = 30
) -> tuple[bool, str]:
    """Whether a command succeeded, and its output; none if it is missing or times out."""
    try:
        done = subprocess.run(
            [str(word) for word in argv],
            env=env,
            cwd=NEUTRAL,
            timeout=timeout_s,
            encoding="utf-8",
            errors="replace",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False, ""
    return done.returncode == 0, done.stdout.strip()


def run(
    label: str,
    argv: Sequence[str | Path],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path = NEUTRAL,
    timeout_s: float | None = None,
) -> str:
    """Run a command and return its output; Failed has the log and its most relevant line."""
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [str(word) for word in argv]
    with log.open("wb") as out:
        out.write(f"$ {' '.join(words)}\n".encode())
        out.flush()
        start = time.monotonic()
        child = None
        try:
            with interrupts_held_back():
                child = subprocess.Popen(
                    words,
                    env=env,
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # its own process group: stop() reaches the grandchildren
                )
            timed_out = not _watch(child, label, log, start, timeout_s)
        finally:
            if child is not None:
                stop(child)
    text = log.read_text(encoding="utf-8", errors="replace")
    if timed_out:
        raise Failed(f"{label}: timed out after {timeout_s:.0f} s; log: {log}")
    if child.returncode != 0:
        line = diagnosis.error_line(text)
        advice = f"; {found}" if (found := diagnosis.known_fix(line)) else ""
        raise Failed(f"{label} failed (exit {child.returncode}): {line}{advice}; log: {log}")
    say(f"{label}: done in {time.monotonic() - start:.0f} s")
    return text


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Delay signals until the child is known: an interrupt during the fork would leave it behind."""
    arrived = []
    handlers = {
        signum: signal.signal(signum, lambda number, _frame: arrived.append(number))
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    for signum in arrived:
        signal.raise_signal(signum)


def stop(child: subprocess.Popen) -> None:
    """End a child and its process group, if still running."""
    if child.poll() is not None:
        return
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, signum)
            child.wait(STOP_GRACE_S)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _watch(child: subprocess.Popen, label: str, log: Path, start: float, timeout_s: float | None) -> bool:
    """Wait for the child and show progress; False on a timeout."""
    on_terminal = sys.stderr.isatty()
    next_plain_s = PLAIN_EVERY_S
    progress = Progress()
    while True:
        try:
            child.wait(0.5)
            return True
        except subprocess.TimeoutExpired:
            pass
        finally:
            if on_terminal:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
        elapsed_s = time.monotonic() - start
        if timeout_s is not None and elapsed_s > timeout_s:
            return False
        shown = progress.of(log.read_text(encoding="utf-8", errors="replace"), elapsed_s)
        line = f"{label}: {int(elapsed_s) // 60}:{int(elapsed_s) % 60:02d} {shown}"
        if on_terminal:
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            print(
                f"{'|/-' + chr(92)}"[int(2 * elapsed_s) % 4],
                line[: width - 3],
                end="",
                file=sys.stderr,
                flush=True,
            )
        elif elapsed_s >= next_plain_s:
            say(line)
            next_plain_s += PLAIN_EVERY_S
