# SPDX-License-Identifier: MIT
"""The saved archive, files that are whole or not there, and decoders of known device states.

Works on bytes and files alone: nothing in here knows a device.
"""
