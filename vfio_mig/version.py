# SPDX-License-Identifier: MIT
"""The version, on the lowest floor: images and commands name it, and may not import the package's face for it."""

__version__ = "0.1.0"
