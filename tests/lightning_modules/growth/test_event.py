"""The record of a growth: the same values when written and read, and records of older versions."""

import json

import pytest

from lightning_modules.growth.event import GrowthEvent

EVENT = {
    "epoch": 1, "step": 3, "policy": "interleaved", "plan": [0, None], "ancestry": [0, None], "depth_before": 1,
    "depth": 2, "parameters": 10, "seconds": 0.5, "loss_before": 2.0, "loss_after": 1.5, "train_seconds": None,
}  # fmt: skip


def test_what_is_written_is_read_back_with_its_keys_in_their_order() -> None:
    assert json.dumps(GrowthEvent.from_plain(EVENT).to_plain()) == json.dumps(EVENT)
    assert GrowthEvent.from_plain(EVENT) != GrowthEvent.from_plain(EVENT | {"plan": [0, 0]})  # control


def test_a_record_of_an_older_version_has_defaults() -> None:
    old = {name: EVENT[name] for name in ("epoch", "step", "ancestry", "depth_before", "depth")}
    event = GrowthEvent.from_plain(old | {"note": "of another version"})
    assert (event.plan, event.loss_before, event.train_seconds) == ((), None, None)
    with pytest.raises(ValueError, match="a growth event lacks the key 'depth_before'"):
        GrowthEvent.from_plain({name: value for name, value in old.items() if name != "depth_before"})
