"""The picture of the policies is made from the plans."""

import itertools
from pathlib import Path
from xml.etree import ElementTree

import pytest

from experiments.report.policy_figure import PANELS, draw_policies, main, policy_stages
from tests.conftest import REPOSITORY


def test_interleaved_keeps_blocks_and_gradual_does_not() -> None:
    interleaved, gradual = policy_stages("interleaved"), policy_stages("gradual")
    assert [len(stage.ancestry) for stage in interleaved] == [3, 6, 9, 12]
    assert interleaved[-1].ancestry == (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)
    assert gradual[-1].ancestry == (0, 1, 2) * 4
    assert gradual[-1].new == (False,) * 9 + (True,) * 3
    assert interleaved[1].new == (False, True) * 3


def test_fresh_layers_have_no_ancestor() -> None:
    last = policy_stages("random")[-1]
    assert last.ancestry == (0, 1, 2) + (None,) * 9
    assert last.new == (False,) * 9 + (True,) * 3


@pytest.mark.parametrize("policy", PANELS)
def test_every_stage_adds_as_many_new_layers_as_it_grows(policy: str) -> None:
    stages = policy_stages(policy)
    depths = [len(stage.ancestry) for stage in stages]
    assert [sum(stage.new) for stage in stages[1:]] == [b - a for a, b in itertools.pairwise(depths)]


def test_the_file_is_small_and_well_formed(tmp_path: Path) -> None:
    main([str(tmp_path / "policies.svg")])
    text = (tmp_path / "policies.svg").read_text()
    ElementTree.fromstring(text)
    assert len(text) < 150 * 1024
    assert text == draw_policies()
    assert all(f">{policy}<" in text for policy in PANELS)
    assert text.count("<rect") > sum(len(stage.ancestry) for policy in PANELS for stage in policy_stages(policy))
    with pytest.raises(SystemExit, match="usage"):
        main([])


def test_the_committed_picture_is_the_one_the_code_draws() -> None:
    committed = REPOSITORY / "docs" / "policies.svg"
    if not committed.is_file():
        pytest.skip("docs/ is not part of this installation")
    assert committed.read_text() == draw_policies()
