"""Text and JSON files are read and written in one place, so that none is half written, holds NaN or has no name."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("callbacks", "datamodules", "experiments", "lightning_modules")
# Files that Python's own way is right for, and why.
ELSEWHERE = {
    "datamodules/loading.py": "a list that several processes append to",
    "datamodules/sentences.py": "part of the package",
    "experiments/bench/memory.py": "/proc",
    "experiments/bench/suite.py": "the log of a process",
    "experiments/dashboards/specification.py": "part of the package",
    "experiments/deployment/measuring.py": "the log of a process",
    "experiments/deployment/worker.py": "a pipe to the parent process",
    "experiments/launch/gpu_bundle.py": "part of the repository",
    "experiments/records/csv_logger.py": "a table that rows are appended to",
    "experiments/report/page.py": "part of the package",
    "experiments/superb/reference/added_tasks.py": "runs in s3prl's environment",
    "experiments/superb/reference/existing_tasks.py": "runs in s3prl's environment",
    "experiments/studies/quickstart.py": "the terminal, by a descriptor of its own",
}


def other_ways(source: str) -> list[str]:
    """Calls that read or write text or JSON by themselves; appending to a log is no such call."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [ast.unparse(call) for call in calls if _is_another_way(call)]


def _is_another_way(call: ast.Call) -> bool:
    match ast.unparse(call.func).rpartition("."):
        case (_, ".", "read_text" | "write_text") | ("json", ".", "dump" | "load"):
            return True
        case ("os", ".", "fdopen") | (_, "", "open"):
            return not set(_mode(call, 1)) & {"a", "b"}
        case (owner, ".", "open") if owner != "os":
            return not set(_mode(call, 0)) & {"a", "b"}
    return False


def _mode(call: ast.Call, place: int) -> str:
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] or call.args[place : place + 1]
    return ast.unparse(given[0]) if given else "r"


def test_text_and_json_are_read_and_written_in_one_place() -> None:
    paths = [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]
    assert len(paths) > 100
    found = {str(path.relative_to(REPOSITORY)): other_ways(path.read_text(encoding="utf-8")) for path in paths}
    assert {path: calls for path, calls in found.items() if calls and path not in ELSEWHERE} == {}
    assert [path for path in ELSEWHERE if not found.get(path)] == []


@pytest.mark.parametrize(
    ("source", "other"),
    [
        ("path.write_text('a')", True),
        ("Path(x).read_text(encoding='utf-8')", True),
        ("json.dump(value, file)", True),
        ("json.load(file)", True),
        ("open(path)", True),
        ("open(path, 'w', encoding='utf-8')", True),
        ("path.open(encoding='utf-8', newline='')", True),
        ("os.fdopen(handle, 'w')", True),
        ("open(path, 'rb')", False),
        ("path.open('ab')", False),
        ("path.open('a', encoding='utf-8')", False),
        ("os.open(path, os.O_RDONLY)", False),
        ("a.b(c).open(mode='w')", True),
        ("write_text(path, 'a')", False),
        ("json.dumps(value)", False),
    ],
)
def test_the_test_sees_them(source: str, other: bool) -> None:
    assert bool(other_ways(source)) == other
