# SPDX-License-Identifier: MIT
"""What every check needs: verdicts, the device under test and how it is driven, the run and its report.

Nothing here imports a check.
"""
