"""The ``interstack`` program.

``interstack COMMAND --help`` describes each command. ``fit`` and ``validate`` are LightningCLI subcommands; the others
are functions whose signatures are their options. Each command's module is imported only when the command is called.
"""

import importlib
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise

from callbacks.requeue import listen
from datamodules.errors import InputError, is_foreseen
from datamodules.files import what_to_do

COMMANDS = {
    "quickstart": (
        "experiments.studies.quickstart",
        "corpus, teacher, four students and a report, on a CPU in minutes",
    ),
    "fit": ("experiments.training.fit", "distil a student that grows while it trains"),
    "fit-together": ("experiments.training.together", "distil several students on one device, in turns batch by batch"),
    "validate": ("experiments.training.fit", "measure the distillation losses of a checkpoint"),
    "cache-targets": (
        "experiments.training.cache_targets",
        "write a teacher's targets to disk, for runs on the same segments",
    ),
    "reproduce": (
        "experiments.studies.reproduce",
        "run a study: distil, export, evaluate, report; finished jobs are kept",
    ),
    "latency": ("experiments.deployment.latency", "time encoders beside each other: latency, memory, size and MACs"),
