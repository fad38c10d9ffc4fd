"""The patches as patches, and what they do to the build; no compiler is needed. What they do at run time:
test_mended_horovod.py."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from set_up_support import needs, patches, place, process

HEADER = ("Without it ", "Since ", "Does ", "Shown by ")


@pytest.fixture(params=place.PATCHES, ids=lambda patch: patch.stem)
def patch(request) -> Path:
    return request.param


def test_a_patch_applies_where_it_says_and_takes_itself_back(patch, source):
    before = {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    changed = patches.apply([patch], source)
    assert {file for file, text in before.items() if file.read_bytes() != text} == set(changed)
    reverse = [needs("patch"), "--reverse", "--strip=1", "--fuzz=0", "--silent", "--input", patch]
    subprocess.run(reverse, cwd=source, check=True, timeout=30)
    assert {file: file.read_bytes() for file in before} == before


def test_patch_the_tool_makes_of_it_what_we_make_of_it(patch, source, tmp_path):
    other = shutil.copytree(source, tmp_path / "other")
    subprocess.run(
        [needs("patch"), "-p1", "--fuzz=0", "-i", patch],
        cwd=other,
        check=True,
        timeout=30,
        capture_output=True,
    )
    for file in patches.apply([patch], source):
        assert file.read_text() == (other / file.relative_to(source)).read_text()


def test_a_patch_that_does_not_apply_is_an_error_and_writes_nothing(patch, source):
    changed = patches.apply([patch], source)
    after = [file.read_text() for file in changed]
    with pytest.raises(process.Failed, match=f"{patch.name} does not apply"):
        patches.apply([patch], source)
    assert [file.read_text() for file in changed] == after


def test_a_patch_without_its_file_is_an_error(patch, tmp_path):
    with pytest.raises(process.Failed, match="does not exist"):
        patches.apply([patch], tmp_path)


def test_a_header_says_why_and_names_a_test_that_is_there(patch):
    header = patch.read_text().partition("\ndiff --git ")[0]
    for part in HEADER:
        assert re.search(rf"^{part}", header, re.MULTILINE), f"{patch.name} lacks {part!r}"
    file, test = re.search(r"^Shown by\s+(\S+)::(\w+)", header, re.MULTILINE).groups()
    assert f"def {test}(" in (place.REPO / file).read_text()


def test_the_documentation_has_a_row_for_each_patch(patch):
    assert f"\n| `{patch.stem}` |" in (place.REPO / "docs" / "horovod.md").read_text(encoding="utf-8")


def test_all_patches_at_once_are_the_patches_one_by_one_in_any_order(source, tmp_path):
    orders = {"sorted": place.PATCHES, "reversed": list(reversed(place.PATCHES))}
    for name, order in orders.items():
        tree = shutil.copytree(source, tmp_path / name)
        for patch in order:
            argv = [needs("patch"), "-p1", "--fuzz=0", "--silent", "-i", patch]
            subprocess.run(argv, cwd=tree, check=True, timeout=30)
    for file in patches.apply(place.PATCHES, source):
        for name in orders:
            assert (tmp_path / name / file.relative_to(source)).read_text() == file.read_text(), name


def test_two_patches_that_want_the_same_lines_are_an_error_and_write_nothing(source, tmp_path):
    first = place.PATCHES[0]
    twin = shutil.copy(first, tmp_path / "twin.patch")
    before = {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    with pytest.raises(process.Failed, match=f"{first.name} and twin.patch both change"):
        patches.apply([first, twin], source)
    assert {file: file.read_bytes() for file in before} == before


# what they do to the build


def cmake(folder: Path, script: str, **environ: str) -> dict[str, str]:
    """Configure a project of this text without compilers; the `NAME is VALUE` lines that it prints."""
    folder.mkdir(exist_ok=True)
    (folder / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.13)\nproject(probe NONE)\n{script}\n"
    )
    done = subprocess.run(
        [needs("cmake"), "-S", folder, "-B", folder / "build"],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^-- (\w+) is (.*)$", done.stdout, re.MULTILINE))


@pytest.fixture
def fake_torch(tmp_path):
    """What CMake's questions take for torch: a CUDA build, with a header that asks for a C++ standard."""

    def write(guard: str) -> dict[str, str]:
        package = tmp_path / "fake" / "torch"
        (package / "utils").mkdir(parents=True)
        (package / "include" / "ATen").mkdir(parents=True)
        (package / "include" / "ATen" / "ATen.h").write_text(
            f"#pragma once\n{guard}\n#error C++ too old\n#endif\n"
        )
        (package / "__init__.py").write_text(
            "import sys\n__version__ = '2.14.1+cu130'\ntorch = sys.modules[__name__]\n"
            "compiled_with_cxx11_abi = lambda: True\n"
            "class version: cuda, hip = '13.0', None\n"
        )
        (package / "utils" / "__init__.py").write_text("")
        (package / "utils" / "cpp_extension.py").write_text(
            "CUDA_HOME, ROCM_HOME = '/usr/local', None\n"
            "class CppExtension:\n    include_dirs = library_dirs = libraries = []\n"
            "    def __init__(self, name, sources): pass\n"
            "CUDAExtension = CppExtension\n"
        )
        return {"PYTHONPATH": str(package.parent)}

    return write


@pytest.mark.parametrize(
    "guard, standard",
    [
        ("#if !defined(_MSC_VER) && __cplusplus < 201402L", "14"),  # torch 1.5 to 2.0
        ("#if !defined(_MSC_VER) && __cplusplus < 201703L", "17"),  # 2.1 to 2.13
        ("#if !defined(_MSC_VER) && __cplusplus < 202002L", "20"),  # 2.14
        ("#if !defined(_MSC_VER) && __cplusplus < 202302L", "23"),  # one day
        ("#if 0", "14"),  # says nothing: Horovod's own choice stays
    ],
)
def test_cpp_standard_is_the_one_that_torch_headers_ask_for(patched, fake_torch, tmp_path, guard, standard):
    environ = fake_torch(guard)
    said = cmake(
        tmp_path / "probe",
        f"""
        set(PY_EXE "{sys.executable}")
        set(CMAKE_CXX_STANDARD 14)
        include("{patched}/cmake/Utilities.cmake")
        torch_cxx_standard(CMAKE_CXX_STANDARD)
        message(STATUS "standard is ${{CMAKE_CXX_STANDARD}}")
    """,
        **environ,
    )
    assert said["standard"] == standard


def test_the_installed_torch_is_asked_for_its_standard(patched, tmp_path):
    import torch

    said = cmake(
        tmp_path / "probe",
        f"""
        set(PY_EXE "{sys.executable}")
        set(CMAKE_CXX_STANDARD 14)
        include("{patched}/cmake/Utilities.cmake")
        torch_cxx_standard(CMAKE_CXX_STANDARD)
        message(STATUS "standard is ${{CMAKE_CXX_STANDARD}}")
    """,
    )
    version = tuple(int(number) for number in torch.__version__.split(".")[:2])
    assert said["standard"] == ("20" if version >= (2, 14) else "17" if version >= (2, 1) else "14")


def test_without_torch_the_standard_stays(patched, tmp_path):
    said = cmake(
        tmp_path / "probe",
        f"""
        set(PY_EXE "{shutil.which("false")}")
        set(CMAKE_CXX_STANDARD 14)
        include("{patched}/cmake/Utilities.cmake")
        torch_cxx_standard(CMAKE_CXX_STANDARD)
        message(STATUS "standard is ${{CMAKE_CXX_STANDARD}}")
    """,
    )
    assert said["standard"] == "14"


def test_nothing_after_it_sets_another_standard(patched):
    assert "CMAKE_CXX_STANDARD" not in (patched / "horovod" / "torch" / "CMakeLists.txt").read_text()
    root = (patched / "CMakeLists.txt").read_text()
    assert root.index("torch_cxx_standard(") < root.index("add_subdirectory(third_party/gloo)")


def pytorch_cuda(
    source: Path, tmp_path: Path, environ: dict[str, str], *, whole: bool, gpu_operations: bool
) -> bool:
    """What FindPytorch decides, given an nvcc; toolkit whole or not, GPU operations asked for or not."""
    modules = tmp_path / "modules"
    modules.mkdir(exist_ok=True)
    (modules / "FindCUDAToolkit.cmake").write_text(f"set(CUDAToolkit_FOUND {'TRUE' if whole else 'FALSE'})\n")
    said = cmake(
        tmp_path / "probe",
        f"""
        set(PY_EXE "{sys.executable}")
        set(CMAKE_CUDA_COMPILER /usr/local/bin/nvcc)
        {"set(HAVE_CUDA TRUE)" if gpu_operations else ""}
        list(PREPEND CMAKE_MODULE_PATH "{modules}")
        include("{source}/cmake/Modules/FindPytorch.cmake")
        message(STATUS "cuda is ${{Pytorch_CUDA}}")
    """,
        **environ,
    )
    return {"TRUE": True, "FALSE": False}[said["cuda"]]


def test_an_nvcc_without_a_toolkit_does_not_turn_cuda_on(patched, fake_torch, tmp_path):
    environ = fake_torch("")
    assert not pytorch_cuda(patched, tmp_path, environ, whole=False, gpu_operations=False)
    assert pytorch_cuda(patched, tmp_path, environ, whole=True, gpu_operations=False)  # as before
    assert pytorch_cuda(patched, tmp_path, environ, whole=False, gpu_operations=True)  # then it is an error
    environ["HOROVOD_WITHOUT_CUDA"] = "1"
    assert not pytorch_cuda(patched, tmp_path, environ, whole=True, gpu_operations=False)


def test_without_the_patch_an_nvcc_turns_cuda_on(source, fake_torch, tmp_path):
    assert pytorch_cuda(source, tmp_path, fake_torch(""), whole=False, gpu_operations=False)


def test_no_cmake_file_of_the_build_asks_for_policies_that_cmake_4_dropped(patched):
    files = [patched / "CMakeLists.txt", patched / "third_party" / "gloo" / "CMakeLists.txt"]
    for file in files:
        asked = re.search(r"cmake_minimum_required\(VERSION (\d+)\.(\d+)", file.read_text())
        assert (int(asked[1]), int(asked[2])) >= (3, 5), file


# what they do to the headers


def compiles(program: str, folder: Path, *options: str | Path) -> subprocess.CompletedProcess:
    """Let the C++ compiler read a program without making anything of it."""
    folder.mkdir(exist_ok=True)
    (folder / "program.cc").write_text(program)
    argv = [needs("c++"), "-std=c++17", "-fsyntax-only", *options, folder / "program.cc"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


STANDARD_LIBRARY = {  # one in which no header includes another one, as newer ones come close to
    "cstdint": "using uint8_t = unsigned char; using uint16_t = unsigned short; using uint32_t = unsigned; "
    "using uint64_t = unsigned long; using int32_t = int;",
    "string": "namespace std { class string {}; }",
    "vector": "namespace std { template <class T> class vector {}; }",
    "queue": "namespace std { template <class T> class queue {}; }",
    "mutex": "namespace std { class mutex {}; }",
    "unordered_map": "namespace std { template <class K, class V> class unordered_map {}; }",
    "iostream": "namespace std { class ostream { public: ostream& operator<<(float); }; }",
    "memory": "namespace std { template <class T> class unique_ptr; "
    "template <class T> unique_ptr<T> make_unique(); }",
}


@pytest.mark.parametrize(
    "header",
    ["horovod/common/group_table.h", "third_party/gloo/gloo/types.h"],
    ids=lambda name: Path(name).stem,
)
def test_headers_include_what_they_use(source, tmp_path, header):
    library = tmp_path / "library"
    library.mkdir()
    for name, text in STANDARD_LIBRARY.items():
        (library / name).write_text(f"#pragma once\n{text}\n")
    gloo = source / "third_party" / "gloo" / "gloo" / "common"
    gloo.mkdir(parents=True, exist_ok=True)
    (gloo / "common.h").write_text("#pragma once\n")
    options = ["-nostdinc", "-nostdinc++", "-I", library, "-I", source / "third_party" / "gloo"]
    program = f'#include "{source / header}"\n'
    assert "error:" in compiles(program, tmp_path / "before", *options).stderr
    patches.apply(place.PATCHES, source)
    after = compiles(program, tmp_path / "after", *options)
    assert after.returncode == 0, after.stderr


def test_a_span_can_be_copied_and_not_assigned(patched, tmp_path):
    program = """
        #include <array>
        #include <type_traits>
        #include <flatbuffers/stl_emulation.h>
        using span = flatbuffers::span<const int>;
        static_assert(std::is_copy_constructible<span>::value, "");
        static_assert(!std::is_copy_assignable<span>::value, "");
    """
    include = patched / "third_party" / "flatbuffers" / "include"
    done = compiles(program, tmp_path / "program", "-I", include)
    assert done.returncode == 0, done.stderr


# what they do to the build's time


def test_no_file_of_the_binding_includes_all_of_torch(patched):
    files = [file for file in (patched / "horovod" / "torch").glob("*") if file.suffix in (".cc", ".h")]
    included = {name for file in files for name in re.findall(r"#include <(torch/[^>]+)>", file.read_text())}
    assert included == {"torch/types.h", "torch/csrc/utils/pybind.h"}


def test_the_optimised_build_has_no_debug_information(patched, tmp_path):
    lines = (patched / "CMakeLists.txt").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("# RelWithDebInfo uses -O2"))
    end = next(i for i, line in enumerate(lines) if line.startswith("# Add architecture specific"))
    flags = "\n".join(lines[start:end])
    said = cmake(
        tmp_path / "probe",
        f"""
        set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O2 -g -DNDEBUG")
        set(CMAKE_C_FLAGS_RELWITHDEBINFO "-O2 -g")
        {flags}
        message(STATUS "cxx is ${{CMAKE_CXX_FLAGS_RELWITHDEBINFO}}")
        message(STATUS "c is ${{CMAKE_C_FLAGS_RELWITHDEBINFO}}")
    """,
    )
    assert {name: flags.split() for name, flags in said.items()} == {"cxx": ["-O3", "-DNDEBUG"], "c": ["-O3"]}


def test_the_build_is_a_unity_build(patched):
    for file, target in [("horovod/torch", "${PYTORCH_TARGET_LIB}"), ("third_party/gloo/gloo", "gloo")]:
        text = (patched / file / "CMakeLists.txt").read_text()
        assert f"set_target_properties({target} PROPERTIES UNITY_BUILD ON" in text


def test_torch_is_asked_twice_for_all_that_cmake_wants_to_know(patched, fake_torch, tmp_path):
    environ = fake_torch("")
    package = Path(environ["PYTHONPATH"]) / "torch"
    asked = tmp_path / "asked"
    with (package / "utils" / "cpp_extension.py").open("a") as extension:
        extension.write(
            "CppExtension.include_dirs = ['/torch/include', '/torch/api']\n"
            "CppExtension.library_dirs, CppExtension.libraries = ['/torch lib'], []\n"
        )
    with (package / "__init__.py").open("a") as init:
        init.write(f"open({str(asked)!r}, 'a').write('x')\n")
    said = cmake(
        tmp_path / "probe",
        f"""
        set(PY_EXE "{sys.executable}")
        include("{patched}/cmake/Modules/FindPytorch.cmake")
        message(STATUS "include is ${{Pytorch_INCLUDE_DIRS}}")
        message(STATUS "library is ${{Pytorch_LIBRARY_DIRS}}")
        message(STATUS "abi is ${{Pytorch_CXX11}}")
    """,
        **environ,
        HOROVOD_WITHOUT_CUDA="1",
    )
    assert said["include"] == "/torch/include;/torch/api"
    assert (said["library"], said["abi"]) == ("/torch lib", "TRUE")
    assert len(asked.read_text()) == 2
