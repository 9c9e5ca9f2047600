"""Students whose layers make their hidden states with parts of their own, of which only some are trained."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks import stacking
from callbacks.checkpointing import RunCheckpoint
from experiments.deployment.rows import find_rows
from experiments.deployment.worker import TorchEncoder
from lightning_modules.compact_hubert import CompactLayer
from lightning_modules.export import export_student
from lightning_modules.superb.upstream import load_upstream
from lightning_modules.teacher import HuggingFaceTeacher
from tests.helpers import POLICY_STAGES, make_data, make_module, make_stacking, make_trainer
from tests.students import KINDS, PAIR_STAGES, save_home

FAST = ("interleaved", "gradual", "random")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_home(tmp_path_factory.mktemp("home"))


class States(Callback):
    """After each growth: what the optimizer has a state of without training it, and the reverse."""

    def __init__(self) -> None:
        self.orphans: list[int] = []
        self.without: list[list[str]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        names = {
            p: n for group in optimizer.param_groups for n, p in zip(group["param_names"], group["params"], strict=True)
        }
        self.orphans.append(len(set(optimizer.state) - set(names)))
        self.without.append([name for parameter, name in names.items() if parameter not in optimizer.state])


def grow(home: Path, folder: Path, policy: str, **objective: Any) -> States:
    """A run that joins frames, so that the part which restores them is trained in the layers alone that learn."""
    stages, states = PAIR_STAGES[policy], States()
    settings = {"intermediate": "l2l", "layers": [4]} | objective
    module = make_module(home / "teacher", stages[-1], objective=settings, **KINDS["joined frames"])
    callbacks = [make_stacking(policy, stages=stages), states, RunCheckpoint()]
    trainer = make_trainer(folder, *callbacks, max_epochs=len(stages), limit_val_batches=0, enable_checkpointing=True)
    trainer.fit(module, datamodule=make_data(home / "corpus", home / "cache", batch_size=8))
    return states


@pytest.mark.parametrize(
    "policy", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in POLICY_STAGES]
)
@pytest.mark.parametrize("attach", ["block_end", "original"])
def test_the_optimizer_has_states_of_what_it_trains_alone(policy: str, attach: str, home: Path, tmp_path: Path) -> None:
    states = grow(home, tmp_path, policy, attach=attach)
    assert states.orphans == [0] * len(PAIR_STAGES[policy])
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()


def test_a_clone_that_learns_instead_of_its_source_has_its_state(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *after = grow(home, tmp_path / "run", "interleaved").without
    assert first  # nothing has been trained yet
    assert after == [[]] * 3
    monkeypatch.setattr(stacking, "carry_state", lambda *_: None)
    assert any("restore" in name for name in grow(home, tmp_path / "control", "interleaved").without[1])


def test_a_compact_student_without_other_states_makes_one(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be timed, drawn anew, and be no teacher."""
    module = make_module(home / "teacher", 4, objective={"layers": [4]}, **KINDS["joined frames"])
    trainer = make_trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(module, datamodule=make_data(home / "corpus", home / "cache", batch_size=8))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    export_student(tmp_path / "last.ckpt", tmp_path / "exported")
    made: list[int] = []
    state = CompactLayer.state
    monkeypatch.setattr(CompactLayer, "state", lambda *args: made.append(1) or state(*args))
    upstream = load_upstream(str(tmp_path / "exported"))
    waveforms_BT = torch.randn(1, 4000)
    states = upstream(list(waveforms_BT))
    made.clear()
    output_BFD = upstream.teacher(waveforms_BT).output_BFD  # type: ignore[operator, union-attr]
    assert torch.equal(output_BFD, states[-1])
    assert len(made) == 1 < len(states)
    (drawn,) = find_rows([f"random:{tmp_path / 'exported'}"], ["float32"], tmp_path / "drawn")
    assert TorchEncoder(drawn.path, "float32", 1)(waveforms_BT.numpy()).shape == output_BFD.shape
    (tmp_path / "exported" / "interstack.json").unlink()
    with pytest.raises(ValueError, match="is a compact student, which cannot be a teacher"):
        HuggingFaceTeacher(str(tmp_path / "exported"))
