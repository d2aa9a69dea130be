// SPDX-License-Identifier: MIT
/*
 * Saving a vGPU: its state as the records of the RFC's image.
 */
#include <linux/crc32.h>

#include "i915_drv.h"
#include "gvt.h"
#include "migrate_compat.h"
#include "migrate_image.h"

static_assert(sizeof(struct gvt_image_header) == 528);
static_assert(sizeof(struct gvt_ppgtt_entry) == 40);
static_assert(sizeof(struct gvt_workload_entry) == 24);
static_assert(sizeof_field(struct gvt_ext_display, edid) == EDID_SIZE);
static_assert(sizeof_field(struct gvt_ext_display, dpcd) == DPCD_SIZE);
static_assert(ARRAY_SIZE(((struct gvt_ext_display *)0)->sbi) == SBI_REG_MAX);
static_assert(BITS_TO_U64(INTEL_GVT_EVENT_MAX) <= 4);

/* HEAD, CFG_SPACE, SREG or EXT, VREG, GTT, PPGTT, WORKLOAD */
#define NR_RECORDS	7

struct output {
	void *base;
	size_t size;
	size_t pos;
};

/* The engines by their numbers of 2017 */
static const int ring_engines[GVT_RING_COUNT] = {
	[GVT_RING_RCS] = RCS0,
	[GVT_RING_BCS] = BCS0,
	[GVT_RING_VCS] = VCS0,
	[GVT_RING_VCS2] = VCS1,
	[GVT_RING_VECS] = VECS0,
};

/**
 * intel_vgpu_ring_to_engine - translate a number of an image
 * @ring: GVT_RING_
 *
 * Returns: the engine's id, or -EINVAL
 */
int intel_vgpu_ring_to_engine(u32 ring)
{
	return ring < ARRAY_SIZE(ring_engines) ? ring_engines[ring] : -EINVAL;
}

/**
 * intel_vgpu_image_crc - compute the checksum of an image
 * @image: the image
 * @size: bytes
 * @crc_at: where in it the checksum is, which counts as 0
 *
 * Returns: the CRC-32
 */
u32 intel_vgpu_image_crc(const void *image, size_t size, size_t crc_at)
{
	static const __le32 zero;
	u32 crc = crc32_le(~0, image, crc_at);

	crc = crc32_le(crc, (const u8 *)&zero, sizeof(zero));
	crc_at += sizeof(zero);
	return ~crc32_le(crc, image + crc_at, size - crc_at);
}

/* The payload of a new record, zeroed; NULL where there is no room for it */
static void *add_record(struct output *out, u32 type, size_t size)
{
	struct gvt_region *region;

	if (size > out->size - out->pos || out->size - out->pos - size < sizeof(*region))
		return NULL;

	region = out->base + out->pos;
	region->type = type;
	region->size = size;
	out->pos += sizeof(*region) + size;
	return memset(region + 1, 0, size);
}

static int save_bytes(struct output *out, u32 type, const void *from, size_t size)
{
	void *to = add_record(out, type, size);

	if (!to)
		return -ENOSPC;

	memcpy(to, from, size);
	return 0;
}

static int save_gtt(struct intel_vgpu *vgpu, struct output *out)
{
	const u64 *table = vgpu->gtt.ggtt_mm->ggtt_mm.virtual_ggtt;
	size_t low = vgpu_aperture_sz(vgpu) >> I915_GTT_PAGE_SHIFT;
	size_t high = vgpu_hidden_sz(vgpu) >> I915_GTT_PAGE_SHIFT;
	u64 *entries = add_record(out, GVT_MIGRATION_GTT, (low + high) * sizeof(*entries));

	if (!entries)
		return -ENOSPC;

	memcpy(entries, table + (vgpu_guest_aperture_gmadr_base(vgpu) >> I915_GTT_PAGE_SHIFT),
	       low * sizeof(*entries));
	memcpy(entries + low, table + (vgpu_guest_hidden_gmadr_base(vgpu) >> I915_GTT_PAGE_SHIFT),
	       high * sizeof(*entries));
	return 0;
}

static int save_ppgtt(struct intel_vgpu *vgpu, struct output *out)
{
	struct gvt_ppgtt_entry *entry;
	struct intel_vgpu_mm *mm;
	size_t nr = 0;
	int i;

	list_for_each_entry(mm, &vgpu->gtt.ppgtt_mm_list_head, ppgtt_mm.list)
		nr++;

	entry = add_record(out, GVT_MIGRATION_PPGTT, nr * sizeof(*entry));
	if (!entry)
		return -ENOSPC;

	list_for_each_entry(mm, &vgpu->gtt.ppgtt_mm_list_head, ppgtt_mm.list) {
		entry->page_table_level =
			mm->ppgtt_mm.root_entry_type == GTT_TYPE_PPGTT_ROOT_L3_ENTRY ? 3 : 4;
		for (i = 0; i < ARRAY_SIZE(entry->pdp); i++)
			entry->pdp[i] = mm->ppgtt_mm.guest_pdps[i];
		entry++;
	}
	return 0;
}

static struct list_head *queue_of(struct intel_vgpu *vgpu, u32 ring)
{
	const struct intel_engine_cs *engine = vgpu->gvt->gt->engine[ring_engines[ring]];

	return engine ? workload_q_head(vgpu, engine) : NULL;
}

static size_t count_workloads(struct intel_vgpu *vgpu)
{
	size_t nr = 0;
	u32 ring;

	for (ring = 0; ring < GVT_RING_COUNT; ring++) {
		struct list_head *queue = queue_of(vgpu, ring);

		if (queue)
			nr += list_count_nodes(queue);
	}
	return nr;
}

static int save_workloads(struct intel_vgpu *vgpu, struct output *out)
{
	size_t nr = count_workloads(vgpu);
	struct gvt_workload_entry *entry = add_record(out, GVT_MIGRATION_WORKLOAD,
						      nr * sizeof(*entry));
	u32 ring;
	int i;

	if (!entry)
		return -ENOSPC;

	for (ring = 0; ring < GVT_RING_COUNT; ring++) {
		struct list_head *queue = queue_of(vgpu, ring);
		struct intel_vgpu_workload *workload;

		if (!queue)
			continue;
		list_for_each_entry(workload, queue, list) {
			entry->ring_id = ring;
			entry->index = 3;
			/* GVT has the last dword that the guest wrote first */
			for (i = 0; i < ARRAY_SIZE(entry->data); i++)
				entry->data[i] = workload->elsp_dwords.data[3 - i];
			entry++;
		}
	}
	return 0;
}

static void save_execlist(struct intel_vgpu *vgpu, u32 ring, struct gvt_ext_execlist *to)
{
	const struct intel_engine_cs *engine = vgpu->gvt->gt->engine[ring_engines[ring]];
	const struct intel_vgpu_execlist *execlist;
	int i, j;

	to->running = GVT_EXT_NONE;
	to->pending = GVT_EXT_NONE;
	to->running_ctx = GVT_EXT_NONE;
	if (!engine || !vgpu->submission.active)
		return;

	execlist = &vgpu->submission.execlist[engine->id];
	if (!execlist->vgpu)
		return;		/* the guest has not enabled this one */

	to->enabled = 1;
	for (i = 0; i < 2; i++) {
		for (j = 0; j < 2; j++) {
			to->slot[i][2 * j] = execlist->slot[i].ctx[j].ldw;
			to->slot[i][2 * j + 1] = execlist->slot[i].ctx[j].udw;
		}
	}
	if (execlist->running_slot)
		to->running = execlist->running_slot->index;
	if (execlist->pending_slot)
		to->pending = execlist->pending_slot->index;
	if (execlist->running_slot && execlist->running_context)
		to->running_ctx = execlist->running_context - execlist->running_slot->ctx;
	memcpy(to->elsp, execlist->elsp_dwords.data, sizeof(to->elsp));
	to->elsp_index = execlist->elsp_dwords.index;
}

static void save_display(struct intel_vgpu *vgpu, struct gvt_ext_display *to)
{
	const struct intel_vgpu_display *display = &vgpu->display;
	const struct intel_vgpu_i2c_edid *i2c = &display->i2c_edid;
	const struct intel_vgpu_port *port = intel_vgpu_port(vgpu, display->port_num);
	int i;

	for (i = 0; i < ARRAY_SIZE(to->flip_done); i++)
		bitmap_to_arr64(to->flip_done[i], vgpu->irq.flip_done_event[i],
				INTEL_GVT_EVENT_MAX);
	to->vrefresh_k = port->vrefresh_k;
	to->i2c_state = i2c->state;
	to->i2c_port = i2c->port;
	to->i2c_flags = (i2c->target_selected ? GVT_EXT_I2C_SELECTED : 0) |
			(i2c->edid_available ? GVT_EXT_I2C_EDID : 0) |
			(i2c->aux_ch.i2c_over_aux_ch ? GVT_EXT_I2C_OVER_AUX : 0) |
			(i2c->aux_ch.aux_ch_mot ? GVT_EXT_I2C_AUX_MOT : 0);
	to->edid_read = i2c->current_edid_read;
	to->gmbus_count = i2c->gmbus.total_byte_count;
	to->gmbus_cycle = i2c->gmbus.cycle_type;
	to->gmbus_phase = i2c->gmbus.phase;
	if (port->edid)
		memcpy(to->edid, port->edid->edid_block, sizeof(to->edid));
	if (port->dpcd)
		memcpy(to->dpcd, port->dpcd->data, sizeof(to->dpcd));
	to->sbi_number = display->sbi.number;
	for (i = 0; i < display->sbi.number; i++) {
		to->sbi[i][0] = display->sbi.registers[i].offset;
		to->sbi[i][1] = display->sbi.registers[i].value;
	}
}

static void save_ext_workloads(struct intel_vgpu *vgpu, struct gvt_ext_workload *to)
{
	u32 ring;

	for (ring = 0; ring < GVT_RING_COUNT; ring++) {
		struct list_head *queue = queue_of(vgpu, ring);
		struct intel_vgpu_workload *workload;

		if (!queue)
			continue;
		list_for_each_entry(workload, queue, list) {
			to->ring = ring;
			to->schedule_in = workload->emulate_schedule_in;
			to->desc[0] = workload->ctx_desc.ldw;
			to->desc[1] = workload->ctx_desc.udw;
			memcpy(to->elsp, workload->elsp_dwords.data, sizeof(to->elsp));
			to++;
		}
	}
}

/* SREG or EXT: see migrate_image.h */
static int save_ext(struct intel_vgpu *vgpu, struct output *out, struct gvt_ext **ext)
{
	struct intel_gvt *gvt = vgpu->gvt;
	struct list_head *partial = &vgpu->gtt.ggtt_mm->ggtt_mm.partial_pte_list;
	bool v2 = intel_gvt_migrates_v2();
	size_t nr_workloads = count_workloads(vgpu);
	size_t nr_partial = list_count_nodes(partial);
	struct gvt_ext_partial_pte *pte_to;
	struct gvt_ext_workload *workload_to;
	struct intel_gvt_partial_pte *pte;
	struct gvt_ext *to;
	size_t size;
	u32 ring;

	size = size_add(sizeof(*to), size_add(size_mul(nr_workloads, sizeof(*workload_to)),
					      size_mul(nr_partial, sizeof(*pte_to))));
	if (!v2 && size > gvt->device_info.mmio_size)
		return -ENOSPC;
	to = add_record(out, v2 ? GVT_MIGRATION_EXT : GVT_MIGRATION_SREG,
			v2 ? size : gvt->device_info.mmio_size);
	if (!to)
		return -ENOSPC;

	to->magic = GVT_EXT_MAGIC;
	to->size = size;
	to->graphics_version = GRAPHICS_VER(gvt->gt->i915);
	to->engine_mask = gvt->gt->info.engine_mask;
	to->ggtt_size = gvt_ggtt_gm_sz(gvt);
	to->bar2_size = gvt_aperture_sz(gvt);
	to->flags = (vgpu->pv_notified ? GVT_EXT_PV_NOTIFIED : 0) |
		    (vgpu->failsafe ? GVT_EXT_FAILSAFE : 0) |
		    (vgpu->d3_entered ? GVT_EXT_D3_ENTERED : 0) |
		    (vgpu->migration.vblank ? GVT_EXT_VBLANK : 0);
	to->nr_workloads = nr_workloads;
	to->nr_partial_ptes = nr_partial;
	for (ring = 0; ring < GVT_RING_COUNT; ring++)
		save_execlist(vgpu, ring, &to->execlist[ring]);
	save_display(vgpu, &to->display);

	workload_to = (void *)(to + 1);
	save_ext_workloads(vgpu, workload_to);
	pte_to = (void *)(workload_to + nr_workloads);
	list_for_each_entry(pte, partial, list) {
		pte_to->offset = pte->offset;
		pte_to->data = pte->data;
		pte_to++;
	}

	*ext = to;
	return 0;
}

/**
 * intel_vgpu_image_size - tell how large an image is with protocol v2
 * @vgpu: a vGPU
 *
 * Returns: bytes of it without page tables and work
 */
size_t intel_vgpu_image_size(struct intel_vgpu *vgpu)
{
	const struct intel_gvt_device_info *info = &vgpu->gvt->device_info;

	return NR_RECORDS * sizeof(struct gvt_region) +
	       sizeof(struct gvt_image_header) + info->cfg_space_size + info->mmio_size +
	       sizeof(struct gvt_ext) +
	       (vgpu_ggtt_gm_sz(vgpu) >> I915_GTT_PAGE_SHIFT) * sizeof(u64);
}

/**
 * intel_vgpu_save - write the state of a vGPU
 * @vgpu: a vGPU; of one that runs, what is on the GPU is missing
 * @buf: where to
 * @size: bytes there
 *
 * Saving changes nothing.
 *
 * Returns: bytes of the image, less than @size; or -ENOSPC
 */
ssize_t intel_vgpu_save(struct intel_vgpu *vgpu, void *buf, size_t size)
{
	const struct intel_gvt_device_info *info = &vgpu->gvt->device_info;
	struct output out = { .base = buf, .size = size };
	struct gvt_image_header *head;
	struct gvt_ext *ext = NULL;
	int ret;

	lockdep_assert_held(&vgpu->vgpu_lock);

	head = add_record(&out, GVT_MIGRATION_HEAD, sizeof(*head));
	if (!head)
		return -ENOSPC;

	ret = save_bytes(&out, GVT_MIGRATION_CFG_SPACE, vgpu_cfg_space(vgpu),
			 info->cfg_space_size);
	if (!ret)
		ret = save_ext(vgpu, &out, &ext);
	if (!ret)
		ret = save_bytes(&out, GVT_MIGRATION_VREG, vgpu->mmio.vreg, info->mmio_size);
	if (!ret)
		ret = save_gtt(vgpu, &out);
	if (!ret)
		ret = save_ppgtt(vgpu, &out);
	if (!ret)
		ret = save_workloads(vgpu, &out);
	/* the RFC's own loader takes an image that fills the region for one too long */
	if (!ret && out.pos == out.size)
		ret = -ENOSPC;
	if (ret)
		return ret;

	head->version = GVT_IMAGE_VERSION;
	head->data_size = out.pos;
	ext->crc = intel_vgpu_image_crc(buf, out.pos, (void *)&ext->crc - buf);
	return out.pos;
}
