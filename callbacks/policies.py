"""Former place of `lightning_modules.growth.policies`, kept for one version."""

from lightning_modules.growth.policies import *  # noqa: F403
