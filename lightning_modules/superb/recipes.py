"""How s3prl trains the head of each task: the constants of the SUPERB configs (s3prl v0.4.18)."""

from dataclasses import dataclass

from torch.optim import Adam


@dataclass(frozen=True)
class TaskRecipe:
    """Training of one task; batches are the data module's part.

    Attributes:
        lr: learning rate by default; the one thing that SUPERB's rules allow to tune.
        updates: optimizer updates.
        eval_every: updates from one evaluation on dev to the next.
        monitor: the dev metric that selects the checkpoint.
        higher_is_better: of ``monitor``.
        clip_norm: largest norm of all gradients together.
        optimizer: Adam or a subclass (AdamW), with its own defaults but for the learning rate.
        spec_augment: mask and warp the features in training.
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
    # No task of SUPERB's: a probe only, whose rate and length are those of the preset.
    "frames": TaskRecipe(1e-1, 300, 300, "accuracy", higher_is_better=True),
}
SUPERB_TASKS = tuple(name for name in TASK_RECIPES if name != "frames")
