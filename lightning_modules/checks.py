"""Checks that teacher, student, data and cache fit together, before the first step."""

import torch

from datamodules.errors import InputError
from datamodules.frames import HOP
from datamodules.speech_data import SpeechDataModule
from lightning_modules.masking import FrameMasks
from lightning_modules.student import Student
from lightning_modules.teacher import Teacher
from lightning_modules.teacher_identity import front_end_digest


def check_shared_convolutions(teacher: Teacher, student: Student) -> None:
    """Refuse a student whose front end differs from the teacher's, for example after a checkpoint was loaded."""
    assert teacher.front_end is not None  # the student's is a copy of it
    own = student.hubert.feature_extractor.state_dict()
    for name, value in teacher.front_end.state_dict.items():
        if not torch.equal(own[name].cpu(), value):
            raise InputError(
                f"model.student.front_end=shared, but {name} of the student's front end is not the teacher's: these "
                "weights come from another run; set model.student.front_end=frozen to keep them"
            )


def check_cached_features(datamodule: SpeechDataModule | None, student: Student) -> None:
    """Refuse cached features of another front end; the student must have the weights that it trains with."""
    cached = None if datamodule is None else datamodule.cached_front_end
    if cached is not None and cached != (own := front_end_digest(student.hubert)):
        raise InputError(
            f"the cache of data.targets has the features of another front end (hash {cached}) than this student's "
            f"({own}): make a cache with `interstack cache-targets` and the options of this run, model.init_from and "
            "seed_everything included"
        )


def check_frame_rates(teacher: Teacher, student: Student) -> None:
    """Refuse a teacher with another number of frames than the student, at every length of a frame around 1 s."""
    num_samples = torch.cat([16_000 + torch.arange(2 * HOP), torch.tensor([1600, 160_000])])
    teacher_frames, student_frames = teacher.num_frames(num_samples).to(torch.long), student.num_frames(num_samples)
    if (differing := (teacher_frames != student_frames).nonzero()).numel():
        first = int(differing[0])
        raise InputError(
            f"for {num_samples[first]} samples the teacher gives {int(teacher_frames[first])} frames and the student "
            f"{int(student_frames[first])}: a teacher must have the student's frames (one per 320 samples, each of the "
            "same 400); copy its front end (model.student.front_end_init=teacher) or choose another teacher"
        )


def check_data(datamodule: SpeechDataModule, teacher: Teacher, masks: FrameMasks | None) -> None:
    """Refuse data of another sample rate than the teacher's, and cached targets that the run could not use."""
    if (rate := datamodule.sample_rate) != teacher.sample_rate:
        raise InputError(
            f"data.sample_rate={rate} Hz, but the teacher was trained on {teacher.sample_rate} Hz: set "
            f"data.sample_rate={teacher.sample_rate} and data.resample=true"
        )
    if datamodule.targets is not None and masks is not None:
        masks.require_fixed()
