# SPDX-License-Identifier: MIT
"""What was measured, to look at: dirty maps, rounds, graphics memory; in the terminal, or as PNG or SVG.

Works on numbers that others have fetched; knows no device and no image. ``terminal`` draws in characters, ``charts``
with matplotlib.
"""
