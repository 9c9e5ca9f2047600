"""``interstack bench together``: time students trained side by side against one run after another.

The runs are those of ``interstack fit-together`` and ``interstack fit``, and take turns. Teacher and students have
random weights and the corpus is noise; time depends on neither.
"""

import gc
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from callbacks.lookup import find_callback
from callbacks.throughput import ThroughputCallback
from datamodules.errors import InputError
from datamodules.files import write_json
from experiments.bench.compare import Place, Variant
from experiments.bench.laps import StepLaps
from experiments.bench.noise import write_noise
from experiments.bench.random_teacher import save_random_teacher
from experiments.training.together import StudentCLI, Together, share_teacher

EPOCHS = 4  # one for each stage


def bench_together(
    configs: list[str] | None = None,
    batch_size: int = 4,
    seconds: float = 5.0,
    steps_per_epoch: int = 2,
    rounds: int = 5,
    accelerator: str = "auto",
    teacher: str | None = None,
    overrides: dict[str, Any] | None = None,
    output: str | None = None,
) -> None:
    """Time students apart and together; print the ratio and write JSON.

    Only training time is counted, not the start or checkpoints. The saving should be the teacher's time for all
    students but one; that is predicted from the separate runs.

    Args:
        configs: recipes of the students; default: full_l2l, interleave_equal and midas_equal.
        batch_size: utterances per step.
        seconds: length of each utterance.
        steps_per_epoch: steps in each of the 4 epochs.
        rounds: counted turns; median and quartiles are over these.
        accelerator: cpu, gpu or auto.
        teacher: folder or hub name of a Hugging Face encoder; default: random weights in HuBERT Base's sizes.
        overrides: settings of all students by their names on the command line.
        output: JSON file to write after every round, so that an interrupted benchmark keeps its finished rounds.
    """
    if min(batch_size, rounds, steps_per_epoch) < 1 or seconds <= 0:
        raise InputError(
            f"batch_size={batch_size}, rounds={rounds}, steps_per_epoch={steps_per_epoch} and seconds={seconds} must "
            "be positive"
        )
    names = configs or ["full_l2l", "interleave_equal", "midas_equal"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_noise(folder, batch_size * steps_per_epoch, seconds)
        encoder = teacher or str(save_random_teacher(folder / "teacher"))
        place = Place(folder, encoder, batch_size, seconds, steps_per_epoch, accelerator)
        turns: list[dict[str, float]] = []
        for turn in range(rounds + 1):
            measured = measure(place, names, overrides or {})
            if turn:  # the first turn builds the table of the corpus
                turns.append(measured)
                result = summarise(names, turns, place)
                if output is not None:
                    write_json(output, result)
    print(line(result))


def measure(place: Place, configs: Sequence[str], overrides: Mapping[str, Any]) -> dict[str, float]:
    """Measure one turn: training seconds apart and together, and the teacher's share of the seconds apart."""
    students = _build(place, configs, overrides)
    for student in students:
        student.start()
    apart = sum(_seconds(student) for student in students)
    teacher = sum(_teacher_seconds(student, EPOCHS * place.steps_per_epoch) for student in students)
    _clear(place)
    students = _build(place, configs, overrides)
    share_teacher([student.model for student in students])
    together = Together(students)
    together.run()
    # The shared time is charged to every student, though it was spent once.
    spared = (len(students) - 1) * together.shared.seconds
    seconds = sum(_seconds(student) for student in students) - spared
    _clear(place)
    return {"apart_seconds": apart, "apart_teacher_seconds": teacher, "together_seconds": seconds}


def _build(place: Place, configs: Sequence[str], overrides: Mapping[str, Any]) -> list[StudentCLI]:
    own = {"trainer.max_epochs": EPOCHS, **overrides}
    return [StudentCLI(c, place.arguments(Variant(c, {**own, "name": c}))) for c in configs]


def _clear(place: Place) -> None:
    gc.collect()
    shutil.rmtree(place.folder / "runs")


def _seconds(student: StudentCLI) -> float:
    clock = find_callback(student.trainer, ThroughputCallback)
    assert clock is not None
    return clock.train_seconds


def _teacher_seconds(student: StudentCLI, steps: int) -> float:
    laps = find_callback(student.trainer, StepLaps)
    assert laps is not None
    return median(step["teacher_ms"] for step in laps.steps) * steps / 1000


def summarise(configs: Sequence[str], turns: Sequence[Mapping[str, float]], place: Place) -> dict[str, Any]:
    """Compute medians over the turns, and medians of the ratios within each turn, in plain values."""
    ratios = [turn["apart_seconds"] / turn["together_seconds"] for turn in turns]
    others = (len(configs) - 1) / len(configs)
    predicted = [t["apart_seconds"] / (t["apart_seconds"] - others * t["apart_teacher_seconds"]) for t in turns]
    low, high = np.percentile(ratios, [25, 75])
    return {
        **place.settings(),
        "configs": list(configs),
        "steps": EPOCHS * place.steps_per_epoch,
        **{key: median(turn[key] for turn in turns) for key in turns[0]},
        "ratio": median(ratios),
        "ratio_quartiles": [float(low), float(high)],
        "predicted_ratio": median(predicted),
        "turns": list(turns),
    }


def line(result: Mapping[str, Any]) -> str:
    """Describe the result in words."""
    low, high = result["ratio_quartiles"]
    return (
        f"{', '.join(result['configs'])}: {result['apart_seconds']:.1f} s apart (teacher "
        f"{result['apart_teacher_seconds']:.1f} s), {result['together_seconds']:.1f} s together: {result['ratio']:.2f} "
        f"times as fast ({low:.2f} to {high:.2f}), predicted {result['predicted_ratio']:.2f}; {result['steps']} steps "
        f"of {result['batch_size']} x {result['seconds']} s, {len(result['turns'])} rounds, {result['hardware']}, "
        f"{result['threads']} threads; teacher: {result['teacher']}; commit {result['commit']}"
    )
