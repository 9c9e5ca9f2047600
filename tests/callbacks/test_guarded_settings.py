"""Every setting of ``fit`` is guarded at a resume, or is on the list of those that cannot change the result."""

import json
from pathlib import Path
from typing import Any

import pytest

from callbacks.lookup import find_callback
from callbacks.resume_guard import ResumeGuard, differences
from callbacks.stacking import StackingCallback
from experiments.training.fit import DistillationCLI
from tests.helpers import save_corpus, save_teacher
from tests.students import POSITIONS, THIN
from tests.tiny_run import TINY

THIN_STUDENT: dict[str, Any] = {
    "conv_layers": THIN,
    "feature_projection": False,
    "input_dropout": 0.1,
    "time_reduction": 2,
    "reuse_attention": True,
    "scale_layer_gradients": True,
    "front_end_gradient": 0.5,
}
# Settings that are changed together: option -> (another value, what the fingerprint says of it).
GUARDED: dict[str, dict[str, tuple[Any, str]]] = {
    "sizes": {
        "model.student.hidden_size": (32, "model.student.hidden_size"),
        "model.student.intermediate_size": (32, "model.student.intermediate_size"),
        "model.student.num_heads": (4, "model.student.num_heads"),
        "model.student.num_layers": (6, "model.student.num_layers"),
        "model.student.dropout": (0.2, "model.student.dropout"),
        "model.student.attention_dropout": (0.0, "model.student.attention_dropout"),
        "model.student.hidden_dropout": (0.3, "model.student.hidden_dropout"),
        "model.student.activation_dropout": (0.4, "model.student.activation_dropout"),
        "model.student.mask_time_prob": (0.1, "model.student.mask_time_prob"),
        "model.student.mask_time_length": (5, "model.student.mask_time_length"),
        "model.objective.masked": ("fixed", "model.objective.masked"),
        "model.objective.mask_seed": (3, "model.objective.mask_seed"),
        "model.student.front_end": ("frozen", "model.student.front_end"),
        "growth.layers_per_stage": (2, "growth.stages"),
        "trainer.max_epochs": (6, "growth.stage_epochs"),
    },
    "losses": {
        "model.student.front_end_init": ("random", "model.student.front_end_init"),
        "model.student.conv_channels": (4, "model.student.conv_channels"),
        "model.objective.distance": ("l1_cosine", "model.objective.distance"),
        "model.objective.loss": ("tests.own_losses.WithDeltas", "model.objective.loss"),
        "model.objective.intermediate": ("l2l", "model.objective.intermediate"),
        "model.objective.weight": (0.25, "model.objective.weight"),
        "model.objective.output_weight": (0.5, "model.objective.output_weight"),
        "model.objective.head": ("mlp", "model.objective.head"),
        "model.objective.targets": ("feed_forward", "model.objective.targets"),
        "model.objective.layers": ("[3]", "model.objective.layers"),
        "model.objective.output_layer": (3, "model.objective.output_layer"),
        "model.objective.attach": ("original", "model.objective.attach"),
        "model.objective.projection": ("shared", "model.objective.projection"),
        "model.objective.normalize_targets": ("standardize", "model.objective.normalize_targets"),
        "model.objective.statistics_seconds": (60.0, "model.objective.statistics_seconds"),
        "model.teacher.init_args.normalize": ("true", "waveforms.normalize"),
        "model.teacher.init_args.precision": ("32", "teacher_settings.precision"),
        "model.cuda.float32": ("ieee", "cuda.float32"),
        "growth.stages": ("[2,4]", "growth.stages"),
    },
    "thin student": {
        "model.student.front_end_init": ("random", "model.student.front_end_init"),
        "growth.layers_per_stage": (2, "growth.stages"),
        **{
            f"model.student.{name}": (json.dumps(value), f"model.student.{name}")
            for name, value in THIN_STUDENT.items()
        },
    },
    "teacher's first layers": {
        "model.student.init_layers": (1, "model.student.init_layers"),
        "model.student.feature_norm": ("false", "model.student.feature_norm"),
    },
    "own model": {
        "model.student.architecture": ("tests.own_students.ScaledHubert", "model.student.architecture"),
        "model.student.options": ('{"first_share": 0.5}', "model.student.options.first_share"),
    },
    "optimisation": {
        "model.optimizer.name": ("sgd", "model.optimizer.name"),
        "model.optimizer.lr": (1e-3, "model.optimizer.lr"),
        "model.optimizer.weight_decay": (0.1, "model.optimizer.weight_decay"),
        "model.optimizer.betas": ("[0.8,0.9]", "model.optimizer.betas"),
        "model.optimizer.eps": (1e-7, "model.optimizer.eps"),
        "model.optimizer.implementation": ("foreach", "model.optimizer.implementation"),
        "model.optimizer.schedule": ("wsd", "model.optimizer.schedule"),
        "model.optimizer.warmup_fraction": (0.1, "model.optimizer.warmup_fraction"),
        "model.optimizer.decay_fraction": (0.3, "model.optimizer.decay_fraction"),
        "model.total_steps": (100, "steps.total"),
        "trainer.gradient_clip_val": (1.0, "trainer.gradient_clip_val"),
        "trainer.gradient_clip_algorithm": ("value", "trainer.gradient_clip_algorithm"),
        "trainer.precision": ("bf16-mixed", "trainer.precision"),
        "model.objective.unmatched": ("skip", "model.objective.unmatched"),
        "growth.policy": ("midas", "growth.policy"),
        "growth.schedule": ("prop-1", "growth.schedule"),
        "growth.optimizer_state": ("zero", "growth.optimizer_state"),
        "growth.lr_after_growth": ("rewarm", "growth.lr_after_growth"),
        "growth.rewarm_steps": (7, "growth.rewarm_steps"),
    },
    "data": {
        "growth.offset": ("first", "growth.offset"),
        "seed_everything": (3, "model.seed"),
        "data.root": ("OTHER_CORPUS", "data.row_hash"),
        "data.train_splits": ("[train,more]", "data.train_splits"),
        "data.batch_size": (5, "data.batch_size"),
        "data.max_samples": (6000, "data.max_samples"),
        "data.min_samples": (500, "data.min_samples"),
        "data.resample": ("true", "data.resample"),
        "data.batches_per_epoch": (2, "data.batches_per_epoch"),
        "data.crop": ("fixed", "data.crop"),
        "data.segment_seed": (4, "data.segment_seed"),
        "data.segments_per_utterance": (2, "data.segments_per_utterance"),
        "data.length_grid": (320, "data.length_grid"),
    },
    "seconds": {
        "data.batch_size": ("null", "data.batch_size"),
        "data.batch_seconds": (4.0, "data.batch_seconds"),
        "data.length": ("pad", "data.length"),
        "trainer.limit_train_batches": (2, "steps.per_epoch"),
    },
    "teacher": {"model.teacher.init_args.model": ("OTHER_TEACHER", "teacher")},
}
# Links: the value comes from another option, or the run must end with an error before it trains.
ELSEWHERE = {
    "model.seed": "seed_everything",
    "data.seed": "seed_everything",
    "data.sample_rate": "must be the teacher's",
    "data.targets": "a cache of other settings is refused; its format is in the fingerprint (test_cache_targets.py)",
    "model.teacher.class_path": "its weights and settings",
    "model.teacher.init_args.revision": "the weights",
    "trainer.max_steps": "is refused",
    "trainer.overfit_batches": "is refused",
    "trainer.fast_dev_run": "keeps no checkpoint",
    "trainer.use_distributed_sampler": "is refused",
}
# What cannot change the result, and a value to show it where there is one.
CANNOT: dict[str, dict[str, Any]] = {
    "the same arithmetic, in other places or another order": {
        "trainer.accelerator": "auto",
        "trainer.strategy": None,
        "trainer.devices": None,
        "trainer.num_nodes": None,
        "trainer.accumulate_grad_batches": 2,
        "max_batch_per_device": None,
        "trainer.deterministic": "true",
        "trainer.benchmark": "false",
        "trainer.inference_mode": "false",
        "trainer.plugins": None,
        "trainer.sync_batchnorm": None,
        "trainer.reload_dataloaders_every_n_epochs": None,
        "model.student.compile": "true",
        "model.student.compile_backend": "eager",
        "model.student.kernels": "plain",
        "model.teacher.init_args.compile": "true",
        "model.teacher.init_args.compile_backend": "eager",
        "model.teacher.init_args.kernels": "plain",
        "model.teacher.init_args.attn_implementation": "eager",
        "model.cuda.attention": "cudnn",
        "data.num_workers": 1,
    },
    "validation": {
        "data.val_splits": "[more]",
        "data.val_batch_size": 2,
        "trainer.limit_val_batches": 1,
        "trainer.limit_test_batches": None,
        "trainer.limit_predict_batches": None,
        "trainer.val_check_interval": 2,
        "trainer.check_val_every_n_epoch": 2,
        "trainer.num_sanity_val_steps": 1,
    },
    "when a run stops, not what it learns until then": {
        "trainer.max_time": "00:10:00:00",
        "trainer.min_epochs": 1,
        "trainer.min_steps": 1,
        "guard.max_skipped_steps": 3,
        "data.on_bad_audio": "skip",
        "trainer.detect_anomaly": "true",
    },
    "what is kept, said and measured": {
        "checkpoint.every_n_steps": 3,
        "checkpoint.keep": 3,
        "checkpoint.keep_stages": "false",
        "trainer.enable_checkpointing": None,
        "trainer.enable_progress_bar": None,
        "trainer.enable_model_summary": None,
        "trainer.enable_autolog_hparams": None,
        "trainer.model_registry": None,
        "trainer.log_every_n_steps": 1,
        "trainer.logger": None,
        "trainer.profiler": "simple",
        "trainer.barebones": None,
        "growth.measure_loss": "false",
        "growth.verify": "false",
        "log_samples": "true",
        **{f"wandb.{name}": None for name in ("mode", "project", "entity", "group", "tags", "id")},
        "wandb.init_timeout_seconds": 3,
        "wandb.finish_timeout_seconds": 3,
    },
    "where things lie": {
        "name": "another",
        "runs_dir": None,
        "trainer.default_root_dir": None,
        "data.run_dir": None,
        "data.cache_dir": None,
        "data.download": None,
        "config": None,
        "ckpt_path": None,
        "allow_config_change": None,
    },
    "read by a new run only": {"model.init_from": None},
    "own callbacks answer for themselves; an average of the weights is compared": {"trainer.callbacks": None},
}


class Prepared(DistillationCLI):
    """A run that is set up, and asked what it is."""

    def _run_subcommand(self, subcommand: str) -> None:
        self.trainer.datamodule = self.datamodule
        self.datamodule.trainer = self.model.trainer = self.trainer
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        stacking, guard = find_callback(self.trainer, StackingCallback), find_callback(self.trainer, ResumeGuard)
        assert stacking is not None
        assert guard is not None
        stacking.setup(self.trainer, self.model, "fit")
        self.fingerprint = guard.fingerprint(self.trainer, self.model)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guarded")
    save_teacher(folder / "teacher", **POSITIONS)
    save_teacher(folder / "other_teacher", width=32)
    for seed, corpus in enumerate(("corpus", "other_corpus")):
        save_corpus(folder / corpus, {"train": 12, "dev": 4, "more": 6}, seed=seed)
    return folder


def prepared(home: Path, changes: dict[str, Any]) -> Prepared:
    places = {"OTHER_CORPUS": home / "other_corpus", "OTHER_TEACHER": home / "other_teacher"}
    settings = {
        "data.root": home / "corpus",
        "model.teacher.init_args.model": home / "teacher",
        "data.cache_dir": home / "cache",
        "runs_dir": home / "runs",
    } | {name: places.get(value, value) for name, value in changes.items()}
    return Prepared(["fit", *TINY, *(f"--{name}={value}" for name, value in settings.items())])


@pytest.fixture(scope="module")
def plain(home: Path) -> Prepared:
    return prepared(home, {})


def test_every_setting_is_in_one_of_the_tables(plain: Prepared) -> None:
    guarded = {name for group in GUARDED.values() for name in group}
    harmless = {name for group in CANNOT.values() for name in group}
    options = {str(name) for name in plain.config["fit"].keys()}  # noqa: SIM118 (a Namespace: all levels)
    assert guarded | harmless | set(ELSEWHERE) == options
    assert not guarded & harmless


@pytest.mark.parametrize("group", GUARDED)
def test_what_changes_the_result_changes_the_fingerprint(group: str, home: Path, plain: Prepared) -> None:
    changes = GUARDED[group]
    other = prepared(home, {name: value for name, (value, _) in changes.items()})
    found = {line.partition(" was ")[0] for line in differences(plain.fingerprint, other.fingerprint)}
    assert {key for _, key in changes.values()} - found == set()


def test_what_cannot_does_not(home: Path, plain: Prepared) -> None:
    values = {name: value for group in CANNOT.values() for name, value in group.items() if value is not None}
    assert len(values) > 35
    assert differences(plain.fingerprint, prepared(home, values).fingerprint) == []


def test_the_common_rate_of_dropout_written_out_is_the_same_run(home: Path, plain: Prepared) -> None:
    written_out = prepared(home, {"model.student.hidden_dropout": plain.model.student.config.dropout})
    assert differences(plain.fingerprint, written_out.fingerprint) == []


def test_the_fingerprint_is_plain_values(plain: Prepared) -> None:
    assert json.loads(json.dumps(plain.fingerprint)) == plain.fingerprint
