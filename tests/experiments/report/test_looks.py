"""How rows look: stable, told apart, and by the shipped studies' own settings."""

from collections.abc import Mapping
from typing import Any

import pytest

from experiments.records.settings_yaml import load_settings
from experiments.report.looks import RECIPES, SYSTEMS, Look, look_of, looks_of
from experiments.report.theme import LIGHT
from experiments.shipped import shipped_names
from experiments.studies.study import load_study, shipped_studies
from experiments.training.fit import CONFIGS
from lightning_modules.growth.policies import POLICIES


def row(config: str, **overrides: Any) -> dict[str, Any]:
    return {"name": "any", "configs": [config], "overrides": {k.replace("__", "."): v for k, v in overrides.items()}}


def shape(look: Look) -> tuple[str, str, str]:
    return look.colour, look.marker, look.fill


@pytest.mark.parametrize("name", shipped_studies())
def test_rows_of_a_shipped_study_are_told_apart_by_what_they_are(name: str) -> None:
    rows = load_study(name).described()["rows"]
    looks = [look_of(each) for each in rows]
    assert len(set(map(shape, looks))) == len(looks)
    assert list(looks_of(rows).values()) == looks  # none gave way to another row
    assert looks_of(rows[::-1]) == looks_of(rows)


@pytest.mark.parametrize("name", [name for name in shipped_names(CONFIGS) if name.startswith(tuple(RECIPES))])
def test_the_name_of_a_shipped_config_tells_its_policy_and_loss(name: str) -> None:
    settings: Mapping[str, Any] = load_settings((CONFIGS / f"{name}.yaml").read_text())
    policy, loss = RECIPES[max((begin for begin in RECIPES if name.startswith(begin)), key=len)]
    assert settings.get("growth", {"policy": "none"})["policy"] == policy
    assert settings.get("model", {}).get("objective", {}).get("intermediate", "l2l") == loss


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "none"])
def test_every_policy_has_its_own_look(policy: str) -> None:
    assert policy in SYSTEMS
    looks = [look_of(row("interleave_equal", growth__policy=each)) for each in POLICIES]
    assert len(set(map(shape, looks))) == len(looks)


def test_a_system_has_one_colour_whatever_else_a_row_changes() -> None:
    plain, changed = row("interleave_equal"), row("interleave_equal", model__student__front_end="frozen")
    assert look_of(plain).colour == look_of(changed).colour == look_of(row("interleave_prop1")).colour
    assert look_of(row("midas_equal")).colour != look_of(plain).colour
    for setting in ({"model__student__front_end": "frozen"}, {"model__objective__weight": 0.0}):
        configs = ("full_l2l", "gradstack_equal", "midas_equal", "interleave_equal")
        assert len({look_of(row(config, **setting)).marker for config in configs}) == 1
    assert look_of(plain).ours
    assert not look_of(row("full_l2l")).ours


def test_schedules_differ_in_fill_and_line() -> None:
    looks = [look_of(row("interleave_equal", growth__schedule=f"prop-{alpha}")) for alpha in (0, 1, 2, 3)]
    assert len({look.fill for look in looks}) == len({look.line for look in looks}) == 4
    assert look_of(row("interleave_prop1")) == looks[1]


def test_a_published_row_looks_like_ours() -> None:
    named = {"name": "interleavestack", "overrides": {"growth.schedule": "prop-1"}}
    assert look_of(named) == look_of(row("interleave_prop1"))


def test_rows_that_nothing_tells_apart_still_differ() -> None:
    rows = [{"name": f"mine_{i}"} for i in range(12)]
    looks = looks_of(rows)
    assert len(set(map(shape, looks.values()))) == 12
    assert looks["mine_0"] == look_of(rows[3])  # what they would be alone
    assert looks["mine_0"].colour == LIGHT["grey"]
