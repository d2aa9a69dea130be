# SPDX-License-Identifier: MIT
"""What a shell may complete: devices, as sysfs has them, files, and names that only some options take."""

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


def check(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001
    """Name the checks of ``conform``."""
    from vfio_mig.conform.registry import all_checks

    return [one.id for one in all_checks() if one.id.startswith(incomplete)]


def hook(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Name the steps of a job, each with the ``=`` that a command follows."""
    from click.shell_completion import CompletionItem

    from vfio_mig.jobs.engine.steps import NAMES

    return [CompletionItem(f"{name}=") for name in sorted(NAMES) if name.startswith(incomplete)]


def section(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001
    """Name the sections of the file that the command line has, as ``inspect`` finds them."""
    from vfio_mig.errors import VfioMigError
    from vfio_mig.jobs.files.inspect import image_sections, inspect_image

    # Behind an option that still lacks its value click has not told arguments apart
    name = ctx.params.get("file") or next(iter(ctx.args), "-")
    if name == "-":
        return []
    try:
        report = inspect_image(name)
    except VfioMigError:  # there is nobody to tell
        return []
    found = [one.name for one in (*image_sections(report), *report.sections)]
    return [one for one in found if one.startswith(incomplete)]


def stream_device(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001
    """Name the VFIO devices of the QEMU stream that the command line has."""
    from vfio_mig.errors import VfioMigError
    from vfio_mig.jobs.files.qemu import device_names

    name = ctx.params.get("into") or ctx.params.get("file") or next(iter(ctx.args), "-")
    if name == "-":
        return []
    try:
        found = device_names(name)
    except VfioMigError:  # there is nobody to tell
        return []
    return [one for one in found if one.startswith(incomplete)]


def connect(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001
    """Name the libvirts of this host."""
    return [one for one in ("qemu:///system", "qemu:///session") if one.startswith(incomplete)]


def vm(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str] | list[CompletionItem]:
    """Leave sockets to the shell; name the domains of the libvirt that the command line has, if it is this host's."""
    uri = ctx.params.get("connect")
    if not isinstance(uri, str):
        return file(ctx, param, incomplete)
    from vfio_mig.errors import VfioMigError
    from vfio_mig.vm.connection import Connection, is_remote

    try:
        if is_remote(uri):  # ssh might ask for a password
            return []
        with Connection(uri) as connection:
            names = [connection.call(one.name) for one in connection.domains()]
    except VfioMigError:  # there is nobody to tell
        return []
    return [name for name in names if name.startswith(incomplete) and name.isprintable()]
