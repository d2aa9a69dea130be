# SPDX-License-Identifier: MIT
"""What is in a device's state, in words: each module takes one layout apart.

All of it works on bytes that anybody may have made: sizes are compared with what is there, lists have a bound, and
what cannot be decoded is said instead of raised.
"""
