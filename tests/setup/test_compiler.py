"""Which compiler builds Horovod: the one asked for, the default one, or another that is known to work."""

import pytest
from set_up_support import lanes
from steps import compiler
from steps.process import Missing

CPU, K80 = lanes.LANES["cpu"].gcc, lanes.LANES["k80"].gcc


@pytest.fixture
def path(tool, tmp_path, monkeypatch):
    """Compilers on PATH: name -> what it says of its version ("clang" for one of those)."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def put(**versions: str | int) -> None:
        for name, version in versions.items():
            is_clang = version == "clang"
            text = "Debian clang version 19.1.7" if is_clang else f"g++ (Debian {version}.2.0) {version}.2.0"
            body = f'case "$1" in -dumpversion) echo {version};; *) echo "{text}";; esac'
            tool(name.replace("_", "-").replace("xx", "++"), body)

    return put


def chosen(gcc=CPU, **environ: str) -> str:
    return compiler.choose(gcc, environ).command.rpartition("/")[2]


def test_the_default_compiler_is_taken_where_it_is_known_to_work(path, capsys):
    path(cxx=12, gxx_11=11)
    assert chosen() == "c++" and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "gcc, default, others, wanted",
    [
        (CPU, 17, {"gxx_12": 12}, "g++-12"),  # too new to be known
        (CPU, 9, {"gxx_10": 10}, "g++-10"),  # too old for torch
        (CPU, 17, {"gxx_14": 14, "gxx_12": 12, "gxx_18": 18}, "g++-14"),  # the newest of those known
        (K80, 12, {"gxx_11": 11, "gxx_10": 10}, "g++-11"),
    ],
)
def test_another_installed_compiler_is_used_and_reported(path, capsys, gcc, default, others, wanted):
    path(cxx=default, **others)
    assert chosen(gcc) == wanted
    said = capsys.readouterr().err
    assert f"the default compiler is g++ {default}" in said and "using " in said and wanted in said


def test_a_compiler_newer_than_any_tested_one_is_used_if_it_is_the_only_one(path, capsys):
    path(cxx=17)
    assert chosen() == "c++"
    assert "g++ 17 is newer than any tested version" in capsys.readouterr().err


def test_a_compiler_that_cannot_work_is_refused_with_the_package_that_can(path):
    path(cxx=12)
    with pytest.raises(Missing, match=r"g\+\+ 12, wanted 7 to 11 .*: apt-get install g\+\+-11$"):
        compiler.choose(K80, {})


def test_clang_is_taken_where_it_is_the_default(path):
    path(clangxx="clang")
    assert chosen() == "clang++"


def test_the_compiler_asked_for_is_taken_though_it_is_not_known(path):
    path(cxx=12, gxx_17=17)
    assert chosen(CXX="g++-17") == "g++-17"


def test_a_compiler_asked_for_may_have_a_launcher_before_it(path, tool):
    path(gxx_12=12)
    tool("ccache", 'exec "$@"')
    assert compiler.choose(CPU, {"CXX": "ccache g++-12"}).gcc == 12


@pytest.mark.parametrize(
    "asked, line", [("g++-99", "is not a working compiler"), ("g++-9", r"is g\+\+ 9, wanted >= 10")]
)
def test_a_compiler_asked_for_that_cannot_work_is_refused(path, asked, line):
    path(cxx=12, gxx_9=9)
    with pytest.raises(Missing, match=f"CXX={asked.replace('+', '[+]')} {line}"):
        compiler.choose(CPU, {"CXX": asked})


def test_the_c_compiler_is_the_one_next_to_it(path, tool):
    path(gxx_12=12)
    assert compiler.choose(CPU, {}).c_compiler is None
    tool("gcc-12", "true")
    assert compiler.choose(CPU, {}).c_compiler.endswith("/gcc-12")
