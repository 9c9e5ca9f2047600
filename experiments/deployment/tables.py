"""The tables and the picture of ``latency.json``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from experiments.report.figures import FONT, SMALL, WIDTH, Picture, axes_grid, legend_below, light_grid
from experiments.report.grids import Cell, Grid, markdown_grid
from experiments.report.looks import MARKS, Look
from experiments.report.numbers import DASH, show_count
from experiments.report.theme import INK, LIGHT, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Mapping[str, Any]
COLOURS = tuple(
    LIGHT[name] for name in ("petrol", "vermilion", "blue", "green", "purple", "brown", "wine", "grey", "olive")
)
KINDS = ("PyTorch float32", "PyTorch bfloat16", "PyTorch int8")  # their marks; each ONNX precision has a further one


def markdown(result: Result) -> str:
    """Format all tables, with what they measure and how to make them again."""
    parts = [
        f"# Latency\n\n{_made(result)}\n",
        "## Size and computation\n",
        markdown_grid(_facts(result)),
        _facts_notes(result),
    ]
    for threads in result["threads"]:
        parts += [f"## {_threads(threads)}\n", markdown_grid(_times(result, str(threads)))]
    return "\n".join([*parts, _times_notes(result)])


def _made(result: Result) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return (
        f"`{result['command']}`\n\nCommit {result['commit']}; {result['hardware']} "
        f"({', '.join(result['cpu_features']) or 'no vector units known'}); {versions}. Load of the machine before the "
        f"measurement: {result['load_before']:.1f}."
    )


def _threads(threads: int | str) -> str:
    return "One thread" if str(threads) == "1" else f"{threads} threads"


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['name']} (random weights)" if row["random_weights"] else row["name"]


def _cells(*texts: str) -> tuple[Cell, ...]:
    return tuple(Cell(text) for text in texts)


def _number(value: float | None, form: str) -> str:
    return DASH if value is None else format(value, form)


def _facts(result: Result) -> Grid:
    titles: tuple[str, ...] = (
        "Encoder",
        "Format",
        "Precision",
        "Parameters",
        "MB",
        f"GMACs per s of audio, at {result['macs_seconds']:g} s",
    )
    titles += ("GMACs, SUPERB", "Distance from float32")
    rows = [
        _cells(
            _name(row),
            row["format"],
            row["precision"],
            DASH if row["parameters"] is None else show_count(row["parameters"]),
            f"{row['weights_mb']:.1f}",
            _number(row["gmacs_per_second"], ".2f"),
            _number(row["superb_gmacs"], ".0f"),
            _number(row["difference"], ".1e") if row["difference"] else DASH,
            *([_number(row["score"], ".2f")] if result["score"] else []),
        )
        for row in result["rows"]
    ]
    return Grid((*titles, *([result["score"]] if result["score"] else [])), tuple(rows))


def _facts_notes(result: Result) -> str:
    note = (
        "MB: the weights as a file in the row's precision. GMACs: 1e9 multiply-accumulate operations of matrix "
        "products and convolutions in the row's encoder, by formula and the same in every precision; SUPERB: the sum "
        "over 32 recordings (225 s) of the SLT 2022 challenge's profiling tool. Distance from float32: relative L2 "
        "distance of the last hidden state, on noise, from that of the PyTorch row in float32.\n"
    )
    if result["score"]:
        note += f"{result['score']}: measured in float32, for every format and precision of the encoder.\n"
    return note


def _times(result: Result, threads: str) -> Grid:
    batch, lengths = result["batch_size"], result["seconds"]
    sizes = list(dict.fromkeys((1, batch)))
    titles = ["Encoder", "Start, s", *(f"{size} x {length:g} s, ms" for size in sizes for length in lengths)]
    titles += [f"Real-time factor, {length:g} s" for length in lengths[-1:]]
    titles += ["Libraries MB", *(f"Peak MB, {size} x {lengths[-1]:g} s" for size in sizes)]
    rows = []
    for row in result["rows"]:
        found = row["threads"][threads]
        longest = next(run for run in found["runs"] if (run["batch"], run["seconds"]) == (1, lengths[-1]))
        name = f"{_name(row)}, {row['label'].removeprefix(row['name'] + ', ')}"
        peaks = [
            _number(each, ",.0f") for each in (found["libraries_mb"], *(each["peak_mb"] for each in found["memory"]))
        ]
        rows.append(_cells(name, f"{found['start']['total']:.1f}", *map(_spread, found["runs"]),
                           f"{longest['real_time_factor']:.4f}", *peaks))  # fmt: skip
    return Grid(tuple(titles), tuple(rows))


def _spread(run: Mapping[str, Any]) -> str:
    """Median and quartiles with three digits."""
    digits = 0 if run["median_ms"] >= 100 else 1
    low, high = run["quartiles_ms"]
    return f"{run['median_ms']:,.{digits}f} [{low:,.{digits}f}, {high:,.{digits}f}]"


def _times_notes(result: Result) -> str:
    more = [row["label"] for row in result["rows"] if row["computes"] == "all hidden states"]
    every = "the last hidden state" + (f" (all hidden states: {'; '.join(more)})" if more else "")
    return (
        f"Medians and quartiles over {result['rounds']} turns, in which all rows alternate; inputs are noise, and each "
        f"run computes {every}. Start: from the start of the process to the first output "
        f"({result['seconds'][0]:g} s of audio), with the imports of the format's library, once. A PyTorch row also "
        "runs the checks of `interstack superb`'s loading there. Real-time factor: seconds of computing per second of "
        "audio, one utterance. Peak MB: the highest resident memory of the whole process up to that input, with "
        "loading (bfloat16 and int8 of PyTorch load float32 first) and libraries; inputs come from short to long, "
        "batches last. Libraries MB: the peak before the encoder is loaded.\n"
    )


def picture(result: Result) -> Picture:
    """Draw latency of one utterance, of the middle length: against the score, or alone if there are no scores."""
    length = result["seconds"][len(result["seconds"]) // 2]
    scored = bool(result["score"])
    looks = _looks(result["rows"])
    count, panels = len(result["rows"]), len(result["threads"])
    height = 3.0 if scored else 0.7 + 0.24 * count
    figure, grid = axes_grid(panels, 1, size=(WIDTH, height * panels))
    for threads, (axes,) in zip(result["threads"], grid, strict=True):
        light_grid(axes)
        for place, row in enumerate(result["rows"]):
            runs = row["threads"][str(threads)]["runs"]
            run = next(each for each in runs if (each["batch"], each["seconds"]) == (1, length))
            y = row["score"] if scored else count - 1 - place
            if y is not None:
                _point(axes, run, y, looks[row["label"]])
        _finish(axes, result, scored)
        axes.set_title(_threads(threads).lower(), loc="left", fontsize=FONT, color=MUTED)
        axes.set_xlabel(f"ms for {length:g} s of audio")
        if scored:
            axes.set_ylabel(result["score"])
        else:
            axes.set_yticks(range(count), [row["label"] for row in result["rows"]][::-1])
    lefts, rights = zip(*(axes.get_xlim() for (axes,) in grid), strict=True)
    for (axes,) in grid:
        axes.set_xlim(min(lefts), max(rights))
    if scored:
        legend_below(figure, _legend([row for row in result["rows"] if row["score"] is not None], looks), lines=False)
    caption = "Median latency of one utterance; bars are quartiles, mostly within the marker."
    if scored:
        caption += (
            f" {'Lower' if result['better'] == 'low' else 'Higher'} scores are better; all were measured in float32."
        )
    return Picture("latency", "Quality against latency" if scored else "Latency", caption, figure)


def _point(axes: "Axes", run: Mapping[str, Any], y: float, look: Look) -> None:
    x, (low, high) = run["median_ms"], run["quartiles_ms"]
    axes.errorbar(x, y, xerr=[[x - low], [high - x]], color=look.colour, elinewidth=1, zorder=2.5)
    axes.plot([x], [y], linestyle="none", zorder=3, **look.marks(6))


def _finish(axes: "Axes", result: Result, scored: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=SMALL)
    if not scored:
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(-0.7, len(result["rows"]) - 0.3)
    axes.margins(x=0.12, y=0.15)


def _kind(row: Mapping[str, Any]) -> str:
    return f"{row['format']} {row['precision']}"


def _looks(rows: Sequence[Mapping[str, Any]]) -> dict[str, Look]:
    """Choose looks by label: the colour is the encoder's, the mark that of the format and precision."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    kinds = list(dict.fromkeys((*KINDS, *map(_kind, rows))))
    return {
        row["label"]: Look(
            COLOURS[names.index(row["name"]) % len(COLOURS)],
            MARKS[kinds.index(_kind(row)) % len(MARKS)],
            "full" if row["precision"] == "float32" else "none",
        )
        for row in rows
    }


def _legend(rows: Sequence[Mapping[str, Any]], looks: Mapping[str, Look]) -> dict[str, Look]:
    """Name the colours, and the marks if there are several."""
    colours = {row["name"]: Look(looks[row["label"]].colour, "o") for row in rows}
    marks = {_kind(row): replace(looks[row["label"]], colour=MUTED) for row in rows}
    return colours | (marks if len(marks) > 1 else {})
