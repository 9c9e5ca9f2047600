"""Every command of the README runs: as it stands, shrunk, or (what needs a corpus or GPUs) with --print_config."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.cli import COMMANDS, run
from experiments.training.fit import CONFIGS
from tests.conftest import REPOSITORY
from tests.helpers import save_corpus, save_teacher
from tests.patience import PATIENCE

DOCS = ("launching.md", "teachers.md", "extending.md", "installing.md", "studies.md", "reproducing.md", "superb.md")
DOCS += (
    "performance.md",
    "caching.md",
    "deployment.md",
    "deployment_latency_draft.md",
    "deployment_streaming_draft.md",
)
