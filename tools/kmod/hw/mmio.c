// SPDX-License-Identifier: GPL-2.0-only
/*
 * BAR0 below 2 MiB: registers, PVINFO, fences, PPGTT roots, reset.
 */
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "hw/hw.h"
#include "lab/lab.h"

#define GVT_CSB_EMPTY		7	/* write pointer before the first entry */
#define GVT_GDRST		0x941c	/* i915: GEN6_GDRST */
#define GVT_GDRST_FULL		BIT(0)
#define GVT_RESET_KEEPS_FROM	0x44200	/* interrupts and display survive */
#define GVT_IMR(bank)		(0x44304 + 16 * (bank))
#define GVT_IRQ_BANKS		4

#define PVINFO_REG(field)	(VGT_PVINFO_PAGE + offsetof(struct vgt_if, field))

const u32 gvt_ring_base[GVT_RING_COUNT] = {
	[GVT_RING_RCS]	= 0x02000,
	[GVT_RING_BCS]	= 0x22000,
	[GVT_RING_VCS]	= 0x12000,
	[GVT_RING_VCS2]	= 0x1c000,
	[GVT_RING_VECS]	= 0x1a000,
};

/* Upper 16 bits of a write select which of the lower 16 change */
static const u32 gvt_masked_regs[] = { 0x9c, 0xc0, GVT_RING_MODE,
				       GVT_RING_CSB_PTR };

/* --- fences ---------------------------------------------------------- */

/* RFC patch 2: a half is zero, or a guest page address and flags */
static int gvt_fence_half(struct vgpu *vgpu, u32 half, u32 *host)
{
	u64 hgma;
	int ret;

	*host = half;
	if (!half)
		return 0;
	ret = gvt_g2h(vgpu, half & GVT_PAGE_MASK, GVT_PAGE_SIZE, &hgma);
	if (ret)
		return ret;
#ifndef GVT_BREAK_g2h_fence
	*host = lower_32_bits(hgma) | (half & ~GVT_PAGE_MASK);
#endif
	return 0;
}

static void gvt_fence_update(struct vgpu *vgpu, unsigned int fence)
{
	u32 *half = gvt_vreg32(vgpu, GVT_FENCE_OFFSET + 8 * fence);
	u32 low, high;
	u64 value = 0;

	if (!gvt_fence_half(vgpu, half[0], &low) &&
	    !gvt_fence_half(vgpu, half[1], &high)) {
		value = (u64)high << 32 | low;
	} else {
		atomic64_inc(&vgpu->counters.fence_errors);
		gvt_note(vgpu, "fence %u: address outside the guest's GM", fence);
	}
	WRITE_ONCE(gvt_host.fence[vgpu->fence_first + fence], value);
}

void gvt_fences_reload(struct vgpu *vgpu)
{
	unsigned int fence;

	lockdep_assert_held(&vgpu->lock);
	for (fence = 0; fence < GVT_VGPU_FENCES; fence++)
		gvt_fence_update(vgpu, fence);
}

void gvt_fences_clear(struct vgpu *vgpu)
{
	unsigned int fence;

	for (fence = 0; fence < GVT_VGPU_FENCES; fence++)
		WRITE_ONCE(gvt_host.fence[vgpu->fence_first + fence], 0);
}

static int gvt_fence_write(struct vgpu *vgpu, u32 off, u32 value)
{
	unsigned int fence = (off - GVT_FENCE_OFFSET) / 8;

	if (fence >= GVT_VGPU_FENCES) {
		gvt_note(vgpu, "fence %u: the vGPU has %u", fence,
			 GVT_VGPU_FENCES);
		return -EINVAL;
	}
	*gvt_vreg32(vgpu, off) = value;
	gvt_fence_update(vgpu, fence);
	return 0;
}

/* --- PPGTT roots ----------------------------------------------------- */

bool gvt_ppgtt_valid(const struct gvt_ppgtt_entry *entry)
{
	return (entry->page_table_level == 3 || entry->page_table_level == 4) &&
	       entry->pdp[0];
}

static struct gvt_ppgtt *gvt_ppgtt_find(struct vgpu *vgpu,
					const struct gvt_ppgtt_entry *entry)
{
	struct gvt_ppgtt *root;

	list_for_each_entry(root, &vgpu->ppgtts, node)
		if (!memcmp(&root->entry, entry, sizeof(*entry)))
			return root;
	return NULL;
}

static int gvt_ppgtt_create(struct vgpu *vgpu,
			    const struct gvt_ppgtt_entry *entry)
{
	struct gvt_ppgtt *root;

	if (!gvt_ppgtt_valid(entry))
		return -EINVAL;
	if (gvt_ppgtt_find(vgpu, entry))
		return 0;
	if (vgpu->nr_ppgtts >= GVT_PPGTT_MAX)
		return -ENOSPC;
	root = kzalloc(sizeof(*root), GFP_KERNEL_ACCOUNT);
	if (!root)
		return -ENOMEM;
	root->entry = *entry;
	list_add_tail(&root->node, &vgpu->ppgtts);
	vgpu->nr_ppgtts++;
	return 0;
}

static int gvt_ppgtt_destroy(struct vgpu *vgpu,
			     const struct gvt_ppgtt_entry *entry)
{
	struct gvt_ppgtt *root = gvt_ppgtt_find(vgpu, entry);

	if (!root)
		return -EINVAL;
	list_del(&root->node);
	vgpu->nr_ppgtts--;
	kfree(root);
	return 0;
}

void gvt_ppgtt_free(struct list_head *roots)
{
	struct gvt_ppgtt *root, *next;

	list_for_each_entry_safe(root, next, roots, node)
		kfree(root);
	INIT_LIST_HEAD(roots);
}

void gvt_ppgtt_replace(struct vgpu *vgpu, struct list_head *roots,
		       unsigned int nr)
{
	gvt_ppgtt_free(&vgpu->ppgtts);
	list_splice_init(roots, &vgpu->ppgtts);
	vgpu->nr_ppgtts = nr;
}

static void gvt_ppgtt_clear(struct vgpu *vgpu)
{
	LIST_HEAD(none);

	gvt_ppgtt_replace(vgpu, &none, 0);
}

/* The guest's message to the host; the roots are in pdp[] */
static int gvt_g2v_notify(struct vgpu *vgpu, u32 message)
{
	const struct vgt_if *pvinfo = gvt_pvinfo(vgpu);
	struct gvt_ppgtt_entry entry = {};
	bool four = message == VGT_G2V_PPGTT_L4_PAGE_TABLE_CREATE ||
		    message == VGT_G2V_PPGTT_L4_PAGE_TABLE_DESTROY;
	int i, ret;

	entry.page_table_level = four ? 4 : 3;
	for (i = 0; i < (four ? 1 : 4); i++)
		entry.pdp[i] = (u64)pvinfo->pdp[2 * i + 1] << 32 |
			       pvinfo->pdp[2 * i];
	switch (message) {
	case VGT_G2V_PPGTT_L3_PAGE_TABLE_CREATE:
	case VGT_G2V_PPGTT_L4_PAGE_TABLE_CREATE:
		ret = gvt_ppgtt_create(vgpu, &entry);
		break;
	case VGT_G2V_PPGTT_L3_PAGE_TABLE_DESTROY:
	case VGT_G2V_PPGTT_L4_PAGE_TABLE_DESTROY:
		ret = gvt_ppgtt_destroy(vgpu, &entry);
		break;
	case VGT_G2V_EXECLIST_CONTEXT_CREATE:
	case VGT_G2V_EXECLIST_CONTEXT_DESTROY:
		return 0;
	default:
		ret = -EINVAL;
	}
	if (ret)
		gvt_note(vgpu, "g2v message %u: error %d", message, ret);
	return ret;
}

/* --- PVINFO ---------------------------------------------------------- */

/*
 * RFC patch 5: the guest's aperture starts at 0. @low and @high are what the
 * guest had before a reset, so that one after a migration moves nothing.
 */
static void gvt_pvinfo_init(struct vgpu *vgpu, u32 low, u32 high)
{
	struct vgt_if *pvinfo = gvt_pvinfo(vgpu);

#ifdef GVT_BREAK_aperture_zero
	low = vgpu->host_low;
	high = vgpu->host_high;
#endif
	memset(pvinfo, 0, sizeof(*pvinfo));
	pvinfo->magic = VGT_MAGIC;
	pvinfo->version_major = VGT_VERSION_MAJOR;
	pvinfo->version_minor = VGT_VERSION_MINOR;
	pvinfo->vgt_id = vgpu->id;
	pvinfo->vgt_caps = VGT_CAPS_FULL_PPGTT | VGT_CAPS_HWSP_EMULATION |
			   VGT_CAPS_HUGE_GTT;
	pvinfo->mappable_base = low;
	pvinfo->mappable_size = vgpu->low_gm;
	pvinfo->nonmappable_base = high;
	pvinfo->nonmappable_size = vgpu->high_gm;
	pvinfo->fence_num = GVT_VGPU_FENCES;
	pvinfo->cursor_x_hot = U32_MAX;
	pvinfo->cursor_y_hot = U32_MAX;
}

static int gvt_pvinfo_write(struct vgpu *vgpu, u32 off, u32 value)
{
	switch (off) {
	case PVINFO_REG(g2v_notify):
		*gvt_vreg32(vgpu, off) = value;
		return gvt_g2v_notify(vgpu, value);
	case PVINFO_REG(display_ready):
	case PVINFO_REG(cursor_x_hot):
	case PVINFO_REG(cursor_y_hot):
	case PVINFO_REG(pdp) ... PVINFO_REG(execlist_context_descriptor_hi):
		*gvt_vreg32(vgpu, off) = value;
		return 0;
	case PVINFO_REG(rsv3) ... PVINFO_REG(rsv3) + 12:
		gvt_note(vgpu, "the guest is out of resources (%#x)", off);
		return 0;
	}
	return 0;		/* patch 4: bases are not the guest's to change */
}

/* --- reset ----------------------------------------------------------- */

static void gvt_mmio_defaults(struct vgpu *vgpu, u32 from_zero_to)
{
	u32 low = gvt_pvinfo(vgpu)->mappable_base;
	u32 high = gvt_pvinfo(vgpu)->nonmappable_base;
	int bank, ring;

	memset(vgpu->vreg, 0, from_zero_to);
	memset(vgpu->elsp_index, 0, sizeof(vgpu->elsp_index));
	for (ring = 0; ring < GVT_RING_COUNT; ring++)
		*gvt_vreg32(vgpu, gvt_ring_base[ring] + GVT_RING_CSB_PTR) =
			GVT_CSB_EMPTY;
	gvt_pvinfo_init(vgpu, low, high);
	if (from_zero_to > GVT_IMR(GVT_IRQ_BANKS))
		for (bank = 0; bank < GVT_IRQ_BANKS; bank++)
			*gvt_vreg32(vgpu, GVT_IMR(bank)) = U32_MAX;
}

/* GEN6_GDRST: bit 0 everything, 1..4 render, media, blitter, video enhance */
static void gvt_gt_reset(struct vgpu *vgpu, u32 value)
{
	unsigned long mask = 0;

	if (value & GVT_GDRST_FULL)
		mask = GENMASK(GVT_RING_COUNT - 1, 0);
	if (value & BIT(1))
		mask |= BIT(GVT_RING_RCS);
	if (value & BIT(2))
		mask |= BIT(GVT_RING_VCS) | BIT(GVT_RING_VCS2);
	if (value & BIT(3))
		mask |= BIT(GVT_RING_BCS);
	if (value & BIT(4))
		mask |= BIT(GVT_RING_VECS);
	gvt_submit_reset(vgpu, mask);
	if (value & GVT_GDRST_FULL)
		gvt_mmio_defaults(vgpu, GVT_RESET_KEEPS_FROM);
}

void gvt_device_reset(struct vgpu *vgpu)
{
	const unsigned long all = GENMASK(GVT_RING_COUNT - 1, 0);

	mutex_lock(&vgpu->lock);
	gvt_submit_reset(vgpu, all);
	mutex_unlock(&vgpu->lock);
	gvt_submit_wait_idle(vgpu);

	mutex_lock(&vgpu->lock);
	gvt_submit_reset(vgpu, all);	/* submitted while we waited */
	gvt_mmio_defaults(vgpu, GVT_MMIO_SIZE);
	gvt_fences_clear(vgpu);
	gvt_gtt_reset(vgpu);
	gvt_ppgtt_clear(vgpu);
	gvt_cfg_init(vgpu);
	mutex_unlock(&vgpu->lock);
}

/* --- registers ------------------------------------------------------- */

/* The engine whose 4 KiB of registers @off lies in, or -1 */
static int gvt_ring_of(u32 off)
{
	int ring;

	for (ring = 0; ring < GVT_RING_COUNT; ring++)
		if (off - gvt_ring_base[ring] < SZ_4K)
			return ring;
	return -1;
}

static bool gvt_is_masked(u32 ring_off)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(gvt_masked_regs); i++)
		if (gvt_masked_regs[i] == ring_off)
			return true;
	return false;
}

static bool gvt_in_pvinfo(u32 off)
{
	return off - VGT_PVINFO_PAGE < VGT_PVINFO_SIZE;
}

static bool gvt_in_fences(u32 off)
{
	return off - GVT_FENCE_OFFSET < 8 * GVT_HOST_FENCES;
}

/* Does a write here do more than store? Such registers take whole DWs only */
static bool gvt_is_special(u32 off)
{
	int ring = gvt_ring_of(off);
	u32 ring_off = ring < 0 ? 0 : off - gvt_ring_base[ring];

	return gvt_in_pvinfo(off) || gvt_in_fences(off) || off == GVT_GDRST ||
	       gvt_irq_owns(off) ||
	       (ring >= 0 && (ring_off == GVT_RING_ELSP ||
			      gvt_is_masked(ring_off)));
}

static int gvt_mmio_write32(struct vgpu *vgpu, u32 off, u32 value)
{
	u32 *reg = gvt_vreg32(vgpu, off);
	int ring = gvt_ring_of(off);
	u32 mask = value >> 16;

	if (gvt_in_pvinfo(off))
		return gvt_pvinfo_write(vgpu, off, value);
	if (gvt_in_fences(off))
		return gvt_fence_write(vgpu, off, value);
	if (gvt_irq_owns(off)) {
		gvt_irq_mmio_write(vgpu, off, value);
		return 0;
	}
	if (off == GVT_GDRST) {
		gvt_gt_reset(vgpu, value);	/* reads back 0 */
		return 0;
	}
	if (ring >= 0 && off - gvt_ring_base[ring] == GVT_RING_ELSP)
		return gvt_elsp_write(vgpu, ring, value);
	if (ring >= 0 && gvt_is_masked(off - gvt_ring_base[ring]))
		*reg = (*reg & ~mask) | (value & mask);
	else
		*reg = value;
	return 0;
}

int gvt_mmio_read(struct vgpu *vgpu, u32 off, void *buf, unsigned int bytes)
{
	lockdep_assert_held(&vgpu->lock);
	if (off >= GVT_MMIO_SIZE || bytes > GVT_MMIO_SIZE - off)
		return -EINVAL;
	memcpy(buf, vgpu->vreg + off, bytes);
	return 0;
}

int gvt_mmio_write(struct vgpu *vgpu, u32 off, const void *buf,
		   unsigned int bytes)
{
	u32 value[2];
	int ret;

	lockdep_assert_held(&vgpu->lock);
	if (bytes > sizeof(value) || !is_power_of_2(bytes) ||
	    off & (bytes - 1) || off >= GVT_MMIO_SIZE)
		return -EINVAL;
	if (bytes < 4) {
		if (gvt_is_special(off & ~3u))
			return -EINVAL;
		memcpy(vgpu->vreg + off, buf, bytes);
		return 0;
	}
	memcpy(value, buf, bytes);
	ret = gvt_mmio_write32(vgpu, off, value[0]);
	if (!ret && bytes == 8)
		ret = gvt_mmio_write32(vgpu, off + 4, value[1]);
	return ret;
}

int gvt_mmio_init(struct vgpu *vgpu)
{
	INIT_LIST_HEAD(&vgpu->ppgtts);
	vgpu->vreg = vzalloc(GVT_MMIO_SIZE);
	vgpu->sreg = vzalloc(GVT_MMIO_SIZE);
	if (!vgpu->vreg || !vgpu->sreg) {
		gvt_mmio_fini(vgpu);
		return -ENOMEM;
	}
	gvt_pvinfo_init(vgpu, 0, vgpu->host_high);
	gvt_mmio_defaults(vgpu, GVT_MMIO_SIZE);
	return 0;
}

void gvt_mmio_fini(struct vgpu *vgpu)
{
	gvt_fences_clear(vgpu);
	gvt_ppgtt_clear(vgpu);
	vfree(vgpu->vreg);
	vfree(vgpu->sreg);
	vgpu->vreg = NULL;
	vgpu->sreg = NULL;
}
