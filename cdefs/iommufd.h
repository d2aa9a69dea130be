/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT */
/*
 * The part of mainline's <linux/iommufd.h> that vfio_mig uses: I/O address
 * spaces, and dirty tracking by the IOMMU (since Linux 6.7). The first field of
 * each struct is its own size. See gvt_rfc.h for the rules that this file's
 * syntax follows.
 */
#ifndef VFIO_MIG_IOMMUFD_H
#define VFIO_MIG_IOMMUFD_H

#include <linux/types.h>

struct iommu_ioas_alloc {
	__u32 size;
	__u32 flags;
	__u32 out_ioas_id;
};

#define IOMMU_IOAS_MAP_FIXED_IOVA 0x1
#define IOMMU_IOAS_MAP_WRITEABLE 0x2
#define IOMMU_IOAS_MAP_READABLE 0x4

struct iommu_ioas_map {
	__u32 size;
	__u32 flags;
	__u32 ioas_id;
	__u32 __reserved;
	__u64 user_va;
	__u64 length;
	__u64 iova;
};

#define IOMMU_HWPT_ALLOC_DIRTY_TRACKING 0x2

struct iommu_hwpt_alloc {
	__u32 size;
	__u32 flags;
	__u32 dev_id;
	__u32 pt_id;
	__u32 out_hwpt_id;
	__u32 __reserved;
	__u32 data_type;
	__u32 data_len;
	__u64 data_uptr;
};

#define IOMMU_HW_CAP_DIRTY_TRACKING 0x1

struct iommu_hw_info {
	__u32 size;
	__u32 flags;
	__u32 dev_id;
	__u32 data_len;
	__u64 data_uptr;
	__u32 out_data_type;
	__u32 __reserved;
	__u64 out_capabilities;
};

#define IOMMU_HWPT_DIRTY_TRACKING_ENABLE 0x1

struct iommu_hwpt_set_dirty_tracking {
	__u32 size;
	__u32 flags;
	__u32 hwpt_id;
	__u32 __reserved;
};

struct iommu_hwpt_get_dirty_bitmap {
	__u32 size;
	__u32 hwpt_id;
	__u32 flags;
	__u32 __reserved;
	__u64 iova;
	__u64 length;
	__u64 page_size;
	__u64 data;
};

#endif
