# SPDX-License-Identifier: MIT
"""The command line: parses, calls one job, prints. No ioctls here.

``main`` is the frame: global options, commands loaded when they are called, errors, exit codes. ``options`` is what
every command finds in its context, ``output`` what commands have in common and the one place that prints, ``streams``
are the standard ones, ``names`` tells devices from files, ``render`` makes lines of decoded states, ``copying`` is
what those have in common that copy guest memory, ``columns`` fits text to a terminal, ``pictures`` is ``--plot``,
``complete`` what shells ask for.
The others have the commands:

=============  ==================================
``devices``    ``list``, ``info``
``control``    ``status``, ``stop``, ``start``, ``reset``, ``state``
``transfer``   ``dirty``, ``sync``, ``save``, ``restore``
``migrate``    ``migrate``
``image``      ``verify``, ``check``, ``pages``
``inspect``    ``inspect``, ``extract``, ``pack``, ``diff``
``hold``       ``hold``
``mdev``       ``mdev types``, ``mdev create``, ``mdev remove``
``conform``    ``conform``
``doctor``     ``doctor``
``vm``         ``vm list``, ``vm save``, ``vm restore``
``qemu``       ``qemu-save``, ``qemu-restore``, programs of their own
=============  ==================================
"""

from vfio_mig.cli.main import main

__all__ = ["main"]
