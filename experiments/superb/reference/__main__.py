"""Write s3prl's values; see the package's docstring."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

from experiments.superb.reference.added_tasks import ADDED
from experiments.superb.reference.existing_tasks import EXISTING, values_of

STUBS = {"catalyst.data.sampler": "DistributedSamplerWrapper", "sox": "Transformer"}
"""Names that s3prl imports for training on several GPUs and for preparing audio; nothing here calls them."""


def main(source: Path, output: Path) -> None:
    sys.path.insert(0, str(source))
    for module, name in STUBS.items():
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        setattr(sys.modules[module], name, object)
    values: dict[str, Any] = values_of(EXISTING | ADDED, source.resolve())
    np.savez_compressed(output, **values)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
