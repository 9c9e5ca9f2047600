"""Corpora of evaluations: each task its own folder, looked at before the first job."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from datamodules.files import write_json
from experiments.studies.corpora import require_corpora
from experiments.studies.job import Workspace
from experiments.studies.plan import Inputs, Job, Plan
from experiments.studies.reproduce import reproduce
from experiments.studies.study import load_study
from tests.datamodules.superb import corpora
from tests.helpers import save_teacher

STUDY = """
title: T
rows: [{name: a, label: A, configs: [full_l2l]}]
tasks: [asr, sf, sid_probe]
similarity: true
"""


@pytest.fixture
def study(tmp_path: Path) -> str:
    (tmp_path / "own.yaml").write_text(STUDY)
    corpora.librispeech(tmp_path / "libri")
    corpora.snips(tmp_path / "snips")
    corpora.voxceleb1(tmp_path / "vox")
    save_teacher(tmp_path / "teacher")
    return str(tmp_path / "own.yaml")


def inputs_of(folder: Path, roots: dict[str, str] | None = None, lexicon: Sequence[str] = ()) -> Inputs:
    return Inputs(str(folder / "libri"), str(folder / "teacher"), lexicon, roots or {})


def plan(folder: Path, study: str, roots: dict[str, str] | None = None) -> Plan:
    return Plan(load_study(study), inputs_of(folder, roots))


def roots_of(folder: Path) -> dict[str, str]:
    return {"sf": str(folder / "snips"), "sid_probe": str(folder / "vox")}


def ids(planned: Plan) -> dict[str, str]:
    return {job.label: job.id for job in planned.jobs.values()}


def differing(first: dict[str, str], second: dict[str, str]) -> set[str]:
    assert first.keys() == second.keys()
    return {label for label in first if first[label] != second[label]}


def test_a_tasks_folder_is_in_the_ids_of_its_evaluations_alone(study: str, tmp_path: Path) -> None:
    without, given = ids(plan(tmp_path, study)), ids(plan(tmp_path, study, roots_of(tmp_path)))
    assert ids(plan(tmp_path, study, {})) == without
    assert differing(without, given) == {"evaluate sf a seed 0", "evaluate sid_probe a seed 0"}
    (tmp_path / "snips").rename(tmp_path / "elsewhere")
    moved = ids(plan(tmp_path, study, {**roots_of(tmp_path), "sf": str(tmp_path / "elsewhere")}))
    assert moved == given
    corpora.write_tone(tmp_path / "vox" / "wav" / "id10001" / "video9" / "00001.wav")
    assert differing(given, ids(plan(tmp_path, study, {**roots_of(tmp_path), "sf": str(tmp_path / "elsewhere")}))) == {
        "evaluate sid_probe a seed 0"
    }
    with pytest.raises(ValueError, match="--roots names ks, but the tasks of own are asr, sf, sid_probe"):
        plan(tmp_path, study, {"ks": str(tmp_path)})
    table = corpora.table(tmp_path / "table")
    before = ids(plan(tmp_path, study, {"sf": str(table)}))
    table.write_text(table.read_text().replace("HELLO WORLD", "HELLO"))
    assert differing(before, ids(plan(tmp_path, study, {"sf": str(table)}))) == {"evaluate sf a seed 0"}


def test_a_command_has_the_folder_of_its_task(study: str, tmp_path: Path) -> None:
    planned = plan(tmp_path, study, roots_of(tmp_path))
    workspace = Workspace(tmp_path / "out", inputs_of(tmp_path, roots_of(tmp_path)))
    found = {
        label.removesuffix(" a seed 0"): words[words.index("--root" if "--root" in words else "--data.root") + 1]
        for label, words in commands(planned, workspace).items()
        if not label.startswith("export")
    }
    places = {"asr": "libri", "sf": "snips", "sid_probe": "vox"}
    assert found == {
        **{f"evaluate {task}": str(tmp_path / folder) for task, folder in places.items()},
        "distil": str(tmp_path / "libri"),
        "similarity": str(tmp_path / "libri" / "LibriSpeech" / "dev-clean"),  # held-out speech
    }


def test_without_a_held_out_split_layers_are_compared_on_the_corpus(study: str, tmp_path: Path) -> None:
    planned = plan(tmp_path, study, roots_of(tmp_path))
    shutil.rmtree(tmp_path / "libri" / "LibriSpeech" / "dev-clean")
    words = commands(planned, Workspace(tmp_path / "out", inputs_of(tmp_path, roots_of(tmp_path))))
    similarity = words["similarity a seed 0"]
    assert similarity[similarity.index("--root") + 1] == str(tmp_path / "libri")


def commands(planned: Plan, workspace: Workspace) -> dict[str, list[str]]:
    for job in planned.jobs.values():
        write_json(workspace.path(job) / "job.json", job.described())
    return {job.label: workspace.command(job) for job in planned.jobs.values()}


def test_a_lexicon_is_in_the_ids_of_pr_by_content_and_in_its_commands_by_path(study: str, tmp_path: Path) -> None:
    Path(study).write_text(STUDY.replace("[asr, sf, sid_probe]", "[asr, pr, pr_probe]"))
    files = [str(corpora.lexicon(tmp_path / name)) for name in ("first.txt", "second.txt")]
    Path(files[1]).write_text("MORE M AO R\n")

    def plan_with(*lexicon: str) -> Plan:
        return Plan(load_study(study), inputs_of(tmp_path, lexicon=lexicon))

    phones = {"evaluate pr a seed 0", "evaluate pr_probe a seed 0"}
    both = ids(plan_with(*files))
    assert differing(ids(plan_with()), both) == phones
    assert differing(ids(plan_with(*files[::-1])), both) == phones
    (tmp_path / "elsewhere").mkdir()
    moved = [str(Path(file).rename(tmp_path / "elsewhere" / Path(file).name)) for file in files]
    assert ids(plan_with(*moved)) == both
    Path(moved[0]).write_text("HELLO HH EH L OW\n")
    assert differing(ids(plan_with(*moved)), both) == phones
    with pytest.raises(ValueError, match=r"the lexicon \S+first.txt does not exist"):
        plan_with(*files)

    planned = plan_with(*moved)
    workspace = Workspace(tmp_path / "out", inputs_of(tmp_path, lexicon=moved))
    given = {
        label: words[words.index("--data.lexicon") + 1]
        for label, words in commands(planned, workspace).items()
        if "--data.lexicon" in words
    }
    assert given == dict.fromkeys(phones, json.dumps(moved))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {},
            r"the task sf cannot be evaluated on \S+/libri: Audio SNIPS is not there: .*--roots '{\"sf\": \"FOLDER\"}'",
        ),
        ({"sf": "snips"}, r"the task sid_probe cannot be evaluated on \S+/libri: VoxCeleb1 is not there"),
        ({"sf": "snips", "sid_probe": "vox", "asr": "vox"}, r"the task asr .*/vox: .* no split 'train-clean-100'"),
    ],
)
def test_a_folder_without_the_tasks_corpus_is_refused_before_the_first_job(
    change: dict[str, str], message: str, study: str, tmp_path: Path
) -> None:
    roots = {task: str(tmp_path / folder) for task, folder in change.items()}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        reproduce(
            study, str(tmp_path / "out"), root=str(tmp_path / "libri"), teacher=str(tmp_path / "teacher"), roots=roots
        )
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_what_is_needed_are_accepted(study: str, tmp_path: Path) -> None:
    jobs = plan(tmp_path, study, roots_of(tmp_path)).jobs.values()
    require_corpora(Workspace(tmp_path / "out", inputs_of(tmp_path, roots_of(tmp_path))), jobs)
    require_corpora(Workspace(tmp_path / "out"), jobs)  # nothing is given: the corpus is still to be made


def test_pr_needs_phones(tmp_path: Path) -> None:
    root = str(corpora.librispeech(tmp_path))
    job = Job("0", "evaluate", [], task="pr", settings={"data.test_splits": ["test-other"]})
    with pytest.raises(ValueError, match=r"(?s)the task pr .* needs phones.*pronunciations with --lexicon"):
        require_corpora(Workspace(tmp_path / "out", Inputs(root)), [job])
    job.settings["inputs"] = {"lexicon": "digest"}
    workspace = Workspace(tmp_path / "out", Inputs(root, lexicon=[str(corpora.lexicon(tmp_path / "lexicon.txt"))]))
    require_corpora(workspace, [job])
    job.settings["data.test_splits"] = ["test-new"]
    with pytest.raises(ValueError, match="no split 'test-new'"):
        require_corpora(workspace, [job])
    job.settings["data"] = {"lexikon": "l"}
    with pytest.raises(ValueError, match="lexikon"):
        require_corpora(Workspace(tmp_path / "out", Inputs(root)), [job])
