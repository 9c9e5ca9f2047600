"""``interstack fit`` and ``interstack validate``: LightningCLI with run folders.

The typed signatures of the classes are the configuration; YAML files hold only what differs from their defaults.
"""

import shutil
import tempfile
import weakref
from argparse import HelpFormatter
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import yaml
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import rank_zero_only

from callbacks.checkpointing import RunCheckpoint
from callbacks.guards import NonFiniteGuard
from callbacks.lookup import find_callback
from callbacks.metrics import TrainingMetrics
from callbacks.progress import DistillationProgressBar
from callbacks.resume_guard import ResumeGuard
from callbacks.samples import SampleSpectrograms
from callbacks.stacking import StackingCallback
from callbacks.summary import RunSummary
from callbacks.throughput import ThroughputCallback
from datamodules.errors import InputError
from datamodules.files import read_text
from datamodules.librispeech import LibriSpeechDataModule
from datamodules.speech_data import SpeechDataModule
from experiments.command_line import OneLineErrors, common_options
from experiments.launch.meeting import warn_if_unreachable
from experiments.records.loggers import LateLogger, WandbSettings, build_loggers
from experiments.records.runs import RunFolder
from experiments.records.settings_yaml import dump_settings, load_settings
from experiments.shipped import find_shipped, shipped_names
from experiments.training.accumulation import accumulation_steps, utterances_that_fit
from experiments.training.data_class import accepts, choose_data, name_data_class
from experiments.training.defaults import TRAINER_DEFAULTS
from experiments.training.nccl_exit import end_others
from experiments.training.on_cpu import prepare_cpu
from experiments.training.trainer_flags import plugin_classes, refuse_flags
from lightning_modules.distillation import DistillationModule
from lightning_modules.precision import trainer_precision

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULT_TEACHER = {
    "class_path": "lightning_modules.teacher.HuggingFaceTeacher",
    "init_args": {"model": "facebook/hubert-base-ls960"},
}


def resolve_configs(args: list[str]) -> list[str]:
    """Let ``--config NAME`` name a shipped file of ``experiments/configs`` if no file of that name exists.

    Raises:
        InputError: the file is missing or is not valid YAML; the message names it.
    """

    def resolve(value: str) -> str:
        if ":" in value:  # inline settings, which jsonargparse accepts too
            return value
        path = find_shipped(value, CONFIGS, "--config")
        try:
            load_settings(read_text(path))
        except yaml.YAMLError as error:
            raise InputError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None
        return str(path)

    resolved = list(args)
    for position, argument in enumerate(args):
        if argument.startswith("--config="):
            resolved[position] = "--config=" + resolve(argument.removeprefix("--config="))
        elif position and args[position - 1] in ("--config", "-c"):
            resolved[position] = resolve(argument)
    return resolved


def default_name(args: list[str]) -> str:
    """Default name of a run: that of its last config file, or ``run``."""
    name = "run"
    for before, argument in zip(["", *args], args, strict=False):
        if argument.startswith("--config=") or before in ("--config", "-c"):
            value = argument.removeprefix("--config=")
            name = name if ":" in value else Path(value).stem  # with a colon it is settings, not a file
    return name


def _refuse_half_precision_on_cpu(trainer: Any) -> None:
    """Refuse float16 on a CPU: Lightning would train in bf16-mixed instead, with only a warning."""
    on_cpu = trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not torch.accelerator.is_available())
    if on_cpu and str(trainer.precision) in ("16-mixed", "16"):
        raise InputError(
            f"trainer.precision={trainer.precision} needs a GPU, and this run is on a CPU: use 32-true or bf16-mixed"
        )


def default_precision(trainer: Any) -> str | None:
    """Precision of a trainer whose settings name none: bf16-mixed on a GPU that computes in it, else 32-true.

    ``None`` if a plugin sets the precision: Lightning refuses both.
    """
    if any(issubclass(plugin, Precision) for plugin in plugin_classes(trainer.plugins)):
        return None
    return trainer_precision(trainer.accelerator)


def _utterances_that_fit(trainer: Trainer, config: Any) -> int | None:
    """Utterances that fit the GPU's memory; ``None`` on other devices and if the user sets accumulation or a limit."""
    devices = getattr(trainer.strategy, "parallel_devices", None) or [trainer.strategy.root_device]
    unlimited = config.trainer.limit_train_batches is None and all(
        getattr(config.data, name, None) is not None for name in ("batch_size", "max_samples", "sample_rate")
    )
    if devices[0].type != "cuda" or not unlimited or trainer.accumulate_grad_batches != 1:
        return None
    memory_gb = min(torch.cuda.get_device_properties(device).total_memory for device in devices) / 1e9
    seconds = config.data.max_samples / config.data.sample_rate
    return utterances_that_fit(memory_gb, seconds, str(trainer.precision))


def integer_first(hint: Any) -> Any:
    """Reorder the type of an option that has int and float so that int comes first: ``1`` stays an integer.

    ``limit_train_batches=1`` is one batch, and ``1.0`` is all of them. Lightning writes int first, but the cache of
    unions in ``typing`` ignores the order: on Python 3.13 Lightning gets one that was made with float first.
    """
    kinds = get_args(hint)
    if int not in kinds or float not in kinds:
        return hint
    return reduce(or_, sorted(kinds, key=lambda kind: kind is not int))  # unions made by `|` are not cached


class TrainingParser(OneLineErrors, LightningArgumentParser):
    """The parser of the commands that train or validate; its help begins with the options that most runs set.

    Attributes:
        data_class: class of the data module, which a configuration must name.
    """

    data_class: type[SpeechDataModule] = LibriSpeechDataModule

    def dump(self, *args: Any, **kwargs: Any) -> str:
        text = super().dump(*args, **kwargs)
        default = self.data_class is LibriSpeechDataModule
        return text if default else dump_settings(name_data_class(load_settings(text), self.data_class))

    def format_usage(self) -> str:
        return f"usage: {self.prog} [--config NAME_OR_FILE] [options]\n"

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        full = super().format_help(formatter)
        start = full.index("\n\n") + 2  # after the usage, which names every option
        description, options = full[start:].split("\n\n", 1)
        return f"{self.format_usage()}\n{description}\n\n{common_options(self)}\nall {options}"


class DistillationCLI(LightningCLI):
    """The command line of training; one instance parses, builds and runs.

    Args:
        args: subcommand and arguments, as on a command line.
        trainer_class: a trainer that has the subcommands.

    Attributes:
        bar: whether a terminal shows progress as a bar.
    """

    bar = True

    def __init__(self, args: list[str], trainer_class: type[Trainer] = Trainer) -> None:
        resolved = resolve_configs(args)
        self._command = args[0] if args else ""
        self._default_name = default_name(resolved)
        self._data_class, arguments = choose_data(resolved)
        super().__init__(
            DistillationModule,
            self._data_class,
            trainer_class=trainer_class,
            seed_everything_default=0,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            save_config_callback=None,
            auto_configure_optimizers=False,  # its --optimizer would replace the optimizer that a growth extends
            load_from_checkpoint_support=False,  # DistillationModule saves plain hyper-parameters itself
            args=arguments,
            parser_class=TrainingParser,
            parser_kwargs={name: {"description": _DESCRIPTIONS[name]} for name in self.subcommands()},
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's is static
        every = {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only"},
        }
        # The asked one alone, since each takes a third of the time that it takes to parse a command.
        return {self._command: every[self._command]} if self._command in every else every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(StackingCallback, "growth")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(NonFiniteGuard, "guard")
        parser.add_class_arguments(WandbSettings, "wandb")
        parser.add_argument("--name", type=str, default=self._default_name, help="Name of the run's folder.")
        parser.add_argument("--runs_dir", type=str, default="runs", help="Folder that holds the runs.")
        parser.add_argument("--log_samples", type=bool, default=True, help="Log spectrograms once per run.")
        parser.add_argument(
            "--max_batch_per_device",
            type=PositiveInt | Literal["auto"] | None,
            default="auto",
            help="Most utterances that one device holds at once; trainer.accumulate_grad_batches follows from it. "
            "`auto`: from a GPU's memory, for the paper's sizes, unless accumulation is set. `null`: keep it as set.",
        )
        parser.add_argument(
            "--allow-config-change",
            action="store_true",
            help="Resume a checkpoint of a run with other settings (policy, schedule, teacher, corpus, ...).",
        )
        parser.set_defaults({"model.teacher": DEFAULT_TEACHER})
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        if accepts(self._data_class, "seed"):
            parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name, subparser in self._subcommand_parsers.items():  # jsonargparse has just changed their names
            subparser.prog = f"interstack {name.replace('_', '-')}"

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        cast(TrainingParser, parser).data_class = self._data_class
        for action in parser._actions:
            action.help = _HELP.get(action.dest, action.help)
            if hasattr(action, "_typehint"):
                action._typehint = integer_first(action._typehint)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        seed = self.config[self.config.subcommand].get("seed_everything")
        if isinstance(seed, bool):  # Lightning takes them for a random seed, and none
            raise InputError(f"--seed_everything {str(seed).lower()} must be a number: no other run would be like it")

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would silently replace the configuration by the checkpoint's hyper-parameters."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        refuse_flags(config.trainer)
        _refuse_half_precision_on_cpu(config.trainer)
        self.run_folder = RunFolder(Path(config.runs_dir) / config.name)
        if self.subcommand == "fit":
            if config.trainer.fast_dev_run:
                self.run_folder = self._scratch_folder(config)
            self.run_folder.hold()
            config.ckpt_path = self.run_folder.resolve_checkpoint(config.ckpt_path)
        elif self.subcommand == "validate":
            config.ckpt_path = self.run_folder.trained_checkpoint(config.ckpt_path)
        config.trainer.default_root_dir = str(self.run_folder.path)
        if accepts(self._data_class, "run_dir"):
            config.data.run_dir = str(self.run_folder.path)
        if config.trainer.precision is None:
            config.trainer.precision = default_precision(config.trainer)

    def _scratch_folder(self, config: Any) -> RunFolder:
        """Temporary folder for a fast_dev_run: it starts from scratch and leaves nothing in the run's folder."""
        if config.ckpt_path not in (None, "last"):
            raise InputError(
                f"--trainer.fast_dev_run {config.trainer.fast_dev_run} begins anew, so it cannot go on from "
                f"{config.ckpt_path}: leave out --ckpt_path"
            )
        config.ckpt_path = None
        scratch = tempfile.mkdtemp(prefix="interstack-")
        weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        return RunFolder(Path(scratch) / config.name)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config[self.subcommand]
        fitting = self.subcommand == "fit"
        if fitting:
            self._dump_config()  # on every rank: the loggers are built from it
            self.config_dump = name_data_class(self.config_dump, self._data_class)
            if config.wandb.id:
                self.run_folder.wandb_id = config.wandb.id
            self._start_attempt()
        late: list[Any] = []
        if config.trainer.logger is None:
            kwargs["logger"] = False
            if fitting and not config.trainer.fast_dev_run:
                kwargs["logger"], *others = build_loggers(
                    self.run_folder.path,
                    config.name,
                    self.config_init[self.subcommand].wandb,
                    run_id=self.run_folder.wandb_id,
                    config=self.config_dump,
                )
                late = [LateLogger(each) for each in others]
        callbacks: list[Any] = [TrainingMetrics(), ThroughputCallback(), RunSummary()]
        callbacks.append(ResumeGuard(config.allow_config_change))
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(DistillationProgressBar(bar=self.bar))
        if config.log_samples:
            callbacks.append(SampleSpectrograms())
        own = self.config_init[self.subcommand].trainer.get("callbacks") or []
        kwargs["callbacks"] = [*late, *(own if isinstance(own, list) else [own]), *callbacks]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except InputError:
            raise
        except ValueError as error:  # such as an unknown strategy
            raise InputError(f"these --trainer settings do not fit: {error}") from error
        prepare_cpu(trainer)
        warn_if_unreachable(trainer.num_nodes, trainer.local_rank)
        most = config.max_batch_per_device
        if most == "auto":
            most = _utterances_that_fit(trainer, config) if self.subcommand in ("fit", "validate") else None
        if most is not None:
            trainer.accumulate_grad_batches = accumulation_steps(
                batch_size=getattr(config.data, "batch_size", None),
                num_devices=trainer.num_devices * trainer.num_nodes,
                max_batch_per_device=most,
                given=trainer.accumulate_grad_batches,
                limit=config.trainer.limit_train_batches,
            )
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Write the traceback of an error to the run's folder as well."""
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            if subcommand == "fit":
                self.run_folder.note_error(error)
                self._withdraw_if_refused()
            end_others(self.trainer)
            raise

    @rank_zero_only
    def after_fit(self) -> None:
        """Leave no trace of a call that found the run finished."""
        summary = find_callback(self.trainer, RunSummary)
        if summary is not None and summary.kept:
            self.run_folder.withdraw_attempt()

    @rank_zero_only
    def _withdraw_if_refused(self) -> None:
        """Leave no trace of a resume that trained nothing, such as one with other settings."""
        summary = find_callback(self.trainer, RunSummary)
        if summary is not None and not summary.trained and self.run_folder.record["attempts"][-1]["resumed_from"]:
            self.run_folder.withdraw_attempt()

    @rank_zero_only
    def after_validate(self) -> None:
        """Print the losses; Lightning's own table has only what goes to a logger."""
        for name, value in self.trainer.callback_metrics.items():
            print(f"{name} {float(value):.6g}")

    @rank_zero_only
    def _start_attempt(self) -> None:
        config = self.config[self.subcommand].clone()
        # The saved configuration starts the same run from scratch; run.json records what this attempt resumed.
        resumed_from, config.ckpt_path, config.allow_config_change = config.ckpt_path, None, False
        config.trainer.default_root_dir = None  # it follows from --runs_dir and --name
        config.wandb.id = None  # of this run alone, and kept in run.json
        self.run_folder.start_attempt(self._parser(self.subcommand).dump(config, skip_none=False), resumed_from)


_DESCRIPTIONS = {
    "fit": "Distil a student. Shipped configs: " + ", ".join(shipped_names(CONFIGS)),
    "validate": "Measure the distillation losses of a checkpoint (--ckpt_path FILE or last).",
    "cache_targets": "Store the teacher's outputs for a run's fixed segments; then `fit --data.targets OUTPUT`.",
}

# Help texts for options whose text from Lightning would be wrong here.
_HELP = {
    "seed_everything": "Seed of weights, masks, dropout and the order of the data: a number.",
    "data": "Class of another data module (my_package.MyData), or a YAML file with settings of this one.",
    "config": "A YAML file, or the name of a shipped one; may be given several times, later ones win.",
    "ckpt_path": "A checkpoint, or `last`: the newest of this run (without one, `fit` starts from scratch).",
    "trainer.default_root_dir": "Leave it out: the run's folder is RUNS_DIR/NAME, see --runs_dir and --name.",
    "trainer.fast_dev_run": "Run this many batches of training and validation (`true`: one); no growth, no run folder.",
    "trainer.precision": "Default: bf16-mixed on GPUs that have bfloat16, else 32-true.",
    "trainer.logger": "Default: metrics.csv in the run's folder, and Weights & Biases as the --wandb settings say.",
    "trainer.use_distributed_sampler": "Leave it off: the data module cuts global batches by rank itself.",
    "trainer.max_epochs": "Epochs of the whole run; a growth schedule divides them into stages.",
    "trainer.num_sanity_val_steps": "Validation micro-batches run before training; off by default.",
    "data.run_dir": "Ignored: it is always the run's folder.",
}
