"""Diagnose a failed step: the relevant line of its log and, for known failures, a fix."""

import re

ERROR_LINES = (  # in this order: a full disk and a killed compiler cause further errors
    re.compile(r"No space left on device|Disk quota exceeded"),
    re.compile(r"Killed signal terminated program|: Killed$|out of memory allocating|std::bad_alloc"),
    re.compile(r"^[^\s:]+:\d+:(\d+:)? (fatal )?error: "),
    re.compile(r"^\S*(c\+\+|g\+\+|gcc|cc1plus|clang|nvcc)\S*: .*error: "),
    re.compile(r"undefined reference to|multiple definition of|cannot find -l"),
    # CMake; what follows is less plain. "-- Could NOT find" is no error.
    re.compile(r"^(?!-- )(?:\S+ )*?(?:Could NOT find|Could not find|Unable to find) "),
    re.compile(r"^CMake Error"),
    re.compile(r"\berror:|^ERROR|Error:"),
)
# pip takes an index that it cannot reach for an empty one. What it says of the connection is a remark.
UNREACHED, NO_VERSIONS = re.compile(r".* after connection broken by '"), "(from versions: none)"
FOLLOWS = re.compile(r"subprocess-exited-with-error|did not run successfully|metadata-generation-failed")
LONGEST_LINE = 200

FIXES = (  # (pattern in the error line, fix)
    ("No space left|quota exceeded", "free some space, or use another disk with XDG_CACHE_HOME and --venv"),
    (
        "Killed|out of memory|bad_alloc",
        "out of memory: `taskset -c 0 launch/setup` compiles one file at a time",
    ),
    (
        r"Python\.h",
        "this Python's headers are missing: apt-get install python3-dev, or use another Python",
    ),
    (r"fatal error: (\S+\.h): No such file", "a header is missing: install the package that contains it"),
    (
        r"unrecognized command.line option '?-std|C\+\+(17|20|23) or later|You need C\+\+",
        "the compiler is too old for this torch: use a newer one: CXX=g++-12 launch/setup",
    ),
    (
        "does not name a type|was not declared in this scope|has not been declared|read-only member"
        "|is not a member of 'std'|Compatibility with CMake",
        "the compiler or CMake may be newer than any tested version (listed in docs/setup.md); "
        "use an older compiler: CXX=g++-14 launch/setup",
    ),
    (
        "GLIBCXX_|CXXABI_",
        "the compiler is newer than the libstdc++ that is loaded, as conda's may be: take the system's, "
        "CC= CXX= launch/setup",
    ),
    (
        "NOT find CUDAToolkit|find cudart",
        "the CUDA toolkit is not whole: launch/setup --lane cuda --cuda-from-pip, or another CUDA_HOME",
    ),
    (
        "cannot execute|Permission denied",
        "the disk may be mounted noexec: use another with XDG_CACHE_HOME and --venv",
    ),
    (
        "No matching distribution|Could not find a version",
        "the package index has no such version for this Python; `pip config list` shows the index",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "pip does not know the authority of the index or the proxy: PIP_CERT=FILE launch/setup",
    ),
    (
        "NewConnectionError|ProxyError|SSLError|Max retries"
        "|name resolution|Connection refused|unreachable|timed out",
        "the package index cannot be reached: check pip's index and proxy, `pip config list`",
    ),
    ("DO NOT MATCH THE HASHES", "a download was truncated or changed: run the same command again"),
)


def error_line(log: str) -> str:
    """The line with the cause: a full disk, a killed compiler, the first compiler error, else the last line.

    The first line of a log is the command itself.
    """
    lines = [line.strip() for line in log.splitlines()[1:] if line.strip()]
    if NO_VERSIONS in log and (unreached := next(filter(None, map(UNREACHED.match, lines)), None)):
        return unreached.string[unreached.end() :][:LONGEST_LINE]
    for pattern in ERROR_LINES:
        for at, line in enumerate(lines):
            if pattern.search(line) and not FOLLOWS.search(line):
                if line.startswith("CMake Error") and at + 1 < len(lines):
                    line = f"{line} {lines[at + 1]}"  # its message is on the next line
                return line[:LONGEST_LINE]
    return lines[-1][:LONGEST_LINE] if lines else "it printed nothing"


def known_fix(line: str) -> str:
    """The fix for an error line, if it is known; else an empty string."""
    return next((fix for pattern, fix in FIXES if re.search(pattern, line)), "")
