"""One table of all kinds of students, for every test that should hold for each of them."""

from pathlib import Path
from typing import Any

from tests.helpers import POLICY_STAGES, save_corpus, save_teacher

THIN = [[4, 10, 5], [8, 1, 1], *[[8, 3, 2]] * 4, [16, 1, 1], *[[16, 2, 2]] * 2]
"""Convolutions with FitHuBERT's kernels and strides."""

POSITIONS = {"num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16}
"""The positional convolution of a teacher whose first layers a student can copy."""

# Kind -> settings of the student beside those of tests.helpers.make_module.
KINDS: dict[str, dict[str, Any]] = {
    "hubert": {},
    "first layers": {"init_layers": 2, "feature_norm": False, "front_end_gradient": 0.1},
    "joined frames": {"front_end_init": "random", "conv_layers": THIN, "time_reduction": 2, "input_dropout": 0.05},
    "reused maps": {
        "front_end_init": "random",
        "conv_layers": THIN,
        "reuse_attention": True,
        "feature_projection": False,
        "scale_layer_gradients": True,
    },
    "own model": {"architecture": "tests.own_students.ScaledHubert", "options": {"first_share": 0.5}},
}

# Policy -> stages of a student whose layers come in pairs.
PAIR_STAGES = {policy: [2 * depth for depth in stages] for policy, stages in POLICY_STAGES.items()}


def save_home(folder: Path) -> Path:
    """A corpus, and a teacher of eight layers whose first ones a student can copy."""
    save_corpus(folder / "corpus", {"train": 8, "dev": 2})
    save_teacher(folder / "teacher", layers=8, **POSITIONS)
    return folder
