"""`interstack fit` at a size of seconds: a student that grows from 1 to 4 layers in 4 epochs of 3 steps."""

from pathlib import Path

from experiments.training.fit import DistillationCLI

TINY = [
    *("--model.student.hidden_size", "16", "--model.student.intermediate_size", "24"),
    *("--model.student.num_heads", "2", "--model.student.num_layers", "4", "--model.objective.layers", "[2]"),
    *("--model.objective.intermediate", "prediction", "--growth.policy", "interleaved"),
    *("--growth.layers_per_stage", "1", "--data.train_splits", "[train]", "--data.val_splits", "[dev]"),
    *("--data.batch_size", "4", "--data.num_workers", "0", "--trainer.max_epochs", "4"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--log_samples", "false", "--checkpoint.every_n_steps", "1"),
    *("--checkpoint.keep", "100", "--wandb.mode", "disabled"),
]


def fit(inputs: Path, *arguments: str) -> DistillationCLI:
    """Train on the teacher and the corpus in ``inputs``, into ``inputs/runs``; later arguments win."""
    common = ["--data.root", str(inputs / "corpus"), "--model.teacher.init_args.model", str(inputs / "teacher")]
    common += ["--data.cache_dir", str(inputs / "cache"), "--runs_dir", str(inputs / "runs")]
    return DistillationCLI(["fit", *TINY, *common, *arguments])
