/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT */
/*
 * What the 2017 GVT-g live migration RFC adds to <linux/vfio.h>.
 *
 * One text for three readers: the sample driver includes it, a C compiler
 * checks it, cffi parses it. So: plain literals, no macros with arguments,
 * no attributes.
 *
 * The RFC text leaves the numbers open; the ones below are the profile that
 * vfio_mig ships. They are data: a host's own patched vfio.h wins.
 */
#ifndef VFIO_MIG_GVT_RFC_H
#define VFIO_MIG_GVT_RFC_H

#include <linux/types.h>

/* vfio_device_info.flags, next to VFIO_DEVICE_FLAGS_PCI (bit 1) */
#define VFIO_DEVICE_FLAGS_MIGRATABLE 0x20

/* Region index of the device state; inserted before VFIO_PCI_NUM_REGIONS */
#define VFIO_PCI_DEVICE_STATE_REGION_INDEX 9
#define VFIO_PCI_RFC_NUM_REGIONS 10

/* Device fd ioctls: _IO(VFIO_TYPE, VFIO_BASE + number) */
#define VFIO_DEVICE_PCI_STATUS_SET_NR 14
#define VFIO_DEVICE_PCI_GET_DIRTY_BITMAP_NR 15

/* Exactly one of these in vfio_pci_status_set.flags */
#define VFIO_DEVICE_PCI_STOP 0x1
#define VFIO_DEVICE_PCI_START 0x2

struct vfio_pci_status_set {
	__u32 argsz;
	__u32 flags;
};

/*
 * start_addr is a guest-physical byte address (an IOVA), page_nr counts 4 KiB
 * pages. Bit i of byte j stands for page 8 * j + i. The kernel copies back one
 * 64-bit word more than page_nr needs: give it room.
 */
struct vfio_pci_get_dirty_bitmap {
	__u64 start_addr;
	__u64 page_nr;
	__u8 dirty_bitmap[];
};

/* Size of the device state region, bytes; an image must be shorter */
#define MIGRATION_IMG_MAX_SIZE 0x900000

/*
 * What the kvmgt of vfio_mig adds to the RFC: where a state does not fit into
 * that, as of the types _1, the vGPU has a region of this size instead. All
 * else is the same, so the size of the region tells one from the other.
 */
#define MIGRATION_IMG_LARGE_SIZE 0x1000000

#endif
