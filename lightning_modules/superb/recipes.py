"""Training recipes of the head of each task, with the constants of the SUPERB configs (s3prl v0.4.18)."""

from dataclasses import dataclass

from torch.optim import Adam


@dataclass(frozen=True)
class TaskRecipe:
    """Training of one task; the data module defines the batches.

    Attributes:
        lr: default learning rate, the only setting that SUPERB's rules allow to tune.
        updates: number of optimizer updates.
        eval_every: updates from one evaluation on dev to the next.
        monitor: the dev metric that selects the checkpoint.
        higher_is_better: whether a higher value of ``monitor`` is better.
        clip_norm: largest norm of all gradients together.
        optimizer: Adam or a subclass (AdamW), with its own defaults except for the learning rate.
        spec_augment: whether features are masked and warped in training.
    """

    lr: float
    updates: int
    eval_every: int
    monitor: str
    higher_is_better: bool
    clip_norm: float = 1.0
    optimizer: type[Adam] = Adam
    spec_augment: bool = False


TASK_RECIPES: dict[str, TaskRecipe] = {
    "pr": TaskRecipe(1e-2, 100_000, 1_000, "per", higher_is_better=False),
    "asr": TaskRecipe(1e-4, 200_000, 2_000, "wer", higher_is_better=False, spec_augment=True),
    "sf": TaskRecipe(1e-4, 200_000, 2_000, "slot_type_f1", higher_is_better=True, spec_augment=True),
    "ks": TaskRecipe(1e-4, 200_000, 5_000, "accuracy", higher_is_better=True),
    "ic": TaskRecipe(1e-4, 200_000, 5_000, "accuracy", higher_is_better=True),
    "sid": TaskRecipe(1e-4, 200_000, 5_000, "accuracy", higher_is_better=True),
    # Not a SUPERB task but only a probe, with learning rate and length of the preset.
    "frames": TaskRecipe(1e-1, 300, 300, "accuracy", higher_is_better=True),
}
SUPERB_TASKS = tuple(name for name in TASK_RECIPES if name != "frames")
