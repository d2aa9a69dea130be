# SPDX-License-Identifier: MIT
"""Whole jobs with rollback: what the command line and the public API call."""
