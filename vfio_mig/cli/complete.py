# SPDX-License-Identifier: MIT
"""What a shell may complete: devices, as sysfs has them, and files."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem


def device(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001 -- click's
    """Name the devices that begin so; nothing is opened."""
    from vfio_mig.host.discover import Host

    return [one.name for one in Host().devices() if one.name.startswith(incomplete) and one.name.isprintable()]


def file(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Leave files to the shell."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def target(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str] | list[CompletionItem]:
    """Name a device, then a file."""
    return file(ctx, param, incomplete) if ctx.params.get(param.name or "") else device(ctx, param, incomplete)
