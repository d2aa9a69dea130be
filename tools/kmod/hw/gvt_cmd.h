/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Commands of a ring or batch (gen8), shared by the scan and the execution.
 */
#ifndef GVT_CMD_H
#define GVT_CMD_H

#include <linux/bits.h>
#include <linux/errno.h>
#include <linux/types.h>

/* What a command's first DW says it is: the MI opcode, or PIPE_CONTROL */
enum gvt_op {
	GVT_OP_NOOP		= 0x00,
	GVT_OP_USER_INTERRUPT	= 0x02,
	GVT_OP_ARB_CHECK	= 0x05,
	GVT_OP_ARB_ON_OFF	= 0x08,
	GVT_OP_BATCH_END	= 0x0a,
	GVT_OP_STORE_DATA_IMM	= 0x20,
	GVT_OP_LRI		= 0x22,	/* load register, immediate */
	GVT_OP_SRM		= 0x24,	/* store register to memory */
	GVT_OP_FLUSH_DW		= 0x26,
	GVT_OP_LRM		= 0x29,	/* load register from memory */
	GVT_OP_LRR		= 0x2a,	/* load register from register */
	GVT_OP_BATCH_START	= 0x31,
	GVT_OP_PIPE_CONTROL	= 0x100,
	GVT_OP_UNKNOWN		= 0x1ff,
};

#define GVT_CLIENT_MI		0
#define GVT_PIPE_CONTROL_ID	0x7a00		/* DW0 31:16: 3D 3/2/0 */

#define GVT_CMD_GGTT		BIT(22)		/* SDI, LRM, SRM */
#define GVT_SDI_QWORD		BIT(21)
#define GVT_BBS_PPGTT		BIT(8)
#define GVT_BBS_SECOND_LEVEL	BIT(22)
#define GVT_FLUSH_INDEX		BIT(21)		/* DW0 */
#define GVT_FLUSH_NOTIFY	BIT(8)		/* DW0 */
#define GVT_FLUSH_GGTT		BIT(2)		/* DW1 */
#define GVT_PC_GGTT		BIT(24)		/* DW1, as the following */
#define GVT_PC_MMIO_WRITE	BIT(23)
#define GVT_PC_INDEX		BIT(21)
#define GVT_PC_NOTIFY		BIT(8)

/* MI_FLUSH_DW's DW0, PIPE_CONTROL's DW1: what is written at the end */
#define GVT_POST_SYNC(dw)	(((dw) >> 14) & 3)
#define GVT_POST_SYNC_NONE	0
#define GVT_POST_SYNC_WRITE	1
#define GVT_POST_SYNC_TIMESTAMP	3

#define GVT_ADDR_MASK		GENMASK(31, 2)
#define GVT_FLUSH_ADDR_MASK	GENMASK(31, 3)
#define GVT_ADDR_HIGH_MASK	GENMASK(15, 0)

#define GVT_LEVEL_RING		0
#define GVT_LEVEL_BATCH		1
#define GVT_LEVEL_SECOND	2

static inline enum gvt_op gvt_cmd_op(u32 dw0)
{
	u32 op = (dw0 >> 23) & 0x3f;

	if (dw0 >> 16 == GVT_PIPE_CONTROL_ID)
		return GVT_OP_PIPE_CONTROL;
	return dw0 >> 29 == GVT_CLIENT_MI ? op : GVT_OP_UNKNOWN;
}

/* Length in DWs, or -EBADRQC for everything the sample does not execute */
static inline int gvt_cmd_dws(u32 dw0)
{
	switch (gvt_cmd_op(dw0)) {
	case GVT_OP_NOOP:
	case GVT_OP_USER_INTERRUPT:
	case GVT_OP_ARB_CHECK:
	case GVT_OP_ARB_ON_OFF:
	case GVT_OP_BATCH_END:
		return 1;
	case GVT_OP_STORE_DATA_IMM:
		return (dw0 & GENMASK(9, 0)) + 2;
	case GVT_OP_FLUSH_DW:
		return (dw0 & GENMASK(5, 0)) + 2;
	case GVT_OP_LRI:
	case GVT_OP_SRM:
	case GVT_OP_LRM:
	case GVT_OP_LRR:
	case GVT_OP_BATCH_START:
	case GVT_OP_PIPE_CONTROL:
		return (dw0 & GENMASK(7, 0)) + 2;
	default:
		return -EBADRQC;
	}
}

/* The address in two DWs; flags in the low one's lower bits are not its part */
static inline u64 gvt_cmd_addr(const u32 *dw, u32 mask)
{
	return (u64)(dw[1] & GVT_ADDR_HIGH_MASK) << 32 | (dw[0] & mask);
}

#endif
