# SPDX-License-Identifier: MIT
"""What every job on devices is made of.

``job`` has the Job: its devices and their locks, the journal of what is being done to them, steps, rollback, commit.
``pause`` is the time in which a device stands still, and ``rehearsal`` does before it what can be done before it.
``export`` reads devices into images, for a save and a migration. ``memory`` is the one copy of guest memory that a
job makes, whatever the number of its devices, from what ``dirtylog`` says, in the rounds of ``live``; ``loading``
writes one from images, and ``progress`` tells how far that has come. ``state`` is what a job reads of a device's own
state. ``session`` leads from a name to an open device and its protocol, ``rollback`` undoes, ``steps`` lists each
job's steps by name, ``events`` tells others of them.
"""
