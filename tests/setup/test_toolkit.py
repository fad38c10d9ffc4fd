"""Which CUDA toolkit builds Horovod, what is said where there is none, and the one made of pip's packages."""

import pytest
from set_up_support import lanes, packages, place, toolkit, tools
from steps.process import Failed, Lacking, Missing

CUDA, CUDA12, K80 = (lanes.LANES[name] for name in ("cuda", "cuda12", "k80"))


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path, monkeypatch):
    """A machine without a toolkit: an empty PATH, and a /usr/local of its own."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "local").mkdir()
    monkeypatch.setattr(toolkit, "CUDA_DEFAULT", tmp_path / "local" / "cuda")


def make_toolkit(root, release="13.0", *, headers=True):
    (root / "bin").mkdir(parents=True)
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.88\n")
    nvcc.chmod(0o755)
    if headers:
        (root / "include").mkdir()
        (root / "include" / "cuda_runtime.h").touch()
    return root


def test_an_nvcc_on_path_with_its_headers_is_a_toolkit(here, tmp_path, monkeypatch):
    root = make_toolkit(tmp_path / "toolkit")
    monkeypatch.setenv("PATH", str(root / "bin"))
    assert toolkit.find(here, CUDA, {}) == toolkit.Toolkit(root, "13.0")


def test_a_wrapper_script_on_path_is_not_a_toolkit(here, tmp_path, monkeypatch):
    """As /usr/local/bin/nvcc, which starts /usr/local/cuda/bin/nvcc."""
    wrapper = make_toolkit(tmp_path, headers=False) / "bin"
    monkeypatch.setenv("PATH", str(wrapper))
    with pytest.raises(Lacking):
        toolkit.find(here, CUDA, {})
    make_toolkit(toolkit.CUDA_DEFAULT)
    assert toolkit.find(here, CUDA, {}).root == toolkit.CUDA_DEFAULT


def test_the_toolkit_of_the_lanes_release_is_found_beside_another_default(here, tmp_path):
    make_toolkit(toolkit.CUDA_DEFAULT, "13.0")
    eleven = make_toolkit(tmp_path / "local" / "cuda-11.8", "11.8")
    assert toolkit.find(here, K80, {}).root == eleven
    assert toolkit.find(here, CUDA, {}).root == toolkit.CUDA_DEFAULT
    with pytest.raises(Lacking, match="no CUDA 12 toolkit .*, only CUDA 13.0 in .*cuda-toolkit-12-8$"):
        toolkit.find(here, CUDA12, {})


def test_one_that_cuda_home_names_is_taken_or_refused(here, tmp_path):
    named = make_toolkit(tmp_path / "named", "13.1")
    make_toolkit(toolkit.CUDA_DEFAULT, "13.0")
    assert toolkit.find(here, CUDA, {"CUDA_HOME": str(named)}).root == named
    with pytest.raises(Missing, match="CUDA_HOME=.*named has CUDA 13.1, wanted CUDA 12: name"):
        toolkit.find(here, CUDA12, {"CUDA_HOME": str(named)})
    with pytest.raises(Missing, match="HOROVOD_CUDA_HOME=/nowhere has no nvcc with its headers"):
        toolkit.find(here, CUDA, {"HOROVOD_CUDA_HOME": "/nowhere", "CUDA_HOME": str(named)})


@pytest.mark.parametrize(
    "lane, said",
    [
        (
            CUDA,
            "launch/setup --lane cuda --cuda-from-pip, or add NVIDIA's apt.*: apt-get .* cuda-toolkit-13-0$",
        ),
        (
            CUDA12,
            r"\(set CUDA_HOME to one, or add NVIDIA's apt repository\): apt-get install .*cuda-toolkit-12-8$",
        ),
        (K80, "apt-get install .*cuda-toolkit-11-8$"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_without_one_it_says_what_to_install(here, lane, said):
    with pytest.raises(Missing, match=said):
        tools.check(lane, here, {})


def test_the_k80_lane_names_a_compiler_that_cuda_11_takes(here, tool):
    tool("c++", 'case "$1" in -dumpversion) echo 12;; *) echo "g++ 12.2.0";; esac')
    with pytest.raises(
        Missing, match=r"g\+\+ 12, wanted 7 to 11 .*apt-get install g\+\+-11 cmake make cuda-toolkit-11-8"
    ):
        tools.check(K80, here, {})


def test_set_up_with_pips_toolkit_does_not_want_one_before(here, tool):
    tool("c++", 'case "$1" in -dumpversion) echo 12;; *) echo "g++ 12.2.0";; esac')
    tool("cmake", "echo cmake version 3.25.1")
    tool("make", "true")
    assert tools.check(CUDA, here, {}, toolkit_later=True).cuda is None


@pytest.mark.parametrize("lane", ["cpu", "cuda12", "k80"])
def test_pip_has_no_toolkit_for_the_other_lanes(set_up, lane):
    done = set_up("--lane", lane, "--cuda-from-pip")
    assert done.returncode == 2
    assert f"pip has no CUDA toolkit for the {lane} lane" in done.stderr


@pytest.fixture
def pip(here, monkeypatch):
    """A pip that leaves what NVIDIA's packages have, `headers` or not; the words it was called with."""
    calls = []

    def pip(where, log, *words, headers=True):
        calls.append(words)
        root = make_toolkit(toolkit.pip_root(where), headers=headers)
        (root / "lib").mkdir()
        (root / "lib" / "libcudart.so.13").touch()

    monkeypatch.setattr(packages, "pip", pip)
    here.venv.mkdir()
    (here.venv / "pyvenv.cfg").touch()
    pip.calls = calls
    return pip


def test_pips_packages_become_a_toolkit_once(here, pip):
    made = toolkit.install_from_pip(here, CUDA)
    assert made == toolkit.Toolkit(here.venv / "cuda" / "nvidia" / "cu13", "13.0")
    assert (made.root / "lib64" / "libcudart.so").resolve().name == "libcudart.so.13"
    assert toolkit.install_from_pip(here, CUDA) == made and len(pip.calls) == 1
    assert (
        toolkit.find(place.Place(here.venv, here.environ), CUDA, {}) == made
    )  # by a later setup, without the option


def test_packages_that_make_no_toolkit_are_an_error(here, pip, monkeypatch):
    monkeypatch.setattr(packages, "pip", lambda *words: pip(*words, headers=False))
    with pytest.raises(Failed, match="are no toolkit; log: "):
        toolkit.install_from_pip(here, CUDA)


def test_what_pip_installs_is_pinned():
    pinned = CUDA.constraints.read_text() + CUDA.constraints.with_name("cpu.txt").read_text()
    assert all(f"\n{name}==13.0." in pinned for name in toolkit.PIP_PACKAGES)
