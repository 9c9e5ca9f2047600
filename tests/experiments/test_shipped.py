"""Files that are chosen by name: a shipped name is a bare name."""

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.bench.compare import find_variants
from experiments.dashboards.specification import study_specification
from experiments.studies.study import find_study, load_study
from experiments.training.fit import resolve_configs
from experiments.training.together import fit_together

# What takes a shipped name, and one that it knows.
TAKERS: dict[str, tuple[Callable[[str], object], str]] = {
    "fit": (lambda name: resolve_configs(["fit", "--config", name]), "full"),
    "fit, with =": (lambda name: resolve_configs(["fit", f"--config={name}"]), "full"),
    "fit-together": (lambda name: fit_together(["--configs", f"{name},b"]), "full"),
    "reproduce": (find_study, "table1_mini"),
    "dashboard": (study_specification, "table1_mini"),
    "bench compare": (find_variants, "variants"),
}


@pytest.mark.parametrize("taker", [name for name in TAKERS if name != "fit-together"])
@pytest.mark.parametrize("suffix", ["", ".yaml"])
def test_a_bare_name_is_the_shipped_file(taker: str, suffix: str) -> None:
    take, known = TAKERS[taker]
    take(known + suffix)


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("form", ["no/such/dir/{}.yaml", "no/such/dir/{}", "./{}", "{}.txt", "{}.5", "../configs/{}"])
def test_a_shipped_name_within_a_path_is_not_the_shipped_file(
    taker: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    take, known = TAKERS[taker]
    with pytest.raises(ValueError, match="there is no such file") as error:
        take(form.format(known))
    assert form.format(known) in str(error.value)
    assert known in str(error.value).replace(form.format(known), "")  # among the shipped names


def test_the_users_file_wins_by_its_whole_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full.yaml").write_text("name: mine\n")
    assert resolve_configs(["--config", "full.yaml"]) == ["--config", "full.yaml"]
    assert resolve_configs(["--config", "full"]) != ["--config", "full.yaml"]


def test_a_row_of_a_study_names_shipped_configs_only(tmp_path: Path) -> None:
    from experiments.studies.study import row_settings

    own = tmp_path / "own.yaml"
    own.write_text("title: T\nrows: [{name: a, label: A, configs: [../studies/controls]}]\n")
    study = load_study(str(own))
    with pytest.raises(ValueError, match=r"names the config '../studies/controls', which is not shipped"):
        row_settings(study, study.rows[0], 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1\n", r"mine\.yaml is not valid YAML: .* line"), ("a: \xe9\n", r"mine\.yaml, line 1: .*not UTF-8")],
)
def test_a_config_that_cannot_be_read_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        resolve_configs(["--config", str(tmp_path / "mine.yaml")])
