# SPDX-License-Identifier: MIT
"""Questions that change nothing: ``devices`` (list, info), ``doctor``, and of it ``gvt_host``."""
