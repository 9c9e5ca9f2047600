"""The jobs of a study and their ids.

An id is a hash of everything that the job's result depends on: its kind, its settings, its seed, and the ids of the
jobs that it needs. A changed row therefore changes the ids of its own jobs and of those that depend on them, and of no
others. Settings without influence on results (labels, columns, titles, W&B, devices) are not in the id. Neither is the
version of the code: every result names its commit, and the report says if they differ.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from datamodules.alignments import ALIGNMENTS, alignment_digest, corpus_folder
from datamodules.errors import InputError
from datamodules.packed import MARKER, packed_digest
from experiments.studies.study import Row, Study, row_settings
from lightning_modules.objective import ObjectiveConfig
from lightning_modules.student_config import StudentConfig

Kind = Literal["corpus", "teacher", "targets", "together", "distil", "export", "evaluate", "similarity"]
TARGET_SETTINGS = ("output_layer", "normalize_targets", "statistics_seconds", "targets", "masked")
"""Settings of the objective, besides the layers, that a cache of targets depends on."""
WITHOUT_WEIGHTS = ("dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "compile", "compile_backend")
"""Settings of the student that its front end's output does not depend on."""
PHONE_TASKS = ("pr", "pr_probe", "frames_probe")
AUDIO_SUFFIXES = (".flac", ".wav", ".mp3", ".ogg", ".opus")


@dataclass(frozen=True)
class Job:
    """One command to run.

    Args:
        id: hash that identifies the job; see the module.
        kind: kind of the job.
        needs: ids of jobs that must be done before.
        row: row of the study, or ``teacher``, ``untrained`` or an upstream's name for the reference rows; empty for
            jobs that rows share.
        seed: seed of the row.
        task: task of an evaluation.
        settings: settings of the command; for ``distil`` the configuration of ``interstack fit``, for ``targets`` its
            sections on model and data and whether features are stored, for ``together`` the ids of the ``distil`` jobs
            whose runs it makes.
        match: for ``distil``, the cost to meet and the ids of the two jobs that it is measured from.
    """

    id: str
    kind: Kind
    needs: list[str]
    row: str = ""
    seed: int = 0
    task: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    match: dict[str, str] | None = None

    @property
    def folder(self) -> Path:
        """Folder of the job, relative to the output folder."""
        return Path("jobs") / self.id

    @property
    def run(self) -> Path:
        """Folder of a distillation run, relative to the output folder."""
        return Path("runs") / f"{self.row}-seed{self.seed}-{self.id}"

    @property
    def label(self) -> str:
        """Name of the job in tables and messages."""
        seeded = self.row or self.kind == "together"
        parts = [self.kind, self.task, self.row, f"seed {self.seed}" if seeded else ""]
        return " ".join(part for part in parts if part)

    def described(self) -> dict[str, Any]:
        """Plain values, for ``job.json``."""
        return asdict(self)


@dataclass(frozen=True)
class Inputs:
    """What the command line gives to a study.

    Args:
        root: corpus for studies with ``data: root``; without one a plan can be shown, not run.
        teacher: hub name or folder of a teacher to use instead of the study's.
        lexicon: files of pronunciations, in order of priority, for ``pr`` on a corpus without phone alignments.
        roots: corpora of single evaluation tasks, by task, instead of ``root`` or the study's corpus.
    """

    root: str | None = None
    teacher: str | None = None
    lexicon: Sequence[str] = ()
    roots: Mapping[str, str] = field(default_factory=dict)


def job_id(kind: Kind, needs: Sequence[str], **content: Any) -> str:
    """Hash kind, needs and content to twelve hexadecimal digits."""
    text = json.dumps({"kind": kind, "needs": list(needs), **content}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Plan:
    """All jobs of a study, in an order in which they can run, and the selection to run.

    Args:
        study: study to plan.
        inputs: corpora, teacher and lexicon.
        only: names of rows to run (with the rows that they are matched to); default: all.
        seeds: seeds to run; default: the study's. Other seeds are added to the plan.
        earlier_seeds: seeds of an earlier call on the same folder; they stay in the plan.

    Raises:
        InputError: a row, task or lexicon does not exist, or a root is given for a study that synthesizes its corpus.
    """

    def __init__(
        self,
        study: Study,
        inputs: Inputs = Inputs(),
        only: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        earlier_seeds: Sequence[int] = (),
    ) -> None:
        root = inputs.root
        if study.data == "corpus" and root is not None:
            raise InputError(f"the study {study.name} synthesizes its corpus: remove --root {root}")
        if unknown := set(inputs.roots) - set(study.tasks):
            raise InputError(
                f"--roots names {', '.join(sorted(unknown))}, but the tasks of {study.name} are "
                f"{', '.join(study.tasks)}"
            )
        self.study, self.inputs = study, inputs
        self._lexicon_digest = lexicon_digest(inputs.lexicon) if inputs.lexicon else None
        self.teacher_settings = {"model": inputs.teacher} if inputs.teacher else dict(study.teacher)
        self._rows_to_run, self._seeds_to_run = self._selected(only), set(seeds or study.seeds)
        self.seeds = list(dict.fromkeys([*study.seeds, *earlier_seeds, *(seeds or [])]))
        self.jobs: dict[str, Job] = {}
        self.corpus = self._add("corpus", [], settings=study.corpus) if self._synthesizes else None
        self._data_digest = corpus_digest(Path(root)) if root else None
        self._task_digests = {task: corpus_digest(Path(folder)) for task, folder in inputs.roots.items()}
        self.teacher = self._add_teacher(self.teacher_settings)
        self._references()
        self.distil: dict[tuple[str, int], Job] = {}
        # Seed by seed, so that an interrupted study has compared all rows at least once.
        for seed in self.seeds:
            for row in sorted(study.rows, key=lambda row: row.match is not None):
                self._add_row(row, seed)
        for upstream in study.upstreams:
            self._evaluate([], upstream, self.seeds[0], None if upstream == "teacher" else upstream)

    @property
    def _synthesizes(self) -> bool:
        return self.study.corpus is not None and ("model" not in self.teacher_settings or self.study.data == "corpus")

    @property
    def to_run(self) -> list[Job]:
        """Jobs of the selected rows and seeds, of models that are no rows, and all jobs that these need."""
        rows = {row.name for row in self.study.rows}
        wanted: set[str] = set()
        left = [
            job
            for job in self.jobs.values()
            if job.row and (job.row not in rows or (job.row in self._rows_to_run and job.seed in self._seeds_to_run))
        ]
        while left:
            job = left.pop()
            if job.id not in wanted:
                wanted.add(job.id)
                left += [self.jobs[needed] for needed in job.needs]
        return [job for job in self.jobs.values() if job.id in wanted]

    def _selected(self, only: Sequence[str] | None) -> set[str]:
        if not only:
            return {row.name for row in self.study.rows}
        wanted = {self.study.row(name).name for name in only}
        for row in [self.study.row(name) for name in only]:
            wanted |= {row.match.target, row.match.reference} if row.match else set()
        return wanted

    def _add(self, kind: Kind, needs: Sequence[Job | None], **content: Any) -> Job:
        ids = [job.id for job in needs if job is not None]
        job = Job(job_id(kind, ids, **content), kind, ids, **content)
        return self.jobs.setdefault(job.id, job)

    def _add_teacher(self, settings: Mapping[str, Any]) -> Job | None:
        if "model" in settings:
            return None
        return self._add("teacher", [self.corpus], settings=dict(settings))

    def _add_targets(self, row: Row, settings: Mapping[str, Any], seed: int) -> Job:
        """Add the job that writes the row's cache: the baseline's layers, normalised as in the row.

        A row with other layers has a cache of its own. Features come from the row's own student. If its front end is
        drawn, each seed has features of its own.
        """
        assert self.study.baseline is not None
        baseline = row_settings(self.study, self.study.row(self.study.baseline), self.seeds[0]).get("model", {})
        own, data = settings.get("model", {}), settings.get("data", {})
        student, features = own.get("student", {}), self.study.cache_of(row) == "features"
        reads = f"{self.study.name}: row {row.name} reads {'features' if features else 'targets'} from a cache, but its"
        if data.get("crop") != "fixed":
            raise InputError(f"{reads} data.crop is {data.get('crop', 'not set')}: set it to fixed under `overrides`")
        if features and (front_end := student.get("front_end", "trained")) not in ("frozen", "shared"):
            raise InputError(f"{reads} model.student.front_end is {front_end}: set it to frozen or shared")
        asked = {name: own["objective"][name] for name in TARGET_SETTINGS if name in own.get("objective", {})}
        layers, stored = (part.get("objective", {}).get("layers") for part in (own, baseline))
        if layers is not None and not (stored is not None and set(layers) <= set(stored)):
            asked["layers"] = layers
        objective = {key: value for key, value in baseline.get("objective", {}).items() if key not in TARGET_SETTINGS}
        model = {key: value for key, value in (own if features else baseline).items() if key != "optimizer"}
        if features:
            model["student"] = {key: value for key, value in student.items() if key not in WITHOUT_WEIGHTS}
        content = {"model": {**model, "objective": objective | asked}, "data": data, "inputs": self._digests()}
        needs = [self.corpus if self.study.data == "corpus" else None, self.teacher]
        if not features:
            return self._add("targets", needs, settings=content)
        drawn = {"seed": seed} if student.get("front_end_init") == "random" else {}
        return self._add("targets", needs, settings=content | {"features": True}, **drawn)

    def _references(self) -> None:
        """Add evaluations of the teacher, and of the teacher before its training."""
        if self.teacher is None:
            return
        self._evaluate([self.teacher], "teacher", self.seeds[0])
        if self.study.untrained:
            twin = self._add_teacher({**self.study.teacher, "steps": 0})
            assert twin is not None
            self._evaluate([twin], "untrained", self.seeds[0])

    def _add_row(self, row: Row, seed: int) -> None:
        settings = row_settings(self.study, row, seed)
        needs, match = [self.corpus if self.study.data == "corpus" else None, self.teacher], None
        if self.study.cache_of(row) != "none":
            needs.append(self._add_targets(row, settings, seed))
        if row.match:
            others = {part: self.distil[getattr(row.match, part), seed] for part in ("target", "reference")}
            needs += others.values()
            match = {"cost": row.match.cost, **{part: job.id for part, job in others.items()}}
        settings.pop("wandb", None)
        settings["inputs"] = self._digests()
        job = self._add("distil", needs, settings=settings, seed=seed, row=row.name, match=match)
        self.distil[row.name, seed] = job
        exported = self._add("export", [job], row=row.name, seed=seed)
        self._evaluate([exported], row.name, seed)
        if self.study.similarity:
            corpus = self.corpus if self.study.data == "corpus" else None
            self._add("similarity", [job, corpus], row=row.name, seed=seed, settings=self._digests())

    def train_together(self, finished: Callable[[Job], bool]) -> None:
        """Put a job that trains students side by side before the ``distil`` jobs that can share batches and teacher.

        It makes their run folders, which the ``distil`` jobs then only read; ids and results are the same either way.

        Args:
            finished: function that tells whether a ``distil`` job's run is finished.
        """
        groups: dict[str, list[Job]] = {}
        for job in self.to_run:
            if job.kind == "distil" and job.match is None and not finished(job):
                groups.setdefault(_what_is_shared(job), []).append(job)
        for members in groups.values():
            if len(members) > 1:
                self._join(members)

    def _join(self, members: Sequence[Job]) -> None:
        ids, needs = [job.id for job in members], members[0].needs
        settings = {"members": ids}
        joined = Job(job_id("together", needs, **settings), "together", needs, seed=members[0].seed, settings=settings)
        jobs: dict[str, Job] = {}
        for job in self.jobs.values():
            if job.id == ids[0]:
                jobs[joined.id] = joined
            jobs[job.id] = replace(job, needs=[*job.needs, joined.id]) if job.id in ids else job
        self.jobs = jobs
        self.distil = {key: self.jobs[job.id] for key, job in self.distil.items()}

    def _evaluate(self, needs: Sequence[Job | None], row: str, seed: int, upstream: str | None = None) -> None:
        named = {} if upstream is None else {"upstream": upstream}
        for task in self.study.tasks:
            corpus = self.corpus if self.study.data == "corpus" else None
            inputs = self._digests()
            if task in self._task_digests:
                inputs["data"] = self._task_digests[task]
            if task in ("pr", "pr_probe") and self._lexicon_digest is not None:
                inputs["lexicon"] = self._lexicon_digest
            elif task in PHONE_TASKS and (root := self.inputs.roots.get(task, self.inputs.root)) is not None:
                inputs |= _alignments(root)
            if upstream is not None and Path(upstream).is_dir():
                inputs["upstream"] = teacher_digest(upstream)
            options = {**self.study.evaluation.get(task, {}), **named, "inputs": inputs}
            self._add("evaluate", [*needs, corpus], row=row, seed=seed, task=task, settings=options)

    def _digests(self) -> dict[str, Any]:
        """Digests of external inputs: data files, and the teacher's weights."""
        inputs: dict[str, Any] = {"data": self._data_digest} if self._data_digest else {}
        if self.teacher is None:
            inputs["teacher"] = teacher_digest(self.teacher_settings["model"])
        return inputs


def trains_on_gpus(plan: "Plan") -> bool:
    """Whether any student is not trained on the CPU by its settings."""
    return any(job.settings.get("trainer", {}).get("accelerator") != "cpu" for job in plan.distil.values())


def _what_is_shared(job: Job) -> str:
    """Describe batches and teacher of a run as text, equal for runs that ``interstack fit-together`` can combine."""
    settings = job.settings
    model = settings.get("model", {})
    objective = ObjectiveConfig(**model.get("objective", {}))
    if objective.masked != "none":
        return job.id  # its masks change the targets
    shared = {key: value for key, value in settings.items() if key in ("data", "max_batch_per_device", "inputs")}
    shared["trainer"] = {key: value for key, value in settings.get("trainer", {}).items() if key != "max_epochs"}
    # By default the output layer is the last, which no other layer is above.
    highest = None if objective.output_layer is None else max([objective.output_layer, *(objective.layers or [])])
    shared["targets"] = model.get("teacher"), objective.output_layer, objective.targets, highest
    shared["cuda"] = model.get("cuda")
    if settings.get("data", {}).get("targets"):  # which may have the features of a frozen front end
        shared["frozen"] = StudentConfig(**model.get("student", {})).starts_frozen
    return json.dumps([job.seed, job.needs, shared], sort_keys=True, default=str)


def _alignments(root: str) -> dict[str, str]:
    """Hash all phone alignments of a corpus; empty if it has none."""
    try:
        folder = corpus_folder(root) / ALIGNMENTS
    except ValueError:
        return {}
    return {"alignments": alignment_digest(root, sorted(path.name for path in folder.iterdir() if path.is_dir()))[:16]}


def corpus_digest(root: Path) -> str:
    """Hash names and sizes of the audio below ``root`` and the checksums of packed splits, or the text of a table.

    Raises:
        InputError: there is no audio below ``root``.
    """
    if root.is_file():
        return hashlib.sha256(root.read_bytes()).hexdigest()[:16]
    names = []
    for path in _files_below(root):
        if path.suffix.lower() in AUDIO_SUFFIXES:
            names.append(f"{path.relative_to(root)} {path.stat().st_size}")
        elif path.name == MARKER:
            names.append(f"{path.relative_to(root)} {packed_digest(str(path.parent))}")
    if not names:
        raise InputError(
            f"there is no audio below {root}: --root is the folder that holds the splits, and --roots names folders of "
            "other corpora"
        )
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]


def _files_below(root: Path) -> Iterator[Path]:
    """All files below a folder, through links to folders as data modules read them, but not around in circles."""
    for folder, below, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = [name for name in below if not f"{real}/".startswith(f"{os.path.realpath(f'{folder}/{name}')}/")]
        yield from (Path(folder) / name for name in files)


def lexicon_digest(paths: Sequence[str]) -> str:
    """Hash the content and order of the files.

    Raises:
        InputError: a file does not exist.
    """
    digest = hashlib.sha256()
    for path in paths:
        if not Path(path).is_file():
            raise InputError(f"the lexicon {path} does not exist: --lexicon is a file of lines 'WORD PHONE PHONE ...'")
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()[:16]


def teacher_digest(model: str) -> str:
    """Return a hub name unchanged; for a folder hash its files."""
    if not Path(model).is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted(Path(model).glob("*")):
        if path.suffix in (".json", ".safetensors", ".bin"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
