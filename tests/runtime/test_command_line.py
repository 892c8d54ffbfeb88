"""The one command with its subcommands, as `boft-ops` and as `python -m boft_ops`."""

import os
import subprocess
import sys

import pytest

from boft_ops import __main__ as command_line
from boft_ops import __version__
from boft_ops.analysis.__main__ import main as analysis
from boft_ops.convert import main as convert
from boft_ops.tune.__main__ import main as tune

main = command_line.main


@pytest.mark.parametrize("arguments", [[], ["info"]])
def test_info_is_the_default(arguments, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"boft_ops {__version__}\n")
    assert "served by" in printed


@pytest.mark.parametrize(
    ("name", "alone", "arguments"),
    [
        ("analysis", analysis, ["128", "4", "2"]),
        ("tune", tune, ["--explain", "64", "64", "100"]),
    ],
)
def test_subcommands_are_the_modules(name, alone, arguments, capsys):
    assert alone(arguments) == 0
    expected = capsys.readouterr().out
    assert main([name, *arguments]) == 0
    assert capsys.readouterr().out == expected != ""


def test_errors_name_the_subcommand(tmp_path, capsys, monkeypatch):
    arguments = [str(tmp_path / "no"), str(tmp_path / "out"), "--to", "peft"]
    assert convert(arguments) == 1
    alone = capsys.readouterr().err
    assert alone.startswith("python -m boft_ops.convert: error: expected a file, got")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/boft-ops", "convert", *arguments])
    assert command_line.console() == 1
    told = capsys.readouterr().err
    assert told == alone.replace("python -m boft_ops.convert", "boft-ops convert")
    assert main(["analysis", "8", "3"]) == 1
    assert capsys.readouterr().err.startswith("python -m boft_ops analysis: error: ")
    with pytest.raises(SystemExit):
        main(["tune", "--ops", "sort"])
    assert "python -m boft_ops tune: error: argument --ops" in capsys.readouterr().err


def test_a_closed_pipe_is_no_second_error():
    code = "import sys; from boft_ops.__main__ import main; sys.exit(main(['analysis', '8', '4']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")
