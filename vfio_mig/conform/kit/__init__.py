# SPDX-License-Identifier: MIT
"""What every check needs. Nothing here imports a check.

``verdict`` is how a check says that a rule is broken, ``check`` a rule with its source, ``rig`` the device under test,
with what checks share. ``v2_device`` and ``rfc_device`` send single requests and give every errno as it came, as the
rooms below would hide what is checked here. ``gvt_guest`` is a guest's driver that has work for a vGPU.
"""
