"""Warnings are errors in the tests; each exception lets through what it is there for, and nothing beside it."""

import re
import tomllib
import warnings

import pytest

from tests.conftest import REPOSITORY

# By the first words of a filter: the text that its library warns with, then one that must stay an error.
TEXTS = {
    "The '.*_dataloader'": (
        "The 'train_dataloader' does not have many workers which may be a bottleneck.",
        "The 'train_dataloader' does not have a sampler",
    ),
    "This DataLoader will": (
        "This DataLoader will create 8 worker processes in total. Our suggested max number of worker in current system",
        "This DataLoader will create no worker processes",
    ),
    "The number of": (
        "The number of training batches (3) is smaller than the logging interval Trainer(log_every_n_steps=50).",
        "The number of training batches (3) is not what it was",
    ),
    "Trying to infer": (
        "Trying to infer the `batch_size` from an ambiguous collection. The batch size we found is 4.",
        "Trying to infer the `batch_size` failed",
    ),
    "You're resuming from": (
        "You're resuming from a checkpoint that ended before the epoch ended and your dataloader is not resumable.",
        "You're resuming from a checkpoint that another version wrote",
    ),
    "The `srun` command": (
        "The `srun` command is available on your system but is not used. HINT: If your intention is to run Lightning",
        "The `srun` command is not available on your system",
    ),
    "GPU available but": (
        "GPU available but not used. You can set it by doing `Trainer(accelerator='gpu')`.",
        "GPU available but too old",
    ),
    "Please use the": (
        "Please use the new API settings to control TF32 behavior, such as torch.backends.cudnn.conv.fp32_precision",
        "Please use the new API settings to control threads",
    ),
    "This process \\(pid=\\d+\\)": (
        "This process (pid=123) is multi-threaded, use of fork() may lead to deadlocks in the child.",
        "This process (pid=123) is multi-threaded, use of forkpty() may lead to deadlocks in the child.",
    ),
    "Guards may run": (
        "Guards may run slower on Python 3.13.0. Consider upgrading to Python 3.13.1+.",
        "Guards may run slower on Python 3.13.1.",
    ),
    "\\s*By default": (
        "\n    By default only one JsonargparseDeprecationWarning per type is shown. To see all warnings set\n",
        "\n    By default nothing is shown\n",
    ),
    "\\s*(``instantiate_classes``|skip_none": (
        "\n    skip_none parameter was deprecated in v4.49.0 and will be removed in v5.0.0. Instead use skip_unset.\n",
        "\n    skip_check parameter was deprecated in v4.49.0 and will be removed in v5.0.0.\n",
    ),
    "`isinstance\\(treespec, LeafSpec\\)`": (
        "`isinstance(treespec, LeafSpec)` is deprecated, use `isinstance(treespec, TreeSpec) and treespec.is_leaf()`",
        "`isinstance(treespec, TreeSpec)` is deprecated",
    ),
}
CATEGORIES = {kind.__name__: kind for kind in (UserWarning, DeprecationWarning, FutureWarning, RuntimeWarning)}
FIRST, *FILTERS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"][
    "filterwarnings"
]


def test_every_warning_but_the_listed_is_an_error() -> None:
    assert FIRST == "error"
    assert len(FILTERS) == len(TEXTS)


@pytest.mark.parametrize("filter_", FILTERS)
def test_a_filter_lets_through_its_own_text_in_its_own_category_only(filter_: str) -> None:
    action, pattern, category = filter_.split(":")
    (texts,) = (texts for words, texts in TEXTS.items() if pattern.startswith(words))
    own, near = texts
    assert action == "ignore"
    assert re.match(pattern, own)  # by this filter, not by another
    warnings.warn(own, CATEGORIES[category])
    for other in set(CATEGORIES.values()) - {CATEGORIES[category]}:
        with pytest.raises(other):
            warnings.warn(own, other)
    for text in (near, f"It was said before: {own}"):
        with pytest.raises(CATEGORIES[category]):
            warnings.warn(text, CATEGORIES[category])
