# SPDX-License-Identifier: MIT
"""``qemu-save`` and ``qemu-restore``, the older names of ``vm save`` and ``vm restore``: programs of their own.

They take a QMP socket only, and keep their arguments and what they print. ``vfio-mig vm`` does more.
"""

from __future__ import annotations

import atexit
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from vfio_mig import interrupts
from vfio_mig.cli import streams
from vfio_mig.cli.output import print_json, put, put_lines
from vfio_mig.errors import HostError, InterruptedJobError, UsageError, VfioMigError, errno_text, json_text
from vfio_mig.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

MEMORY_HELP: Final = (
    "The guest's RAM: auto (found by itself; must be shared), none, or FILE@GPA[:SIZE[+OFFSET]] (repeatable)."
)
CONTEXT: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 80}


def _common(program: str, cont: str, force: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add what both commands take."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for one in (
            click.version_option(__version__, prog_name=program, message="%(prog)s %(version)s"),
            click.option("-v", "--verbose", is_flag=True, help="Say on stderr what is done."),
            click.option("--force", is_flag=True, help=force),
            click.option("--memory", multiple=True, default=["auto"], show_default=True, help=MEMORY_HELP),
            click.option("--cont", is_flag=True, help=cont),
            click.argument("file"),
            click.argument("device"),
            click.argument("qmp_socket", metavar="QMP-SOCKET"),
        ):
            function = one(function)
        return function

    return add


def _say(text: str) -> None:
    put(text, err=True)


def _callbacks(program: str, *, verbose: bool) -> dict[str, Any]:
    """Return what the jobs call with what is done (tell), and with what the user must read (warn)."""
    from vfio_mig.jobs.engine.session import Settings

    settings = Settings(warn=lambda text: _say(f"{program}: warning: {text}"))
    return {"tell": _say if verbose else lambda _: None, "settings": settings}


def _summarise(program: str, summary: dict[str, Any], *, err: bool = False) -> None:
    """Print what was done. It is done, so a summary that nobody takes is a warning."""
    try:
        if err:
            put_lines(json_text(summary), err=True)
        else:
            print_json(summary)
    except HostError as error:
        _say(f"{program}: warning: what was asked for is done, but then: {error}")


SAVE: Final = "qemu-save"
RESTORE: Final = "qemu-restore"


@click.command(SAVE, context_settings=CONTEXT)
@_common(SAVE, cont="Let the vGPU and the VM go on afterwards.", force="Replace an existing FILE.")
@click.option("--all-memory", is_flag=True, help="Save all of the guest's RAM, for a VM that does not have it.")
def save_command(qmp_socket: str, device: str, file: str, *, verbose: bool, **options: Any) -> None:
    """Pause the VM behind QMP-SOCKET and save its vGPU DEVICE to FILE, with the guest's pages that it may have written.

    Both stay stopped, unless --cont. After a failure the VM and the vGPU are as they were found, and there is no FILE;
    so too if somebody else lets the VM go on meanwhile. A VM that QEMU has stopped for good (migrated away, a failed
    disk) is saved without --cont only. Behind a virtual IOMMU that translates, the guest's pages cannot be told.

    Prints a summary as JSON; to stderr when FILE is -, standard output. Run it as root, in QEMU's PID namespace.
    `vfio-mig vm save` is the newer name of it, and takes libvirt domains, too.

    \b
    Example:
      qemu-save --cont /run/vm.qmp 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001 gpu.vfm
    """
    from vfio_mig.vm.jobs import save_vgpu
    from vfio_mig.vm.qmp import Qmp

    with Qmp(qmp_socket) as qmp:
        done = save_vgpu(qmp, device, file, **_callbacks(SAVE, verbose=verbose), **options)
    _summarise(SAVE, done.summary(), err=file == "-")


@click.command(RESTORE, context_settings=CONTEXT)
@_common(RESTORE, cont="Let the vGPU and the VM go on afterwards.", force="Go on over mismatches that may be forced.")
def restore_command(qmp_socket: str, device: str, file: str, *, verbose: bool, **options: Any) -> None:
    """Load FILE into the vGPU DEVICE of the paused VM behind QMP-SOCKET, and the pages in it into the guest's RAM.

    Both stay stopped, unless --cont: `vfio-mig start DEVICE` first, then `cont` in the monitor. A failure leaves the VM
    paused. Prints a summary as JSON. Run it as root, in QEMU's PID namespace. `vfio-mig vm restore` is the newer name.

    \b
    Example:
      qemu-restore --cont /run/vm.qmp 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001 gpu.vfm
    """
    from vfio_mig.vm.jobs import restore_vgpu
    from vfio_mig.vm.qmp import Qmp

    with Qmp(qmp_socket) as qmp:
        done = restore_vgpu(qmp, device, file, **_callbacks(RESTORE, verbose=verbose), **options)
    _summarise(RESTORE, done.summary())


COMMANDS: Final = {SAVE: save_command, RESTORE: restore_command}
"""The programs that pyproject.toml installs."""


def _fail(program: str, error: VfioMigError) -> NoReturn:
    _say(f"{program}: {error}")
    sys.exit(error.exit_code)


def run(program: str, arguments: list[str]) -> NoReturn:
    """Run one of the two; errors and exit codes are those of ``vfio-mig``.

    :param program: its name.
    :param arguments: what stands behind the name.
    """
    command = COMMANDS[program]
    streams.fill()
    interrupts.install()
    atexit.register(streams.settle)
    try:
        with command.make_context(program, arguments) as context:
            command.invoke(context)
        sys.exit(0)
    except VfioMigError as error:
        _fail(program, error)
    except click.exceptions.Exit as done:  # --help
        sys.exit(done.exit_code)
    except click.UsageError as error:
        _fail(program, UsageError(error.format_message().rstrip("."), hint=f"see '{program} --help'"))
    except KeyboardInterrupt:  # what is final takes no notice of signals
        _fail(program, InterruptedJobError("interrupted; what was begun has been undone"))
    except MemoryError:
        _fail(program, HostError("out of memory"))
    except OSError as error:
        _fail(program, HostError(f"{error.filename or 'standard output'}: {errno_text(error.errno or 0)}"))


def save() -> NoReturn:
    """Be ``qemu-save``."""
    run(SAVE, sys.argv[1:])


def restore() -> NoReturn:
    """Be ``qemu-restore``."""
    run(RESTORE, sys.argv[1:])
