"""``interstack probe-phones``: the probe preset of SUPERB's PR, on a corpus with phone alignments.

`interstack synthesize` makes such corpora. One linear layer and a few hundred steps: it is not SUPERB's PR.
"""

import json
from pathlib import Path

from experiments.runs import write_atomically
from experiments.superb.command import superb_probe
from experiments.superb.options import TaskData


def probe_phones(upstream: str, root: str, output: str, seed: int = 0, steps: int = 300) -> None:
    """Train a linear CTC head on weighted frozen layers and write result.json with the phone error rate in per cent.

    Args:
        upstream: exported student, training checkpoint, any Hugging Face encoder, or fbank.
        root: folder of the splits, with alignments beside them; train-clean-100 trains, test-clean scores.
        output: the folder that gets result.json.
        seed: of the order.
        steps: optimizer steps.
    """
    result = superb_probe(upstream, TaskData(root=root, num_workers=0), output, seed=seed, updates=steps)
    values = {
        "task": "phones",
        "preset": f"{steps} steps",
        "metrics": {"per": result["test"]["per"]},
        "layer_weights": result["layer_weights"],
    }
    write_atomically(Path(output) / "result.json", json.dumps(values, indent=1) + "\n")
