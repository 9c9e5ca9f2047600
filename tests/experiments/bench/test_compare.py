"""``interstack bench compare``: variants are runs of ``fit``; ratios are those of turns beside each other."""

import contextlib
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.bench import compare
from experiments.bench.compare import (
    TIMES,
    Place,
    Variant,
    bench_compare,
    choose,
    find_variants,
    load_variants,
    summarise,
    table,
)
from experiments.bench.laps import PARTS, StepLaps
from experiments.cli import run
from lightning_modules.teacher import HuggingFaceTeacher
from tests.helpers import save_teacher


def variants_file(folder: Path) -> Path:
    small = {"model.student.hidden_size": 16, "model.student.intermediate_size": 24, "model.student.num_heads": 2}
    variants = {
        "plain": {"overrides": small},
        "frozen": {"overrides": small | {"model.student.front_end": "frozen"}, "expected": {"plain": 1.5}},
        "grown": {"config": "interleave_equal", "overrides": small, "expected": {"frozen": 1.1}},
        "cached": {"overrides": small, "targets": "int8"},
        "grown cached": {"config": "interleave_equal", "overrides": small, "targets": "int8"},
        "cached features": {
            "overrides": small | {"model.student.front_end": "frozen"},
            "targets": "bf16",
            "features": "int8",
        },
    }
    (folder / "variants.yaml").write_text(json.dumps(variants))
    return folder / "variants.yaml"


@pytest.mark.ci
def test_runs_take_turns_and_their_parts_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: HuggingFaceTeacher, *inputs: Any) -> Any:
        time.sleep(0.05)  # so tiny a teacher may be as fast as a file
        return quick(self, *inputs)

    quick = HuggingFaceTeacher.forward
    monkeypatch.setattr(HuggingFaceTeacher, "forward", forward)
    teacher, output = save_teacher(tmp_path / "teacher", layers=12), tmp_path / "compare.json"
    run(
        [
            *("bench", "compare", "--variants", str(variants_file(tmp_path)), "--batch_size", "1", "--seconds", "0.3"),
            *("--rounds", "1", "--accelerator", "cpu", "--teacher", str(teacher), "--output", str(output)),
        ]
    )
    rows = json.loads(output.read_text())["variants"]
    assert list(rows) == ["plain", "frozen", "grown", "cached", "grown cached", "cached features"]
    assert rows["cached"]["teacher_ms"] < rows["plain"]["teacher_ms"]
    assert (rows["plain"]["ratios"], rows["frozen"]["ratios"]["plain"]["expected"]) == ({}, 1.5)
    assert list(rows["grown"]["ratios"]) == ["plain", "frozen"]
    found = rows["grown"]["ratios"]["frozen"]["median"]
    assert found == pytest.approx(rows["frozen"]["step_ms"] / rows["grown"]["step_ms"])
    assert rows["plain"]["growth_ms"] == 0 < rows["grown"]["growth_ms"]
    stages = {depth: [turn["stages"][depth] for turn in rows["grown"]["turns"]] for depth in ("3", "6", "9", "12")}
    assert rows["grown"]["step_ms"] == pytest.approx(sum(sum(times) for times in stages.values()) / 4)
    assert rows["grown"]["growth"]["f"] == pytest.approx((stages["12"][0] - stages["3"][0]) / 9 * 12 / stages["12"][0])
    assert rows["plain"]["growth"] == {}
    assert rows["plain"]["against_full"] is None
    same = rows["cached"]["step_ms"] / rows["grown cached"]["step_ms"]
    assert rows["grown cached"]["against_full"]["equal"]["median"] == pytest.approx(same)
    proportional = sum(rows["grown cached"]["turns"][0]["stages"][str(3 * k)] * k for k in (1, 2, 3, 4)) / 10
    same = rows["cached"]["step_ms"] / proportional
    assert rows["grown cached"]["against_full"]["prop-1"]["median"] == pytest.approx(same)
    for name in ("plain", "frozen", "cached"):
        assert sum(rows[name][part] for part in PARTS) == pytest.approx(rows[name]["step_ms"])
    assert "| grown |" in capsys.readouterr().out


def turn(step_ms: float) -> dict[str, Any]:
    return {"step_ms": step_ms, "growth_ms": 0.0, "stages": {12: step_ms}, **dict.fromkeys(PARTS, step_ms / len(PARTS))}


def test_a_ratio_is_the_median_over_neighbouring_turns(tmp_path: Path) -> None:
    variants = {"slow": Variant(), "fast": Variant(expected={"slow": 3})}
    # A machine that gets ten times slower: the ratio of medians would say 20 / 10, neighbours say 2, 2, 4.
    turns = {"slow": [turn(20), turn(200), turn(20)], "fast": [turn(10), turn(100), turn(5)]}
    result = summarise(variants, turns, Place(tmp_path, "some/teacher", 4, 5.0, 2, "cpu"))
    assert result["variants"]["fast"]["ratios"] == {"slow": {"median": 2, "low": 2, "high": 3, "expected": 3}}
    assert "| fast | 10 |" in table(result)
    assert "| fast | slow | 2.00 | 2.00 to 3.00 | 3 |" in table(result)


def test_ratios_are_of_turns_that_both_have(tmp_path: Path) -> None:
    variants = {"slow": Variant(), "fast": Variant(), "none": Variant(expected={"fast": 1.0})}
    turns = {"slow": [turn(20), turn(200)], "fast": [turn(10)], "none": []}
    rows = summarise(variants, turns, Place(tmp_path, "some/teacher", 4, 5.0, 2, "cpu"))["variants"]
    assert list(rows) == ["slow", "fast"]
    assert rows["fast"]["ratios"]["slow"]["median"] == 2


def interrupted_compare(folder: Path, monkeypatch: pytest.MonkeyPatch, runs: int, **settings: Any) -> list[str]:
    """Names of the variants that ran before the benchmark was interrupted, after so many counted runs.

    Those whose ``x`` is ``fails`` do.
    """
    names = {tuple(sorted(v.overrides.items())): n for n, v in load_variants(folder / "variants.yaml").items()}
    ran: list[str] = []

    def one_run(place: Place, variant: Variant) -> dict[str, Any]:
        if len(ran) == runs + 1:  # the first one is not counted
            raise KeyboardInterrupt
        ran.append(names[tuple(sorted(variant.overrides.items()))])
        if variant.overrides["x"] == "fails":
            raise ZeroDivisionError("x fails")
        return turn(10.0)

    monkeypatch.setattr(compare, "run", one_run)
    monkeypatch.setattr(compare, "write_noise", lambda *_: None)
    with contextlib.suppress(KeyboardInterrupt):
        bench_compare(
            str(folder / "variants.yaml"), teacher="some/teacher", accelerator="cpu", rounds=2,
            output=str(folder / "compare.json"), **settings,
        )  # fmt: skip
    return ran[1:]


def test_an_interrupted_benchmark_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    definitions = {name: {"overrides": {"x": name}} for name in ("a", "b")}
    (tmp_path / "variants.yaml").write_text(json.dumps(definitions))
    assert interrupted_compare(tmp_path, monkeypatch, 3) == ["a", "b", "b"]
    written = json.loads((tmp_path / "compare.json").read_text())["variants"]
    assert {name: len(row["turns"]) for name, row in written.items()} == {"a": 1, "b": 2}
    assert interrupted_compare(tmp_path, monkeypatch, 9) == ["a"]
    assert interrupted_compare(tmp_path, monkeypatch, 9) == []
    definitions["b"]["overrides"]["x"] = "b2"
    (tmp_path / "variants.yaml").write_text(json.dumps(definitions))
    assert interrupted_compare(tmp_path, monkeypatch, 9) == ["b", "b"]
    assert "turns of 'b' are dropped" in caplog.text
    assert interrupted_compare(tmp_path, monkeypatch, 9, seconds=1.0) == ["a", "b", "b", "a"]
    assert "begins anew: its seconds was 5.0, is 1.0" in caplog.text


def test_a_variant_that_fails_costs_the_others_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    definitions = {name: {"overrides": {"x": x}} for name, x in (("a", "a"), ("b", "fails"), ("c", "c"))}
    (tmp_path / "variants.yaml").write_text(json.dumps(definitions))
    with pytest.raises(RuntimeError, match=r"not measured, for the errors above: b$"):
        interrupted_compare(tmp_path, monkeypatch, 9)
    assert "ZeroDivisionError: x fails" in caplog.text
    assert "| c | 10 |" in capsys.readouterr().out
    written = json.loads((tmp_path / "compare.json").read_text())["variants"]
    assert {name: len(row["turns"]) for name, row in written.items()} == {"a": 2, "c": 2}
    definitions["b"]["overrides"]["x"] = "works"
    (tmp_path / "variants.yaml").write_text(json.dumps(definitions))
    assert interrupted_compare(tmp_path, monkeypatch, 9) == ["b", "b"]


class Steps:
    """What ``run`` asks of a run: two stages of as many steps as it was told, whose times are their numbers."""

    def __init__(self, arguments: list[str]) -> None:
        self.laps, count = StepLaps(), int(arguments[arguments.index("--data.batches_per_epoch") + 1])
        for depth in (3, 6):
            self.laps.steps += [{**dict.fromkeys(TIMES, float(step)), "depth": depth} for step in range(count)]
        self.trainer = SimpleNamespace(callbacks=[self.laps])
        self.model = SimpleNamespace(teacher=SimpleNamespace(precision_used="32"))


@pytest.mark.parametrize(("workers", "mean"), [(0, (2 + 9) / 2), (3, (8 + 9) / 2)])
def test_steps_whose_batches_were_ready_are_not_counted(
    workers: int, mean: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "DistillationCLI", Steps)
    found = compare.run(Place(tmp_path, "teacher", 1, 1.0, 10, "cpu", workers), Variant())
    assert found["stages"] == {3: mean, 6: mean}
    assert found["data_ms"] == mean
    with pytest.raises(ValueError, match="steps_per_epoch=8 at least 9 with num_workers=3"):
        bench_compare(steps_per_epoch=8, num_workers=3)


@pytest.mark.ci
@pytest.mark.parametrize("name", ["variants", "variants_gpu", "variants_gpu_short"])
def test_the_shipped_variants_are_settings_of_fit(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path, "teacher", 1, 1.0, 2, "cpu")
    for variant in load_variants(find_variants(name)).values():
        with pytest.raises(SystemExit) as stop:
            run([*place.arguments(variant), "--print_config"])
        assert stop.value.code in (0, None), capsys.readouterr().err


def test_workers_are_those_of_the_command(tmp_path: Path) -> None:
    words = Place(tmp_path, "teacher", 1, 1.0, 3, "gpu", num_workers=8).arguments(Variant())
    assert words[words.index("--data.num_workers") + 1] == "8"


def test_what_a_variant_is_compared_with_runs_too() -> None:
    variants = {"a": Variant(), "b": Variant(), "c": Variant(expected={"b": 2}), "d": Variant()}
    assert list(choose(variants, ["c"])) == ["a", "b", "c"]
    assert list(choose(variants, ["d"])) == ["a", "d"]
    assert list(choose(variants, None)) == ["a", "b", "c", "d"]


def test_nonsense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps_per_epoch=2 at least 3 with num_workers=0"):
        bench_compare(steps_per_epoch=2)
    with pytest.raises(
        ValueError,
        match="nothing: there is no such file, and the shipped names are variants, variants_gpu, variants_gpu_short",
    ):
        find_variants("nothing")
    with pytest.raises(ValueError, match="unknown variants z: choose from a"):
        choose({"a": Variant()}, ["z"])
    path = tmp_path / "variants.yaml"
    for text, message in (
        ("a: {konfig: x}", "keys are config, overrides"),
        ("a: {expected: {b: 2}}", "not in the file"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_variants(path)
