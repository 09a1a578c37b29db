import shlex
import subprocess
import sys

import pytest

from ragsr import cli

COMMANDS = ["demo", "restore", "gallery", "eval", "env"]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS), ["gallery", "build"], ["eval", "restore"]])
def test_help_explains_and_costs_nothing(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: ragsr")
    assert "example" in text or command == ["env"] or command in (["gallery"], ["eval"])


def test_every_command_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {name}" in text for name in COMMANDS)


def test_wrong_usage_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["restroe"])
    assert stop.value.code == 2
    assert "restroe" in capsys.readouterr().err


def test_wrong_input_is_one_sentence(tmp_path, capsys):
    assert cli.main(["gallery", "info", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ragsr: error: ")
    assert captured.err.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("RAGSR_DEBUG", "1")
    with pytest.raises(ValueError, match="no gallery there"):
        cli.main(["gallery", "info", str(tmp_path)])


def test_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.env, "run", interrupted)
    assert cli.main(["env"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_module_and_version():
    done = subprocess.run([sys.executable, "-m", "ragsr", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ragsr ")


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{shlex.quote(sys.executable)} -m ragsr env --json | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout == "{"
    assert done.stderr == ""
