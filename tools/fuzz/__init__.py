# SPDX-License-Identifier: MIT
"""Fuzzers for everything that reads what others wrote: see docs/fuzzing.md.

``targets``, ``inspection``, ``streams`` and ``gpu`` take any bytes, ``corpus`` and ``builders`` make inputs for them,
``engine`` runs one, ``limits`` is what is asked of each run, ``printed`` what the command line would say.
"""
