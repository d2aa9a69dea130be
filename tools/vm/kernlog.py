# SPDX-License-Identifier: MIT
"""Finding complaints of the kernel in its log."""

import re
from typing import Final

# What the kernel's own checks print, at the start of a message. A driver's message that merely contains such a word
# ("Spectre V2 : WARNING: …", "traps: sh[1] general protection fault" for a process) is not a complaint of the kernel.
_FAULT: Final = re.compile(
    r"""(?:\[\s*\d+\.\d+\]\s*(?:\[\s*[TC]\d+\]\s*)?)?  # time and, with CONFIG_PRINTK_CALLER, task or CPU
    (?:
        -+\[\ cut\ here\ \]-+
      | WARNING:\ (?:CPU:|possible|suspicious|inconsistent|bad\ unlock|held\ lock|lock\ held|\w+-safe\ ->|Nested\ lock
          |chain_key|kernel\ stack|stack\ recursion|[\w./-]+:\d+\ at\ )
      | (?:\[\ )?BUG:?\ \S
      | INFO:\ trying\ to\ register\ non-static\ key
      | watchdog:\ BUG:
      | Oops[:\ ]
      | kernel\ BUG\ at
      | (?:[\w ]+,\ )?general\ protection\ fault(?:,\ |:\ \d+\ \[\#)
      | Kernel\ panic
      | Unable\ to\ handle\ kernel
      | Internal\ error:
      | (?:divide\ error|invalid\ opcode|stack\ segment|double\ fault|int3):\ \d+\ \[\#
      | UBSAN:
      | refcount_t:
      | (?:list_add|list_del)\ corruption
      | INFO:\ task\ .*\ blocked\ for\ more\ than
      | (?:rcu:\ )?INFO:\ \w+\ (?:self-)?detected\ (?:expedited\ )?stall
      | kmemleak:\ (?:[1-9]\d*\ new\ suspected|Cannot\ allocate\ a\ kmemleak_object|Memory\ pool\ empty
          |Kernel\ memory\ leak\ detector\ disabled)
      | Bad\ page\ (?:state|map)
    )""",
    re.VERBOSE,
)
# What graphics drivers call an error: one line, with or without the device in front of it.
_DRIVER_ERROR: Final = re.compile(
    r"(?:\[\s*\d+\.\d+\]\s*(?:\[\s*[TC]\d+\]\s*)?)?(?:[\w-]+ [\w:.-]+: )?\[drm[^]]*(?:\[[^]]*\])?\] \*ERROR\* "
)
_END: Final = re.compile(r"---\[ end (?:trace|Kernel panic)")
_LINES_AFTER: Final = 50
_MAX_LINES: Final = 300


def is_complaint(line: str) -> bool:
    """Tell whether the kernel's own checks wrote this line, with or without its time."""
    return _FAULT.match(line) is not None


def faults(log: str) -> list[str]:
    """Return the parts of a kernel log that show a WARN, BUG, Oops, panic or a driver's ERROR, as lines."""
    shown: list[str] = []
    left = 0
    for line in log.splitlines():
        if is_complaint(line):
            left = _LINES_AFTER
        elif _DRIVER_ERROR.match(line):
            left = left or 1
        if left:
            shown.append(line)
            left = 0 if _END.search(line) else left - 1
    return shown[:_MAX_LINES]
