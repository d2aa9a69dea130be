# SPDX-License-Identifier: MIT
"""What every job on devices is made of.

``job`` has the Job: its devices and their locks, the journal of what is being done to them, steps, rollback, commit.
``pause`` is the time in which a device stands still. ``memory`` is the one copy of guest memory that a job makes,
whatever the number of its devices; ``loading`` writes one from images. ``state`` is what a job reads of a device's own
state.
"""
