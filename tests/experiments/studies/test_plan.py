"""Ids of jobs: what changes them, and what does not."""

import functools
from pathlib import Path

import pytest

from callbacks.stacking import StackingCallback
from datamodules.alignments import HEADER
from datamodules.corpus import CorpusSettings
from datamodules.files import write_text
from datamodules.librispeech import LibriSpeechDataModule
from datamodules.packing import pack_split
from experiments.studies.estimate import Estimator
from experiments.studies.job import superb_result
from experiments.studies.matching import cost_ratio, matched
from experiments.studies.plan import Inputs, Job, Plan, corpus_digest, teacher_digest, trains_on_gpus
from experiments.studies.study import load_study
from experiments.training.defaults import TRAINER_DEFAULTS
from tests.helpers import save_corpus, save_teacher

STUDY = """
title: T
corpus: {minutes: 1.0}
data: corpus
teacher: {steps: 2}
tasks: [pr_probe]
similarity: true
baseline: a
rows:
- {name: a, label: A, configs: [full_l2l]}
- {name: b, label: B, configs: [interleave_equal]}
- {name: c, label: C, configs: [full_l2l], match: {cost: flops, target: b, reference: a}}
"""


def plan(folder: Path, text: str = STUDY, **options: object) -> Plan:
    (folder / "own.yaml").write_text(text)
    return Plan(load_study(str(folder / "own.yaml")), **options)


def ids(planned: Plan, row: str) -> set[str]:
    return {job.id for job in planned.jobs.values() if job.row == row}


def changed(folder: Path, old: str, new: str) -> set[str]:
    """Rows (empty: shared jobs) whose ids differ."""
    first, second = plan(folder), plan(folder, STUDY.replace(old, new))
    assert old in STUDY
    return {row for row in ("", "teacher", "a", "b", "c") if ids(first, row) != ids(second, row)}


def test_every_job_comes_after_those_that_it_needs(tmp_path: Path) -> None:
    seen: set[str] = set()
    for job in plan(tmp_path).jobs.values():
        assert set(job.needs) <= seen
        seen.add(job.id)
    kinds = [job.kind for job in plan(tmp_path).jobs.values() if job.row in ("a", "b", "c")]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == dict.fromkeys(
        ("distil", "export", "evaluate", "similarity"), 3
    )


def test_a_changed_row_changes_its_jobs_and_what_is_matched_to_it(tmp_path: Path) -> None:
    assert changed(tmp_path, "[interleave_equal]", "[interleave_prop1]") == {"b", "c"}
    assert changed(tmp_path, "cost: flops", "cost: train_seconds") == {"c"}


def test_what_is_only_looked_at_changes_nothing(tmp_path: Path) -> None:
    assert changed(tmp_path, "label: B", "label: Better") == set()
    assert changed(tmp_path, "title: T", "title: U") == set()


def test_a_changed_teacher_or_corpus_changes_all_that_follows(tmp_path: Path) -> None:
    assert changed(tmp_path, "steps: 2", "steps: 3") == {"", "teacher", "a", "b", "c"}
    assert changed(tmp_path, "minutes: 1.0", "minutes: 2.0") == {"", "teacher", "a", "b", "c"}


def test_one_cache_of_targets_serves_all_rows_and_seeds(tmp_path: Path) -> None:
    cached = STUDY.replace("baseline: a", "baseline: a\ncache: targets\noverrides: {data.crop: fixed}")
    planned = plan(tmp_path, cached, seeds=[0, 1])
    (targets,) = (job for job in planned.jobs.values() if job.kind == "targets")
    assert all(targets.id in job.needs for job in planned.distil.values())
    assert "trainer" not in targets.settings
    wider = plan(tmp_path, cached.replace("configs: [interleave_equal]", "configs: [midas_equal]"))
    assert targets.id in wider.jobs  # control: what another row than the baseline learns is not in it
    other = plan(tmp_path, cached.replace("data.crop: fixed", "data.crop: fixed, data.segment_seed: 1"))
    assert targets.id not in other.jobs
    normalised = "- {name: d, label: D, configs: [full_l2l], overrides: {model.objective.normalize_targets: layer}}\n"
    both = plan(tmp_path, cached + normalised)
    assert [job.id == targets.id for job in both.jobs.values() if job.kind == "targets"] == [True, False]
    assert targets.id not in both.distil["d", 0].needs
    deeper = "- {name: e, label: E, configs: [full_l2l], overrides: {model.objective.layers: [3, 6, 9]}}\n"
    three = plan(tmp_path, cached + deeper)
    caches = {job.id: job.settings["model"]["objective"] for job in three.jobs.values() if job.kind == "targets"}
    assert targets.id in caches
    assert [caches[need]["layers"] for need in three.distil["e", 0].needs if need in caches] == [[3, 6, 9]]
    with pytest.raises(ValueError, match="with the layers of the baseline row: name one"):
        plan(tmp_path, cached.replace("baseline: a\n", ""))


def test_a_row_chooses_what_it_reads_from_a_cache(tmp_path: Path) -> None:
    frozen = "{name: NAME, label: NAME, configs: [CONFIG], cache: CACHE, overrides: {model.student.front_end: shared}}"

    def planned(*rows: tuple[str, str, str], more: str = "") -> Plan:
        lines = [frozen.replace("NAME", name).replace("CONFIG", config).replace("CACHE", c) for name, config, c in rows]
        text = STUDY + "".join(f"- {line}\n" for line in lines) + "overrides: {data.crop: fixed}\n"
        return plan(tmp_path, text.replace("shared", f"shared, {more}" if more else "shared"), seeds=[0, 1])

    def caches(whole: Plan, row: str) -> list[str]:
        needed = [whole.jobs[need] for seed in (0, 1) for need in whole.distil[row, seed].needs]
        return [job.id for job in needed if job.kind == "targets"]

    rows = [("d", "full_l2l", "targets"), ("e", "full_l2l", "features"), ("f", "interleave_equal", "features")]
    whole = planned(*rows)
    assert caches(whole, "a") == []  # the study's choice is none
    (targets, again), features = caches(whole, "d"), caches(whole, "e")
    assert targets == again
    assert features == caches(whole, "f"), "one cache of features for all policies"
    assert len({targets, *features}) == 2, "and for all seeds, since the front end is the teacher's"
    assert whole.jobs[features[0]].settings["features"] is True
    assert "features" not in whole.jobs[targets].settings
    costs = [Estimator(whole, on_gpu=False).of(whole.distil[row, 0]).flops for row in ("a", "d", "e")]
    assert costs[0] > costs[1] > costs[2]  # neither teacher nor convolutions
    still = planned(*rows, more="model.student.dropout: 0.0")
    assert caches(still, "e") == features, "dropout does not change what the front end gives"
    drawn = "model.student.front_end_init: random"
    whole = planned(*rows, more=f"{drawn}, model.student.front_end: frozen")
    assert len(set(caches(whole, "e"))) == 2, "a drawn front end has features of its own for each seed"
    assert [whole.jobs[cache].seed for cache in caches(whole, "e")] == [0, 1]
    assert len(set(caches(whole, "d"))) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("model.student.front_end: shared", "row d reads features from a cache, but its data.crop is not set"),
        ("data.crop: fixed", "its model.student.front_end is trained: set it to frozen or shared"),
        ("data.crop: fixed, model.student.front_end: trained_until_growth", "is trained_until_growth: set"),
    ],
)
def test_a_row_that_could_not_read_its_cache_is_named_before_anything_runs(
    overrides: str, message: str, tmp_path: Path
) -> None:
    row = f"- {{name: d, label: D, configs: [full_l2l], cache: features, overrides: {{{overrides}}}}}\n"
    with pytest.raises(ValueError, match=message):
        plan(tmp_path, STUDY + row)
    with pytest.raises(ValueError, match="cache of d is feature: choose from none, targets, features"):
        plan(tmp_path, STUDY + row.replace("cache: features", "cache: feature"))


def test_other_alignments_make_other_probes_of_phones(tmp_path: Path) -> None:
    text = STUDY.replace("corpus: {minutes: 1.0}\ndata: corpus\nteacher: {steps: 2}\n", "data: root\n")
    text = text.replace("tasks: [pr_probe]", "tasks: [frames_probe, asr_probe]")
    corpus, teacher = save_corpus(tmp_path / "corpus", {"train": 2}), str(save_teacher(tmp_path / "teacher"))
    found = []
    for end in ("0.2", "0.3"):
        write_text(corpus / "alignments" / "train" / "1.tsv", "\t".join(HEADER) + f"\n1-1-0000\tAA\t0.1\t{end}\n")
        planned = plan(tmp_path, text, inputs=Inputs(str(corpus), teacher))
        found.append({(job.kind, job.task): job.id for job in planned.jobs.values() if job.row == "a"})
    assert {key for key in found[0] if found[0][key] != found[1][key]} == {("evaluate", "frames_probe")}


def test_other_upstreams_stand_beside_the_students(tmp_path: Path) -> None:
    planned = plan(tmp_path, STUDY + "upstreams: [fbank]\n", seeds=[0, 1])
    (fbank,) = (job for job in planned.jobs.values() if job.row == "fbank")
    assert (fbank.kind, fbank.settings["upstream"], fbank.seed) == ("evaluate", "fbank", 0)
    folder, found = tmp_path / "encoder", []
    for width in (16, 32):
        save_teacher(folder, width=width)
        (job,) = (j for j in plan(tmp_path, f"{STUDY}upstreams: [{folder}]\n").jobs.values() if j.row == str(folder))
        found.append(job.id)
    assert found[0] != found[1]  # a folder is known by its content
    with pytest.raises(ValueError, match="a teacher that a job trains is evaluated anyway"):
        plan(tmp_path, STUDY + "upstreams: [teacher]\n")


def test_rows_that_share_data_and_teacher_are_trained_together(tmp_path: Path) -> None:
    more = "- {name: d, label: D, configs: [midas_equal], overrides: {data.batch_size: 2}}\n"
    apart, planned = plan(tmp_path, STUDY + more, seeds=[0, 1]), plan(tmp_path, STUDY + more, seeds=[0, 1])
    planned.train_together(lambda job: False)
    joined = [job for job in planned.jobs.values() if job.kind == "together"]
    # d has other batches, c waits for the costs of a and b.
    assert [job.settings["members"] for job in joined] == [
        [planned.distil[row, seed].id for row in ("a", "b")] for seed in (0, 1)
    ]
    assert {job.label for job in joined} == {"together seed 0", "together seed 1"}
    assert set(planned.jobs) - {job.id for job in joined} == set(apart.jobs), "ids are the same either way"
    seen: set[str] = set()
    for job in planned.jobs.values():
        assert set(job.needs) <= seen
        seen.add(job.id)
    assert all(joined[0].id in planned.distil[row, 0].needs for row in ("a", "b"))

    rest = plan(tmp_path, seeds=[0])
    rest.train_together(lambda job: job.row == "a")
    assert not [job for job in rest.jobs.values() if job.kind == "together"], "one student is no group"


@pytest.mark.parametrize(("front_ends", "groups"), [(("frozen", "shared"), 1), (("frozen", "trained"), 0)])
def test_rows_share_a_cache_if_both_or_none_read_its_features(
    front_ends: tuple[str, str], groups: int, tmp_path: Path
) -> None:
    text = STUDY[: STUDY.index("rows:")] + "rows:\n"
    for name, front_end in zip("ab", front_ends, strict=True):
        text += f"- {{name: {name}, label: {name}, configs: [full_l2l], overrides: "
        text += f"{{model.student.front_end: {front_end}, data.targets: cache, data.crop: fixed}}}}\n"
    planned = plan(tmp_path, text, seeds=[0])
    planned.train_together(lambda job: False)
    assert sum(job.kind == "together" for job in planned.jobs.values()) == groups


def test_a_row_brings_along_those_that_it_is_matched_to(tmp_path: Path) -> None:
    shared = {"", "teacher"}
    assert {job.row for job in plan(tmp_path, only=["c"]).to_run} == shared | {"a", "b", "c"}
    assert {job.row for job in plan(tmp_path, only=["b"]).to_run} == shared | {"b"}
    with pytest.raises(ValueError, match="no row 'd'"):
        plan(tmp_path, only=["d"])


def test_a_cache_of_targets_that_no_chosen_row_reads_is_not_made(tmp_path: Path) -> None:
    other = "{name: d, label: D, configs: [full_l2l], overrides: {model.objective.normalize_targets: layer}}"
    text = f"{STUDY}- {other}\ncache: targets\noverrides: {{data.crop: fixed}}\n"
    for only, caches in ((["b"], 1), (["b", "d"], 2), (None, 2)):
        assert sum(job.kind == "targets" for job in plan(tmp_path, text, only=only).to_run) == caches


def test_what_runs_is_part_of_the_whole_plan(tmp_path: Path) -> None:
    whole = plan(tmp_path, seeds=[0, 7])
    assert whole.seeds == [0, 7]
    assert whole.to_run == list(whole.jobs.values())
    part = plan(tmp_path, only=["b"], seeds=[7])
    assert part.jobs == whole.jobs
    assert {(job.row, job.seed) for job in part.to_run if job.row == "b"} == {("b", 7)}
    seen: set[str] = set()
    for job in part.to_run:
        assert set(job.needs) <= seen
        seen.add(job.id)
    part.train_together(lambda job: False)
    assert not [job for job in part.jobs.values() if job.kind == "together"]


def test_ids_depend_on_the_content_of_teacher_and_corpus(tmp_path: Path) -> None:
    teacher, corpus = save_teacher(tmp_path / "teacher"), save_corpus(tmp_path / "corpus", {"train": 2})
    before = teacher_digest(str(teacher)), corpus_digest(corpus)
    assert before == (teacher_digest(str(teacher)), corpus_digest(corpus))
    save_teacher(teacher, width=32)
    save_corpus(corpus, {"more": 1})
    assert teacher_digest(str(teacher)) != before[0]
    assert corpus_digest(corpus) != before[1]
    with pytest.raises(ValueError, match="no audio"):
        corpus_digest(tmp_path / "teacher")


def test_a_packed_corpus_has_an_id_by_content_and_a_size(tmp_path: Path) -> None:
    study = "title: T\nrows: [{name: a, label: A, configs: [full]}]\noverrides: {data.train_splits: [train]}\n"
    (tmp_path / "own.yaml").write_text(study)
    corpus, packed = save_corpus(tmp_path / "corpus", {"train": 70}), tmp_path / "packed"

    def pack() -> str:
        settings = CorpusSettings((str(corpus),), ("train",))
        pack_split(settings, packed, 10**6, overwrite=True, cache_dir=str(tmp_path / "cache"))
        return corpus_digest(packed)

    before = pack()
    assert before == pack() != corpus_digest(corpus)
    teacher = str(save_teacher(tmp_path / "teacher"))
    plans = [Plan(load_study(str(tmp_path / "own.yaml")), Inputs(str(root), teacher)) for root in (corpus, packed)]
    costs = [Estimator(each, on_gpu=True).of(each.distil["a", 0]).flops for each in plans]
    assert costs[0] == costs[1] > 0  # 70 utterances are a batch of 64, fewer are none
    save_corpus(corpus, {"train": 71}, seed=1)
    assert pack() != before


@pytest.mark.parametrize(
    ("owner", "change"),
    [
        (LibriSpeechDataModule, {"max_samples": 30_000}),
        (LibriSpeechDataModule, {"batch_size": 8}),
        (StackingCallback, {"layers_per_stage": 6}),
    ],
)
def test_costs_follow_the_defaults_of_what_runs(
    owner: type, change: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(tmp_path)
    before = Estimator(planned, on_gpu=True).of(planned.distil["b", 0]).flops
    changed = functools.partialmethod(owner.__init__, **change)
    monkeypatch.setattr(owner, "__init__", changed)
    assert 0 < Estimator(planned, on_gpu=True).of(planned.distil["b", 0]).flops != before


def test_a_batch_by_seconds_has_the_utterances_that_fit_in(tmp_path: Path) -> None:
    sizes = ("data.batch_size: 10", "data.batch_size: null, data.batch_seconds: 30.0")  # of 3 s each
    planned = [plan(tmp_path, f"{STUDY}overrides: {{{size}, data.batches_per_epoch: 5}}\n") for size in sizes]
    one, other = (Estimator(each, on_gpu=True).of(each.distil["a", 0]).flops for each in planned)
    assert one == other > 0


def test_costs_follow_the_default_number_of_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(tmp_path)
    before = Estimator(planned, on_gpu=True).of(planned.distil["a", 0]).flops
    monkeypatch.setitem(TRAINER_DEFAULTS, "max_epochs", 25)
    assert Estimator(planned, on_gpu=True).of(planned.distil["a", 0]).flops == pytest.approx(before / 3)
    assert matched({}, 0.8) == {"data": {}, "trainer": {"max_epochs": 20}}


@pytest.mark.parametrize(
    ("settings", "ratio", "steps"),
    [
        ({"data": {"batches_per_epoch": 8}, "trainer": {"max_epochs": 8}}, 0.875, 56),
        ({"data": {"batches_per_epoch": 8}, "trainer": {"max_epochs": 8}}, 0.78, 50),
        ({"data": {"batches_per_epoch": 8}, "trainer": {"max_epochs": 8}}, 1.3, 83),
    ],
)
def test_a_matched_run_is_longer_or_shorter(settings: dict[str, dict[str, int]], ratio: float, steps: int) -> None:
    result = matched(settings, ratio)
    assert result["data"]["batches_per_epoch"] * result["trainer"]["max_epochs"] == pytest.approx(steps, abs=1)


def test_a_matched_run_over_whole_epochs_changes_their_number() -> None:
    assert matched({}, 0.8) == {"data": {}, "trainer": {"max_epochs": 60}}


def test_the_result_of_a_superb_task_is_that_of_its_rate(tmp_path: Path) -> None:
    job = Job("0", "evaluate", [], "a", 3, "pr_probe")
    for rate in ("0.1", "0.01"):
        (tmp_path / "pr_probe" / f"lr{rate}_seed3").mkdir(parents=True)
        (tmp_path / "pr_probe" / f"lr{rate}_seed3" / "result.json").write_text("{}")
    assert not superb_result(tmp_path, job).is_file()  # two rates, and none was chosen
    (tmp_path / "pr_probe" / "chosen_seed3.json").write_text('{"chosen_lr": 0.01}')
    assert superb_result(tmp_path, job).parent.name == "lr0.01_seed3"


@pytest.mark.parametrize("change", ["objective.masked: drawn", "objective.targets: feed_forward", "cuda.tf32: true"])
def test_students_that_cannot_share_a_teacher_are_in_no_group(change: str, tmp_path: Path) -> None:
    more = f"- {{name: d, label: D, configs: [full_l2l], overrides: {{model.{change}}}}}\n"
    planned = plan(tmp_path, STUDY + more, seeds=[0])
    planned.train_together(lambda job: False)
    (joined,) = [job for job in planned.jobs.values() if job.kind == "together"]
    assert joined.settings["members"] == [planned.distil[row, 0].id for row in ("a", "b")]


def test_students_train_on_gpus_unless_all_are_told_to_use_the_cpu(tmp_path: Path) -> None:
    assert trains_on_gpus(plan(tmp_path))
    assert not trains_on_gpus(plan(tmp_path, STUDY + "overrides: {trainer.accelerator: cpu}\n"))


def test_seconds_of_other_hardware_make_no_run_of_equal_cost() -> None:
    target = {"row": "b", "seed": 0, "train_seconds": 5.0, "flops": 5.0, "hardware": "A100", "students": 1}
    for other in ({"hardware": "H100"}, {"students": 3}):
        reference = target | {"row": "a", "train_seconds": 10.0, "flops": 10.0} | other
        with pytest.raises(ValueError, match="equal seconds of b and a, seed 0, have no meaning"):
            cost_ratio(target, reference, "train_seconds")
        assert cost_ratio(target, reference, "flops") == 0.5
        assert cost_ratio(target, reference | {key: target[key] for key in other}, "train_seconds") == 0.5


def test_audio_behind_links_is_part_of_the_digest(tmp_path: Path) -> None:
    save_corpus(tmp_path / "real", {"train": 2})
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "train").symlink_to(tmp_path / "real" / "train")
    (tmp_path / "real" / "train" / "circle").symlink_to(tmp_path / "real")
    assert corpus_digest(tmp_path / "linked") == corpus_digest(tmp_path / "real")
    before = corpus_digest(tmp_path / "linked")
    next((tmp_path / "real").rglob("*.flac")).unlink()
    assert corpus_digest(tmp_path / "linked") != before
