"""The tasks: the class of each, and the training of its head with the constants of the SUPERB configs (s3prl v0.4.18).

A new task needs a class, a row here, and a row with its corpus in :data:`datamodules.superb.registry.SOURCES`. Every
command of the program reads this table, so the modules of tasks import scikit-learn, librosa and h5py where they use
them.
"""

from torch.optim import AdamW

from datamodules.errors import InputError
from lightning_modules.superb.classification_tasks import (
    EmotionRecognition,
    IntentClassification,
    KeywordSpotting,
    SpeakerIdentification,
)
from lightning_modules.superb.ctc_tasks import PhoneRecognition, SlotFilling, SpeechRecognition
from lightning_modules.superb.diarization_task import SpeakerDiarization
from lightning_modules.superb.frames import FrameTask
from lightning_modules.superb.query_task import QueryByExample
from lightning_modules.superb.speaker_tasks import SpeakerVerification
from lightning_modules.superb.tasks import Task, TaskInputs, TaskRecipe

TASK_RECIPES: dict[str, TaskRecipe] = {
    "pr": TaskRecipe(PhoneRecognition, 1e-2, 100_000, 1_000, "per", higher_is_better=False),
    "ks": TaskRecipe(KeywordSpotting, 1e-4, 200_000, 5_000, "accuracy", higher_is_better=True),
    "ic": TaskRecipe(IntentClassification, 1e-4, 200_000, 5_000, "accuracy", higher_is_better=True),
    "sid": TaskRecipe(SpeakerIdentification, 1e-4, 200_000, 5_000, "accuracy", higher_is_better=True),
    "er": TaskRecipe(EmotionRecognition, 1e-4, 30_000, 1_000, "accuracy", higher_is_better=True),
    "asr": TaskRecipe(SpeechRecognition, 1e-4, 200_000, 2_000, "wer", higher_is_better=False, spec_augment=True),
    "qbe": TaskRecipe(QueryByExample, 0.0, 0, 0, "mtwv", higher_is_better=True, presets=("superb",)),
    "sf": TaskRecipe(SlotFilling, 1e-4, 200_000, 2_000, "slot_type_f1", higher_is_better=True, spec_augment=True),
    "asv": TaskRecipe(
        SpeakerVerification, 1e-4, 200_000, 20_000, "eer", higher_is_better=False, clip_norm=1000.0, optimizer=AdamW
    ),
    "sd": TaskRecipe(SpeakerDiarization, 1e-4, 30_000, 500, "accuracy", higher_is_better=True, presets=("superb",)),
    # With learning rate and length of the probe preset.
    "frames": TaskRecipe(FrameTask, 1e-1, 300, 300, "accuracy", higher_is_better=True, presets=("probe",)),
}
"""In the order of the leaderboard's table."""
SUPERB_TASKS = tuple(name for name, recipe in TASK_RECIPES.items() if "superb" in recipe.presets)


def build_task(name: str, inputs: TaskInputs) -> Task:
    """Build the task with this name.

    Raises:
        InputError: there is no such task, or it lacks an input.
    """
    if name not in TASK_RECIPES:
        raise InputError(f"there is no task {name!r}; choose one of {', '.join(TASK_RECIPES)}")
    recipe = TASK_RECIPES[name]
    return recipe.task(recipe, inputs)
