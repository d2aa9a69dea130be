# SPDX-License-Identifier: MIT
"""What breaks jobs on purpose: the package itself prints the table of jobs, faults and outcomes, for people to read;
``storm`` sends signals.
"""
