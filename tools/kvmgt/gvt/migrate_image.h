/* SPDX-License-Identifier: MIT */
/*
 * The image of a vGPU: the RFC's records, whose layout is in gvt_image.h, and
 * what the RFC forgot.
 *
 * Through the RFC's state region the latter is in the record SREG. GVT never had
 * a use for its 2 MiB, only its size matters to a reader that follows the RFC.
 * An image without it, all zero there, is taken as the RFC describes it: as that
 * of a vGPU that has nothing half done.
 *
 * With protocol v2 it is a record of its own, GVT_MIGRATION_EXT, there is no
 * SREG, and nothing may follow the last record.
 */
#ifndef _GVT_MIGRATE_IMAGE_H_
#define _GVT_MIGRATE_IMAGE_H_

#include <linux/types.h>

#include "gvt_image.h"

/* Types of records from here on are ours */
#define GVT_MIGRATION_EXT	0x100

#define GVT_EXT_MAGIC	0x315458452d545647ULL	/* "GVT-EXT1" */

/* An ELSP's four dwords are kept as GVT has them: element 0 first, low first */
struct gvt_ext_execlist {
	__u32 enabled;
	__u32 running;		/* slot, or GVT_EXT_NONE */
	__u32 pending;		/* slot, or GVT_EXT_NONE */
	__u32 running_ctx;	/* element of the running slot, or GVT_EXT_NONE */
	__u32 slot[2][4];
	__u32 elsp[4];		/* what of it the guest has written: from the end */
	__u32 elsp_index;
	__u32 reserved;
};

#define GVT_EXT_NONE	0xffffffffU

/* A workload in a queue; those of an engine follow each other */
struct gvt_ext_workload {
	__u32 ring;		/* GVT_RING_ */
	__u32 schedule_in;	/* it is the first of its pair, which is elsp */
	__u32 desc[2];
	__u32 elsp[4];
};

/* The half of a GGTT entry whose other half the guest has yet to write */
struct gvt_ext_partial_pte {
	__u64 offset;		/* in the GGTT; 4 more for the upper half */
	__u64 data;
};

/* What is behind the registers of the display */
struct gvt_ext_display {
	__u64 flip_done[3][4];
	__u32 vrefresh_k;	/* 1/1000 Hz */
	__u32 i2c_state;
	__u32 i2c_port;
	__u32 i2c_flags;	/* GVT_EXT_I2C_ */
	__u32 edid_read;	/* bytes */
	__u32 gmbus_count;
	__u32 gmbus_cycle;
	__u32 gmbus_phase;
	__u8 edid[128];
	__u8 dpcd[0x700];
	__u32 sbi_number;
	__u32 reserved;
	__u32 sbi[20][2];	/* register, value */
};

#define GVT_EXT_I2C_SELECTED	0x1
#define GVT_EXT_I2C_EDID	0x2
#define GVT_EXT_I2C_OVER_AUX	0x4
#define GVT_EXT_I2C_AUX_MOT	0x8

struct gvt_ext {
	__u64 magic;
	__u32 size;		/* bytes of this, with what follows it */
	__u32 crc;		/* CRC-32 of the whole image, with 0 here */
	/* of the host: another one's registers mean something else */
	__u32 graphics_version;
	__u32 engine_mask;
	__u64 ggtt_size;
	__u64 bar2_size;
	__u32 flags;		/* GVT_EXT_ */
	__u32 reserved;
	__u32 nr_workloads;
	__u32 nr_partial_ptes;
	struct gvt_ext_execlist execlist[GVT_RING_COUNT];
	struct gvt_ext_display display;
	/* struct gvt_ext_workload, struct gvt_ext_partial_pte */
};

#define GVT_EXT_PV_NOTIFIED	0x1
#define GVT_EXT_FAILSAFE	0x2
#define GVT_EXT_D3_ENTERED	0x4
#define GVT_EXT_VBLANK		0x8
#define GVT_EXT_FLAGS		0xf

struct intel_vgpu;

/* An image that was checked, taken apart */
struct intel_vgpu_image {
	const void *cfg;
	const void *vreg;
	const u64 *gtt;
	const struct gvt_ppgtt_entry *ppgtt;
	u32 nr_ppgtt;
	const struct gvt_workload_entry *workloads;
	u32 nr_workloads;
	u32 guest_hidden_base;
	/* NULL where the image has none of this */
	const struct gvt_ext *ext;
	const struct gvt_ext_workload *ext_workloads;
	const struct gvt_ext_partial_pte *partial_ptes;
};

int intel_vgpu_ring_to_engine(u32 ring);
u32 intel_vgpu_image_crc(const void *image, size_t size, size_t crc_at);
size_t intel_vgpu_image_size(struct intel_vgpu *vgpu);
ssize_t intel_vgpu_save(struct intel_vgpu *vgpu, void *buf, size_t size);
int intel_vgpu_check_image(struct intel_vgpu *vgpu, const void *buf, size_t size,
			   struct intel_vgpu_image *image);
int intel_vgpu_restore(struct intel_vgpu *vgpu, const void *buf, size_t size);

#endif
