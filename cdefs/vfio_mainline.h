/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT */
/*
 * The part of mainline's <linux/vfio.h> that vfio_mig uses. A test compares
 * every size, offset and constant with the system's own header. See gvt_rfc.h
 * for the rules that this file's syntax follows.
 */
#ifndef VFIO_MIG_VFIO_MAINLINE_H
#define VFIO_MIG_VFIO_MAINLINE_H

#include <linux/types.h>

#define VFIO_API_VERSION 0
#define VFIO_TYPE1_IOMMU 1
#define VFIO_TYPE1v2_IOMMU 3

#define VFIO_GROUP_FLAGS_VIABLE 0x1
#define VFIO_GROUP_FLAGS_CONTAINER_SET 0x2

struct vfio_group_status {
	__u32 argsz;
	__u32 flags;
};

struct vfio_info_cap_header {
	__u16 id;
	__u16 version;
	__u32 next;
};

#define VFIO_DEVICE_FLAGS_RESET 0x1
#define VFIO_DEVICE_FLAGS_PCI 0x2
#define VFIO_DEVICE_FLAGS_PLATFORM 0x4
#define VFIO_DEVICE_FLAGS_AMBA 0x8
#define VFIO_DEVICE_FLAGS_CCW 0x10
#define VFIO_DEVICE_FLAGS_AP 0x20
#define VFIO_DEVICE_FLAGS_FSL_MC 0x40
#define VFIO_DEVICE_FLAGS_CAPS 0x80

struct vfio_device_info {
	__u32 argsz;
	__u32 flags;
	__u32 num_regions;
	__u32 num_irqs;
	__u32 cap_offset;
};

#define VFIO_REGION_INFO_FLAG_READ 0x1
#define VFIO_REGION_INFO_FLAG_WRITE 0x2
#define VFIO_REGION_INFO_FLAG_MMAP 0x4
#define VFIO_REGION_INFO_FLAG_CAPS 0x8

struct vfio_region_info {
	__u32 argsz;
	__u32 flags;
	__u32 index;
	__u32 cap_offset;
	__u64 size;
	__u64 offset;
};

#define VFIO_REGION_INFO_CAP_SPARSE_MMAP 1
#define VFIO_REGION_INFO_CAP_TYPE 2

struct vfio_region_sparse_mmap_area {
	__u64 offset;
	__u64 size;
};

struct vfio_region_info_cap_sparse_mmap {
	struct vfio_info_cap_header header;
	__u32 nr_areas;
	__u32 reserved;
	struct vfio_region_sparse_mmap_area areas[];
};

struct vfio_region_info_cap_type {
	struct vfio_info_cap_header header;
	__u32 type;
	__u32 subtype;
};

#define VFIO_PCI_BAR0_REGION_INDEX 0
#define VFIO_PCI_BAR2_REGION_INDEX 2
#define VFIO_PCI_ROM_REGION_INDEX 6
#define VFIO_PCI_CONFIG_REGION_INDEX 7
#define VFIO_PCI_VGA_REGION_INDEX 8

#define VFIO_DMA_MAP_FLAG_READ 0x1
#define VFIO_DMA_MAP_FLAG_WRITE 0x2

struct vfio_iommu_type1_dma_map {
	__u32 argsz;
	__u32 flags;
	__u64 vaddr;
	__u64 iova;
	__u64 size;
};

struct vfio_device_bind_iommufd {
	__u32 argsz;
	__u32 flags;
	__s32 iommufd;
	__u32 out_devid;
};

struct vfio_device_attach_iommufd_pt {
	__u32 argsz;
	__u32 flags;
	__u32 pt_id;
};

#define VFIO_IOMMU_DIRTY_PAGES_FLAG_START 0x1
#define VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP 0x2
#define VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP 0x4

struct vfio_iommu_type1_dirty_bitmap {
	__u32 argsz;
	__u32 flags;
	__u8 data[];
};

#define VFIO_DEVICE_FEATURE_MASK 0xffff
#define VFIO_DEVICE_FEATURE_GET 0x10000
#define VFIO_DEVICE_FEATURE_SET 0x20000
#define VFIO_DEVICE_FEATURE_PROBE 0x40000

struct vfio_device_feature {
	__u32 argsz;
	__u32 flags;
	__u8 data[];
};

#define VFIO_DEVICE_FEATURE_MIGRATION 1
#define VFIO_MIGRATION_STOP_COPY 0x1
#define VFIO_MIGRATION_P2P 0x2
#define VFIO_MIGRATION_PRE_COPY 0x4

struct vfio_device_feature_migration {
	__u64 flags;
};

#define VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE 2
#define VFIO_DEVICE_STATE_ERROR 0
#define VFIO_DEVICE_STATE_STOP 1
#define VFIO_DEVICE_STATE_RUNNING 2
#define VFIO_DEVICE_STATE_STOP_COPY 3
#define VFIO_DEVICE_STATE_RESUMING 4
#define VFIO_DEVICE_STATE_RUNNING_P2P 5
#define VFIO_DEVICE_STATE_PRE_COPY 6
#define VFIO_DEVICE_STATE_PRE_COPY_P2P 7

struct vfio_device_feature_mig_state {
	__u32 device_state;
	__s32 data_fd;
};

/* On the data fd; flags are valid after MIG_PRECOPY_INFOv2 was set */
#define VFIO_PRECOPY_INFO_REINIT 0x1

struct vfio_precopy_info {
	__u32 argsz;
	__u32 flags;
	__u64 initial_bytes;
	__u64 dirty_bytes;
};

#define VFIO_DEVICE_FEATURE_DMA_LOGGING_START 6
#define VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP 7
#define VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT 8

struct vfio_device_feature_dma_logging_control {
	__u64 page_size;
	__u32 num_ranges;
	__u32 __reserved;
	__u64 ranges;
};

struct vfio_device_feature_dma_logging_range {
	__u64 iova;
	__u64 length;
};

struct vfio_device_feature_dma_logging_report {
	__u64 iova;
	__u64 length;
	__u64 page_size;
	__u64 bitmap;
};

#define VFIO_DEVICE_FEATURE_MIG_DATA_SIZE 9

struct vfio_device_feature_mig_data_size {
	__u64 stop_copy_length;
};

#define VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 12

#endif
