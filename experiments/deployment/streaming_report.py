"""Tables and picture of ``interstack streaming``."""

from collections.abc import Iterable
from typing import Any

from experiments.report.figures import FONT, WIDTH, Picture, legend_below, log_scale, require_matplotlib, single_axes
from experiments.report.grids import Cell, Grid, markdown_grid
from experiments.report.looks import MARKS, Look
from experiments.report.theme import LIGHT, MUTED

COLOURS = ("blue", "vermilion", "green", "purple", "petrol", "wine", "olive", "grey", "brown")
NOTE = """The encoder attends in both directions and was trained on whole utterances; nothing was trained for
streaming. Latency is algorithmic (hop, look-ahead and the window of a frame); computing time comes on top. Computed
frames per frame are those of a long stream, then of these utterances, whose chunks end where they end; attention
costs less than this factor says. Relative L2 is the norm of the difference to the whole utterance's states over their
norm, for the input of the first layer and for the last layer. Where both contexts reach over the positional
convolution (1.28 s in HuBERT), the input differs by the statistics of norms alone: group norm in the first
convolution, and normalisation of waveforms. The row *mean frame* has the utterance's mean in place of every frame: a
state as far off as that says nothing of its frame."""


def report_text(result: dict[str, Any]) -> str:
    """Render the whole result as Markdown."""
    spoken = f"{result['utterances']} utterances, {result['seconds']:.0f} s, of {result['root']}"
    scored = f"{spoken}; encoder {result['upstream']}."
    parts = ["# Streaming", scored, NOTE, markdown_grid(_summary(result))]
    for key, title in (("relative_l2", "Relative L2 by hidden state"), ("cosine", "Mean cosine by hidden state")):
        parts += [f"## {title}", markdown_grid(_by_state(result, key))]
    if (head := result.get("head")) is not None:
        parts.insert(3, _head_note(head))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _head_note(head: dict[str, Any]) -> str:
    kind = "A probe, not comparable with SUPERB" if head["preset"] == "probe" else "SUPERB's recipe"
    return (
        f"Scores are {head['metric']} of task {head['task']} on test ({head['folder']}). {kind}. The head was trained "
        "on whole utterances' states; *retrained* heads on streamed ones."
    )


def _summary(result: dict[str, Any]) -> Grid:
    titles = ["hop, left context, look-ahead (s)", "latency (ms)", "computed frames", "L2, input", "L2, last layer"]
    titles += ["cosine, last layer", *_score_titles(result)]
    whole = ["whole utterance", "", "1", "0", "0", "1", *_whole_scores(result)]
    mean = result["mean_state"]
    ends = [f"{mean['relative_l2'][0]:.3f}", f"{mean['relative_l2'][-1]:.3f}", f"{mean['cosine'][-1]:.3f}"]
    nothing = ["mean frame", "", "", *ends, *("" for _ in _score_titles(result))]
    return _grid(titles, [whole, *(_line(result, row) for row in result["settings"]), nothing])


def _line(result: dict[str, Any], row: dict[str, Any]) -> list[str]:
    return [
        setting_name(result, row),
        f"{row['latency_ms']:.0f}",
        f"{row['compute_factor']:.2f}, {row['compute_factor_here']:.2f}",
        f"{row['relative_l2'][0]:.3f}",
        f"{row['relative_l2'][-1]:.3f}",
        f"{row['cosine'][-1]:.3f}",
        *(
            f"{scores[result['head']['metric']]:.2f}"
            for key in ("scores", "retrained")
            for scores in row.get(key, {}).values()
        ),
    ]


def _score_titles(result: dict[str, Any]) -> list[str]:
    if "head" not in result:
        return []
    tests, metric = list(result["head"]["whole"]), result["head"]["metric"]
    retrained = [f"{metric}, {test}, retrained" for test in tests if "retrained" in result["settings"][0]]
    return [*(f"{metric}, {test}" for test in tests), *retrained]


def _whole_scores(result: dict[str, Any]) -> list[str]:
    if "head" not in result:
        return []
    scores = [f"{one[result['head']['metric']]:.2f}" for one in result["head"]["whole"].values()]
    return scores * (len(_score_titles(result)) // len(scores))


def _by_state(result: dict[str, Any], key: str) -> Grid:
    titles = ["hop, left context, look-ahead (s)", *map(str, range(len(result["mean_state"][key])))]
    named = [(setting_name(result, row), row[key]) for row in result["settings"]]
    return _grid(
        titles,
        [
            [name, *(f"{value:.3f}" for value in values)]
            for name, values in [*named, ("mean frame", result["mean_state"][key])]
        ],
    )


def _grid(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> Grid:
    return Grid(tuple(titles), tuple(tuple(map(Cell, row)) for row in rows))


def setting_name(result: dict[str, Any], row: dict[str, Any]) -> str:
    """Name a setting by its hop, left context and look-ahead in seconds."""
    return ", ".join(f"{row[key] * result['frame_seconds']:g}" for key in ("hop", "left_context", "look_ahead"))


def context_picture(result: dict[str, Any]) -> Picture | None:
    """Draw the last state's relative L2 against left context, a line for each hop and look-ahead, if there is one."""
    require_matplotlib()
    lines: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for row in result["settings"]:
        point = row["left_context"] * result["frame_seconds"], row["relative_l2"][-1]
        lines.setdefault((row["hop"], row["look_ahead"]), []).append(point)
    if len(next(iter(lines.values()))) < 2:
        return None
    figure, axes = single_axes(3.0, WIDTH)
    seconds, looks = result["frame_seconds"], {}
    for place, ((hop, look_ahead), points) in enumerate(sorted(lines.items())):
        look = Look(LIGHT[COLOURS[place % len(COLOURS)]], MARKS[place % len(MARKS)])
        looks[f"hop {hop * seconds:g} s, look-ahead {look_ahead * seconds:g} s"] = look
        axes.plot(*zip(*sorted(points), strict=True), **look.lines() | look.marks())
    log_scale(axes, axes.dataLim.get_points()[:, 1])
    axes.set_xlabel("left context (s)")
    axes.set_title("relative L2 of the last layer", loc="left", fontsize=FONT, color=MUTED)
    legend_below(figure, looks)
    caption = "Difference of streamed states to those of whole utterances, against the context that every call hears."
    return Picture("context", "What does a stream lose?", caption, figure)
