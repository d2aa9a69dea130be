# SPDX-License-Identifier: MIT
"""A migration between two hosts: two VMs, joined by a pipe, or by a network cable with a real sshd at its end.

``__main__`` is the host's part. In the VMs there are ``sides`` of the pipe, and of the cable ``network`` (the sample
driver), ``gvt`` (our kvmgt), ``fleet`` and ``fleet_gvt`` (Ansible's playbook, of both). They are made of ``hosts`` (the
way from one to the other), ``sshd`` (a server, and where it is fetched) and ``post`` (what the two tell each other).
"""
