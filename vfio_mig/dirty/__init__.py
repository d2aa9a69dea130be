# SPDX-License-Identifier: MIT
"""Dirty bitmaps, and the copying of dirty guest pages.

Works on bytes and files alone: nothing in here knows a device. Page numbers count pages of 4096 bytes from
guest-physical address 0.
"""
