# SPDX-License-Identifier: MIT
"""Faults at the steps of jobs: ``injection`` plays them, ``faulty`` is the program with them, ``storm``
sends signals.

The package itself prints the table of jobs, faults and outcomes, for people to read.
"""
