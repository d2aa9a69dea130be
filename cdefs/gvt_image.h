/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT */
/*
 * The GVT-g device state image of the 2017 RFC, little-endian.
 *
 * A chain of records without padding: HEAD, CFG_SPACE, SREG, VREG, GTT, PPGTT,
 * WORKLOAD. See gvt_rfc.h for the rules that this file's syntax follows.
 */
#ifndef VFIO_MIG_GVT_IMAGE_H
#define VFIO_MIG_GVT_IMAGE_H

#include <linux/types.h>

/* struct gvt_region.type */
#define GVT_MIGRATION_NONE 0
#define GVT_MIGRATION_HEAD 1
#define GVT_MIGRATION_CFG_SPACE 2
#define GVT_MIGRATION_VREG 3
#define GVT_MIGRATION_SREG 4
#define GVT_MIGRATION_GTT 5
#define GVT_MIGRATION_PPGTT 6
#define GVT_MIGRATION_WORKLOAD 7

#define GVT_IMAGE_VERSION 0
#define GVT_IMAGE_CFG_SIZE 4096
#define GVT_IMAGE_REG_SIZE 0x200000

/* Before every payload; size counts the payload alone, bytes */
struct gvt_region {
	__u32 type;
	__u32 size;
};

/* Payload of HEAD; data_size counts the whole image, this record included */
struct gvt_image_header {
	__s32 version;
	__s32 data_size;
	__u64 crc_check;
	__u64 global_data[64];
};

/* PPGTT payload: one per root; level 3 uses pdp[0..3], level 4 only pdp[0] */
struct gvt_ppgtt_entry {
	__s32 page_table_level;
	__u32 reserved;
	__u64 pdp[4];
};

/*
 * WORKLOAD payload: one per queued workload. data[] holds the four ELSP words
 * in the order in which the guest wrote them: element 1 high, element 1 low,
 * element 0 high, element 0 low. All zero: the entry before it, which carries
 * both elements, stands for this one too.
 */
struct gvt_workload_entry {
	__s32 ring_id;
	__u32 data[4];
	__u32 index;
};

#define GVT_RING_RCS 0
#define GVT_RING_BCS 1
#define GVT_RING_VCS 2
#define GVT_RING_VCS2 3
#define GVT_RING_VECS 4
#define GVT_RING_COUNT 5

#endif
