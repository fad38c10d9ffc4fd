"""Job scripts, in which every word stays one word, and their submission."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from job_scripts import rendered, words_that_arrive

from horovod_owt.cli import cli
from horovod_owt.errors import ConfigError, RunError
from horovod_owt.slurm import client
from horovod_owt.slurm.script import quote_directive, render
from horovod_owt.slurm.spec import KINDS, JobSpec
from horovod_owt.slurm.times import seconds_in

REPO = Path(__file__).parents[2]
NASTY = [
    "a b",
    "it's",
    '"x"',
    "$(touch broken)",
    "`touch broken`",
    "a\nb",
    "a\n#SBATCH --wrap=x",
    "\\",
    "*",
    "",
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_scripts_in_slurm_are_what_render_gives(kind):
    assert (REPO / "slurm" / f"{kind}.sbatch").read_text() == rendered("--kind", kind)


def test_a_job_script_does_not_import_what_lies_in_the_folder_it_was_submitted_from(tmp_path):
    """It fails for want of a job, not for a random.py of the user's."""
    for name in ("random", "token", "psutil"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the user')")
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    script = ["bash", REPO / "slurm" / "train.sbatch", "DATA"]
    done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30)
    assert "no SLURM_JOB_NODELIST" in done.stderr, done.stderr


def test_every_word_of_owt_and_of_the_launcher_arrives_as_it_was_given(tmp_path):
    spec = JobSpec(owt_args=("/data set/x", *NASTY), apptainer="my image; touch broken", launcher="gloo")
    words = words_that_arrive(render(spec), tmp_path, "--set", "seed=$(touch broken)")
    assert words[: words.index("--")] == [
        *("job", "run", "--launcher", "gloo"),
        *("--apptainer", "my image; touch broken"),
    ]
    wanted = ["train", "/data set/x", *NASTY, "--set", "seed=$(touch broken)"]
    assert words[words.index("--") + 1 :] == wanted


@settings(max_examples=30)
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=4))
def test_any_words_become_one_line_of_bash_that_gives_them_back(words):
    line = render(JobSpec(owt_args=tuple(words))).partition("\nexec ")[2].removesuffix(' "$@"\n')
    assert shlex.split(line)[4:] == ["train", *words]


def test_modules_and_environments_are_quoted_too(tmp_path):
    venv = tmp_path / "my $(touch broken) env"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "activate").write_text("echo activated > activated\n")
    script = render(JobSpec(modules=("gcc/12; touch broken",), venv=str(venv), owt_args=("D",)))
    (tmp_path / "module.sh").write_text('module() { printf "%s\\n" "$@" > modules; }\n')
    words_that_arrive(script.replace("\n\n", "\n. ./module.sh\n", 1), tmp_path)
    assert (tmp_path / "modules").read_text().splitlines() == ["load", "gcc/12; touch broken"]
    assert (tmp_path / "activated").exists()


def test_a_batch_shell_without_the_function_of_environment_modules_gets_it(tmp_path):
    """Functions are not exported by a login shell other than bash, nor with --export=NONE."""
    (tmp_path / "init").mkdir()
    (tmp_path / "init" / "bash").write_text('module() { echo "$@" > modules; }\n')
    script = render(JobSpec(modules=("gcc/12",), owt_args=("D",)))
    words_that_arrive(script, tmp_path, MODULESHOME=str(tmp_path))
    assert (tmp_path / "modules").read_text() == "load gcc/12\n"


@pytest.mark.parametrize(
    "name", ["a b", 'say "x"', "back\\slash", "at its end\\", "it's", "$(x)", "`x`", "#x", "\u00e9t\u00e9"]
)
def test_a_directive_keeps_its_value(name):
    """sbatch reads quotes and backslashes as a POSIX shell does inside double quotes, and expands nothing."""
    assert shlex.split(quote_directive(f"--job-name={name}")) == [f"--job-name={name}"]


@pytest.mark.parametrize("value", ["a\nb", "a\n#SBATCH --wrap=x", "a\tb", "\x1b[0m", "\r"])
def test_what_has_no_place_in_a_directive_is_refused(value):
    with pytest.raises(ConfigError, match="--job-name"):
        JobSpec(job_name=value)
    with pytest.raises(ConfigError, match="printable"):
        JobSpec(extra=(f"--comment={value}",))


def test_options_of_sbatch_keep_their_names():
    options = ["--nodes=8", "--gpus-per-task=1", "--ntasks-per-node=4", "--exclusive", "--array=0-4%2"]
    script = rendered(*options, "--sbatch", "--gres=fs:1", "--sbatch", "--contiguous", "D")
    lines = script.splitlines()
    for option in [*options, "--gres=fs:1", "--contiguous", "--requeue", "--open-mode=append"]:
        assert f"#SBATCH {option}" in lines
    assert lines.index("#SBATCH --contiguous") < next(
        i for i, line in enumerate(lines) if line[:1] not in "#"
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpus-per-task", "1"], "--ntasks-per-node"),
        (["--container-image", "a", "--apptainer", "b"], "one of them"),
        (["--container-image", "a", "--launcher", "mpirun"], "srun"),
        (["--container-mounts", "/a:/a"], "--container-image or --apptainer"),
        (["--time", "2"], "--time 2 with a warning 120 s before its end.*--signal"),
        (["--time", "0:03:59"], "wanted more than 240 s"),
        (["--time", "1:59", "--signal", "B:USR1@30"], "wanted more than 150 s"),
        (["--sbatch", "rm -r x"], "option"),
        (["--min-ranks", "2"], "--kind elastic"),
        (["--kind", "elastic", "--apptainer", "a"], "ssh"),
        (["--kind", "elastic", "--launcher", "pmix"], "ssh"),
    ],
)
def test_what_makes_no_sense_together_is_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        CliRunner().invoke(cli, ["job", "render", *options, "D"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:30:05", 5405),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-00:00:07", 86407),
        ("UNLIMITED", None),
        ("0", None),
        ("", None),
    ],
)
def test_time_limits_are_slurms(limit, seconds):
    assert seconds_in(limit) == seconds
    rendered("--time", limit, "D")  # long enough, or none that we know


def test_a_short_job_that_is_not_warned_may_be_short():
    rendered("--kind", "preflight", "--time", "2", "D")
    rendered("--time", "3", "--signal", "B:USR1@30", "D")


def test_an_elastic_job_outlives_its_nodes_and_has_them_alone():
    script = rendered("--kind", "elastic", "--nodes", "4", "--min-ranks", "3", "D")
    for option in ("--no-kill", "--exclusive", "--requeue", "--signal=B:USR1@120"):
        assert f"#SBATCH {option}" in script.splitlines()
    assert "exec owt job run --elastic --min-ranks 3 -- train D " in script
    assert "--no-kill" not in rendered("D")


@pytest.fixture
def fake_sbatch(tmp_path, monkeypatch):
    """An `sbatch` that keeps the script it was given."""
    tool = tmp_path / "bin" / "sbatch"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\ncp "$2" "{tmp_path}/seen.sh"\nenv >"{tmp_path}/env"\necho "4242;cluster"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    return tmp_path / "seen.sh"


def test_a_job_submitted_from_a_job_gets_none_of_its_settings(fake_sbatch, monkeypatch):
    """From a shell of `srun --pty`, say: sbatch would pass them on, and the new job take them for its own."""
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SLURM_NTASKS", "1")  # here for a reason of the user's
    args = ["job", "submit", "/data"]
    CliRunner().invoke(cli, args, catch_exceptions=False)
    assert "SLURM_NTASKS=1" in (fake_sbatch.parent / "env").read_text().splitlines()
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SRUN_CPUS_PER_TASK"):
        monkeypatch.setenv(name, "1")
    CliRunner().invoke(cli, args, catch_exceptions=False)
    said = (fake_sbatch.parent / "env").read_text().splitlines()
    assert [line for line in said if line.startswith(("SLURM", "SRUN"))] == ["SLURM_CONF=/etc/slurm.conf"]


def test_sbatch_may_wait_for_the_jobs_end(fake_sbatch, monkeypatch):
    """--sbatch --wait: that it takes long is no fault of slurmctld's."""
    tool = fake_sbatch.parent / "bin" / "sbatch"
    tool.write_text(tool.read_text() + "sleep 0.3\n")
    monkeypatch.setattr(client, "LIMIT_S", 0.05)
    assert client.submit("#!/bin/sh\n") == "4242"


def test_submit_hands_the_rendered_script_to_sbatch_and_prints_the_number(fake_sbatch):
    args = ["job", "submit", "--nodes", "2", "/data", "--", "--set", "lr=0.1"]
    dry = CliRunner().invoke(cli, [*args[:2], "--dry-run", *args[2:]], catch_exceptions=False)
    assert not fake_sbatch.exists()
    done = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert done.stdout == "4242\n"
    assert fake_sbatch.read_text() == dry.stdout


@pytest.mark.parametrize(
    "said",
    [
        "Welcome to the Supercomputer\n--> Verifying 2 limits...OK\n4242",
        "No reservation for this job\nSubmitted batch job 4242",
        "Submitted batch job 4242 on cluster slaking",
    ],
)
def test_the_job_id_is_found_among_what_the_sbatch_of_a_site_prints(fake_sbatch, said):
    (fake_sbatch.parent / "bin" / "sbatch").write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\n")
    assert client.submit("#!/bin/sh\n") == "4242"


def test_an_sbatch_that_prints_no_job_id_is_quoted(fake_sbatch):
    (fake_sbatch.parent / "bin" / "sbatch").write_text("#!/bin/sh\necho queued, see mail\n")
    with pytest.raises(RunError, match="sbatch printed no job id: 'queued, see mail'; fix: .*squeue"):
        client.submit("#!/bin/sh\n")
