"""A study: rows to compare, seeds, evaluation tasks and published references, read from one YAML file.

``base`` names studies to start from (files of the same folder, or paths): mappings are merged, everything else is
replaced, so a variant holds only what differs. ``row_overrides`` changes single rows of the base; ``keep_rows`` keeps
some of them.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import yaml

from datamodules.errors import InputError
from datamodules.files import flatten, read_text
from experiments.records.accounting import Growth
from experiments.records.settings_yaml import load_settings
from experiments.report.study_tables import COLUMNS
from experiments.shipped import find_shipped, shipped_names
from experiments.training.defaults import max_epochs
from experiments.training.fit import CONFIGS
from lightning_modules.student_config import StudentConfig
from lightning_modules.superb.recipes import SUPERB_TASKS, TASK_RECIPES

STUDIES = Path(__file__).resolve().parent
TASKS = (*SUPERB_TASKS, *(f"{task}_probe" for task, recipe in TASK_RECIPES.items() if "probe" in recipe.presets))
Cache = Literal["none", "targets", "features"]
COMPARED = tuple(key for key, shown in COLUMNS.items() if shown.better)
"""Measures that come from no task and have a better direction."""


@dataclass(frozen=True)
class Match:
    """Let a row train for as long as another: its steps are those of ``reference`` times a ratio of measured costs.

    Args:
        cost: ``train_seconds`` or ``flops``.
        target: row whose cost is met.
        reference: row that trains at the same cost per step as this one.
    """

    cost: Literal["train_seconds", "flops"]
    target: str
    reference: str


@dataclass(frozen=True)
class Row:
    """One system.

    Args:
        name: unique name of letters, digits and underscores, used in the run folders.
        label: unique label, used in tables.
        configs: names of shipped configurations.
        overrides: settings of ``interstack fit`` by dotted name; one replaces the study's of the same name.
        match: rule that sets the length of the run by another row's cost.
        random_growth: grow the student at epochs drawn from the seed.
        cache: what the row reads from a cache instead of the study's choice: none, targets, or features (in bf16, with
            the targets, from a front end that is frozen from the start).
    """

    name: str
    label: str
    configs: list[str]
    overrides: dict[str, Any] = field(default_factory=dict)
    match: Match | None = None
    random_growth: bool = False
    cache: Cache | None = None


@dataclass(frozen=True)
class Comparison:
    """A comparison of two rows by a rule that is fixed before the study runs.

    Args:
        label: unique label, used in tables.
        row: row that is claimed to be better, or not much worse.
        reference: row that it is compared with.
        measure: column such as ``pr/per``; it decides which direction is better.
        margin: 0 claims that the row is better. Below 0 it claims that the row is worse by less than this, in the unit
            of the measure, whichever direction is better.
    """

    label: str
    row: str
    reference: str
    measure: str
    margin: float = 0.0


@dataclass(frozen=True)
class Study:
    """The rows of a study and their common settings.

    Args:
        name: name of the study.
        title: title of the report.
        rows: systems to compare, in the order of the tables.
        corpus: settings of ``interstack synthesize``; ``None`` if nothing is synthesized.
        teacher: ``{"model": NAME_OR_FOLDER}``, or settings of ``interstack pretrain-teacher`` on the corpus.
        data: distil and evaluate on the ``corpus``, or on the ``root`` given on the command line.
        configs: configurations that are applied after each row's own.
        overrides: settings of every row.
        seeds: seeds; every row is run once with each.
        tasks: evaluations, as SUPERB tasks such as ``pr``, or quick probes of them such as ``pr_probe``.
        evaluation: options of ``interstack superb`` by task.
        similarity: compare the layers of every student.
        untrained: also evaluate the teacher before its training.
        upstreams: models to evaluate beside the students: ``teacher`` if no job trains it, ``fbank``, or any other
            value of ``interstack superb --upstream``.
        cache: what rows read from a cache that a job of the study writes: none, the teacher's targets, or features too
            (see ``Row``). A cache needs ``data.crop: fixed``. It has the layers of the ``baseline`` row; a row that
            learns others has a cache of its own.
        columns: columns of the main table; empty for the default.
        references: published rows.
        baseline: row that speed-ups refer to.
        comparisons: planned comparisons; the report gives a verdict on each.
        notes: sentences that the report shows above its tables.
    """

    name: str
    title: str
    rows: list[Row]
    corpus: dict[str, Any] | None = None
    teacher: dict[str, Any] = field(default_factory=lambda: {"model": "facebook/hubert-base-ls960"})
    data: Literal["corpus", "root"] = "root"
    configs: list[str] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    tasks: list[str] = field(default_factory=list)
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    similarity: bool = False
    untrained: bool = False
    upstreams: list[str] = field(default_factory=list)
    cache: Cache = "none"
    columns: list[str] = field(default_factory=list)
    references: list[dict[str, Any]] = field(default_factory=list)
    baseline: str | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def row(self, name: str) -> Row:
        """Find the row of that name.

        Raises:
            InputError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise InputError(f"{self.name} has no row {name!r}: choose from {', '.join(row.name for row in self.rows)}")

    def cache_of(self, row: Row) -> Cache:
        """What the row reads from a cache."""
        return row.cache or self.cache

    def described(self) -> dict[str, Any]:
        """Plain values, for ``study.json``."""
        return asdict(self)


def find_study(name: str) -> Path:
    """Find a study's file by path, or a shipped one by name.

    Raises:
        InputError: neither exists.
    """
    return find_shipped(name, STUDIES, "study")


def shipped_studies() -> list[str]:
    """List the names of the studies that ship with the package."""
    return shipped_names(STUDIES)


def load_study(name: str) -> Study:
    """Read, merge and check a study.

    Raises:
        InputError: a key, row or task does not exist, a key is missing, or the file is not valid YAML; it is named.
    """
    path = find_study(name)
    values = {"name": path.stem} | _merged(path)
    changes, kept = values.pop("row_overrides", None) or {}, values.pop("keep_rows", None)
    try:
        rows = [_row(row, changes) for row in values.pop("rows", None) or []]
        if changes:
            raise InputError(f"row_overrides names {', '.join(changes)}, which are no rows of it")
        if kept is not None and (missing := set(kept) - {row.name for row in rows}):
            raise InputError(f"keep_rows names {', '.join(sorted(missing))}, which are no rows of it")
        rows = [row for row in rows if kept is None or row.name in kept]
        comparisons = [_build(Comparison, each) for each in values.pop("comparisons", None) or []]
        study = _build(Study, values | {"rows": rows, "comparisons": comparisons})
        _check(study)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    return study


def _merged(path: Path) -> dict[str, Any]:
    try:
        own = load_settings(read_text(path)) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(own, dict):
        raise InputError(f"{path} must be a mapping of keys such as title and rows, not a {type(own).__name__}")
    bases = own.pop("base", [])
    result: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        sibling = path.parent / f"{base}.yaml"
        result = _over(result, _merged(sibling if sibling.is_file() else find_study(base)))
    return _over(result, own)


def _over(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the values of a study over those of its base; of overrides, what the study itself has stands last."""
    merged, before = merge(first, second), first.get("overrides") or {}
    if before and second.get("overrides"):
        later: dict[str, Any] = {}
        for key, value in second["overrides"].items():
            both = isinstance(value, Mapping) and isinstance(before.get(key), Mapping)
            later |= flatten(value, key) if both else {key: value}
        merged["overrides"] = _later(before, later)
    return merged


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Merge ``second`` over ``first``: mappings are merged, everything else is replaced."""
    result = copy.deepcopy(dict(first))
    for key, value in second.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], value) if both else copy.deepcopy(value)
    return result


Built = TypeVar("Built")


def _build(kind: type[Built], values: Mapping[str, Any]) -> Built:
    known = [entry.name for entry in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise InputError(f"a {kind.__name__.lower()} is a mapping of {', '.join(known)}, not {values}")
    if unknown := set(values) - set(known):
        raise InputError(
            f"unknown key {', '.join(sorted(unknown))} in {kind.__name__.lower()}: {', '.join(known)} exist"
        )
    required = [entry.name for entry in fields(kind) if entry.default is entry.default_factory is MISSING]  # type: ignore[arg-type]
    if missing := [name for name in required if name not in values]:
        named = f"{kind.__name__.lower()} {values.get('name', values.get('label', ''))}".rstrip()
        raise InputError(f"the {named} lacks {', '.join(missing)}")
    return kind(**values)


def _row(values: Mapping[str, Any], changes: dict[str, Mapping[str, Any]]) -> Row:
    """Build a row, and move its overrides out of ``changes``."""
    if not isinstance(values, Mapping) or "name" not in values:
        raise InputError(f"rows are mappings with a name, not {values}")
    values = dict(values)
    values["overrides"] = _later(values.get("overrides", {}), changes.pop(values["name"], {}))
    if match := values.get("match"):
        values["match"] = _build(Match, match)
    return _build(Row, values)


def _later(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides of which the ``second`` count, whatever their order was; one replaces another of the same key."""
    return {key: value for key, value in first.items() if key not in second} | dict(second)


def _check(study: Study) -> None:
    names = [row.name for row in study.rows]
    labels, compared = ([each.label for each in group] for group in (study.rows, study.comparisons))
    kinds = (("rows have the name", names), ("rows have the label", labels), ("comparisons have the label", compared))
    for kind, values in kinds:
        if repeated := {value for value in values if values.count(value) > 1}:
            raise InputError(f"two {kind} {', '.join(sorted(repeated))}: make them unique")
    if not names or not study.seeds:
        raise InputError("a study needs rows and seeds")
    if bad := [name for name in names if not name.replace("_", "").isalnum()]:
        raise InputError(f"row names may hold letters, digits and underscores only, not {', '.join(bad)}")
    if bad := [task for task in study.tasks if task not in TASKS]:
        raise InputError(f"unknown tasks {', '.join(bad)}: choose from {', '.join(TASKS)}")
    if presets := [task for task, options in study.evaluation.items() if "preset" in options]:
        raise InputError(f"evaluation of {presets[0]} sets a preset: the task {presets[0]}_probe is the probe")
    if study.data == "corpus" and study.corpus is None:
        raise InputError("data is `corpus`, but there are no settings under `corpus`")
    caches = get_args(Cache)
    asked = {"cache": study.cache} | {f"cache of {row.name}": row.cache for row in study.rows if row.cache}
    for named, cache in asked.items():
        if cache not in caches:
            raise InputError(f"{named} is {cache}: choose from {', '.join(caches)}")
        if cache != "none" and study.baseline is None:
            raise InputError(f"{named} is {cache}, with the layers of the baseline row: name one under `baseline`")
    if "teacher" in study.upstreams and "model" not in study.teacher:
        raise InputError("a teacher that a job trains is evaluated anyway: remove it from `upstreams`")
    if "model" not in study.teacher and study.corpus is None:
        raise InputError("a teacher is trained on the corpus, but there are no settings under `corpus`")
    for row in study.rows:
        others = [row.match.target, row.match.reference] if row.match else []
        for other in [*others, *([study.baseline] if study.baseline else [])]:
            if study.row(other).match and other in others:
                raise InputError(f"{row.name} is matched to {other}, which is matched itself")
    for comparison in study.comparisons:
        _check_comparison(study, comparison)


def _check_comparison(study: Study, comparison: Comparison) -> None:
    named, names = f"the comparison {comparison.label!r}", [row.name for row in study.rows]
    for name in (comparison.row, comparison.reference):
        if name not in names:
            raise InputError(f"{named} names {name}, which is no row of it: choose from {', '.join(names)}")
    task, slash, _ = comparison.measure.partition("/")
    layer = comparison.measure.startswith("val_layer_")
    if not (task in study.tasks if slash else layer or comparison.measure in COMPARED):
        raise InputError(
            f"{named} has the measure {comparison.measure}: name TASK/METRIC with a task of the study "
            f"({', '.join(study.tasks) or 'it has none'}), val_layer_N, or one of {', '.join(COMPARED)}"
        )
    if not isinstance(comparison.margin, int | float) or not -math.inf < comparison.margin <= 0:
        raise InputError(f"{named} has the margin {comparison.margin}: give 0, or a number below it (how much worse)")


def row_settings(study: Study, row: Row, seed: int) -> dict[str, Any]:
    """Build a row's configuration for ``interstack fit`` as one nested mapping: configs, then overrides."""
    settings: dict[str, Any] = {}
    for name in [*row.configs, *study.configs]:
        if name not in shipped_names(CONFIGS):
            raise InputError(f"{study.name}: row {row.name} names the config {name!r}, which is not shipped")
        settings = merge(settings, load_settings(read_text(CONFIGS / f"{name}.yaml")) or {})
    for key, value in _later(study.overrides, row.overrides).items():
        for part in reversed(key.split(".")):
            value = {part: value}
        settings = merge(settings, value)
    if row.random_growth:
        if settings.get("growth", {}).get("policy", "none") == "none":
            raise InputError(f"{study.name}: row {row.name} has random_growth, but no growth.policy to grow by")
        settings = merge(settings, {"growth": {"schedule": random_schedule(settings, seed)}})
    return settings


def random_schedule(settings: Mapping[str, Any], seed: int) -> str:
    """Draw growth epochs from ``seed``, each between the first and the last epoch."""
    epochs = max_epochs(settings)
    growth, student = settings["growth"], StudentConfig(**settings.get("model", {}).get("student", {}))
    stages = Growth.of(growth, student.num_layers, epochs).stages
    generator = np.random.default_rng([seed, epochs])
    drawn = sorted(generator.choice(np.arange(1, epochs), size=len(stages) - 1, replace=False).tolist())
    return "explicit-" + ",".join(map(str, drawn))
