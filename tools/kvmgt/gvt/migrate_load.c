// SPDX-License-Identifier: MIT
/*
 * Restoring a vGPU from an image that was checked.
 */
#include <linux/pci_regs.h>
#include <linux/workqueue.h>

#include "i915_drv.h"
#include "i915_reg.h"
#include "gt/intel_engine_regs.h"
#include "gvt.h"
#include "migrate_compat.h"
#include "migrate_image.h"

/* --- registers ------------------------------------------------------- */

static bool is_enabled(struct intel_vgpu *vgpu, const struct intel_vgpu_image *image,
		       const struct intel_engine_cs *engine)
{
	u32 ring;

	/* The register alone says little: a guest that never wrote it sees the host's */
	if (!image->ext)
		return vgpu_vreg_t(vgpu, RING_MODE_GEN7(engine->mmio_base)) & GFX_RUN_LIST_ENABLE;

	for (ring = 0; ring < GVT_RING_COUNT; ring++)
		if (intel_vgpu_ring_to_engine(ring) == engine->id)
			return image->ext->execlist[ring].enabled;
	return false;
}

static int load_registers(struct intel_vgpu *vgpu, const struct intel_vgpu_image *image)
{
	const struct intel_gvt_device_info *info = &vgpu->gvt->device_info;
	struct intel_runtime_pm *rpm = vgpu->gvt->gt->uncore->rpm;
	struct intel_engine_cs *engine;
	enum intel_engine_id id;
	intel_wakeref_t wakeref;
	int ret, i;

	memcpy(vgpu->mmio.vreg, image->vreg, info->mmio_size);
	vgpu->gm.guest_hidden_base = image->guest_hidden_base;

	for_each_engine(engine, vgpu->gvt->gt, id) {
		u32 hws_pga = vgpu_vreg_t(vgpu, RING_HWS_PGA(engine->mmio_base));

		/* as hws_pga_write(); the host's own is no page of the guest's */
		if (!intel_gvt_ggtt_validate_range(vgpu, hws_pga, I915_GTT_PAGE_SIZE))
			hws_pga = 0;
		vgpu->hws_pga[id] = hws_pga;

		if (!is_enabled(vgpu, image, engine))
			continue;
		ret = intel_vgpu_select_submission_ops(vgpu, engine->mask,
						       INTEL_VGPU_EXECLIST_SUBMISSION);
		if (ret)
			return ret;
	}

	/* That has put the pointers of the status buffers to their start. */
	memcpy(vgpu->mmio.vreg, image->vreg, info->mmio_size);

	/* Whatever the GPU remembers of this vGPU is of another guest. */
	bitmap_fill(vgpu->submission.tlb_handle_pending, I915_NUM_ENGINES);
	memset(vgpu->submission.last_ctx, 0, sizeof(vgpu->submission.last_ctx));

	wakeref = intel_runtime_pm_get(rpm);
	for (i = 0; i < vgpu_fence_sz(vgpu); i++)
		intel_vgpu_write_fence(vgpu, i, intel_vgpu_host_fence(vgpu, i));
	intel_runtime_pm_put(rpm, wakeref);

	return 0;
}

static void load_display(struct intel_vgpu *vgpu, const struct gvt_ext_display *from)
{
	struct intel_vgpu_display *display = &vgpu->display;
	struct intel_vgpu_i2c_edid *i2c = &display->i2c_edid;
	struct intel_vgpu_port *port = intel_vgpu_port(vgpu, display->port_num);
	int i;

	for (i = 0; i < ARRAY_SIZE(from->flip_done); i++)
		bitmap_from_arr64(vgpu->irq.flip_done_event[i], from->flip_done[i],
				  INTEL_GVT_EVENT_MAX);
	port->vrefresh_k = from->vrefresh_k;
	i2c->state = from->i2c_state;
	i2c->port = from->i2c_port;
	i2c->target_selected = from->i2c_flags & GVT_EXT_I2C_SELECTED;
	i2c->edid_available = from->i2c_flags & GVT_EXT_I2C_EDID;
	i2c->aux_ch.i2c_over_aux_ch = from->i2c_flags & GVT_EXT_I2C_OVER_AUX;
	i2c->aux_ch.aux_ch_mot = from->i2c_flags & GVT_EXT_I2C_AUX_MOT;
	i2c->current_edid_read = from->edid_read;
	i2c->gmbus.total_byte_count = from->gmbus_count;
	i2c->gmbus.cycle_type = from->gmbus_cycle;
	i2c->gmbus.phase = from->gmbus_phase;
	if (port->edid)
		memcpy(port->edid->edid_block, from->edid, sizeof(from->edid));
	if (port->dpcd)
		memcpy(port->dpcd->data, from->dpcd, sizeof(from->dpcd));
	display->sbi.number = from->sbi_number;
	for (i = 0; i < from->sbi_number; i++) {
		display->sbi.registers[i].offset = from->sbi[i][0];
		display->sbi.registers[i].value = from->sbi[i][1];
	}
}

/* --- page tables ------------------------------------------------------ */

static int load_partial_ptes(struct intel_vgpu *vgpu, const struct intel_vgpu_image *image)
{
	u32 i;

	for (i = 0; i < image->ext->nr_partial_ptes; i++) {
		struct intel_gvt_partial_pte *pte = kzalloc_obj(*pte, GFP_KERNEL_ACCOUNT);

		if (!pte)
			return -ENOMEM;
		pte->offset = image->partial_ptes[i].offset;
		pte->data = image->partial_ptes[i].data;
		list_add_tail(&pte->list, &vgpu->gtt.ggtt_mm->ggtt_mm.partial_pte_list);
	}
	return 0;
}

static int load_gtt_range(struct intel_vgpu *vgpu, const u64 *entries, u64 base, u64 size)
{
	const struct intel_gvt_device_info *info = &vgpu->gvt->device_info;
	const struct intel_gvt_gtt_pte_ops *ops = vgpu->gvt->gtt.pte_ops;
	u64 *table = vgpu->gtt.ggtt_mm->ggtt_mm.virtual_ggtt;
	u64 first = base >> I915_GTT_PAGE_SHIFT;
	u64 nr = size >> I915_GTT_PAGE_SHIFT;
	u64 i;
	int ret;

	memcpy(table + first, entries, nr * sizeof(*entries));
	for (i = 0; i < nr; i++) {
		struct intel_gvt_gtt_entry entry = {
			.type = GTT_TYPE_GGTT_PTE,
			.val64 = entries[i],
		};

		if (!ops->test_present(&entry))
			continue;
		/* as the guest wrote it; what cannot be pinned is the scratch page */
		ret = intel_vgpu_emulate_ggtt_mmio_write(vgpu, info->gtt_start_offset +
							 (first + i) * info->gtt_entry_size,
							 &entry.val64, sizeof(entry.val64));
		if (ret)
			return ret;
		cond_resched();
	}
	return 0;
}

/* The host's entries are all scratch, after a reset. */
static int load_gtt(struct intel_vgpu *vgpu, const struct intel_vgpu_image *image)
{
	u64 low = vgpu_aperture_sz(vgpu);
	int ret;

	memset(vgpu->gtt.ggtt_mm->ggtt_mm.virtual_ggtt, 0, gvt_ggtt_sz(vgpu->gvt));
	ret = load_gtt_range(vgpu, image->gtt, vgpu_guest_aperture_gmadr_base(vgpu), low);
	if (ret)
		return ret;
	return load_gtt_range(vgpu, image->gtt + (low >> I915_GTT_PAGE_SHIFT),
			      vgpu_guest_hidden_gmadr_base(vgpu), vgpu_hidden_sz(vgpu));
}

/*
 * The shadow is built when the first workload needs it, as for a page table
 * that was reclaimed: the guest's memory may not be complete yet.
 */
static int load_ppgtt(struct intel_vgpu *vgpu, const struct gvt_ppgtt_entry *entry)
{
	struct intel_gvt *gvt = vgpu->gvt;
	struct intel_vgpu_mm *mm = kzalloc_obj(*mm, GFP_KERNEL_ACCOUNT);

	if (!mm)
		return -ENOMEM;

	mm->type = INTEL_GVT_MM_PPGTT;
	mm->vgpu = vgpu;
	kref_init(&mm->ref);
	atomic_set(&mm->pincount, 0);
	mm->ppgtt_mm.root_entry_type = entry->page_table_level == 3 ?
				       GTT_TYPE_PPGTT_ROOT_L3_ENTRY :
				       GTT_TYPE_PPGTT_ROOT_L4_ENTRY;
	INIT_LIST_HEAD(&mm->ppgtt_mm.link);
	memcpy(mm->ppgtt_mm.guest_pdps, entry->pdp, sizeof(mm->ppgtt_mm.guest_pdps));
	list_add_tail(&mm->ppgtt_mm.list, &vgpu->gtt.ppgtt_mm_list_head);

	mutex_lock(&gvt->gtt.ppgtt_mm_lock);
	list_add_tail(&mm->ppgtt_mm.lru_list, &gvt->gtt.ppgtt_mm_lru_list_head);
	mutex_unlock(&gvt->gtt.ppgtt_mm_lock);
	return 0;
}

/* --- work ------------------------------------------------------------- */

static void load_execlist(struct intel_vgpu *vgpu, u32 ring, const struct gvt_ext_execlist *from)
{
	struct intel_vgpu_execlist *to;
	int i, j;

	if (!from->enabled)
		return;

	to = &vgpu->submission.execlist[intel_vgpu_ring_to_engine(ring)];
	for (i = 0; i < 2; i++) {
		for (j = 0; j < 2; j++) {
			to->slot[i].ctx[j].ldw = from->slot[i][2 * j];
			to->slot[i].ctx[j].udw = from->slot[i][2 * j + 1];
		}
	}
	if (from->running != GVT_EXT_NONE) {
		to->running_slot = &to->slot[from->running];
		to->running_context = &to->running_slot->ctx[from->running_ctx];
	}
	if (from->pending != GVT_EXT_NONE)
		to->pending_slot = &to->slot[from->pending];
	memcpy(to->elsp_dwords.data, from->elsp, sizeof(from->elsp));
	to->elsp_dwords.index = from->elsp_index;
}

static int load_ext_workload(struct intel_vgpu *vgpu, const struct gvt_ext_workload *from)
{
	const struct intel_engine_cs *engine =
		vgpu->gvt->gt->engine[intel_vgpu_ring_to_engine(from->ring)];
	struct execlist_ctx_descriptor_format desc = {
		.ldw = from->desc[0],
		.udw = from->desc[1],
	};
	struct intel_vgpu_elsp_dwords elsp = { .index = 3 };

	memcpy(elsp.data, from->elsp, sizeof(elsp.data));
	return intel_vgpu_requeue_context(vgpu, engine, &desc, from->schedule_in, &elsp);
}

/* The RFC's way: the guest's four writes once more */
static int load_workload(struct intel_vgpu *vgpu, const struct gvt_workload_entry *from)
{
	const struct intel_engine_cs *engine =
		vgpu->gvt->gt->engine[intel_vgpu_ring_to_engine(from->ring_id)];
	unsigned int elsp = i915_mmio_reg_offset(RING_ELSP(engine->mmio_base));
	int ret, i;

	if (!memchr_inv(from->data, 0, sizeof(from->data)))
		return 0;

	for (i = 0; i < ARRAY_SIZE(from->data); i++) {
		u32 data = from->data[i];

		ret = intel_vgpu_mmio_reg_rw(vgpu, elsp, &data, sizeof(data), false);
		if (ret)
			return ret;
	}
	return 0;
}

static int load_work(struct intel_vgpu *vgpu, const struct intel_vgpu_image *image)
{
	int ret = 0;
	u32 i;

	if (!image->ext) {
		for (i = 0; i < image->nr_workloads && !ret; i++)
			ret = load_workload(vgpu, &image->workloads[i]);
		return ret;
	}

	for (i = 0; i < GVT_RING_COUNT; i++)
		load_execlist(vgpu, i, &image->ext->execlist[i]);
	for (i = 0; i < image->ext->nr_workloads && !ret; i++)
		ret = load_ext_workload(vgpu, &image->ext_workloads[i]);
	return ret;
}

/* --- all of it -------------------------------------------------------- */

static int load(struct intel_vgpu *vgpu, const struct intel_vgpu_image *image)
{
	u32 flags = image->ext ? image->ext->flags : GVT_EXT_PV_NOTIFIED;
	u32 i;
	int ret;

	memcpy(vgpu_cfg_space(vgpu), image->cfg, vgpu->gvt->device_info.cfg_space_size);
	ret = intel_vgpu_opregion_base_write_handler(vgpu,
						     *(u32 *)(vgpu_cfg_space(vgpu) +
							      INTEL_GVT_PCI_OPREGION));
	if (ret)
		return ret;

	if (image->ext)
		load_display(vgpu, &image->ext->display);
	ret = load_registers(vgpu, image);
	if (!ret)
		ret = load_gtt(vgpu, image);
	for (i = 0; i < image->nr_ppgtt && !ret; i++)
		ret = load_ppgtt(vgpu, &image->ppgtt[i]);
	if (ret)
		return ret;

	vgpu->pv_notified = flags & GVT_EXT_PV_NOTIFIED;
	vgpu->migration.vblank = image->ext ? flags & GVT_EXT_VBLANK :
					      intel_vgpu_has_vblank(vgpu);
	if (image->ext) {
		ret = load_partial_ptes(vgpu, image);
		if (ret)
			return ret;
	}

	ret = load_work(vgpu, image);
	/* one that the scanner refuses puts the vGPU where its dispatch would have */
	if (ret && vgpu->failsafe)
		ret = 0;
	vgpu->failsafe |= !!(flags & GVT_EXT_FAILSAFE);
	vgpu->d3_entered = flags & GVT_EXT_D3_ENTERED;
	return ret;
}

static void reset(struct intel_vgpu *vgpu)
{
	vgpu->d3_entered = false;	/* or page tables would be kept */
	intel_vgpu_reset_stopped(vgpu);
}

struct restore_work {
	struct work_struct work;
	struct intel_vgpu *vgpu;
	const void *buf;
	size_t size;
	int ret;
};

static void restore_fn(struct work_struct *work)
{
	struct restore_work *restore = container_of(work, struct restore_work, work);
	struct intel_vgpu *vgpu = restore->vgpu;
	struct intel_vgpu_image image;
	int ret;

	mutex_lock(&vgpu->vgpu_lock);
	ret = intel_vgpu_check_image(vgpu, restore->buf, restore->size, &image);
	if (!ret) {
		reset(vgpu);
		ret = load(vgpu, &image);
		if (ret)
			reset(vgpu);
	}
	mutex_unlock(&vgpu->vgpu_lock);
	restore->ret = ret;
}

/**
 * intel_vgpu_restore - give a vGPU the state of an image
 * @vgpu: a vGPU that is open and stopped
 * @buf: the image, in memory that nobody else can change
 * @size: bytes there; the image may end before
 *
 * A kernel thread does it. Workloads are made from what is in the guest's
 * memory, and vfio_dma_rw() reads that for a kernel thread or for the process
 * that mapped it; the caller may be a third one, that got the file from there.
 *
 * Returns: 0; -EINVAL or another error of intel_vgpu_check_image() with the
 * vGPU as it was; any other error with the vGPU reset
 */
int intel_vgpu_restore(struct intel_vgpu *vgpu, const void *buf, size_t size)
{
	struct restore_work restore = { .vgpu = vgpu, .buf = buf, .size = size };

	lockdep_assert_held(&vgpu->migration.lock);

	INIT_WORK_ONSTACK(&restore.work, restore_fn);
	queue_work(system_unbound_wq, &restore.work);
	flush_work(&restore.work);
	destroy_work_on_stack(&restore.work);
	return restore.ret;
}
