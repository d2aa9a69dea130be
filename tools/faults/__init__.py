# SPDX-License-Identifier: MIT
"""The table of jobs, faults and outcomes, for people to read."""
