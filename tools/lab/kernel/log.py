# SPDX-License-Identifier: MIT
"""What the kernel writes to its log while something is done to it."""

from __future__ import annotations

import os
from typing import Final

from tools.vm.kernlog import is_complaint


class KernelLog:
    """Records that the kernel writes from now on; the ones before are not ours."""

    def __init__(self) -> None:
        self._fd: Final = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._fd, 0, os.SEEK_END)

    def close(self) -> None:
        os.close(self._fd)

    def new(self) -> list[str]:
        """Give the lines since the last call."""
        lines: list[str] = []
        while True:
            try:
                record = os.read(self._fd, 8192)
            except BlockingIOError:
                return lines
            except BrokenPipeError:  # records were overwritten before we read them; go on with the next
                continue
            lines.append(record.decode(errors="replace").partition(";")[2].splitlines()[0])

    def complaints(self) -> list[str]:
        """Give the new lines from the first complaint of the kernel on, none when there is none."""
        lines = self.new()
        for number, line in enumerate(lines):
            if is_complaint(line):
                return lines[number : number + 40]
        return []
