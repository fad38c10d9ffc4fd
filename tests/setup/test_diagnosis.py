"""What a failed step says: the line of its log that tells why, and the way out where it is known."""

import pytest
from set_up_support import needs, process
from steps import diagnosis

GCC_14 = """\
$ pip wheel
[  3%] Building CXX object a.cc.o
/x/torch/c10/util/Exception.h:40:7: warning: 'class c10::Error' has virtual functions [-Wnon-virtual-dtor]
/x/half.h:76:11: note: in expansion of macro; c10::Error: what
In file included from /x/message.cc:20:
/x/flatbuffers/stl_emulation.h:549:12: error: assignment of read-only member 'flatbuffers::span<T>::count_'
make[2]: *** [CMakeFiles/pytorch.dir/build.make:76: a.cc.o] Error 1
  error: subprocess-exited-with-error
ERROR: Failed building wheel for horovod
"""

CUDA = """\
$ pip wheel
CMake Error: try_compile of a CUDA program failed
-- Using CUDA from torch
CMake Error at /usr/share/cmake-3.25/Modules/FindPackageHandleStandardArgs.cmake:230 (message):
  Could NOT find CUDAToolkit (missing: CUDAToolkit_INCLUDE_DIR CUDA_CUDART)
  (found version "13.0.88")
Call Stack (most recent call first):
-- Configuring incomplete, errors occurred!
subprocess.CalledProcessError: Command '['cmake', '/x/horovod-0.28.1']' returned non-zero exit status 1.
"""

BLANK = """\
$ pip wheel
-- Could not find CCache. Consider installing CCache to speed up compilation.
CMake Error in /x y/CMakeFiles/CMakeScratch/TryCompile-fUp82Q/CMakeLists.txt:
  Imported target "MPI::MPI_CXX" includes non-existent path

    "/x"
-- Configuring incomplete, errors occurred!
"""


@pytest.mark.parametrize(
    "log, line",
    [
        (
            "$ pip\nERROR: a\nOSError: [Errno 28] No space left on device\n",
            "[Errno 28] No space left on device",
        ),
        (
            "$ pip\nx.cc:1:2: error: a\nx.s:1: error: write: No space left on device\n",
            "No space left on device",
        ),
        (
            "$ pip\nc++: fatal error: Killed signal terminated program cc1plus\nx.cc:3:1: error: y\n",
            "c++: fatal error: Killed signal terminated program cc1plus",
        ),
        (GCC_14, "/x/flatbuffers/stl_emulation.h:549:12: error: assignment of read-only member"),
        (
            "$ pip\nCMake Error at CMakeLists.txt:1 (find_package):\n  Could not find MPI\n",
            "Could not find MPI",
        ),
        (BLANK, 'Imported target "MPI::MPI_CXX" includes non-existent path'),
        (CUDA, "Could NOT find CUDAToolkit (missing: CUDAToolkit_INCLUDE_DIR CUDA_CUDART)"),
        ("$ pip\nerror: subprocess-exited-with-error\nERROR: No matching distribution\n", "No matching dist"),
        (
            "$ pip\nx.o: undefined reference to `gloo::f()'\ncollect2: error: ld returned 1\n",
            "undefined reference",
        ),
        ("$ pip\none\ntwo\n", "two"),
        ("$ pip\n", "it printed nothing"),
    ],
    ids=[
        "disk",
        "disk before compiler",
        "killed",
        "compiler",
        "cmake",
        "cmake after a remark",
        "cuda toolkit",
        "pip",
        "linker",
        "last line",
        "nothing",
    ],
)
def test_the_error_line_of_a_log(log, line):
    assert line in diagnosis.error_line(log)


@pytest.mark.parametrize(
    "line, advice",
    [
        ("OSError: [Errno 28] No space left on device", "XDG_CACHE_HOME"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "memory"),
        (
            "ATen.h:4:2: error: #error C++20 or later compatible compiler is required",
            "too old",
        ),
        (
            "stl_emulation.h:549:12: error: assignment of read-only member 'flatbuffers::span<T>::count_'",
            "CXX=g++-14",
        ),
        ("gloo/types.h:66:11: error: 'uint8_t' does not name a type", "newer than any tested version"),
        ("x.cc:1:10: fatal error: Python.h: No such file or directory", "python3-dev"),
        ("Could NOT find CUDAToolkit (missing: CUDAToolkit_INCLUDE_DIR CUDA_CUDART)", "--cuda-from-pip"),
        (
            "ImportError: /usr/lib/x86_64-linux-gnu/libstdc++.so.6: version `GLIBCXX_3.4.32' not found",
            "CXX= launch/setup",
        ),
        ("ERROR: No matching distribution found for torch==2.14.1", "pip config list"),
        ("something nobody has seen", ""),
    ],
)
def test_the_fix_of_a_known_failure(line, advice):
    assert advice in diagnosis.known_fix(line)
    assert bool(diagnosis.known_fix(line)) == bool(advice)


@pytest.mark.parametrize(
    ("cause", "advice"),
    [
        (
            "NewConnectionError('<pip._vendor.urllib3.connection.HTTPSConnection object at 0x7f0>: Failed to "
            "establish a new connection: [Errno -3] Temporary failure in name resolution')",
            "proxy",
        ),
        ("ProxyError('Cannot connect to proxy.', OSError('Tunnel connection failed: 407'))", "proxy"),
        (
            "SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] self-signed'))",
            "PIP_CERT",
        ),
    ],
    ids=["connection", "proxy", "certificate"],
)
def test_an_index_that_cannot_be_reached_is_not_said_to_lack_a_version(cause, advice):
    retries = "Retry(total=4, connect=None, read=None, redirect=None, status=None)"
    remark = f"WARNING: Retrying ({retries}) after connection broken by '{cause}': /simple/torch/\n"
    error = "ERROR: Could not find a version that satisfies the requirement torch (from versions: {})\n"
    line = diagnosis.error_line(f"$ pip\n{remark}{error.format('none')}ERROR: No matching distribution\n")
    assert line.startswith(cause.partition("(")[0]) and advice in diagnosis.known_fix(line)
    line = diagnosis.error_line(f"$ pip\n{remark}{error.format('2.13.0')}")  # it was reached the second time
    assert "no such version" in diagnosis.known_fix(line)


def test_a_failed_step_ends_with_line_fix_and_log(tmp_path):
    log = tmp_path / "build.log"
    script = "echo compiling; echo \"gloo/types.h:66:1: error: 'uint8_t' does not name a type\"; exit 2"
    with pytest.raises(process.Failed) as stop:
        process.run("building Horovod", ["sh", "-c", script], log=log)
    said = str(stop.value)
    assert said.startswith(
        "building Horovod failed (exit 2): gloo/types.h:66:1: error: 'uint8_t' does not name"
    )
    assert "CXX=g++-14 launch/setup" in said and said.endswith(f"; log: {log}")


def test_what_a_real_compiler_says_is_found(tmp_path):
    program = tmp_path / "program.cc"
    program.write_text("int main() { return nothing_here; }\n")
    with pytest.raises(process.Failed, match=r"program\.cc:1:21: error: .*nothing_here.*was not declared"):
        process.run("compiling", [needs("c++"), "-c", program], log=tmp_path / "log", cwd=tmp_path)
