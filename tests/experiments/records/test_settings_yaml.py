"""Every string setting survives its own YAML: what an attempt keeps and what a study's runner writes."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace, capture_parser

from experiments.records.settings_yaml import dump_settings, load_settings
from experiments.studies.job import Workspace
from experiments.studies.plan import Job
from experiments.training.fit import DistillationCLI

# Words that YAML, or one of its readers, takes for something else; and text that is hard to write down.
# fmt: off
STRINGS = [
    "5e-4", "1e3", "1.e3", "12e03", "1_0e3", ".5e3", "+1", "1.5", "1_000", "007", "0o7", "0x10", "0b1", "1:30",
    "190:20:30.15", "inf", ".inf", "-.inf", ".nan", "NaN", "yes", "no", "on", "off", "y", "n", "true", "False", "None",
    "2020-01-01", "", " ", " a", "a ", "\t", "a: b", "a:", "1:", "?", "? a", "-", "- a", "a #b", "#a", "&a", "*a", "!x",
    "%a", "@a", "`a`", "|", ">", "=", "<<", "[a]", "{a: 1}", "{a}", "'", '"', "'a'", '"a"', "\\", "a,b", "--x", "a=b",
    "a\nb", "a\n\n b\n", "\n", "\x07", "\u2028", "\u00e9", "e3", "_1", "1_", "12 e3", "1e", "e", "run-5e-4",
]
# fmt: on
HARDEST = ["5e-4", "1e3", "1.e3", "1_000", "yes", "1:30", "", "a: b", "1:", "?", "#a", "&a", "a\nb"]
# Where no string is wanted, `null` and `~` are typed for None; YAML has no way to say it otherwise.
NULLS = ["null", "~"]


def fit_parser() -> Any:
    return capture_parser(lambda: DistillationCLI(["fit"]))._subcommands_action.choices["fit"]


def string_options(parser: Any) -> dict[str, str]:
    """Options that take any string, with what else they take; Lightning's are checked by Lightning."""
    kinds = {action.dest: str(getattr(action, "_typehint", action.type)) for action in parser._actions}
    return {
        name: kind
        for name, kind in kinds.items()
        if "str" in kind and "Literal" not in kind and "dict" not in kind.lower() and not name.startswith("trainer.")
    }


@pytest.mark.ci
def test_every_string_survives_in_every_option_of_fit() -> None:
    parser = fit_parser()
    options = string_options(parser)
    assert {"name", "runs_dir", "data.root", "data.targets", "growth.policy", "wandb.tags", "ckpt_path"} <= set(options)
    config = parser.parse_args(["--data.root", "x"])
    for text in [*STRINGS, *NULLS]:
        given: Namespace = config.clone()
        for name, kind in options.items():
            if (text in NULLS and "None" in kind) or (text in ("[a]", "- a") and "list" in kind):
                continue  # which is None or a list already when it is typed
            given[name] = [text] if kind.startswith(("list", "collections")) else text
        given["model.teacher"]["init_args"]["model"] = text
        read = parser.parse_string(parser.dump(given, skip_unset=False))
        for name in [*options, "model.teacher.init_args.model"]:
            assert read[name] == given[name], (name, text)


def test_a_string_that_is_typed_is_what_is_kept() -> None:
    parser, names = fit_parser(), ("name", "runs_dir", "data.targets", "wandb.group")
    for text in [*HARDEST, *NULLS]:
        read = parser.parse_args(["--data.root", "x", *(f"--{name}={text}" for name in names)])
        assert {read[name] for name in names} <= ({text, None} if text in NULLS else {text}), text


def test_control_pyyaml_alone_loses_a_string() -> None:
    text = yaml.safe_dump({"name": "5e-4"})
    assert load_settings(text) == {"name": 5e-4}
    assert load_settings(dump_settings({"name": "5e-4"})) == {"name": "5e-4"}
    assert yaml.safe_load(dump_settings({"name": "5e-4"})) == {"name": "5e-4"}  # by PyYAML's rules too


def test_values_that_are_no_strings_stay_what_they_are() -> None:
    values = {"a": 5e-4, "b": 1e-5, "c": 1e20, "d": 3, "e": None, "f": [True, False], "g": {}, "h": [], "i": 0.1}
    assert load_settings(dump_settings(values)) == values
    assert [load_settings(text) for text in ("5e-4", "null", "", "# only a comment\n")] == [5e-4, None, None, None]


def test_what_the_runner_of_a_study_writes_is_read_back(tmp_path: Path) -> None:
    parser = fit_parser()
    for number, text in enumerate(HARDEST):
        settings = {"data": {"cache_dir": text}, "model": {"optimizer": {"lr": 5e-4}}}
        job = Job(f"job{number}", "distil", [], "row", settings=settings)
        workspace = Workspace(tmp_path, wandb={"entity": text}, study=text)
        read = parser.parse_args(["--data.root", "x", "--config", workspace._config(job)])
        assert (read["data.cache_dir"], read["wandb.entity"], read["wandb.group"]) == (text, text, text)
        assert read["model.optimizer.lr"] == 5e-4
