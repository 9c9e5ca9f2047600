"""``python -m experiments.superb.cost``: count what each SUPERB task costs with an encoder, without running anything.

FLOPs are those of :mod:`experiments.records.accounting` for the frozen encoder. A head costs two per parameter and
frame, three times as much in training, which is a little too much for heads that average over time. The seconds of an
utterance are the corpora's means, after a recipe's crop and its removal of silence, rounded to 0.1 s.
"""

from typing import NamedTuple

from rich.console import Console
from transformers import HubertConfig, PretrainedConfig

from datamodules.audio import SAMPLE_RATE
from datamodules.frames import HOP
from datamodules.superb.registry import find_source
from experiments.records.accounting import teacher_flops
from lightning_modules.superb.recipes import SUPERB_TASKS, TASK_RECIPES, build_task
from lightning_modules.superb.tasks import TaskInputs
from lightning_modules.teacher_loading import read_config

ASSUMED_FLOPS = 1e14
"""FLOPs in a second: an assumption for the last column, not a measurement."""


class Corpus(NamedTuple):
    """Size of a published corpus."""

    seconds: float  # of an utterance in training
    dev_hours: float
    test_hours: float
    labels: tuple[int, ...] = ()  # sizes of its label lists
    folds: int = 1


CORPORA = {
    "pr": Corpus(12.7, 5.4, 5.4, (71,)),
    "ks": Corpus(1.0, 1.9, 0.9, (12,)),
    "ic": Corpus(2.3, 1.9, 2.4, (6, 14, 4)),
    "sid": Corpus(6.9, 15.8, 18.9, (1251,)),
    "er": Corpus(4.5, 1.1, 1.4, (4,), folds=5),
    "asr": Corpus(12.7, 5.4, 5.4),
    "sf": Corpus(2.6, 2.0, 2.0, (39,)),
    "asv": Corpus(6.8, 10.0, 10.0, (1211,)),
    "sd": Corpus(14.6, 7.6, 7.0),
}
"""The trained tasks. QbE pushes its audio through the encoder once for each hidden state, and then runs on the CPU."""


class Cost(NamedTuple):
    """Cost of a task with one learning rate, over all folds."""

    train_hours: float  # of audio that the encoder sees in training
    eval_hours: float  # in evaluations on dev, and in the test
    encoder_flops: float
    head_flops: float

    @property
    def flops(self) -> float:
        return self.encoder_flops + self.head_flops


def cost_of(task: str, config: PretrainedConfig) -> Cost:
    """Cost of a trained task with an encoder of this configuration."""
    corpus, recipe, batches = CORPORA[task], TASK_RECIPES[task], find_source(task).recipe
    labels = [[f"{number}" for number in range(size)] for size in corpus.labels]
    head = build_task(task, TaskInputs(labels)).build_head(config.hidden_size)
    parameters = sum(parameter.numel() for parameter in head.parameters())
    train_hours = corpus.folds * recipe.updates * batches.effective_batch * corpus.seconds / 3600
    evaluations = recipe.updates // recipe.eval_every
    eval_hours = corpus.folds * (evaluations * corpus.dev_hours + corpus.test_hours)
    per_second = teacher_flops(config, 10 * SAMPLE_RATE, config.num_hidden_layers) / 10
    head_per_second = 2 * parameters * SAMPLE_RATE / HOP
    seconds = 3600 * (train_hours + eval_hours)
    trained = 3600 * (3 * train_hours + eval_hours)
    return Cost(train_hours, eval_hours, per_second * seconds, head_per_second * trained)


def cost(encoder: str | None = None) -> None:
    """Print a table of what each task costs.

    Args:
        encoder: Hugging Face encoder by name or folder; default: HuBERT Base.
    """
    Console(width=150).print(markdown(HubertConfig() if encoder is None else read_config(encoder, None)), markup=False)


def markdown(config: PretrainedConfig) -> str:
    """Format one row per task: hours of audio, FLOPs and the head's share, and hours at 100 TFLOP/s."""
    lines = ["| task | audio in training, h | in evaluations, h | EFLOP | of it the head | hours at 100 TFLOP/s |"]
    lines.append("|---|---|---|---|---|---|")
    for task in (name for name in SUPERB_TASKS if name in CORPORA):
        one = cost_of(task, config)
        share, hours = 100 * one.head_flops / one.flops, one.flops / ASSUMED_FLOPS / 3600
        sizes = f"{one.train_hours:,.0f} | {one.eval_hours:,.0f} | {one.flops / 1e18:.2f}"
        lines.append(f"| {task} | {sizes} | {share:.0f} % | {hours:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(cost)
