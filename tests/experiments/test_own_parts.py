"""Own losses and teachers, from a module in the working directory, as README says."""

import re
from pathlib import Path

import pytest
import torch

from experiments.training.fit import DistillationCLI
from lightning_modules.objective import DISTANCES, ObjectiveConfig, l1
from tests.conftest import REPOSITORY
from tests.tiny_run import TINY

# One frame per 320 samples, as HuBERT's convolutions count them; no front end to copy.
OWN_TEACHER = """
from lightning_modules.teacher import Teacher, TeacherTargets


class Energy(Teacher):
    def __init__(self) -> None:
        super().__init__()
        self.sample_rate, self.num_layers, self.hidden_size, self.init_args = 16_000, 4, 6, {}

    def num_frames(self, num_samples_B):
        return ((num_samples_B - 400) // 320 + 1).clamp(min=0)

    def forward(self, waveforms_BT, num_samples_B=None):
        energy_BF = waveforms_BT.unfold(-1, 400, 320).square().mean(-1)
        target_BFD = energy_BF[..., None].expand(-1, -1, self.hidden_size).contiguous()
        return TeacherTargets(target_BFD, {layer: layer * target_BFD for layer in self.hidden_layers})
"""


def fit(inputs: Path, *arguments: str) -> DistillationCLI:
    place = ["--data.root", str(inputs / "corpus"), "--data.cache_dir", str(inputs / "cache")]
    return DistillationCLI(["fit", *TINY, *place, "--trainer.fast_dev_run", "true", *arguments])


def hugging_face(inputs: Path) -> list[str]:
    return ["--model.teacher.init_args.model", str(inputs / "teacher")]


def test_the_readmes_loss_trains_from_a_module_of_its_own(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(# my_losses.py.*?)```", text, re.DOTALL)
    assert code is not None
    (tmp_path / "my_losses.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    assert "`--model.objective.distance my_losses.smooth_l1`" in text
    own, plain = (
        fit(inputs, *hugging_face(inputs), *more)
        for more in (["--model.objective.distance", "my_losses.smooth_l1"], [])
    )
    assert own.model.hparams["objective"]["distance"] == "my_losses.smooth_l1"
    losses = [float(cli.trainer.callback_metrics["val/loss"]) for cli in (own, plain)]
    assert losses[0] != pytest.approx(losses[1], rel=0.05)  # control: another loss


def test_a_new_entry_of_the_registry_needs_no_other_change(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DISTANCES, "half_l1", lambda one, two: 0.5 * l1(one, two))
    cli = fit(inputs, *hugging_face(inputs), "--model.objective.distance", "half_l1")
    assert cli.trainer.global_step == 1
    projection = cli.model.objective.output_projection
    ones, zeros = torch.ones(1, 2, 16), torch.zeros(1, 2, 16)
    assert torch.equal(projection.distance(ones, zeros), torch.full((1, 2), 0.5))


@pytest.mark.parametrize("name", ["msee", "my_missing.distance", "torch.no_such_function", ""])
def test_an_unknown_distance_is_answered_with_those_that_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown model\.objective\.distance '{name}'.*l1, l1_cosine, mse"):
        ObjectiveConfig(distance=name)


def test_an_own_teacher_without_a_front_end_trains_by_the_option_that_the_error_names(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_teachers.py").write_text(OWN_TEACHER)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--model.teacher", "my_teachers.Energy"]
    with pytest.raises(ValueError, match=r"set model\.student\.front_end_init=random"):
        fit(inputs, *arguments)
    assert fit(inputs, *arguments, "--model.student.front_end_init=random").trainer.global_step == 1
