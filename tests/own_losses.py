"""A loss of a user's own, typed."""

from collections.abc import Sequence

from torch import Tensor

from lightning_modules.objective import Objective, summed
from lightning_modules.teacher import TeacherTargets


class WithDeltas(Objective):
    """Adds to the output loss the squared error of the changes from frame to frame."""

    def sums(
        self,
        hidden_states: Sequence[Tensor],
        targets: TeacherTargets,
        originals: Sequence[int],
        valid_BF: Tensor | None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        output, layers = super().sums(hidden_states, targets, originals, valid_BF)
        prediction_BFD = self.output_projection.predict(hidden_states[-1])
        deltas_BF = (prediction_BFD.diff(dim=1) - targets.output_BFD.diff(dim=1)).square().mean(-1)
        return output + summed(deltas_BF, None if valid_BF is None else valid_BF[:, 1:]), layers
