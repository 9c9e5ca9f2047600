"""``interstack rescore``: score a trained head with the hidden states of other encoders.

    interstack rescore --head runs/superb/first/pr_probe/lr0.1_seed1337 --upstreams '[students/first-int8]' --output x

The head does not train again. So the difference is what another format or precision costs where the head is in use.
"""

import logging
from pathlib import Path
from typing import Any, Literal

from datamodules.errors import InputError
from datamodules.files import write_json, write_text
from experiments.bench.made import made, training_device
from experiments.deployment.heads import load_head
from lightning_modules.superb.upstream import load_upstream

log = logging.getLogger(__name__)


def rescore(
    head: str,
    upstreams: list[str],
    output: str,
    normalize: bool | None = None,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
) -> None:
    """Score a trained head on its test sets with the states of each encoder; write result.json and report.md.

    Args:
        head: result folder of `interstack superb` (with config.json and best.ckpt).
        upstreams: encoders with as many hidden states of the same width as the head's own: ONNX folders (exported with
            ``--states all``), checkpoints, exported students.
        output: folder for the results.
        normalize: give waveforms zero mean and unit variance; default: each encoder's own setting.
        accelerator: device to compute on.
    """
    if not upstreams:
        raise InputError("upstreams is empty: give at least one encoder")
    encoders = [load_upstream(name, normalize) for name in upstreams]
    heads = [load_head(Path(head), encoder, accelerator, own=False) for encoder in encoders]
    rows: list[dict[str, Any]] = []
    for encoder, trained in zip(encoders, heads, strict=True):
        rows.append({"upstream": encoder.name, "digest": encoder.digest(), "scores": trained.scores(encoder)})
        log.info("scored %d of %d encoders", len(rows), len(encoders))
    first = heads[0]
    settings = {"head": head, "task": first.settings.task, "preset": first.settings.preset, "metric": first.metric}
    result = settings | {"rows": rows} | made(training_device(accelerator))
    write_json(Path(output) / "result.json", result)
    write_text(Path(output) / "report.md", report_text(result))
    print(report_text(result))


def report_text(result: dict[str, Any]) -> str:
    """A Markdown table with a row for each encoder and the main metric of each test set."""
    metric, rows = result["metric"], result["rows"]
    sets = list(rows[0]["scores"])
    lines = [
        f"Head `{result['head']}` of {result['task']} ({result['preset']}), not trained again.\n",
        f"| encoder | {' | '.join(f'{metric} on {name}' for name in sets)} |",
        f"| :--- |{' ---: |' * len(sets)}",
    ]
    for row in rows:
        scores = [f"{row['scores'][name][metric]:.2f}" for name in sets]
        lines.append(f"| {row['upstream']} | {' | '.join(scores)} |")
    return "\n".join(lines) + "\n"
