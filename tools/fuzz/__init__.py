# SPDX-License-Identifier: MIT
"""Fuzzers for everything that reads what others wrote: see docs/fuzzing.md."""
