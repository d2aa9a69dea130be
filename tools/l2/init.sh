#!/bin/busybox sh
# SPDX-License-Identifier: MIT
#
# The first process of a vGPU's guest: loads i915 and what it needs, and starts the load. /modules has a line for each
# module, in the order in which they are loaded: FILE [PARAMETER…].
/bin/busybox --install -s /bin
export PATH=/bin

fail() {
	echo "load: failed $*"
	dmesg | tail -n 40
	poweroff -f
}

mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
while read -r file parameters; do
	# shellcheck disable=SC2086 # several words
	insmod "/lib/$file" $parameters || fail "insmod $file"
done </modules
[ -e /dev/dri/renderD128 ] || fail 'i915 has not bound to the vGPU'
/load || fail "the load, with status $?"
poweroff -f
