/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT */
/*
 * The part of mainline's <linux/kvm.h> that vfio_mig uses: a VM without a CPU,
 * its memory, and the device through which VFIO files are made known to it.
 * See gvt_rfc.h for the rules that this file's syntax follows.
 */
#ifndef VFIO_MIG_KVM_H
#define VFIO_MIG_KVM_H

#include <linux/types.h>

struct kvm_userspace_memory_region {
	__u32 slot;
	__u32 flags;
	__u64 guest_phys_addr;
	__u64 memory_size;
	__u64 userspace_addr;
};

#define KVM_DEV_TYPE_VFIO 4

struct kvm_create_device {
	__u32 type;
	__u32 fd;
	__u32 flags;
};

#define KVM_DEV_VFIO_GROUP 1
#define KVM_DEV_VFIO_GROUP_ADD 1

struct kvm_device_attr {
	__u32 flags;
	__u32 group;
	__u64 attr;
	__u64 addr;
};

#endif
