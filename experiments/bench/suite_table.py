"""The table of ``interstack bench suite``: the measurements of each finished part, read from its file."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from datamodules.files import read_json
from experiments.bench.profile import host_bound_below, name_in_words

HEAD = ("part", "what", "ms per step", "audio s/s", "% of the matmul peak", "memory GB", "besides")
Cells = tuple[str, float | None, float | None, float | None, float | None, str]


def table(folder: Path, state: Mapping[str, Any]) -> str:
    """Format a Markdown table with a row per measurement, then one with the status of every part.

    Args:
        folder: folder of the JSON files.
        state: content of ``suite.json``.
    """
    lines = [_row(HEAD), "|---" * len(HEAD) + "|"]
    outputs = dict.fromkeys(part["output"] for part in state["parts"].values())
    for output in outputs:
        if (path := folder / output).is_file():
            name = path.stem
            found = read_json(path)
            read = READERS.get(name, _steps)
            lines += [_row((name, *map(_text, cells))) for cells in read(found, state)]
    lines += ["", "| part | ended | seconds |", "|---|---|---|"]
    lines += [_row((name, part["status"], f"{part['seconds']:.0f}")) for name, part in state["parts"].items()]
    how = f"{state['hardware']}; torch {state['torch']}, cuDNN {state['cudnn']}, float32 {state['float32']}"
    return "\n".join([*lines, "", f"{how}; commit {state['commit']}", ""])


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _text(value: str | float | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _profiles(found: list[dict[str, Any]], state: Mapping[str, Any]) -> Iterable[Cells]:
    for row in found:
        if row["commit"] == state["commit"]:
            kinds = ", ".join(f"{kind} {sums['ms']:.1f}" for kind, sums in list(row["kinds"].items())[:4])
            bound = "" if (below := host_bound_below(row)) is None else f"; host-bound below {below:.0f} audio s"
            numbers = (row["step_ms"], row["audio_s_per_s"], 100 * row["mfu"], row["memory_gb"])
            yield name_in_words(row), *numbers, f"{row['kernels']} kernels; ms: {kinds}{bound}"


def _steps(found: dict[str, Any], state: Mapping[str, Any]) -> Iterable[Cells]:
    setting, growth = found["setting"], found["growth"]
    one = setting["lengths"] == "one"
    length = f"{setting['seconds']:g} s" if one else f"{setting['lengths']}, grid {setting['length_grid']}"
    size = f"{setting['batch_size']} x {length}"
    for row in found["depths"]:
        numbers = (row["step_ms"], row["audio_s_per_s"], 100 * row["mfu"], row["memory_gb"])
        yield f"{size}, {setting['precision']}, depth {row['depth']}", *numbers, f"{row['lengths']} lengths"
    if growth:
        yield "f", None, None, None, None, f"{growth['f']:.3f}; equal predicted {growth['equal']['predicted']:.2f}"


def _runs(found: dict[str, Any], state: Mapping[str, Any]) -> Iterable[Cells]:
    audio = found["batch_size"] * found["seconds"]
    for name, row in found["variants"].items():
        ratios = [f"{ratio['median']:.2f} x {other}" for other, ratio in row["ratios"].items()]
        if row["growth"] and row["against_full"]:
            predicted, measured = row["growth"]["equal"]["predicted"], row["against_full"]["equal"]["median"]
            ratios.append(f"growth predicted {predicted:.2f}, measured {measured:.2f}")
        yield name, row["step_ms"], audio / row["step_ms"] * 1000, None, None, "; ".join(ratios)


def _reading(found: dict[str, Any], state: Mapping[str, Any]) -> Iterable[Cells]:
    for row in found["variants"]:
        yield row["variant"], None, row["audio_s_per_s"], None, None, f"{row['audio_s_per_cpu_s']:.0f} per core second"


def _growths(found: dict[str, Any], state: Mapping[str, Any]) -> Iterable[Cells]:
    for row in found["growths"]:
        name = f"{row['depth_before']} to {row['depth']} layers"
        yield name, None, None, None, None, f"{row['seconds']:.3f} s"


def _points(found: dict[str, Any], state: Mapping[str, Any]) -> Iterable[Cells]:
    for row in found["points"]:
        size = f"{row['processes']} process, {row['batch_size']} x {row['seconds']:g} s, depth {row['depth']}"
        yield (
            size,
            row.get("step_ms"),
            row.get("audio_s_per_s"),
            None,
            None,
            "failed" if "error" in row else row["axis"],
        )


def _kernels(found: dict[str, Any], state: Mapping[str, Any]) -> Iterable[Cells]:
    for row in found["rows"]:
        ratios = f"forward {row['forward_ratio']:.2f}, both {row['both_ratio']:.2f}; error {row['error']:.1e}"
        yield f"{row['part']}, {row['name']}", row["both_ms"], None, None, None, ratios


READERS: dict[str, Callable[[Any, Mapping[str, Any]], Iterable[Cells]]] = {
    "profile": _profiles,
    "compare": _runs,
    "data": _reading,
    "data_features": _reading,
    "growth": _growths,
    "kernels": _kernels,
    "scaling": _points,
}
