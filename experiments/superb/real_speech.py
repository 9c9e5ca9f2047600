"""``python -m experiments.superb.real_speech --data DIR --models DIR --output DIR``: tasks of SUPERB on real speech.

A trained encoder (``MODELS/teacher``), its untrained copy (``MODELS/untrained``) and FBANK are probed for phones,
words, speakers and keywords on a few hours of real recordings (see tests/test_real_speech.py). With ``--sets``, the
folder that ``experiments.corpora.superb_sets`` writes, they do ASV, SD and QbE instead. Every number comes from
``interstack superb``; finished runs are kept.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from datamodules.files import read_json, read_lines, write_json, write_text
from datamodules.superb.registry import find_source
from datamodules.superb.speech_commands import split_of
from experiments import cli
from experiments.superb.options import task_folder
from lightning_modules.superb.tasks import Preset

UPSTREAMS = ("teacher", "untrained", "fbank")
HELD_OUT_SPEAKERS = ("2277", "2902", "777")
"""Test speakers of PR and ASR: a woman and two men, chosen before anything was measured."""
MOST_SECONDS = 12.0
"""Longer recordings are left out of every table: on one core PR and ASR would spend half of the time on them."""


class Probe(NamedTuple):
    """One task on one corpus, a table of the recordings or a name in the folder of sets."""

    name: str
    task: str
    corpus: str
    metric: str
    options: tuple[str, ...] = ()
    preset: Preset = "probe"


PROBES = (
    Probe("PR", "pr", "dev_clean", "per", ("--updates", "600", "--data.unknown_words", "skip")),
    Probe("ASR", "asr", "dev_clean", "wer", ("--updates", "300")),
    Probe("SID, dev-clean", "sid", "speakers", "accuracy", ("--updates", "300")),
    Probe("SID, FSDD", "sid", "fsdd", "accuracy", ("--updates", "300", "--data.resample", "true")),
    Probe("KS, three words", "ks", "three_words", "accuracy", ("--updates", "300")),
)
SETS = (
    Probe("ASV", "asv", "speakers.tsv", "eer", ("--updates", "300")),
    # SUPERB's head and batches with a higher rate, since it has few updates.
    Probe("SD", "sd", "diarization", "der", ("--updates", "60", "--eval_every", "20", "--lr", "1e-3"), "superb"),
    Probe("QbE", "qbe", "queries.tsv", "mtwv", (), "superb"),
)


def superb_real_speech(data: str, models: str, output: str, sets: str | None = None, seed: int = 0) -> None:
    """Run the unfinished probes, then write OUTPUT/table.md.

    Args:
        data: folder of the recordings, with manifest.tsv and lexicon/.
        models: folder that holds the Hugging Face folders teacher and untrained.
        output: folder of the table, the results and their tables of utterances.
        sets: folder of the corpora for ASV, SD and QbE, which are then run in place of the probes.
        seed: seed of subsets, order and heads.
    """
    root, folder = Path(data).resolve(), Path(output)
    write_tables(root, folder / "tables")
    probes = PROBES if sets is None else SETS
    for probe in probes:
        corpus = folder / "tables" / f"{probe.corpus}.tsv" if sets is None else Path(sets) / probe.corpus
        for upstream in UPSTREAMS:
            cli.run(_arguments(probe, upstream, root, corpus, Path(models), folder, seed))
    results = {(u, p.name): _result(folder, u, p) for u in UPSTREAMS for p in probes}
    table = markdown(probes, results)
    write_text(folder / "table.md", table)
    Console().print(table, markup=False)


def write_tables(root: Path, folder: Path) -> None:
    """Write the corpora as tables of :mod:`datamodules.superb.table`, with absolute paths."""
    files = list(csv.DictReader(read_lines(root / "manifest.tsv"), delimiter="\t", quoting=csv.QUOTE_NONE))
    parts = {name: [line for line in files if line["set"] == name] for name in {line["set"] for line in files}}
    other = parts["LibriSpeech/test-other"]
    clean = parts["LibriSpeech_mp3/dev-clean"]
    _write(folder / "dev_clean.tsv", root, _transcribed(clean, other))
    _write(folder / "speakers.tsv", root, ((_utterance_split(i), f, f["speaker"]) for i, f in enumerate(clean)))
    _write(folder / "fsdd.tsv", root, ((_digit_split(f["path"]), f, f["speaker"]) for f in parts["fsdd"]))
    words = ((_hash_split(f["path"]), f, f["label"]) for f in parts["speech_commands_3words"])
    _write(folder / "three_words.tsv", root, words)


def _transcribed(clean: list[dict[str, str]], other: list[dict[str, str]]) -> Iterator[tuple[str, dict[str, str], str]]:
    """Yield rows: held-out speakers are the test, a tenth of the others dev, test-other a second, mismatched test."""
    for index, line in enumerate(clean):
        split = "test" if line["speaker"] in HELD_OUT_SPEAKERS else "dev" if index % 10 == 0 else "train"
        yield split, line, line["speaker"]
    for line in other:
        yield "test-other", line, line["speaker"]


def _utterance_split(index: int) -> str:
    """Choose the split by utterance, because all splits need the same speakers: a sixth is test, a sixth dev."""
    return {0: "dev", 3: "test"}.get(index % 6, "train")


def _digit_split(path: str) -> str:
    """Choose the split: FSDD's own test recordings, 0 to 4 of each speaker and digit; the next five are dev."""
    recording = int(re.sub(r".*_(\d+)\.flac$", r"\1", path))
    return "test" if recording < 5 else "dev" if recording < 10 else "train"


def _hash_split(path: str) -> str:
    """Choose the split by Speech Commands' rule; the tenth that SUPERB leaves to its test archive is the test here."""
    return split_of(Path(path).name) or "test"


def _write(path: Path, root: Path, rows: Iterable[tuple[str, dict[str, str], str]]) -> None:
    lines = ["path\tkey\tsplit\tspeaker\tlabel\ttext"]
    for split, line, label in rows:
        if float(line["seconds"]) <= MOST_SECONDS:
            # The key includes the folder, because files of the three words have the same names.
            key = "-".join(Path(line["path"]).with_suffix("").parts[-2:])
            values = (str(root / line["path"]), key, split, line["speaker"], label, line["text"] or "-")
            lines.append("\t".join(values))
    write_text(path, "\n".join(lines) + "\n")


def _arguments(
    probe: Probe, upstream: str, root: Path, corpus: Path, models: Path, folder: Path, seed: int
) -> list[str]:
    arguments = ["superb", "--preset", probe.preset, "--task", probe.task, "--seed", str(seed)]
    arguments += ["--upstream", upstream if upstream == "fbank" else str(models / upstream)]
    arguments += ["--data.root", str(corpus), "--data.num_workers", "0"]
    if probe.preset == "superb":  # a probe keeps features in memory
        arguments += ["--feature_cache", str(folder / "features")]
    arguments += ["--output", str(_runs(folder, upstream, probe)), *probe.options]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.progress_bar", "false", "--wandb.mode", "disabled"]
    if find_source(probe.task).without_lexicon is not None:
        arguments += ["--data.lexicon", str(root / "lexicon" / "lexicon_for_these_transcripts.txt")]
    return arguments


def _runs(folder: Path, upstream: str, probe: Probe) -> Path:
    return folder / "runs" / upstream / Path(probe.corpus).stem


def _result(folder: Path, upstream: str, probe: Probe) -> dict[str, Any]:
    (path,) = (_runs(folder, upstream, probe) / task_folder(probe.task, probe.preset)).glob("*/result.json")
    result = read_json(path)
    kept = {name: value for name, value in result.items() if name not in ("config", "upstream")}
    write_json(folder / f"{probe.task}_{Path(probe.corpus).stem}_{upstream}.json", kept)
    return kept


def markdown(probes: Iterable[Probe], results: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Format one row per probe and test set, one column per upstream; the layer with most weight is in brackets."""
    lines = [f"| probe | test | utterances | {' | '.join(UPSTREAMS)} |", "|---|---|---|" + "---|" * len(UPSTREAMS)]
    for probe in probes:
        first = results[UPSTREAMS[0], probe.name]
        for test in first["tests"]:
            cells = [_cell(results[upstream, probe.name], test, probe.metric) for upstream in UPSTREAMS]
            sizes = f"{first['utterances']['train']} / {first['utterances'][test]}"
            lines.append(f"| {probe.name}, {probe.metric} | {test} | {sizes} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(result: dict[str, Any], test: str, metric: str) -> str:
    weights = result["layer_weights"]
    layer = f" [{int(np.argmax(weights))}]" if len(weights) > 1 else ""
    return f"{result['tests'][test][metric]:.1f}{layer}"


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(superb_real_speech)
