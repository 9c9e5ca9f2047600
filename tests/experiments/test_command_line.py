"""Errors of the command line: one line, the nearest option, and a help that begins with what people use."""

import pytest
from jsonargparse import capture_parser

from experiments.cli import COMMANDS, run
from experiments.command_line import COMMON_OPTIONS, nearest, option_names

# Arguments, and all that the one line says after the command's name and before the hint at --help.
MISTAKES = [
    ("fit --confg full", "there is no option --confg: did you mean --config?"),
    ("fit --confg=full", "there is no option --confg: did you mean --config?"),
    ("fit --conf full", "there is no option --conf: did you mean --config?"),  # no abbreviations
    ("fit --trainer.max_epoch 3", "there is no option --trainer.max_epoch: did you mean --trainer.max_epochs?"),
    ("validate --ckpt_pth last", "there is no option --ckpt_pth: did you mean --ckpt_path?"),
    (
        "fit --data.root x --model.student.hiden_size 3",
        "there is no option --model.student.hiden_size: did you mean --model.student.hidden_size?",
    ),
    (
        "fit --data.root x --model.teacher.init_args.modle x",
        "there is no option --model.teacher.init_args.modle: did you mean --model.teacher.init_args.model?",
    ),
    ("fit --config {growht:1}", "there is no option --growht: did you mean --growth? (in a configuration)"),
    ("fit full", "'full' belongs to no option"),
    ("fit ", "'' belongs to no option"),
    ("fit", "missing: --data.root"),
    ("fit --trainer.max_epochs many", "--trainer.max_epochs many: expected int or null"),
    ("fit --max_batch_per_device x", "--max_batch_per_device x: expected a positive int, auto or null"),
    ("fit --data.train_splits x", "--data.train_splits x: expected a list such as [a, b]"),
    (
        "fit --wandb.mode onlin",
        "--wandb.mode onlin: expected auto, online, offline or disabled: did you mean online?",
    ),
    ("fit --model.teacher nix", "--model.teacher: Expected a dot import path string: nix"),
    ("fit --model.teacher nix.a", "--model.teacher: Problem with given class_path 'nix.a': No module named 'nix'"),
    ("fit --data.root", "argument --data.root/--data.root+: expected one argument"),
    ("cache-targets --data.rot x", "there is no option --data.rot: did you mean --data.root?"),
    ("fit-together --config x", "missing: --configs"),
    ("fit-together --configs full,midas_equal --trainer.max_epoch 3", "did you mean --trainer.max_epochs?"),
    ("export --checkpont x --output y", "there is no option --checkpont: did you mean --checkpoint?"),
    ("reproduce table1_mini --otput x", "there is no option --otput: did you mean --output?"),
    ("reproduce --output x", "missing: STUDY"),
    ("superb --decode legcy", "--decode legcy: expected fixed or legacy: did you mean legacy?"),
    ("bench --acelerator cpu", "there is no option --acelerator: did you mean --accelerator?"),
    ("bench compare --outptu x", "there is no option --outptu: did you mean --output?"),
]


@pytest.mark.parametrize(("line", "says"), MISTAKES)
def test_a_mistake_is_one_line_that_says_what_was_meant(
    line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [word.replace("growht:1", "growht: 1") for word in line.split(" ")]
    with pytest.raises(SystemExit) as stop:
        run(arguments)
    assert stop.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("interstack ")
    assert says in told


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_answers_a_typo_so(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run([*command.split(), "--hlep"])
    assert stop.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"interstack {command.split()[0]}")
    assert "--h" in told


@pytest.mark.parametrize(
    ("words", "meant"), [("fitt", "fit"), ("bench comparee", "bench compare"), ("cache_targets", "cache-targets")]
)
def test_a_command_that_there_is_not(words: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"unknown command '{words}': did you mean {meant}\\?"):
        run(words.split())


def test_nothing_is_suggested_where_nothing_is_like_it() -> None:
    assert nearest("zzz", ["config", "name"]) == ""


def test_help_begins_with_the_options_that_people_use(capsys: pytest.CaptureFixture[str]) -> None:
    known = option_names(capture_parser(lambda: run(["fit"]))._subcommands_action.choices["fit"])
    assert set(COMMON_OPTIONS) <= set(known)
    assert 15 <= len(COMMON_OPTIONS) <= 25
    with pytest.raises(SystemExit):
        run(["fit", "--help"])
    text = capsys.readouterr().out
    common = text[: text.index("all options:")]
    lines = common.splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 120
    assert all(any(line.startswith(f"  --{name} ") for line in lines) for name in COMMON_OPTIONS)
    assert "(64)" in common  # a default
    assert "--model.student.kernels" in text
    assert "--model.student.kernels" not in common
