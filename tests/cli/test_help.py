"""``--help`` answers at once, every command has an example that parses, and the documentation names what there is."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import typer

from mambify import __version__
from mambify.cli.main import COMMANDS, app

from .conftest import Run

REPOSITORY = Path(__file__).resolve().parents[2]
INSTALLED = Path(sysconfig.get_path("scripts"), "mambify")


def test_help_imports_nothing_heavy() -> None:
    program = (
        f"import sys; sys.argv = [{str(INSTALLED)!r}, '--help']\n"
        "from mambify.cli.main import main\n"
        "status = main()\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'yaml', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else status)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout


def test_python_m_is_the_same_command() -> None:
    program = [sys.executable, "-X", "importtime", "-m", "mambify", "--version"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, f"mambify {__version__}\n")
    assert " torch\n" not in done.stderr


@pytest.mark.parametrize("name", ["mambify.py", "mambify"])
def test_a_script_of_the_same_name_is_another_program(name: str, tmp_path: Path) -> None:
    """It finds the model among transformers' auto classes, as any other does."""
    (tmp_path / name).write_text("import sys, mambify\nprint('mambify.families.load' in sys.modules)\n")
    program = [sys.executable, "-P", str(tmp_path / name)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_without_arguments_there_is_help(run: Run) -> None:
    result = run()
    assert result.status == 0
    assert "Usage: mambify" in result.out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_ends_with_an_example(run: Run, name: str) -> None:
    result = run(name, "--help")
    assert result.status == 0
    assert f"Example: mambify {name}" in " ".join(result.out.split())
    assert "\x1b" not in result.out  # no terminal, no colour


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(name: str) -> None:
    program, *arguments = shlex.split(COMMANDS[name][1])
    assert program == "mambify"
    group = typer.main.get_command(app)
    with group.make_context("mambify", arguments) as context:  # raises on anything it does not know
        assert isinstance(group, typer.core.TyperGroup)
        found, command, rest = group.resolve_command(context, arguments)
        assert found == name
        assert command is not None
        command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_documentation_names_every_command_and_option(name: str) -> None:
    page = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {name}$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert section is not None, f"docs/cli.md has no section {name}"
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    for parameter in group.commands[name].params:
        if parameter.param_type_name == "option":
            assert f"`{parameter.opts[0]}" in section[1], f"docs/cli.md does not name {parameter.opts[0]} of {name}"
    named = set(re.findall(r"`(--[a-z0-9-]+)", section[1]))
    known = {o for p in group.commands[name].params for o in (*p.opts, *p.secondary_opts)}
    assert named <= known, f"docs/cli.md names {named - known}, which {name} has not"
