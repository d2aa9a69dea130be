// SPDX-License-Identifier: MIT
/*
 * Graphics addresses as the guest has them, and as the GPU needs them.
 *
 * The guest's bases are in its PVINFO page, too, but are never read from there:
 * a vGPU in failsafe mode lets its guest overwrite that page, and the bases
 * index the guest's table.
 */
#include "i915_drv.h"
#include "i915_reg.h"
#include "gvt.h"

#define FENCE_PAGE	GENMASK(31, 12)	/* of either dword: first and last page */
#define GMADR_HI	GENMASK(15, 0)	/* of a command's second address dword */

/**
 * intel_vgpu_init_guest_gm - show a new vGPU's guest the host's addresses
 * @vgpu: a vGPU that has its part of the host's GGTT
 */
void intel_vgpu_init_guest_gm(struct intel_vgpu *vgpu)
{
	vgpu->gm.guest_aperture_base = vgpu_aperture_gmadr_base(vgpu);
	vgpu->gm.guest_hidden_base = vgpu_hidden_gmadr_base(vgpu);
}

/**
 * intel_vgpu_align_guest_aperture - show the guest its aperture at 0
 * @vgpu: a vGPU that has its part of the host's GGTT
 *
 * Every vGPU has it there, so that BAR2 looks the same wherever one is migrated
 * to. The hidden part must lie behind all of BAR2; the guest sees this host's
 * address of it until it is migrated.
 */
void intel_vgpu_align_guest_aperture(struct intel_vgpu *vgpu)
{
	if (intel_gvt_migrates())
		vgpu->gm.guest_aperture_base = 0;
}

/**
 * intel_vgpu_gmadr_g2h - translate a guest's graphics address to the host's
 * @vgpu: a vGPU
 * @g_addr: what the guest uses
 * @h_addr: what the GPU needs
 *
 * Returns: 0, or -EACCES where the guest has nothing; a guest may well ask
 */
int intel_vgpu_gmadr_g2h(struct intel_vgpu *vgpu, u64 g_addr, u64 *h_addr)
{
	if (vgpu_gmadr_is_aperture(vgpu, g_addr))
		*h_addr = vgpu_aperture_gmadr_base(vgpu) +
			  (g_addr - vgpu_guest_aperture_gmadr_base(vgpu));
	else if (vgpu_gmadr_is_hidden(vgpu, g_addr))
		*h_addr = vgpu_hidden_gmadr_base(vgpu) +
			  (g_addr - vgpu_guest_hidden_gmadr_base(vgpu));
	else
		return -EACCES;

	return 0;
}

/**
 * intel_vgpu_gmadr_h2g - translate a host's graphics address to the guest's
 * @vgpu: a vGPU
 * @h_addr: an address in the host's GGTT
 * @g_addr: what the guest calls it
 *
 * Returns: 0, or -EACCES where it is not this vGPU's
 */
int intel_vgpu_gmadr_h2g(struct intel_vgpu *vgpu, u64 h_addr, u64 *g_addr)
{
	if (vgpu_host_gmadr_is_aperture(vgpu, h_addr))
		*g_addr = vgpu_guest_aperture_gmadr_base(vgpu) +
			  (h_addr - vgpu_aperture_gmadr_base(vgpu));
	else if (vgpu_host_gmadr_is_hidden(vgpu, h_addr))
		*g_addr = vgpu_guest_hidden_gmadr_base(vgpu) +
			  (h_addr - vgpu_hidden_gmadr_base(vgpu));
	else
		return -EACCES;

	return 0;
}

/**
 * intel_vgpu_plane_g2h - find a plane of the guest in the host's GGTT
 * @vgpu: a vGPU
 * @start: where the guest has it
 * @size: bytes
 * @h_start: where the host has it
 *
 * The range was validated when the plane was queried, but a vGPU may have been
 * restored in between.
 *
 * Returns: 0, or -EFAULT where not all of it is the guest's
 */
int intel_vgpu_plane_g2h(struct intel_vgpu *vgpu, u64 start, u32 size, u64 *h_start)
{
	if (!intel_gvt_migrates()) {
		*h_start = start;
		return 0;
	}

	if (!intel_gvt_ggtt_validate_range(vgpu, start, size) ||
	    intel_vgpu_gmadr_g2h(vgpu, start, h_start))
		return -EFAULT;

	return 0;
}

/**
 * intel_vgpu_host_fence - translate a fence register
 * @vgpu: a vGPU
 * @num: number of the fence, as the guest counts
 *
 * Returns: the register as the GPU needs it; 0, no fence, for one that is not
 * valid, and for one whose pages are not all the guest's
 */
u64 intel_vgpu_host_fence(struct intel_vgpu *vgpu, u32 num)
{
	u64 fence = vgpu_vreg64_t(vgpu, FENCE_REG_GEN6_LO(num));
	u64 first = lower_32_bits(fence) & FENCE_PAGE;
	u64 last = upper_32_bits(fence) & FENCE_PAGE;
	u64 h_first, h_last;

	if (!intel_gvt_migrates())
		return fence;

	if (!(fence & I965_FENCE_REG_VALID) || last < first)
		return 0;

	/* between two windows, and between their ends, there are others' pages */
	if (vgpu_gmadr_is_aperture(vgpu, first) != vgpu_gmadr_is_aperture(vgpu, last) ||
	    intel_vgpu_gmadr_g2h(vgpu, first, &h_first) ||
	    intel_vgpu_gmadr_g2h(vgpu, last, &h_last)) {
		gvt_dbg_mmio("vgpu%d: fence over invalid range %llx-%llx\n",
			     vgpu->id, first, last);
		return 0;
	}

	fence &= ~((u64)FENCE_PAGE << 32 | FENCE_PAGE);
	return fence | h_last << 32 | h_first;
}

/**
 * intel_vgpu_cmd_g2h - put the host's graphics address into a command
 * @vgpu: a vGPU
 * @cmd: the command's dword with the low half of the address
 * @g_addr: the guest's address
 * @mask: the bits of that dword that are the address; the others are flags
 *
 * Returns: 0, or -EFAULT where the guest has nothing
 */
int intel_vgpu_cmd_g2h(struct intel_vgpu *vgpu, u32 *cmd, u64 g_addr, u32 mask)
{
	u64 h_addr;

	if (intel_vgpu_gmadr_g2h(vgpu, g_addr, &h_addr))
		return -EFAULT;

	cmd[0] = (cmd[0] & ~mask) | (lower_32_bits(h_addr) & mask);
	if (vgpu->gvt->device_info.gmadr_bytes_in_cmd == 8)
		cmd[1] = (cmd[1] & ~GMADR_HI) | (upper_32_bits(h_addr) & GMADR_HI);

	return 0;
}

/**
 * intel_vgpu_reg_g2h - translate the value of a register that has an address
 * @vgpu: a vGPU
 * @value: the value: a page's address, and flags
 *
 * Returns: 0, or -EFAULT where the guest has nothing
 */
int intel_vgpu_reg_g2h(struct intel_vgpu *vgpu, u32 *value)
{
	u64 h_addr;

	if (!*value)
		return 0;

	if (intel_vgpu_gmadr_g2h(vgpu, *value & FENCE_PAGE, &h_addr))
		return -EFAULT;

	*value = (*value & ~FENCE_PAGE) | (lower_32_bits(h_addr) & FENCE_PAGE);
	return 0;
}

/**
 * intel_vgpu_bar2_start - tell where in BAR2 the vGPU's aperture starts
 * @vgpu: a vGPU
 *
 * Returns: the offset, which is a guest's graphics address
 */
u64 intel_vgpu_bar2_start(struct intel_vgpu *vgpu)
{
	return vgpu_guest_aperture_gmadr_base(vgpu);
}

/**
 * intel_vgpu_bar2_g2h - find what is behind a part of BAR2
 * @vgpu: a vGPU
 * @off: offset in BAR2
 * @count: bytes
 * @h_off: offset in the GPU's own BAR2
 *
 * Returns: whether all of it is the vGPU's
 */
bool intel_vgpu_bar2_g2h(struct intel_vgpu *vgpu, u64 off, u64 count, u64 *h_off)
{
	u64 start = vgpu_guest_aperture_gmadr_base(vgpu);
	u64 size = vgpu_aperture_sz(vgpu);

	if (off < start || count > size || off - start > size - count)
		return false;

	*h_off = vgpu_aperture_offset(vgpu) + (off - start);
	return true;
}

/**
 * intel_vgpu_set_wa_ctx - have the GPU use the batches that were scanned
 * @workload: a workload of the render engine
 * @shadow: its shadow context, as it was just read from the guest
 *
 * The guest may have changed its context since the workload was created. Where
 * there is a batch, prepare_shadow_wa_ctx() puts in its address later.
 */
void intel_vgpu_set_wa_ctx(struct intel_vgpu_workload *workload,
			   struct execlist_ring_context *shadow)
{
	struct intel_shadow_wa_ctx *wa_ctx = &workload->wa_ctx;

	if (!intel_gvt_migrates())
		return;

	shadow->bb_per_ctx_ptr.val = wa_ctx->per_ctx.guest_gma | wa_ctx->per_ctx.valid;
	shadow->rcs_indirect_ctx.val = wa_ctx->indirect_ctx.guest_gma |
				       wa_ctx->indirect_ctx.size / CACHELINE_BYTES;
}
