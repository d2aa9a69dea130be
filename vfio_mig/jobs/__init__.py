# SPDX-License-Identifier: MIT
"""Whole jobs with rollback: what the command line and the public API call.

- On a device: ``control`` (stop, start, reset, state, status), ``dirty`` (bitmap), ``sync``, ``save``, ``restore``,
  ``migrate`` (with ``peer``, its other end, and ``reach``, the way there), ``hold``, ``check`` (does an image
  fit? and is it whole?).
- Without one: ``files`` (inspect, diff, extract, pack, pages). Questions: ``queries`` (list, info, doctor).
- What they are made of: ``engine``.
"""
