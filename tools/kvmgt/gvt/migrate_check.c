// SPDX-License-Identifier: MIT
/*
 * Checking an image, before anything of a vGPU is changed.
 *
 * An image may come from anybody. What is let through here is what a guest
 * could have done to a vGPU of this host, so that nothing reaches the hardware,
 * or indexes something, that a guest's own write would not have got there.
 */
#include <linux/pci_regs.h>

#include "i915_drv.h"
#include "i915_reg.h"
#include "gt/intel_engine_regs.h"
#include "gt/intel_gt_regs.h"
#include "gvt.h"
#include "i915_pvinfo.h"
#include "migrate_compat.h"
#include "migrate_image.h"

#define RING_CTX_OFF(x)	offsetof(struct execlist_ring_context, x)

static int bad(struct intel_vgpu *vgpu, const char *what)
{
	gvt_dbg_core("vgpu%d: image refused: %s\n", vgpu->id, what);
	return -EINVAL;
}

/* --- records --------------------------------------------------------- */

static size_t gtt_bytes(struct intel_vgpu *vgpu)
{
	return (vgpu_ggtt_gm_sz(vgpu) >> I915_GTT_PAGE_SHIFT) * sizeof(u64);
}

/* A record that must be there once, with this size */
static int take(struct intel_vgpu *vgpu, const void **field, const void *payload,
		u32 size, size_t expected)
{
	if (*field)
		return bad(vgpu, "a record is there twice");
	if (size != expected)
		return bad(vgpu, "a record has another size than here");

	*field = payload;
	return 0;
}

static int take_array(struct intel_vgpu *vgpu, const void **field, u32 *nr,
		      const void *payload, u32 size, size_t each)
{
	if (*field)
		return bad(vgpu, "a record is there twice");
	if (size % each)
		return bad(vgpu, "a record ends in the middle of an entry");

	*field = payload;
	*nr = size / each;
	return 0;
}

/* Where what the RFC forgot is, or would be */
struct ext_place {
	const struct gvt_ext *ext;
	size_t room;
	bool own;		/* in a record of its own, which has nothing else */
};

static int take_ext(struct intel_vgpu *vgpu, struct ext_place *place, const void *payload,
		    u32 size)
{
	if (size < sizeof(*place->ext))
		return bad(vgpu, "EXT is too short");

	place->room = size;
	place->own = true;
	return take(vgpu, (const void **)&place->ext, payload, size, size);
}

static int take_sreg(struct intel_vgpu *vgpu, struct ext_place *place, const void *payload,
		     u32 size)
{
	place->room = vgpu->gvt->device_info.mmio_size;
	return take(vgpu, (const void **)&place->ext, payload, size, place->room);
}

static int take_record(struct intel_vgpu *vgpu, const struct gvt_region *region,
		       struct intel_vgpu_image *image, struct ext_place *place)
{
	const struct intel_gvt_device_info *info = &vgpu->gvt->device_info;
	const void *payload = region + 1;

	switch (region->type) {
	case GVT_MIGRATION_CFG_SPACE:
		return take(vgpu, &image->cfg, payload, region->size, info->cfg_space_size);
	case GVT_MIGRATION_SREG:
		return take_sreg(vgpu, place, payload, region->size);
	case GVT_MIGRATION_EXT:
		return take_ext(vgpu, place, payload, region->size);
	case GVT_MIGRATION_VREG:
		return take(vgpu, &image->vreg, payload, region->size, info->mmio_size);
	case GVT_MIGRATION_GTT:
		return take(vgpu, (const void **)&image->gtt, payload, region->size,
			    gtt_bytes(vgpu));
	case GVT_MIGRATION_PPGTT:
		return take_array(vgpu, (const void **)&image->ppgtt, &image->nr_ppgtt,
				  payload, region->size, sizeof(*image->ppgtt));
	case GVT_MIGRATION_WORKLOAD:
		return take_array(vgpu, (const void **)&image->workloads, &image->nr_workloads,
				  payload, region->size, sizeof(*image->workloads));
	}
	return bad(vgpu, "a record of an unknown type");
}

static int take_records(struct intel_vgpu *vgpu, const void *buf, size_t size,
			struct intel_vgpu_image *image, struct ext_place *place, size_t *data_size)
{
	const struct gvt_region *region = buf;
	const struct gvt_image_header *head = (const void *)(region + 1);
	size_t pos = sizeof(*region) + sizeof(*head);
	int ret;

	if (size < pos || region->type != GVT_MIGRATION_HEAD || region->size != sizeof(*head) ||
	    head->version != GVT_IMAGE_VERSION)
		return bad(vgpu, "it does not begin with HEAD");
	if (head->data_size < 0 || head->data_size < pos || head->data_size > size)
		return bad(vgpu, "data_size");
	if (intel_gvt_migrates_v2() && head->data_size != size)
		return bad(vgpu, "something behind data_size");

	*data_size = head->data_size;
	while (pos < *data_size) {
		region = buf + pos;
		if (*data_size - pos < sizeof(*region) ||
		    *data_size - pos - sizeof(*region) < region->size)
			return bad(vgpu, "a record runs over data_size");
		ret = take_record(vgpu, region, image, place);
		if (ret)
			return ret;
		pos += sizeof(*region) + region->size;
	}

	if (!image->cfg || !image->vreg || !image->gtt || !place->ext)
		return bad(vgpu, "a record is missing");
	return 0;
}

/* --- config space and registers -------------------------------------- */

/* What of the first 64 bytes may differ; BARs are looked at by themselves */
static bool cfg_may_differ(unsigned int off)
{
	switch (off) {
	case PCI_COMMAND:
	case PCI_COMMAND + 1:
	case PCI_STATUS + 1:
	case PCI_CACHE_LINE_SIZE:
	/* not writable, but of the board and not of the GPU */
	case PCI_SUBSYSTEM_VENDOR_ID ... PCI_SUBSYSTEM_ID + 1:
	case PCI_ROM_ADDRESS ... PCI_ROM_ADDRESS + 3:
	case PCI_INTERRUPT_LINE:
		return true;
	}
	return off >= PCI_BASE_ADDRESS_0 && off < PCI_BASE_ADDRESS_5 + 4;
}

/* The guest puts a BAR where it likes; its kind decides how that address is read. */
static int check_bar(struct intel_vgpu *vgpu, const void *cfg, unsigned int off)
{
	u64 value = *(const u64 *)(cfg + off);
	u64 own = *(const u64 *)(vgpu_cfg_space(vgpu) + off);

	if ((value ^ own) & ~PCI_BASE_ADDRESS_MEM_MASK)
		return bad(vgpu, "a BAR is of another kind");
	return 0;
}

static int check_cfg(struct intel_vgpu *vgpu, const void *cfg)
{
	const u8 *own = vgpu_cfg_space(vgpu);
	unsigned long msi = vgpu->gvt->device_info.msi_cap_offset;
	unsigned int i;
	u16 control;
	int ret;

	for (i = 0; i < PCI_STD_HEADER_SIZEOF; i++)
		if (!cfg_may_differ(i) && ((const u8 *)cfg)[i] != own[i])
			return bad(vgpu, "it is of another device");

	ret = check_bar(vgpu, cfg, PCI_BASE_ADDRESS_0);
	if (!ret)
		ret = check_bar(vgpu, cfg, PCI_BASE_ADDRESS_2);
	if (ret)
		return ret;

	/* kvmgt sends one message, and warns about a guest that asks for more */
	control = *(const u16 *)(cfg + msi + PCI_MSI_FLAGS);
	if ((control & PCI_MSI_FLAGS_ENABLE) && (control & PCI_MSI_FLAGS_QSIZE))
		return bad(vgpu, "more than one MSI");
	return 0;
}

static int check_pvinfo(struct intel_vgpu *vgpu, struct intel_vgpu_image *image)
{
	const struct vgt_if *pv = image->vreg + VGT_PVINFO_PAGE;
	u64 low = pv->avail_rs.mappable_gmadr.base;
	u64 high = pv->avail_rs.nonmappable_gmadr.base;
	struct intel_gvt *gvt = vgpu->gvt;

	if (pv->magic != VGT_MAGIC || pv->version_major != 1)
		return bad(vgpu, "PVINFO");
	if (pv->avail_rs.mappable_gmadr.size != vgpu_aperture_sz(vgpu) ||
	    pv->avail_rs.nonmappable_gmadr.size != vgpu_hidden_sz(vgpu) ||
	    pv->avail_rs.fence_num != vgpu_fence_sz(vgpu))
		return bad(vgpu, "it is of another type");
	/* BAR2 is mapped by this address since before the image came */
	if (low != vgpu_guest_aperture_gmadr_base(vgpu))
		return bad(vgpu, "the aperture is elsewhere");
	/* the guest has its hidden part behind BAR2, and within what its table can hold */
	if (!IS_ALIGNED(high, I915_GTT_PAGE_SIZE) || high < gvt_hidden_gmadr_base(gvt) ||
	    high > gvt_ggtt_gm_sz(gvt) || vgpu_hidden_sz(vgpu) > gvt_ggtt_gm_sz(gvt) - high)
		return bad(vgpu, "the hidden part is elsewhere");

	image->guest_hidden_base = high;
	return 0;
}

static u32 reg_of(const void *vreg, unsigned int offset)
{
	return *(const u32 *)(vreg + offset);
}

/* Bits that a guest's write never sets; the host's own registers may have them */
static bool has_forbidden(struct intel_vgpu *vgpu, const void *vreg, unsigned int offset, u32 bits)
{
	return reg_of(vreg, offset) & bits & ~reg_of(vgpu->gvt->firmware.mmio, offset);
}

static int check_nonpriv(struct intel_vgpu *vgpu, const void *vreg)
{
	int i;

	for (i = 0; i < RING_MAX_NONPRIV_SLOTS; i++) {
		unsigned int offset =
			i915_mmio_reg_offset(RING_FORCE_TO_NONPRIV(RENDER_RING_BASE, i));
		u32 value = reg_of(vreg, offset);
		u32 reg = value & REG_GENMASK(25, 2);

		if (value && value != reg_of(vgpu->gvt->firmware.mmio, offset) &&
		    reg != i915_mmio_reg_offset(RING_NOPID(RENDER_RING_BASE)) &&
		    !intel_gvt_in_force_nonpriv_whitelist(vgpu->gvt, reg))
			return bad(vgpu, "a register is opened to batches that must not be");
	}
	return 0;
}

/*
 * Registers that are loaded into the GPU when the vGPU gets it, and whose
 * handlers do not take every value of a guest's.
 */
static int check_hw_registers(struct intel_vgpu *vgpu, const void *vreg)
{
	struct drm_i915_private *i915 = vgpu->gvt->gt->i915;
	bool cfl = IS_COFFEELAKE(i915) || IS_COMETLAKE(i915);
	struct intel_engine_cs *engine;
	enum intel_engine_id id;
	u32 value;

	for_each_engine(engine, vgpu->gvt->gt, id) {
		u32 mode = i915_mmio_reg_offset(RING_MODE_GEN7(engine->mmio_base));

		if (has_forbidden(vgpu, vreg, mode, cfl ? 3 : 1) ||
		    (GRAPHICS_VER(i915) >= 9 &&
		     has_forbidden(vgpu, vreg, engine->mmio_base + 0xd4, 0x18)))
			return bad(vgpu, "an engine's mode");
	}

	if (GRAPHICS_VER(i915) >= 9) {
		value = reg_of(vreg, i915_mmio_reg_offset(TRTTE));
		if ((value & 1) && !(value & 2))
			return bad(vgpu, "tiled resources by physical address");
		value = reg_of(vreg, i915_mmio_reg_offset(GEN9_GAMT_ECO_REG_RW_IA)) &
			GAMW_ECO_ENABLE_64K_IPS_FIELD;
		if (value && value != GAMW_ECO_ENABLE_64K_IPS_FIELD)
			return bad(vgpu, "64K pages on some engines only");
	}
	return check_nonpriv(vgpu, vreg);
}

/* --- page tables ------------------------------------------------------ */

static int check_ppgtt(struct intel_vgpu *vgpu, const struct intel_vgpu_image *image)
{
	u32 i;

	for (i = 0; i < image->nr_ppgtt; i++) {
		s32 level = image->ppgtt[i].page_table_level;

		if (level != 3 && level != 4)
			return bad(vgpu, "a page table of a level that there is not");
	}
	return 0;
}

static bool in_window(u64 gma, u64 base, u64 size, u64 *index)
{
	if (gma < base || gma - base >= size)
		return false;

	*index = (gma - base) >> I915_GTT_PAGE_SHIFT;
	return true;
}

/* Where in the guest's memory a page of its GGTT is, by the image's entries */
static int image_gma_to_gpa(struct intel_vgpu *vgpu, const struct intel_vgpu_image *image,
			    u64 gma, u64 *gpa)
{
	const struct intel_gvt_gtt_pte_ops *ops = vgpu->gvt->gtt.pte_ops;
	struct intel_gvt_gtt_entry entry = { .type = GTT_TYPE_GGTT_PTE };
	u64 index;

	if (in_window(gma, image->guest_hidden_base, vgpu_hidden_sz(vgpu), &index))
		index += vgpu_aperture_sz(vgpu) >> I915_GTT_PAGE_SHIFT;
	else if (!in_window(gma, vgpu_guest_aperture_gmadr_base(vgpu), vgpu_aperture_sz(vgpu),
			    &index))
		return -EINVAL;

	entry.val64 = image->gtt[index];
	if (!ops->test_present(&entry))
		return -EINVAL;

	*gpa = (u64)ops->get_pfn(&entry) << I915_GTT_PAGE_SHIFT;
	return 0;
}

/* --- what the RFC forgot ---------------------------------------------- */

static bool same_context(const u32 *one, const u32 *other)
{
	const struct execlist_ctx_descriptor_format *a = (const void *)one;
	const struct execlist_ctx_descriptor_format *b = (const void *)other;

	return a->context_id == b->context_id && a->lrca == b->lrca;
}

static bool is_valid(const u32 *desc)
{
	return ((const struct execlist_ctx_descriptor_format *)desc)->valid;
}

/* The state of an execlist, to go through what the queue will do to it */
struct execlist_model {
	u32 slot[2][4];
	u32 running, pending, running_ctx, write_pointer;
};

static bool model_is_sound(const struct execlist_model *model)
{
	if (model->running == GVT_EXT_NONE)
		return model->pending == GVT_EXT_NONE && model->running_ctx == GVT_EXT_NONE;
	if (model->running > 1 || model->running_ctx > 1 || !is_valid(model->slot[model->running]))
		return false;
	if (model->running_ctx == 1 && !is_valid(&model->slot[model->running][2]))
		return false;
	if (model->write_pointer == model->running)
		return false;
	return model->pending == GVT_EXT_NONE ||
	       (model->pending < 2 && model->pending != model->running &&
		is_valid(model->slot[model->pending]));
}

/* As emulate_execlist_schedule_in() */
static bool model_schedule_in(struct execlist_model *model, const u32 *elsp)
{
	u32 slot = model->write_pointer;
	const u32 *ctx;
	bool goes_on;

	if (model->pending != GVT_EXT_NONE || !is_valid(elsp))
		return false;

	memcpy(model->slot[slot], elsp, sizeof(model->slot[slot]));
	if (model->running == GVT_EXT_NONE) {
		model->running = slot;
		model->running_ctx = 0;
		model->write_pointer = !slot;
		return true;
	}

	ctx = model->slot[model->running];
	if (is_valid(ctx + 2))
		goes_on = same_context(ctx + 2, elsp) &&
			  !same_context(ctx, ctx + 2 * model->running_ctx);
	else
		goes_on = same_context(ctx, elsp);

	if (goes_on) {
		model->running = slot;
		model->running_ctx = 0;
		model->write_pointer = !slot;
	} else {
		model->pending = slot;
	}
	return true;
}

/* As emulate_execlist_ctx_schedule_out() */
static bool model_schedule_out(struct execlist_model *model, const u32 *desc)
{
	const u32 *ctx;

	if (model->running == GVT_EXT_NONE)
		return false;

	ctx = model->slot[model->running];
	if (!same_context(desc, ctx + 2 * model->running_ctx))
		return false;
	if (is_valid(ctx + 2) && same_context(ctx, desc)) {
		model->running_ctx = 1;
		return true;
	}
	if (!same_context(is_valid(ctx + 2) ? ctx + 2 : ctx, desc))
		return false;

	model->running = model->pending;
	model->pending = GVT_EXT_NONE;
	model->running_ctx = model->running == GVT_EXT_NONE ? GVT_EXT_NONE : 0;
	if (model->running != GVT_EXT_NONE)
		model->write_pointer = !model->running;
	return true;
}

/* All that intel_vgpu_create_workload() will read must be there */
static int check_context(struct intel_vgpu *vgpu, const struct intel_vgpu_image *image,
			 const u32 *desc)
{
	const struct execlist_ctx_descriptor_format *format = (const void *)desc;
	struct execlist_ring_context *context;
	u64 gpa;
	int ret;

	if (!format->valid || !format->privilege_access ||
	    (format->addressing_mode != 1 && format->addressing_mode != 3))
		return bad(vgpu, "a context that cannot be submitted");
	if (image_gma_to_gpa(vgpu, image, ((u64)format->lrca + 1) << I915_GTT_PAGE_SHIFT, &gpa))
		return bad(vgpu, "a context that is nowhere");

	context = kmalloc_obj(*context, GFP_KERNEL);
	if (!context)
		return -ENOMEM;
	ret = intel_gvt_read_gpa(vgpu, gpa, context, sizeof(*context));
	if (!ret && !IS_ALIGNED(context->rb_start.val, I915_GTT_PAGE_SIZE))
		ret = bad(vgpu, "a ring that is not aligned");
	/* as in memory that nobody has brought along: its work would be lost without a word */
	if (!ret && !(context->rb_ctrl.val & RING_VALID))
		ret = bad(vgpu, "a context without a ring");
	kfree(context);
	return ret;
}

static int check_execlist(struct intel_vgpu *vgpu, const struct intel_vgpu_image *image, u32 ring)
{
	const struct gvt_ext_execlist *execlist = &image->ext->execlist[ring];
	const struct intel_engine_cs *engine =
		vgpu->gvt->gt->engine[intel_vgpu_ring_to_engine(ring)];
	struct execlist_model model = {
		.running = execlist->running,
		.pending = execlist->pending,
		.running_ctx = execlist->running_ctx,
	};
	const struct gvt_ext_workload *workload, *next = NULL;
	struct execlist_status_format status;
	bool is_pending;
	u32 reg, i;
	int ret;

	if (!execlist->enabled) {
		for (i = 0; i < image->ext->nr_workloads; i++)
			if (image->ext_workloads[i].ring == ring)
				return bad(vgpu, "work for an engine that is off");
		return 0;
	}
	if (!engine || execlist->enabled != 1 || execlist->elsp_index > 3)
		return bad(vgpu, "an execlist that there is not");

	reg = i915_mmio_reg_offset(RING_EXECLIST_STATUS_LO(engine->mmio_base));
	status.ldw = reg_of(image->vreg, reg);
	model.write_pointer = status.execlist_write_pointer;
	memcpy(model.slot, execlist->slot, sizeof(model.slot));
	is_pending = model.pending != GVT_EXT_NONE;
	if (!model_is_sound(&model) || status.execlist_queue_full != is_pending)
		return bad(vgpu, "an execlist that cannot be");

	for (i = 0; i < image->ext->nr_workloads; i++) {
		if (image->ext_workloads[i].ring != ring)
			continue;
		workload = next;
		next = &image->ext_workloads[i];
		ret = check_context(vgpu, image, next->desc);
		if (ret)
			return ret;
		/* one that goes on in the same context is not switched out */
		if (workload && !same_context(workload->desc, next->desc) &&
		    !model_schedule_out(&model, workload->desc))
			return bad(vgpu, "a queue that cannot be");
		if (next->schedule_in && !model_schedule_in(&model, next->elsp))
			return bad(vgpu, "a queue that cannot be");
	}
	if (next && !model_schedule_out(&model, next->desc))
		return bad(vgpu, "a queue that cannot be");
	return 0;
}

static int check_display(struct intel_vgpu *vgpu, const struct gvt_ext_display *display)
{
	u32 edid = GVT_EXT_I2C_SELECTED | GVT_EXT_I2C_EDID;

	if (!display->vrefresh_k || display->vrefresh_k > 1000 * 1000)
		return bad(vgpu, "the refresh rate");
	if (display->i2c_state > I2C_AUX_CH || display->i2c_flags > 0xf ||
	    display->gmbus_phase >= GMBUS_MAX_PHASE || display->gmbus_cycle > IDX_STOP)
		return bad(vgpu, "I2C");
	if (display->i2c_port >= I915_MAX_PORTS &&
	    (display->i2c_port != (u32)-1 || display->i2c_flags & edid))
		return bad(vgpu, "a port that there is not");
	if (display->sbi_number > SBI_REG_MAX)
		return bad(vgpu, "SBI");
	return 0;
}

static int check_partial_ptes(struct intel_vgpu *vgpu, const struct intel_vgpu_image *image)
{
	u64 index, gma;
	u32 i;

	for (i = 0; i < image->ext->nr_partial_ptes; i++) {
		const struct gvt_ext_partial_pte *pte = &image->partial_ptes[i];

		if (pte->offset % 4 || pte->offset >= gvt_ggtt_sz(vgpu->gvt))
			return bad(vgpu, "half an entry that is nowhere");
		gma = pte->offset / sizeof(u64) << I915_GTT_PAGE_SHIFT;
		if (!in_window(gma, image->guest_hidden_base, vgpu_hidden_sz(vgpu), &index) &&
		    !in_window(gma, vgpu_guest_aperture_gmadr_base(vgpu),
			       vgpu_aperture_sz(vgpu), &index))
			return bad(vgpu, "half an entry that is not the guest's");
		if (pte->offset % 8 ? lower_32_bits(pte->data) : upper_32_bits(pte->data))
			return bad(vgpu, "more than half an entry");
	}
	return 0;
}

static int check_ext(struct intel_vgpu *vgpu, struct intel_vgpu_image *image,
		     const struct ext_place *place)
{
	const struct gvt_ext *ext = place->ext;
	struct intel_gvt *gvt = vgpu->gvt;
	u32 ring, i;
	int ret;

	if (ext->size < sizeof(*ext) || ext->size > place->room ||
	    ext->size != size_add(sizeof(*ext),
				  size_add(size_mul(ext->nr_workloads,
						    sizeof(*image->ext_workloads)),
					   size_mul(ext->nr_partial_ptes,
						    sizeof(*image->partial_ptes)))))
		return bad(vgpu, "the size of what the RFC forgot");
	if (place->own ? ext->size != place->room :
			 !!memchr_inv((const void *)ext + ext->size, 0, place->room - ext->size))
		return bad(vgpu, "something behind what the RFC forgot");
	if (ext->graphics_version != GRAPHICS_VER(gvt->gt->i915) ||
	    ext->engine_mask != gvt->gt->info.engine_mask ||
	    ext->ggtt_size != gvt_ggtt_gm_sz(gvt) || ext->bar2_size != gvt_aperture_sz(gvt))
		return bad(vgpu, "it is of another host");
	if (ext->flags & ~GVT_EXT_FLAGS)
		return bad(vgpu, "flags");

	image->ext = ext;
	image->ext_workloads = (const void *)(ext + 1);
	image->partial_ptes = (const void *)(image->ext_workloads + ext->nr_workloads);
	for (i = 0; i < ext->nr_workloads; i++)
		if (image->ext_workloads[i].ring >= GVT_RING_COUNT)
			return bad(vgpu, "work for an engine that there is not");

	ret = check_display(vgpu, &ext->display);
	if (!ret)
		ret = check_partial_ptes(vgpu, image);
	for (ring = 0; ring < GVT_RING_COUNT && !ret; ring++)
		ret = check_execlist(vgpu, image, ring);
	return ret;
}

/* The RFC's own list of workloads: needed where there is no other */
static int check_workloads(struct intel_vgpu *vgpu, const struct intel_vgpu_image *image)
{
	u32 i;
	int ret;

	for (i = 0; i < image->nr_workloads; i++) {
		const struct gvt_workload_entry *entry = &image->workloads[i];
		int engine = intel_vgpu_ring_to_engine(entry->ring_id);
		u32 desc[4] = { entry->data[3], entry->data[2], entry->data[1], entry->data[0] };

		if (engine < 0 || !vgpu->gvt->gt->engine[engine] || entry->index > 3)
			return bad(vgpu, "work for an engine that there is not");
		/* the second of a pair has nothing of its own */
		if (image->ext || !memchr_inv(desc, 0, sizeof(desc)))
			continue;
		ret = check_context(vgpu, image, desc);
		if (!ret && is_valid(desc + 2))
			ret = check_context(vgpu, image, desc + 2);
		if (ret)
			return ret;
	}
	return 0;
}

/**
 * intel_vgpu_check_image - look at all of an image
 * @vgpu: a vGPU that is open and stopped
 * @buf: the image, in memory that nobody else can change
 * @size: bytes there; the image may end before
 * @image: where its parts are
 *
 * To be called by a kernel thread, as it reads the guest's memory.
 *
 * Returns: 0; -EINVAL for what is not an image, or not one for this vGPU;
 * another error where the guest's memory that the image needs is not there
 */
int intel_vgpu_check_image(struct intel_vgpu *vgpu, const void *buf, size_t size,
			   struct intel_vgpu_image *image)
{
	struct ext_place place = {};
	const struct gvt_ext *ext;
	size_t data_size;
	bool has_ext;
	int ret;

	memset(image, 0, sizeof(*image));
	ret = take_records(vgpu, buf, size, image, &place, &data_size);
	if (ret)
		return ret;

	ext = place.ext;
	has_ext = ext->magic == GVT_EXT_MAGIC;
	if (!has_ext && (place.own || intel_gvt_migrates_v2()))
		return bad(vgpu, "what the RFC forgot is not there");
	if (has_ext &&
	    ext->crc != intel_vgpu_image_crc(buf, data_size, (const void *)&ext->crc - buf))
		return bad(vgpu, "it was damaged");

	ret = check_cfg(vgpu, image->cfg);
	if (!ret)
		ret = check_pvinfo(vgpu, image);
	if (!ret)
		ret = check_hw_registers(vgpu, image->vreg);
	if (!ret)
		ret = check_ppgtt(vgpu, image);
	if (!ret && has_ext)
		ret = check_ext(vgpu, image, &place);
	if (!ret)
		ret = check_workloads(vgpu, image);
	return ret;
}
