/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT */
/*
 * The interface of vfio_mig's kvmgt with migration=rfc, for programs.
 *
 * A device of it is known by its flags and regions alone: bits PCI and
 * VFIO_DEVICE_FLAGS_MIGRATABLE, more regions than the state region's index, and
 * that region for reading and writing, without a type, of one of the sizes in
 * gvt_rfc.h. Both requests mean something else on other devices, and an old
 * kvmgt answers 0 to everything: never send one to find out.
 */
#ifndef VFIO_MIG_GVT_MIGRATION_H
#define VFIO_MIG_GVT_MIGRATION_H

#include <linux/vfio.h>

#include "gvt_image.h"
#include "gvt_rfc.h"

/* struct vfio_pci_status_set; returns once the running workload has ended */
#define VFIO_DEVICE_PCI_STATUS_SET \
	_IO(VFIO_TYPE, VFIO_BASE + VFIO_DEVICE_PCI_STATUS_SET_NR)

/* struct vfio_pci_get_dirty_bitmap; of at most 2^20 pages */
#define VFIO_DEVICE_PCI_GET_DIRTY_BITMAP \
	_IO(VFIO_TYPE, VFIO_BASE + VFIO_DEVICE_PCI_GET_DIRTY_BITMAP_NR)

#endif
