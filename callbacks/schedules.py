"""Former place of `lightning_modules.growth.schedules`, kept for one version."""

from lightning_modules.growth.schedules import *  # noqa: F403
