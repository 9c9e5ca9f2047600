"""What documented commands write is ignored by git, and nothing that belongs to the project is."""

import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

from experiments.dashboards.command import dashboard
from tests.conftest import NEEDS_CLONE, REPOSITORY
from tests.test_readme import PAGES, command_of, commands, interstack_commands

pytestmark = NEEDS_CLONE

WRITES = ("--output", "--runs_dir", "--feature_cache", "--data.cache_dir", "--cache_dir", "--data.targets")


def git(*arguments: str, given: str = "") -> list[str]:
    result = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], input=given, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stderr
    return result.stdout.splitlines()


def ignored(paths: set[str]) -> set[str]:
    return set(git("check-ignore", "--no-index", "--stdin", given="\n".join(sorted(paths))))


def written() -> set[str]:
    """Paths in the working directory that a documented command writes, a file in each folder."""
    paths = {"runs/first/config_1.yaml", "runs/quickstart/report.html", "runs/superb/first/result.json", "wandb/x"}
    for line in interstack_commands():
        words = shlex.split(line)
        values = [value for option, value in pairwise(words) if option in WRITES]
        paths |= {value if Path(value).suffix else f"{value}/file" for value in values}
        if command_of(line) == "dashboard" and "--output" not in words:
            paths.add(f"{dashboard.__defaults__[-1]}/table1_mini.json")  # type: ignore[index]
    script = (REPOSITORY / "experiments/launch/slurm.sbatch").read_text(encoding="utf-8")
    paths |= {name.replace("%j", "1") for name in re.findall(r"^#SBATCH --output=(\S+)", script, re.MULTILINE)}
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    paths |= {f"{value}/file" for value in re.findall(r"--output (\S+)", makefile)}
    # Results in benchmarks/ are published with the project.
    return {path for path in paths if not path.startswith(("/", "benchmarks/"))}


def test_what_documented_commands_write_is_ignored() -> None:
    paths = written()
    assert {"corpora/espeak/file", "dashboards/table1_mini.json", "interstack-1.log", "gpu_results/suite/file"} <= paths
    assert paths - ignored(paths) == set()


def test_no_file_of_the_project_is_ignored() -> None:
    tracked = set(git("ls-files"))
    assert len(tracked) > 200
    assert any("sbatch" in line for page in PAGES for line in commands(page))
    assert ignored(tracked) == set()


def test_control_a_source_of_the_same_name_is_not_ignored() -> None:
    sources = {"experiments/studies/new.yaml", "experiments/dashboards/new.py", "tests/probes/new.py", "notes.md"}
    assert ignored(sources) == set()
    assert ignored({"studies/new.yaml"}) == {"studies/new.yaml"}
