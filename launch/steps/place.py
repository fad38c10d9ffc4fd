"""The folders that setup writes to, virtual environment and cache, and the stamp of finished steps."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from steps.process import Missing, say

REPO = Path(__file__).resolve().parents[2]
LAUNCH = REPO / "launch"
PATCHES = sorted((LAUNCH / "horovod").glob("*.patch"))

# Environment variables that change the Horovod build. They are kept in the stamp, so that a later run without
# them (make test) does not build Horovod again.
SETTINGS = ("CC", "CXX", "HOROVOD_BUILD_ARCH_FLAGS")
GPU_SETTINGS = (  # ignored by the cpu lane: a `module load cuda` must not rebuild it
    "CUDA_HOME",
    "HOROVOD_BUILD_CUDA_CC_LIST",
    "HOROVOD_CUDA_HOME",
    "HOROVOD_NCCL_HOME",
    "HOROVOD_NCCL_LINK",
    "HOROVOD_WITHOUT_CUDA",
)
# Prefixes removed from a child's environment: variables of another job's ranks or another Python. In a job of
# LSF (LSB_) horovodrun looks for IBM's CSM, in one of PBS mpirun takes its slots from the job. Horovod's
# build passes options of make on, which Ninja refuses. Of pip's options only those below stay.
FOREIGN = (
    "CMAKE_GENERATOR",
    "HOROVOD_",
    "LSB_",
    "OMPI_",
    "PBS_",
    "PMIX_",
    "PMI_",
    "PRTE_",
    "SLURM_",
    "PYTHON",
    "VIRTUAL_ENV",
    "PIP_",
)
# How pip reaches an index, and its cache. Others would change what is installed, or where: NVIDIA's
# containers pin their own packages by PIP_CONSTRAINT.
PIP_OPTIONS = (
    *("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_TRUSTED_HOST"),
    *("PIP_CERT", "PIP_CLIENT_CERT", "PIP_PROXY", "PIP_TIMEOUT", "PIP_DEFAULT_TIMEOUT", "PIP_RETRIES"),
    *("PIP_CACHE_DIR", "PIP_NO_CACHE_DIR", "PIP_CONFIG_FILE", "PIP_KEYRING_PROVIDER"),
    *("PIP_USE_FEATURE", "PIP_USE_DEPRECATED", "PIP_RESUME_RETRIES"),
)


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def patch_digest(patch: Path) -> str:
    """Digest of a patch's changes; a new header does not cause a new build."""
    _header, diff, rest = patch.read_text(encoding="utf-8").partition("diff --git ")
    return hashlib.sha256((diff + rest).encode()).hexdigest()


def has_blank(path: str | Path) -> bool:
    return any(map(str.isspace, str(path)))


def cache_home(environ: Mapping[str, str]) -> Path:
    """XDG_CACHE_HOME or ~/.cache; raises Missing for a user without a home, as in some containers."""
    home = environ.get("HOME") or os.path.expanduser("~")
    folder = Path(environ.get("XDG_CACHE_HOME") or Path(home, ".cache"))
    if not folder.is_absolute():
        raise Missing("no HOME and no passwd entry: set XDG_CACHE_HOME to a writable folder")
    return folder


class Place:
    """The folders of one installation and its stamp, `horovod_owt.json` in the virtual environment."""

    def __init__(self, venv: Path, environ: Mapping[str, str] = os.environ):
        self.venv = Path(os.path.expanduser(venv)).absolute()
        self.environ = environ
        self.bin = self.venv / "bin"
        self.python = self.bin / "python"
        self.stamp_file = self.venv / "horovod_owt.json"
        self.cache = cache_home(environ) / "horovod_owt"
        self.stamp = self._read_stamp()

    # the stamp

    def _read_stamp(self) -> dict:
        try:
            return json.loads(self.stamp_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
            return {}

    def _write_stamp(self) -> None:
        if not (self.venv / "pyvenv.cfg").exists():
            return  # kept in memory until the virtual environment exists
        beside = self.stamp_file.with_suffix(".new")
        beside.write_text(json.dumps(self.stamp, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        beside.replace(self.stamp_file)

    def is_done(self, step: str, inputs: str) -> bool:
        return self.stamp.get("steps", {}).get(step) == inputs

    def was_begun(self, step: str) -> bool:
        """Whether the step was begun once, with any inputs."""
        return step in self.stamp.get("steps", {})

    def mark(self, step: str, inputs: str | None, **facts: object) -> None:
        """Record that a step is done with these inputs (None: to be done)."""
        self.stamp.setdefault("steps", {})[step] = inputs
        self.stamp.update(facts)
        self._write_stamp()

    def forget_steps(self) -> None:
        """All steps are to be done."""
        self.stamp["steps"] = {}
        self._write_stamp()

    def finish(self, rows: list) -> None:
        self.mark("all", self.inputs(), rows=rows)

    def rows_kept(self) -> list | None:
        return self.stamp.get("rows") if self.stamp.get("steps", {}).get("all") else None

    def lane_kept(self) -> str | None:
        return self.stamp.get("lane")

    def keep_settings(self, lane: str) -> None:
        """Record lane and settings; the installation counts as unfinished from now on."""
        self.stamp["lane"] = lane
        self.mark("all", None, settings=self.settings())

    def settings(self) -> dict[str, str]:
        """The build settings of this lane, from the environment or an earlier run; an empty one is none."""
        names = SETTINGS if self.lane_kept() == "cpu" else SETTINGS + GPU_SETTINGS
        said = {**self.stamp.get("settings", {}), **self.environ}
        return {name: said[name] for name in names if said.get(name)}

    def without_gpus(self) -> bool:
        """Whether a lane for GPUs gets a Horovod for CPU cores, to test its packages."""
        said = {**self.stamp.get("settings", {}), **self.environ}
        return said.get("HOROVOD_WITHOUT_CUDA", "0") not in ("", "0")

    def inputs(self) -> str:
        """Digest of everything that an installation depends on, as far as files and variables show it."""
        files = [
            LAUNCH / "setup",
            *sorted((LAUNCH / "steps").glob("*.py")),
            *sorted((LAUNCH / "proof").glob("*.py")),
            *sorted((LAUNCH / "constraints").glob("*")),
            *PATCHES,
            REPO / "setup.cfg",
            REPO / "pyproject.toml",
        ]
        python = self.venv / "pyvenv.cfg"
        return digest(
            {file.name: file_digest(file) for file in files if file.exists()},
            str(REPO),
            self.lane_kept(),
            self.settings(),
            python.read_text(encoding="utf-8") if python.exists() else None,
            os.path.realpath(self.python),  # /usr/bin/python3.13 once the system has replaced its python3.11
        )

    def up_to_date(self, lane_asked: str | None) -> bool:
        """Whether nothing is left to do. A new MPI on PATH is work; one that has left PATH is not."""
        site = self.site_mpicc()
        return (
            lane_asked in (None, self.lane_kept())
            and self.is_done("all", self.inputs())
            and (site is None or str(site) == self.stamp.get("mpi", {}).get("mpicc"))
            and self.python.exists()
            and (self.bin / "horovodrun").exists()
        )

    def site_mpicc(self) -> Path | None:
        """The `mpicc` on PATH, unless a virtual environment has it: this one, or another that is active."""
        folders = [Path(folder) for folder in self.environ.get("PATH", "").split(os.pathsep) if folder]
        path = os.pathsep.join(
            str(folder)
            for folder in folders
            if folder.resolve() != self.bin.resolve() and not (folder.parent / "pyvenv.cfg").exists()
        )
        mpicc, mpirun = shutil.which("mpicc", path=path), shutil.which("mpirun", path=path)
        return Path(mpicc) if mpicc and mpirun else None

    # the cache

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One setup per user at a time: a second one waits, then finds the first one's wheel."""
        self._own_cache()
        lock_file = os.open(self.cache / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with open(lock_file, "r+b") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another setup is using {self.cache}; waiting for it to end")
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:  # a file system without locks, such as NFS without lockd
                say(f"{self.cache} cannot be locked: run one setup at a time")
            shutil.rmtree(self.scratch, ignore_errors=True)  # left by a killed setup
            self.stamp = self._read_stamp()
            yield

    def _own_cache(self) -> None:
        """Create the cache for this user alone: setup installs the wheels that it finds there."""
        try:
            self.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.cache.stat()
        except OSError as error:
            raise Missing(
                f"{self.cache}: {error.strerror}: set XDG_CACHE_HOME to a writable folder"
            ) from None
        if {found.st_uid, self.cache.lstat().st_uid} != {os.geteuid()}:
            raise Missing(
                f"{self.cache} belongs to user {found.st_uid}, wanted one of user {os.geteuid()}: "
                "set XDG_CACHE_HOME to a folder of your own"
            )
        if not os.access(self.cache, os.W_OK):
            raise Missing(f"{self.cache} is not writable: set XDG_CACHE_HOME to a writable folder")
        if found.st_mode & 0o022:
            self.cache.chmod(found.st_mode & 0o755)

    @contextmanager
    def named_without_blanks(self) -> Iterator["Place"]:
        """The same installation with names that Horovod can be built under, its scratch folder moved there.

        CMake's FindMPI takes `mpicc -show` apart at blanks, and Horovod's CMake file passes the path of its
        sources to the linker unquoted. The names are links, but for the scratch folder: CMake resolves the
        folder that it works in. They lie in a folder of this user: the built library keeps them in its
        RUNPATH.
        """
        if not has_blank(self.venv) and not has_blank(self.cache):
            yield self
            return
        folders = [self.environ.get(name) for name in ("HOME", "XDG_RUNTIME_DIR")]
        home = next((f for f in folders if f and not has_blank(f) and os.access(f, os.W_OK)), None)
        if home is None:
            raise Missing(
                f"{self.venv} or {self.cache} has a blank, where Horovod cannot be built: "
                "use --venv and XDG_CACHE_HOME"
            )
        with tempfile.TemporaryDirectory(prefix=".owt-build-", dir=home) as folder:
            named = Place(Path(folder, "venv"), {**self.environ, "XDG_CACHE_HOME": folder})
            named.venv.symlink_to(self.venv)
            named.cache.mkdir()
            for kept in ("logs", "sdist", "wheels"):
                (self.cache / kept).mkdir(parents=True, exist_ok=True)
                (named.cache / kept).symlink_to(self.cache / kept)
            yield named

    @property
    def scratch(self) -> Path:
        return self.cache / "tmp"

    def log(self, name: str) -> Path:
        return self.cache / "logs" / f"{name}.log"

    # children

    def child_env(self) -> dict[str, str]:
        """The caller's environment, cleaned, with the virtual environment active."""
        env = {
            name: value
            for name, value in self.environ.items()
            if name in PIP_OPTIONS or not name.startswith(FOREIGN)
        }
        env["PATH"] = os.pathsep.join([str(self.bin), env.get("PATH", os.defpath)])
        env["VIRTUAL_ENV"] = str(self.venv)
        return env

    def build_env(self) -> dict[str, str]:
        """The same for pip and compilers, with temporary files in the cache, because /tmp may be small."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        return {
            **self.child_env(),
            **self.settings(),
            "TMPDIR": str(self.scratch),
            "PIP_NO_INPUT": "1",
            # whatever pip.conf says: packages go into the virtual environment, in the lane's versions
            "PIP_USER": "0",
            "PIP_CONSTRAINT": os.devnull,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
