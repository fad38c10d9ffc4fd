"""What this host hands to the machines: its way to Debian's packages and to pip's, and perhaps a Python."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
APT_KEPT = re.compile(r"Acquire::(http|https|ftp|Retries|Check-)", re.IGNORECASE)


@dataclass(frozen=True)
class Pip:
    """How this host's pip finds packages, for a machine to find them likewise."""

    environ: Mapping[str, str]
    files: Mapping[Path, str]  # copied, where to: settings and certificates
    folders: tuple[Path, ...]  # mounted read-only: indexes and wheels on this host's disk


def lacking() -> str | None:
    """Why no machine can be made here, or None."""
    if os.getuid() != 0:
        return "making a Debian root needs root: sudo make test-machines"
    for tool, package in (("debootstrap", "debootstrap"), ("unshare", "util-linux"), ("git", "git")):
        if shutil.which(tool) is None:
            return f"no {tool}: apt-get install {package}"
    namespaces = [
        "unshare",
        "--mount",
        "--uts",
        "--ipc",
        "--pid",
        "--fork",
        "mount",
        "-t",
        "tmpfs",
        "x",
        "/mnt",
    ]
    if subprocess.run(namespaces, capture_output=True).returncode != 0:
        return "no namespaces of mounts and processes may be made here (a container without SYS_ADMIN?)"
    return None


def pip(environ: Mapping[str, str] = os.environ, etc: Path = Path("/etc")) -> Pip:
    """This host's pip settings: variables, files, and whatever on this disk they name."""
    kept = {
        name: value
        for name, value in environ.items()
        if (name.startswith("PIP_") or name in CERTIFICATES or name.lower() in PROXIES)
        and name not in ("PIP_CACHE_DIR", "PIP_TARGET", "PIP_USER", "PIP_REQUIRE_VIRTUALENV")
    }
    files = {file: str(file) for file in (etc / "pip.conf", *sorted(etc.glob("xdg/pip/*"))) if file.is_file()}
    own = Path(environ.get("HOME", "/root"), ".config", "pip", "pip.conf")
    if own.is_file() and "PIP_CONFIG_FILE" not in kept:
        files[own] = "/etc/pip-of-the-host.conf"  # whoever the machine's user is
    named = named_paths("\n".join([*kept.values(), *(file.read_text() for file in files)]))
    if own in files:
        kept["PIP_CONFIG_FILE"] = files[own]
    files |= {path: str(path) for path in named if path.is_file() and path not in files}
    return Pip(kept, files, tuple(path for path in named if path.is_dir() and not path.is_relative_to(etc)))


def named_paths(text: str) -> list[Path]:
    """Absolute paths in settings that are there; of an index `.../simple`, the folder with its files too."""
    found = []
    for words in re.findall(r"(?:(?<=file://)|(?<![\w/:.]))(/[^\s'\",;]+)", text):
        path = Path(words)
        path = path.parent if path.name == "simple" else path
        if path.exists() and path not in found:
            found.append(path)
    return found


def debian_mirror() -> str | None:
    """The mirror that this host's apt uses if it has Debian's packages; None: debootstrap's default."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)", "Created-By: Packages"],
        capture_output=True,
        text=True,
    ).stdout
    found = re.search(r"^Debian (\S+/debian)/?$", listed, re.MULTILINE)
    return found[1] if found else None


def apt_settings() -> str:
    """This host's proxies and patience, as a file for apt.conf.d."""
    dump = subprocess.run(["apt-config", "dump", "--no-empty"], capture_output=True, text=True).stdout
    return "".join(f"{line}\n" for line in dump.splitlines() if APT_KEPT.match(line))


def python(name: str) -> Path | None:
    """This host's Python of that name ("python3.12"), outside /usr/bin; None if there is none."""
    version = name.removeprefix("python")
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions")
    places = [*pyenv.glob(f"{version}.*/bin/{name}"), *Path("/opt").glob(f"*/bin/{name}")]
    places.append(Path("/usr/local/bin", name))
    return next((place for place in sorted(places) if place.exists()), None)
