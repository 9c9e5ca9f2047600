"""The interstack program: help, errors, configs by name, resolved configuration."""

import contextlib
import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from callbacks.guards import DivergedError
from datamodules.audio import BadAudioError
from datamodules.errors import InputError
from experiments.cli import COMMANDS, complete_switches, help_text, main, run, sigterm_as_status
from experiments.training import fit as training
from experiments.training.fit import CONFIGS, DistillationCLI, default_name, resolve_configs
from tests.helpers import save_corpus, save_teacher
from tests.patience import PATIENCE
from tests.processes import ended, fork_program


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with contextlib.suppress(SystemExit):
        run(arguments)
    return capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed([*command.split(), "--help"], capsys)
    assert command in text
    assert "usage" in text.lower()
    assert len(text.splitlines()) > 8
    assert command in help_text()


def test_help_shows_what_settings_mean(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["fit", "--help"], capsys)
    for setting in ("--growth.policy", "--model.objective.weight", "--data.root", "--wandb.mode", "--name"):
        assert setting in text
    assert "interleave_equal" in text
    assert "optimizer steps between files" in text  # docstrings are the help


def option_helps(text: str) -> dict[str, str]:
    """What a help text says of each option, on one line; an option is set off from its text by two spaces or a line."""
    blocks = re.split(r"\n(?=  -|\S|\n)", text[text.index("options:") :])
    options = [re.split(r"\n +| {2,}", block.strip(), maxsplit=1) for block in blocks if block.startswith("  -")]
    return {head: " ".join("".join(rest).split()) for head, *rest in options}


def options_without_help(text: str) -> list[str]:
    """Options that say nothing, or only their type."""
    return [head for head, says in option_helps(text).items() if not says or says.startswith(("(type:", "(required"))]


def swallowed_options(text: str) -> list[str]:
    """Options that are explained within the text of another, as a reflowed docstring does it."""
    helps = {head: says for head, says in option_helps(text).items() if "--trainer" not in head}
    names = {head.split()[0].rstrip(",").split(".")[-1].lstrip("-") for head in helps}
    return [name for name in names for says in helps.values() if re.search(rf"[.;)`] {name}: ", says)]


def test_faults_of_a_help_text_are_noticed() -> None:
    silent = "  --b {x,y}\n          (type: Literal['x', 'y'])\n"
    text = f"options:\n  --a A   first. b: other. (type: int)\n{silent}  --c\n    third.\n  --d D\n"
    assert options_without_help(text) == ["--b {x,y}", "--d D"]
    assert swallowed_options(text) == ["b"]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_option_has_a_help_text_of_its_own(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed([*command.split(), "--help"], capsys)
    assert len(option_helps(text)) > 1
    assert options_without_help(text) == []
    assert swallowed_options(text) == []
    assert "lacks type and help" not in text


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Lets the next command raise an error."""
    monkeypatch.setattr("sys.argv", ["interstack", "fit"])
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("experiments.cli.CHATTY_LOGGERS", ())  # other tests listen to them

    def fail(error: Exception) -> None:
        def run(args: list[str]) -> None:
            raise error

        monkeypatch.setattr("experiments.cli.run", run)

    return fail


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("growth.stages must grow"), "growth.stages must grow"),
        (BadAudioError("a.flac: is empty; copy it again"), "a.flac: is empty; copy it again"),
        (DivergedError("not finite"), "not finite"),
        (FileNotFoundError(2, "No such file", "a.json"), "FileNotFoundError: [Errno 2] No such file: 'a.json'"),
        (MisconfigurationException("you asked for 8 GPUs"), "MisconfigurationException: you asked for 8 GPUs"),
    ],
)
def test_a_foreseen_error_is_one_line(
    error: Exception, line: str, fail: Callable[[Exception], None], capsys: pytest.CaptureFixture[str]
) -> None:
    fail(error)
    assert main() == 2
    assert capsys.readouterr().err == f"interstack: {line}\n"


@pytest.mark.parametrize(
    ("number", "status"), [(errno.EIO, 1), (errno.ESTALE, 1), (errno.ENOSPC, 2), (errno.EACCES, 2)]
)
def test_what_may_be_gone_at_the_next_start_has_a_status_of_its_own(
    number: int, status: int, fail: Callable[[Exception], None], capsys: pytest.CaptureFixture[str]
) -> None:
    fail(OSError(number, os.strerror(number), "last.ckpt"))
    assert main() == status
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.ci
@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("analysis.copies", "--results nothing.json", "nothing.json holds no study.json: give the --output folder"),
        ("analysis.copies", "--result nothing.json", "there is no option --result: did you mean --results?"),
        ("corpora.real_speech", "--output made", "missing: --data"),
    ],
)
def test_modules_that_are_commands_have_errors_of_one_line(
    module: str, arguments: str, message: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", f"experiments.{module}", *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True)
    line = done.stderr.decode()
    assert done.returncode == 2
    assert line.startswith(f"python -m experiments.{module}: {message}")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "local_rank", "code"),
    [
        (SIGTERMException(), None, 143),
        (SIGTERMException(), "0", 143),
        (SIGTERMException(), "1", 0),  # Lightning's launcher would kill the others, and what they still write
        (SIGTERMException(0), "0", 0),
        (SystemExit(), None, None),
    ],
)
def test_sigterm_has_a_status_in_the_first_process_of_a_machine(
    error: SystemExit, local_rank: str | None, code: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit) as end, sigterm_as_status():
        raise error
    assert end.value.code == code


@pytest.mark.parametrize("error", [KeyError("a key"), ValueError("shapes differ"), RuntimeError("CUDA")])
def test_an_error_that_nobody_foresaw_keeps_its_traceback(error: Exception, fail: Callable[[Exception], None]) -> None:
    fail(error)
    with pytest.raises(type(error)):
        main()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--trainer.strategy=nonsense", "these --trainer settings do not fit: .*nonsense"),
        ("--data.batch_size=0", r"data\.batch_size is 0; it must be positive"),
    ],
)
def test_settings_that_lightning_or_we_refuse_are_named(
    option: str, message: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--data.root", str(inputs / "corpus"), "--model.teacher.init_args.model", str(inputs / "teacher")]
    with pytest.raises(InputError, match=f"^{message}"):
        run(["fit", *words, "--wandb.mode", "disabled", "--trainer.accelerator", "cpu", option])


TEACHER = """
from lightning_modules.teacher import HuggingFaceTeacher

class Broken(HuggingFaceTeacher):
    def forward(self, waveforms_BT, num_samples_B=None):
        return super().forward(waveforms_BT, num_samples_B).output_BFD @ waveforms_BT
"""


def test_a_fault_in_ones_own_teacher_is_shown_where_it_is(tmp_path: Path) -> None:
    """On the terminal and in the run's folder; as a process, since its end is what prints it."""
    (tmp_path / "mine.py").write_text(TEACHER)
    teacher, corpus = save_teacher(tmp_path / "teacher"), save_corpus(tmp_path / "corpus", {"train": 2})
    command = [
        *("fit", "--model.teacher", "mine.Broken"),
        *("--model.teacher.model", str(teacher), "--data.root", str(corpus), "--data.train_splits", "[train]"),
        *("--data.val_splits", "[]", "--data.batch_size", "2", "--growth.policy", "none", "--trainer.max_epochs", "1"),
        *("--trainer.accelerator", "cpu", "--wandb.mode", "disabled", "--log_samples", "false"),
    ]
    variables = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert ended(fork_program(command, tmp_path / "output.txt", tmp_path, variables)) == 1
    for told in ((tmp_path / "output.txt").read_text(), (tmp_path / "runs" / "run" / "errors.log").read_text()):
        assert f'File "{tmp_path / "mine.py"}", line 6, in forward' in told
        assert "RuntimeError: " in told.strip().splitlines()[-1]


def test_a_bare_switch_means_true() -> None:
    switches = {"fast", "overwrite"}
    assert complete_switches(["--fast"], switches) == ["--fast", "true"]
    assert complete_switches(["--fast", "--seed", "1"], switches) == ["--fast", "true", "--seed", "1"]
    for untouched in ([], ["--fast", "false"], ["--fast=false"], ["--output", "fast"], ["--output"]):
        assert complete_switches(untouched, switches) == untouched


def test_unknown_commands_and_bad_values_are_one_line(tmp_path: Path) -> None:
    for arguments, message in (
        (["fitt"], "unknown command 'fitt': did you mean fit?"),
        (["export", "--checkpoint", "none.ckpt", "--output", "x"], "none.ckpt"),
    ):
        output = tmp_path / f"{arguments[0]}.txt"
        assert ended(fork_program(arguments, output)) == 2
        (line,) = output.read_text().splitlines()
        assert message in line


def test_shipped_configs_are_found_by_name(tmp_path: Path) -> None:
    shipped = str(CONFIGS / "full.yaml")
    assert resolve_configs(["--config", "full"]) == ["--config", shipped]
    assert resolve_configs(["--config=full.yaml", "-c", "full"]) == [f"--config={shipped}", "-c", shipped]
    own = tmp_path / "full.yaml"
    own.write_text("{}")
    assert resolve_configs(["--config", str(own)]) == ["--config", str(own)]
    assert resolve_configs(["--name", "full"]) == ["--name", "full"]
    assert resolve_configs(["--config", "{name: a}"]) == ["--config", "{name: a}"]  # settings themselves


def test_runs_are_named_after_their_last_config() -> None:
    assert default_name(["fit", "--config", "a/full.yaml", "--config=midas_equal"]) == "midas_equal"
    assert default_name(["fit", "-c", "midas_equal"]) == "midas_equal"
    assert default_name(["fit", "-c", "midas_equal", "-c", "{model: {init_from: a/last.ckpt}}"]) == "midas_equal"
    assert default_name(["fit"]) == "run"


def print_config(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    with pytest.raises(SystemExit):
        DistillationCLI(["fit", *arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_the_defaults_are_the_papers_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    config = print_config(["--config", "interleave_prop1", "--data.root", "corpus"], capsys)
    student, optimizer, objective = (config["model"][k] for k in ("student", "optimizer", "objective"))
    assert (student["hidden_size"], student["intermediate_size"], student["num_heads"]) == (384, 1536, 8)
    assert student["num_layers"] == 12
    assert (optimizer["lr"], optimizer["weight_decay"], optimizer["warmup_fraction"]) == (5e-4, 1e-4, 0.07)
    assert optimizer["schedule"] == "linear"
    assert (objective["intermediate"], objective["weight"], objective["distance"]) == ("l2l", 0.5, "mse")
    assert config["model"]["teacher"]["init_args"]["model"] == "facebook/hubert-base-ls960"
    assert (config["growth"]["policy"], config["growth"]["schedule"]) == ("interleaved", "prop-1")
    assert config["growth"]["layers_per_stage"] == 3
    assert (config["data"]["batch_size"], config["data"]["max_samples"]) == (64, 250_000)
    assert config["data"]["train_splits"] == ["train-clean-100", "train-clean-360", "train-other-500"]
    assert (config["trainer"]["max_epochs"], config["trainer"]["gradient_clip_val"]) == (75, 5.0)


def test_any_value_can_be_overridden(capsys: pytest.CaptureFixture[str]) -> None:
    config = print_config(
        ["--data.root", "corpus", "--growth.policy", "midas", "--model.optimizer.lr", "1e-3", "--seed_everything", "5"],
        capsys,
    )
    assert config["growth"]["policy"] == "midas"
    assert config["model"]["optimizer"]["lr"] == 1e-3
    assert config["seed_everything"] == 5


@pytest.mark.parametrize("value", ["true", "false"])
def test_a_seed_is_a_number(value: str) -> None:
    with pytest.raises(InputError, match=f"--seed_everything {value} must be a number"):
        run(["fit", "--data.root", "corpus", "--seed_everything", value])


LIMITS = [f"limit_{stage}_batches" for stage in ("train", "val", "test", "predict")]


@pytest.mark.parametrize("name", [*LIMITS, "overfit_batches", "val_check_interval"])
def test_one_batch_is_not_all_batches(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(value: str) -> object:
        return print_config([f"--trainer.{name}", value], capsys)["trainer"][name]

    def float_first(hint: Any) -> Any:
        """The order that Lightning's types have on Python 3.13."""
        return float | hint if float in get_args(hint) else hint

    integer_first = training.integer_first
    monkeypatch.setattr(training, "integer_first", lambda hint: integer_first(float_first(hint)))
    assert [repr(read(value)) for value in ("1", "1.0", "0.5")] == ["1", "1.0", "0.5"]
    monkeypatch.setattr(training, "integer_first", float_first)  # control
    assert repr(read("1")) == "1.0"


IMPORTS = """
import sys
from pathlib import Path

sys.modules.update(dict.fromkeys(["wandb", "espeakng_loader"]))
import experiments.studies.study  # with the tables of tasks, which every command reads, on GPU machines too
assert not {"numba", "sklearn", "h5py", "joblib"} & set(sys.modules), "libraries of a single task"
import experiments.cli, experiments.training.fit, experiments.studies.quickstart, experiments.report
import datamodules.synthetic
from experiments.records.loggers import WandbSettings, build_loggers
build_loggers(Path(sys.argv[1]), "run", WandbSettings("disabled"))
print("imported")
try:
    import wandb
except ModuleNotFoundError:
    del sys.modules["wandb"]
else:
    raise AssertionError("wandb can be imported after all")
build_loggers(Path(sys.argv[1]), "run", WandbSettings("offline"))
assert sys.modules["wandb"]
print("both controls pass")
"""


@pytest.mark.ci
def test_importing_needs_no_optional_package(tmp_path: Path) -> None:
    # None in sys.modules makes an import fail, as if the package were not there. (librosa and matplotlib cannot be
    # tested so: torchmetrics, which Lightning imports, loads them itself where they are installed.)
    command = [sys.executable, "-c", IMPORTS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.splitlines() == ["imported", "both controls pass"], done.stderr


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_is_expandable_unless_the_user_says_otherwise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["interstack", "--help"])
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    main()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv(name, "max_split_size_mb:128")
    main()
    assert {os.environ.get("PYTORCH_ALLOC_CONF"), os.environ.get("PYTORCH_CUDA_ALLOC_CONF")} == {
        "max_split_size_mb:128",
        None,
    }
