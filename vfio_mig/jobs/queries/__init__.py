# SPDX-License-Identifier: MIT
"""Questions that change nothing: ``devices`` (list, info), ``doctor``, and of it ``gvt_host``.

``host_report`` is what a bug report needs of a host, and ``private`` takes out of it what is nobody's business.
"""
