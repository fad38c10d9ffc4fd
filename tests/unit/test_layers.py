"""The layers of the design: who may import whom, what stays light, and who talks to Horovod.

Imports are read from the sources, those in functions and under TYPE_CHECKING included.
"""

import ast
import gc
import resource
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import horovod_owt
from horovod_owt.commands.loading import loading

PACKAGE = Path(horovod_owt.__file__).parent
HEAVY = {"torch", "torchvision", "horovod", "nvidia", "mpi4py"}

# Folder -> the folders that it may import from, beside itself and the modules of ROOT.
MAY_IMPORT = {
    "perf": {"runs"},
    "data": set(),
    "runs": set(),
    "model": {"data"},  # its hash, for dropout
    "parallel": {"perf", "model"},
    "launch": {"runs", "parallel"},
    "slurm": {"runs", "parallel", "launch"},
    "preflight": {"perf", "data", "parallel"},
    "monitoring": {"data", "runs", "parallel"},
    "train": {"perf", "data", "runs", "model", "parallel", "monitoring"},
    "inference": {"perf", "data", "runs", "model", "parallel", "train"},
    "bench": {"perf", "data", "model", "parallel", "train"},
    "report": {"perf", "data", "runs"},
    "recipes": set(),
}
MAY_IMPORT["commands"] = set(MAY_IMPORT)
ROOT = {
    "",
    "cgroups",
    "compression",
    "config",
    "errors",
    "files",
    "filesystem",
    "logs",
    "private",
    "recipe",
    "schedule",
    "signals",
    "text",
    "topology",
    "versions",
}
ABOVE = {"cli": {"commands"}, "__main__": {"cli"}}

# What loads on a login node, or in a moment: nothing heavy at the top of these, or of what they import there.
LIGHT = {"", "commands", "perf", "report", "runs", "launch", "slurm", "preflight"}
LIGHT_TOO = {
    "data": lambda name: not name.startswith(("batch", "copies", "dali_", "nvjpeg", "pipeline_")),
    "parallel": {
        "activity",
        "admission",
        "control_channel",
        "cores",
        "device",
        "gloo",
        "gpus",
        "interfaces",
        "lines",
        "mpi",
        "objects",
        "rendezvous",
    }.__contains__,
    "train": {"prepare"}.__contains__,
    "inference": {"confusion", "names", "outcomes", "request"}.__contains__,
    "bench": {"request"}.__contains__,
}
# Not in functions either, but for the part of Horovod that starts ranks.
TORCHLESS = {"perf", "report", "runs", "launch", "slurm"}
STARTERS = {"launch.horovodrun", "parallel.store"}


class Import(NamedTuple):
    name: str  # without `horovod_owt.` for the project's own modules
    own: bool
    deferred: bool  # in a function, or for type checkers only


def modules() -> dict[str, Path]:
    """Name below horovod_owt -> file. A package goes by its folder's name, so horovod_owt itself by none."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def read_imports(tree: ast.AST, known: set[str], *, deferred: bool = False) -> set[Import]:
    """Whatever is imported anywhere below this node."""
    if isinstance(tree, ast.Import):
        return {_import(alias.name, deferred) for alias in tree.names}
    if isinstance(tree, ast.ImportFrom):
        assert not tree.level, "relative imports are not read here"
        whole = {f"{tree.module}.{alias.name}" for alias in tree.names}  # a module's, or one of its names
        of_modules = {name for name in whole if name.removeprefix("horovod_owt.") in known}
        return {_import(name if name in of_modules else tree.module, deferred) for name in whole}
    deferred |= isinstance(tree, ast.FunctionDef)
    deferred |= isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING"
    below = (read_imports(node, known, deferred=deferred) for node in ast.iter_child_nodes(tree))
    return set().union(*below)


def _import(name: str, deferred: bool) -> Import:
    own = name.partition(".")[0] == "horovod_owt"
    return Import(name.removeprefix("horovod_owt").removeprefix(".") if own else name, own, deferred)


MODULES = modules()
IMPORTS = {
    name: read_imports(ast.parse(path.read_text(encoding="utf-8")), set(MODULES))
    for name, path in MODULES.items()
}


def folder_of(module: str) -> str:
    """Its sub-package; an empty one for the modules of horovod_owt itself."""
    head, dot, _ = module.partition(".")
    return head if dot or (PACKAGE / head).is_dir() else ""


def forbidden(imports: dict[str, set[Import]]) -> list[str]:
    """Imports that the table does not allow."""
    found = []
    for module, names in imports.items():
        folder = folder_of(module)
        allowed = MAY_IMPORT[folder] | {folder} if folder else ABOVE.get(module, set())
        for name in (each.name for each in names if each.own):
            if name not in ROOT and not {name, folder_of(name)} & allowed:
                found.append(f"{module} imports {name}")
    return found


def circle(imports: dict[str, set[Import]]) -> list[str]:
    """The modules of an import circle, in order; empty if there is none."""
    graph = {module: {each.name for each in names if each.own} for module, names in imports.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return []


def heavy_ways(imports: dict[str, set[Import]], start: set[str], *, deferred: bool) -> list[str]:
    """How these modules come to import something heavy; through imports in functions too if `deferred`."""
    ways, seen = [], set()
    waiting = [[module] for module in sorted(start)]
    while waiting:
        way = waiting.pop()
        if way[-1] in seen:
            continue
        seen.add(way[-1])
        for each in sorted(imports[way[-1]]):
            if each.deferred and not deferred:
                continue
            if each.own:
                waiting.append([*way, each.name])
            elif each.name.partition(".")[0] in HEAVY:
                ways.append(" -> ".join([*way, each.name]))
    return ways


def light_modules() -> set[str]:
    def is_light(module: str) -> bool:
        folder, _, name = module.rpartition(".")
        return folder_of(module) in LIGHT or LIGHT_TOO.get(folder, lambda name: False)(name)

    return {module for module in MODULES if is_light(module) and module != "__main__"}


def test_every_folder_has_its_place_in_the_table():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == MAY_IMPORT.keys()
    assert {name for name in MODULES if not folder_of(name)} == ROOT | ABOVE.keys()


def test_folders_import_what_the_table_allows():
    assert forbidden(IMPORTS) == []


def test_no_module_imports_itself_by_way_of_others():
    assert circle(IMPORTS) == []


def test_light_modules_import_nothing_heavy_at_the_top():
    assert heavy_ways(IMPORTS, light_modules(), deferred=False) == []


def test_what_starts_jobs_and_reads_runs_needs_no_torch_at_all():
    ways = heavy_ways(IMPORTS, {m for m in MODULES if folder_of(m) in TORCHLESS}, deferred=True)
    talk = {tuple(way.split(" -> ")[-2:]) for way in ways}
    assert {module for module, _ in talk} == STARTERS
    assert all(f"{name}.".startswith("horovod.runner.") for _, name in talk), talk


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("runs.folder", "from horovod_owt.train import loop"),
        ("parallel.step", "def f():\n    from horovod_owt.train.replica import Replica"),
        ("errors", "import horovod_owt.cli"),
        ("data.store", "if TYPE_CHECKING:\n    from horovod_owt.parallel.runtime import World"),
    ],
)
def test_a_forbidden_import_is_seen(module, line):
    spoiled = {**IMPORTS, module: IMPORTS[module] | read_imports(ast.parse(line), set(MODULES))}
    assert len(forbidden(spoiled)) == 1 and forbidden(spoiled)[0].startswith(f"{module} imports ")


def test_a_circle_and_a_heavy_import_are_seen():
    """Both behind others, and where a program that runs would not meet them."""
    back = read_imports(ast.parse("def f():\n    from horovod_owt.runs import attempts"), set(MODULES))
    assert {"runs.attempts", "runs.records"} == set(
        circle({**IMPORTS, "runs.records": IMPORTS["runs.records"] | back})
    )
    torch = {Import("torch", own=False, deferred=False)}
    spoiled = {**IMPORTS, "runs.records": IMPORTS["runs.records"] | torch}
    assert heavy_ways(spoiled, {"slurm.status"}, deferred=False) == ["slurm.status -> runs.records -> torch"]


def imported_after(code: str) -> set[str]:
    program = f"{code}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_light_modules_load_nothing_heavy():
    """In a program: what other packages bring along is seen too."""
    names = [f"horovod_owt.{module}".rstrip(".") for module in sorted(light_modules())]
    code = f"import importlib; [importlib.import_module(name) for name in {names}]"
    code += "; from horovod_owt.cli import cli; cli(['train', '--help'], standalone_mode=False)"
    assert not HEAVY & imported_after(code)


def test_help_takes_half_a_second_of_cpu_time():
    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "horovod_owt", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(5)) < 0.5  # the best of five: the machine may be busy


def test_garbage_is_left_alone_while_modules_load_and_looked_for_again():
    gc.unfreeze()
    with pytest.raises(ImportError), loading():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() > 0
    gc.unfreeze()


def test_only_parallel_talks_to_horovod():
    def talks(module: str) -> set[str]:
        return {
            each.name for each in IMPORTS[module] if each.name.partition(".")[0] == "horovod" and not each.own
        }

    above = {module: talks(module) for module in MODULES if talks(module) and folder_of(module) != "parallel"}
    # the peer of the benchmark is a Horovod loop as others write it
    assert above.pop("bench.plain_loop") == {"horovod.torch"}
    # what starts ranks is not what they do: Horovod's launcher may be called, and loads nothing heavy
    assert above.keys() == {"launch.horovodrun"}
    launcher = "; ".join(f"import {name}" for name in sorted(set().union(*map(talks, STARTERS))))
    assert HEAVY & imported_after(launcher) == {"horovod"}


def test_only_runs_names_the_files_of_a_run_folder():
    files = ("config.json", "metrics.jsonl", "outcome.json", "attempts.jsonl", "best.json", "state.json")
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        words = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in prose]
        named = {name for name in files for word in words if name in str(word.value)}
        assert not named or folder_of(module) == "runs", f"{module} names {named}"
