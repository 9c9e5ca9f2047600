"""``interstack probe-phones``: the quick start's phone probe on any exported student or HuBERT folder.

For corpora with phone alignments (``interstack synthesize`` makes them). It is not SUPERB's PR task.
"""

import json
from dataclasses import asdict
from pathlib import Path

from transformers import HubertModel

from datamodules.phones import ProbeCorpus
from experiments.runs import write_atomically
from lightning_modules.probe import phone_probe


def probe_phones(upstream: str, root: str, output: str, seed: int = 0, steps: int = 300) -> None:
    """Train a linear CTC head on weighted frozen layers and write result.json with the phone error rate in per cent.

    Args:
        upstream: folder of an exported student, or of any HuBERT that takes raw audio.
        root: folder of the splits, with alignments beside them; train-clean-100 trains, test-clean scores.
        output: the folder that gets result.json.
        seed: of the order.
        steps: optimizer steps.
    """
    model = HubertModel.from_pretrained(upstream).eval()
    result = asdict(phone_probe(model, ProbeCorpus.read(root), seed=seed, steps=steps))
    metrics = {"per": result["per"]}
    values = {
        "task": "phones",
        "preset": f"{steps} steps",
        "metrics": metrics,
        "layer_weights": result["layer_weights"],
    }
    write_atomically(Path(output) / "result.json", json.dumps(values, indent=1) + "\n")
