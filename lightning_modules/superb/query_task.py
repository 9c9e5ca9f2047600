"""QbE, which finds spoken queries in documents without training. Shapes: B batch, F frames, D width."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from datamodules.superb.trials import DOCUMENT, QUERY
from lightning_modules.superb.spoken_term import maximum_term_weighted_value, search, stdlist
from lightning_modules.superb.tasks import Item, Prediction, ProbeStart, Task, TaskInputs, TaskRecipe


class Features(nn.Module):
    """A head without parameters, which returns the features (B, F, D)."""

    def forward(self, features_BFD: Tensor, num_frames: Sequence[int]) -> Tensor:
        return features_BFD


class QueryByExample(Task):
    """Search each query in each document by dynamic time warping of one hidden state."""

    def __init__(self, recipe: TaskRecipe, inputs: TaskInputs) -> None:
        super().__init__(recipe, inputs)
        self.trials = inputs.trials
        self._found: dict[str, dict[tuple[str, str], float]] = {}

    def build_head(self, width: int, probe: ProbeStart | None = None) -> nn.Module:
        return Features()

    def losses(self, output: Any, num_frames: Sequence[int], items: Sequence[Item]) -> Tensor:
        raise TypeError("QbE trains nothing, so it has no loss")

    def predict(self, output: Tensor, num_frames: Sequence[int], items: Sequence[Item]) -> list[Prediction]:
        features_BFD = output.float().cpu().numpy()
        rows = zip(items, features_BFD, num_frames, strict=True)
        return [Prediction(item.key, item.target, row_FD[:frames]) for item, row_FD, frames in rows]

    def score(self, predictions: Sequence[Prediction], split: str) -> dict[str, float]:
        """MTWV in percent."""
        self._found[split] = _search(predictions)
        return {"mtwv": maximum_term_weighted_value(self._found[split], self.trials[split])}

    def texts(self, prediction: Prediction) -> tuple[str, str]:
        return f"{len(prediction.values)} frames", prediction.target

    def hypothesis_files(self, test: str, predictions: Sequence[Prediction]) -> dict[str, str | bytes]:
        """The list of the last search, which ``score`` has made."""
        name = f"{'' if self.file_stem(test) == 'test' else f'{test}-'}benchmark.stdlist.xml"
        return {name: stdlist(self._found[test], self.trials[test]) if predictions else ""}


def _search(predictions: Sequence[Prediction]) -> dict[tuple[str, str], float]:
    """Score of each pair of query and document."""
    queries, documents = ([one for one in predictions if one.target == role] for role in (QUERY, DOCUMENT))
    scores_KN = search([one.values for one in queries], [one.values for one in documents])
    return {
        (query.key, document.key): float(score)
        for query, row_N in zip(queries, scores_KN, strict=True)
        for document, score in zip(documents, row_N, strict=True)
    }
