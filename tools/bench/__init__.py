# SPDX-License-Identifier: MIT
"""Benchmarks: ours against a reference, alternately in the same run, medians and ratios."""
