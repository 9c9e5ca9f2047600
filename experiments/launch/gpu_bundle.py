"""``make gpu-bundle``: gather the packages that a machine with a GPU and no network lacks, and print its commands.

The folder has wheels for that machine's Python and the commit of this tree, because the copy there has no git history.
Git ignores the folder, so it has to be sent beside the working tree.
"""

import re
import subprocess
import sys
from pathlib import Path

from datamodules.errors import InputError
from datamodules.files import write_text
from experiments.launch.gpu_commands import commands
from experiments.records.runs import git_commit

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# Needed besides torch, transformers, lightning, torchmetrics, matplotlib, pytest, xdist and their dependencies.
MISSING = (
    *("jsonargparse", "typeshed_client", "docstring_parser"),  # every command
    *("soundfile", "cffi", "pycparser", "soxr"),  # reading audio
    *("librosa", "audioread", "pooch", "decorator", "platformdirs"),  # pictures of samples
    "espeakng-loader",  # synthetic corpora
)
# pip accepts a wheel for an older C library only if its platform tag is listed.
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (1, 5, 12, 17, 24, 27, 28, 31, 34, 35)),
    *("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"),
)


def gpu_bundle(
    output: str = ".bundle", python: str = "3.12", packages: list[str] | None = None, download: bool = True
) -> None:
    """Gather wheels, then print the commands in order with their time limits.

    Args:
        output: folder of the bundle; the commands expect .bundle in the working tree.
        python: version of Python on the GPU machine.
        packages: packages that are missing there; default: all but torch, transformers, lightning, pytest and their
            dependencies. Versions are those of constraints.txt.
        download: download the wheels; otherwise the commands are printed and nothing is written.
    """
    if download:
        folder = Path(output)
        wanted = pinned(list(packages or MISSING), (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"))
        subprocess.run(pip_command(folder / "wheels", python, wanted), check=True)
        write_text(folder / "commit", f"{git_commit()}\n")
    print(in_words())


def pinned(packages: list[str], constraints: str) -> list[str]:
    """Look up ``NAME==VERSION`` of each package.

    Raises:
        InputError: a package is not in the constraints.
    """
    lines = [line.strip() for line in constraints.splitlines() if "==" in line]
    versions = {_normal(line.split("==")[0]): line for line in lines}
    if unknown := [name for name in packages if _normal(name) not in versions]:
        raise InputError(f"constraints.txt has no version of {', '.join(unknown)}")
    return [versions[_normal(name)] for name in packages]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pip_command(folder: Path, python: str, wanted: list[str]) -> list[str]:
    """Build the pip command that downloads wheels for a 64-bit Linux with that Python, whatever this machine is."""
    if not re.fullmatch(r"3\.\d+", python):
        raise InputError(f"python={python} must be a version such as 3.12")
    tags = ["--python-version", python, "--implementation", "cp"]
    for abi in (f"cp{python.replace('.', '')}", "abi3", "none"):
        tags += ["--abi", abi]
    for platform in PLATFORMS:
        tags += ["--platform", platform]
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    return [*download, *tags, "--dest", str(folder), *wanted]


def in_words() -> str:
    """Format the commands as text."""
    lines = [
        "# In the root of the working tree on the GPU machine, with the ignored folder .bundle beside git's files.",
        "# After each command copy the suite.tgz that came back into .bundle: a fresh machine goes on from it.",
    ]
    for number, command in enumerate(commands(), 1):
        again = "; give it again until nothing is left" if command.repeat else ""
        lines += ["", f"# {number}. {command.title}: at most {command.limit} s, needs .bundle{again}", command.text]
    return "\n".join(lines)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(gpu_bundle)
