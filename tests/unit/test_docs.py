# SPDX-License-Identifier: MIT
"""Every vfio-mig command line in README.md and docs/ is one that the program understands: commands, options, arguments.

They are parsed, not run; what they do on a device is tested in the VM.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import pytest

from vfio_mig.cli.main import PROGRAM, cli

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def command_lines(text: str) -> Iterator[str]:
    """Yield what an example block, or a piece of code in a sentence, has of our command lines."""
    blocks = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    blocks += [
        line.strip()
        for fence in re.findall(r"```(?:sh|console)?\n(.*?)```", text, re.DOTALL)
        for line in fence.splitlines()
    ]
    for line in blocks:
        for part in re.split(r"\s[|&]{1,2}\s?|\sssh HOST ", line.removeprefix("$ ").partition("  # ")[0] + " "):
            if part.strip().startswith(f"{PROGRAM} "):
                yield part.strip()


def parse(line: str) -> click.Context:
    """Parse a command line as the program would, without running it."""
    words = [word for word in shlex.split(line) if word not in {"…", ">", "&"} and not word.startswith((">", "<"))]
    root = click.Context(cli, info_name=PROGRAM, **cli.context_settings)
    rest = cli.make_parser(root).parse_args(args=words[1:])[1]
    name = rest[0]
    command = cli.get_command(root, name)
    assert command is not None, f"there is no command {name!r}"
    context = click.Context(command, parent=root, info_name=name)
    if isinstance(command, click.Group):
        sub = command.get_command(context, rest[1])
        assert sub is not None, f"there is no command {name} {rest[1]}"
        command, context, rest = sub, click.Context(sub, parent=context, info_name=rest[1]), rest[1:]
    command.make_parser(context).parse_args(args=rest[1:])
    return context


EXAMPLES: Final = [(page.name, line) for page in PAGES for line in command_lines(page.read_text("utf-8"))]


@pytest.mark.parametrize(("page", "line"), EXAMPLES, ids=[f"{page}: {line}" for page, line in EXAMPLES])
def test_an_example_is_a_command_line_that_the_program_understands(page: str, line: str) -> None:
    try:
        parse(line)
    except click.ClickException as error:
        pytest.fail(f"{page}: {line}: {error.format_message()}")


def test_there_are_examples_and_a_wrong_one_would_be_noticed() -> None:
    assert len(EXAMPLES) > 20
    for line in (f"{PROGRAM} save $UUID x --no-such-option", f"{PROGRAM} list --memory"):
        with pytest.raises(click.ClickException):
            parse(line)
    with pytest.raises(AssertionError, match="no command"):
        parse(f"{PROGRAM} frobnicate $UUID")


def test_every_command_is_in_the_table_of_commands() -> None:
    usage = (ROOT / "docs/usage.md").read_text("utf-8").partition("## Commands")[2].partition("\n## ")[0]
    missing = [name for name in cli.list_commands(click.Context(cli)) if not re.search(rf"`{name}[` ]", usage)]
    assert missing == []


def test_the_first_page_is_short_and_names_the_two_commands_first() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(readme.splitlines()) <= 130
    assert readme.splitlines()[0].startswith(f"# {PROGRAM}")
    (demo, test, *_) = [line.split("  #")[0].strip() for line in readme.splitlines() if line.startswith("    ")]
    assert (demo, test) == ("scripts/demo --gvt", "scripts/test")


def test_the_first_page_leads_to_every_other() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", (ROOT / "README.md").read_text("utf-8")))
    assert linked == {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")}
