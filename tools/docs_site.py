# SPDX-License-Identifier: MIT
"""What mkdocs.yml calls to make a site of the documentation: pages from elsewhere, and links between them.

The pages in docs/ are written to be read as files: they name each other by paths. Here a path in a sentence becomes a
link, README.md becomes the first page, and there is one page for each command, of the help that the man pages are made
of. ``scripts/docs`` builds the site; a unit test follows every link of it.
"""

from __future__ import annotations

import re
import unicodedata
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from mkdocs.structure.files import File

from vfio_mig.cli import qemu
from vfio_mig.cli.main import COLUMNS, PROGRAM, cli

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT: Final = Path(__file__).parents[1]
ELSEWHERE: Final = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "contrib/ansible/README.md": "ansible.md",
    **{f"tools/{name}/README.md": f"tools-{name}.md" for name in ("gpu", "kmod", "kvmgt", "l2")},
}
"""Pages that stand outside of docs/, and what they are called in the site."""
_SCHEMAS: Final = "schemas.md"
_PLACES: Final = {
    **ELSEWHERE,
    "docs/schemas": _SCHEMAS,
    **{f"docs/{path.name}": path.name for path in (ROOT / "docs").glob("*.md")},
    "docs/demo.svg": "demo.svg",
}
_PATH: Final = re.compile(r"(?<![\w/`\[.-])(?<!\]\()`?(" + "|".join(map(re.escape, _PLACES)) + r")`?(?![\w/`\]-])")
_LINK: Final = re.compile(r"\]\((" + "|".join(map(re.escape, _PLACES)) + r")\)")
_CODE: Final = re.compile(r"`[^`]*`")
_LOCAL: Final = re.compile(r"\[(\w+)\]\(\1\)")
_SHORT: Final = 26
"""Characters of code that stay in one line; what is longer than half a column of text has to be divided."""
_INLINE: Final = re.compile(r"(?s)<pre>.*?</pre>|<code>(.*?)</code>")
_QUANTITY: Final = re.compile(r"(?<=\d) (?=(?:µs|ms|s|min|minutes|KiB|MiB|GiB|TiB|MB|GB|%)\b|%)")
_STYLE: Final = """\
:not(pre) > code { white-space: normal; }
code.short { white-space: nowrap; }
"""
_CELL: Final = re.compile(r"(?s)<t[dh][ >].*?</t[dh]>|<t[dh]>.*?</t[dh]>")


def linked(text: str) -> str:
    r"""Make links of the paths in sentences, and of links to files those of the site; code stays as it is.

    >>> linked("see docs/usage.md, and `docs/usage.md`")
    'see [docs/usage.md](usage.md), and [docs/usage.md](usage.md)'
    >>> linked("it is (docs/usage.md) there, [here](docs/usage.md)")
    'it is ([docs/usage.md](usage.md)) there, [here](usage.md)'
    >>> linked("[that](docs/usage.md)"), linked("    cat docs/usage.md"), linked("[LICENSE](LICENSE)")
    ('[that](usage.md)', '    cat docs/usage.md', 'LICENSE')
    >>> linked(r"| `save DEV - \| ssh` | a |")
    '| `save DEV - | ssh` | a |'
    """
    lines, fenced = [], False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        lines.append(line if fenced or line.startswith("    ") else _linked_line(line))
    return "\n".join(lines)


def _linked_line(line: str) -> str:
    if line.startswith("|"):  # within code a bar divides no columns here, as it does where these pages are files
        line = _CODE.sub(lambda found: found[0].replace(r"\|", "|"), line)
    line = _LINK.sub(lambda found: f"]({_PLACES[found[1]]})", line)
    line = _PATH.sub(lambda found: f"[{found[1]}]({_PLACES[found[1]]})", line)
    return _LOCAL.sub(r"\1", line)


def _help_pages() -> Iterator[tuple[str, str]]:
    """Yield a page for each command: (its name, text)."""
    root = click.Context(cli, info_name=PROGRAM, **cli.context_settings)
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        if command is not None:
            yield f"{PROGRAM} {name}", _help(command, root, name)
    for name, command in qemu.COMMANDS.items():
        yield name, _help(command, None, name)


def _help(command: click.Command, parent: click.Context | None, name: str) -> str:
    context = click.Context(command, parent=parent, info_name=name, max_content_width=COLUMNS, terminal_width=COLUMNS)
    texts = [command.get_help(context)]
    if isinstance(command, click.Group):
        for one in command.list_commands(context):
            below = command.get_command(context, one)
            if below is not None:
                texts.append(
                    below.get_help(click.Context(below, parent=context, info_name=one, terminal_width=COLUMNS))
                )
    return "\n\n".join(f"```text\n{text}\n```" for text in texts)


def made_pages() -> dict[str, str]:
    """Return the pages that are not in docs/, by their names in the site."""
    pages = {to: (ROOT / path).read_text("utf-8") for path, to in ELSEWHERE.items()}
    schemas = sorted(path.name for path in (ROOT / "docs/schemas").glob("*.json"))
    rows = "\n".join(f"- [{name}](schemas/{name})" for name in schemas)
    pages[_SCHEMAS] = f"# JSON\n\nA JSON Schema for each document that `--json` prints (docs/scripting.md).\n\n{rows}\n"
    for title, text in _help_pages():
        pages[f"reference/{title.replace(' ', '-')}.md"] = f"# {title}\n\n{text}\n"
    return pages


def slug(text: str, separator: str) -> str:
    """Name a heading's place; the menu's script takes it for a CSS selector, and those begin with no digit.

    >>> slug("0.1.0 - 2026-11-29", "-"), slug("A pipe", "-")
    ('at-010-2026-11-29', 'a-pipe')
    """
    letters = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    made = re.sub(r"[-\s]+", separator, re.sub(r"[^\w\s-]", "", letters).strip().lower())
    return f"at{separator}{made}" if made[:1].isdigit() else made


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the reference to the menu, and name places so that every script understands them."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    names = sorted(name for name in made_pages() if name.startswith("reference/"))
    config.nav = [*(config.nav or []), {"Reference": [{Path(name).stem: name} for name in names]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for name, text in made_pages().items():
        files.append(File.generated(config, name, content=text))
    files.append(File.generated(config, "site.css", content=_STYLE))
    return files


def unbroken(html: str) -> str:
    r"""Keep short code in one line, as an option is not to be read as two, and in tables a number with its unit.

    >>> unbroken("<p><code>stop DEV</code> in 5 ms</p><td>5 ms, 0.1 % to 2 s</td>").replace("\xa0", "_")
    '<p><code class="short">stop DEV</code> in 5 ms</p><td>5_ms, 0.1_% to 2_s</td>'
    >>> unbroken("<code>one\ntwo</code><pre><code>a\nb</code></pre>")
    '<code class="short">one two</code><pre><code>a\nb</code></pre>'
    """
    return _CELL.sub(lambda cell: _QUANTITY.sub("\xa0", cell[0]), _INLINE.sub(_code, html))


def _code(found: re.Match[str]) -> str:
    if found[1] is None:  # a block, which has its lines
        return found[0]
    text = " ".join(found[1].split())
    kind = ' class="short"' if len(unescape(text)) <= _SHORT else ""
    return f"<code{kind}>{text}</code>"


def on_page_content(html: str, **_: object) -> str:
    """Have no line end where a reader stumbles."""
    return unbroken(html)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Link a page with the others."""
    return linked(markdown)
