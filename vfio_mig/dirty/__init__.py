# SPDX-License-Identifier: MIT
"""Dirty bitmaps, and the copying of dirty guest pages.

Works on bytes and files alone: nothing in here knows a device. Page numbers count pages of 4096 bytes from
guest-physical address 0.

``ranges`` are ranges of pages, and how users write them; ``bitmap`` counts dirty pages (``popcount``), ``runs`` finds
which follow each other; ``fetch`` asks for bitmaps in pieces; ``memory`` is guest memory in files (``--memory``),
``lent`` opens it where it is named through another process; ``sync`` copies in rounds, and ``changed`` tells which
pages have a new content, by what ``pagehash`` makes of them.
"""
