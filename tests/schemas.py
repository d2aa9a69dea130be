# SPDX-License-Identifier: MIT
"""Whether a document is what docs/schemas says."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Final

import jsonschema

SCHEMAS: Final = Path(__file__).parents[1] / "docs" / "schemas"


@cache
def _validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads((SCHEMAS / f"{name}.json").read_text("utf-8")))


def validate(name: str, text: str | bytes) -> Any:
    """Demand that one JSON document is valid, and return it."""
    value = json.loads(text)
    problems = [f"{error.json_path}: {error.message}" for error in _validator(name).iter_errors(value)]
    assert not problems, f"{name}: {problems}\n{value}"
    return value
