# SPDX-License-Identifier: MIT
"""What a job did, for programs and people: the same names in Python as in JSON."""

from __future__ import annotations

from typing import Any


class Report:
    """A job's report; each kind is a frozen dataclass whose fields are given by name."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it: the fields by name, and what is nested in them the same way."""
        return {name: _plain(value) for name, value in vars(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if hasattr(value, "as_dict"):
        return value.as_dict()
    return value._asdict() if hasattr(value, "_asdict") else value
