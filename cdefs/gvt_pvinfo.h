/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT */
/*
 * PVINFO: the page of virtual registers at BAR0 + 0x78000 that tells a GVT-g
 * guest its share of graphics memory, and the fixed places in BAR0 around it.
 * See gvt_rfc.h for the rules that this file's syntax follows.
 */
#ifndef VFIO_MIG_GVT_PVINFO_H
#define VFIO_MIG_GVT_PVINFO_H

#include <linux/types.h>

/* BAR0: 2 MiB of registers, GGTT entries in the upper half */
#define GVT_BAR0_SIZE 0x1000000
#define GVT_MMIO_SIZE 0x200000
#define GVT_GTT_OFFSET 0x800000
#define GVT_GTT_SIZE 0x800000
#define GVT_FENCE_OFFSET 0x100000

#define VGT_PVINFO_PAGE 0x78000
#define VGT_PVINFO_SIZE 0x1000
#define VGT_MAGIC 0x4776544776544776
#define VGT_VERSION_MAJOR 1
#define VGT_VERSION_MINOR 0

#define VGT_CAPS_FULL_PPGTT 0x4
#define VGT_CAPS_HWSP_EMULATION 0x8
#define VGT_CAPS_HUGE_GTT 0x10

#define VGT_G2V_PPGTT_L3_PAGE_TABLE_CREATE 2
#define VGT_G2V_PPGTT_L3_PAGE_TABLE_DESTROY 3
#define VGT_G2V_PPGTT_L4_PAGE_TABLE_CREATE 4
#define VGT_G2V_PPGTT_L4_PAGE_TABLE_DESTROY 5
#define VGT_G2V_EXECLIST_CONTEXT_CREATE 6
#define VGT_G2V_EXECLIST_CONTEXT_DESTROY 7

/* Bases and sizes are graphics addresses in bytes, pages of 4 KiB */
struct vgt_if {
	__u64 magic;			/* 0x000 */
	__u16 version_major;
	__u16 version_minor;
	__u32 vgt_id;
	__u32 vgt_caps;			/* 0x010 */
	__u32 rsv1[11];
	__u32 mappable_base;		/* 0x040: aperture, low GM */
	__u32 mappable_size;
	__u32 nonmappable_base;		/* 0x048: hidden, high GM */
	__u32 nonmappable_size;
	__u32 fence_num;		/* 0x050 */
	__u32 rsv2[491];
	__u32 v2g_notify;		/* 0x800 */
	__u32 display_ready;
	__u32 rsv3[4];
	__u32 g2v_notify;		/* 0x818 */
	__u32 rsv4[5];
	__u32 cursor_x_hot;		/* 0x830 */
	__u32 cursor_y_hot;
	__u32 pdp[8];			/* 0x838: four pairs of low, high */
	__u32 execlist_context_descriptor_lo;	/* 0x858 */
	__u32 execlist_context_descriptor_hi;
	__u32 rsv5[488];
};

#endif
