# SPDX-License-Identifier: MIT
"""The kernel under the tests.

================  ============================================================
``log``           what it complains of from now on
``memory``        what it has allocated
``alloc_faults``  allocations that fail on demand
================  ============================================================
"""
