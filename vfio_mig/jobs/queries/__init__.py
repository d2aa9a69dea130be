# SPDX-License-Identifier: MIT
"""Questions that change nothing: ``devices`` (list, info), ``doctor``."""
