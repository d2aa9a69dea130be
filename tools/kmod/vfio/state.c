// SPDX-License-Identifier: GPL-2.0-only
/*
 * RFC patch 9: the device state region. One read takes a snapshot, one write
 * restores one. Layout and order are in cdefs/gvt_image.h.
 *
 * Unlike the original, an image is taken apart and checked to its last byte
 * before anything of the vGPU changes. As in the original the buffer is never
 * cleared, so a read may carry leftovers behind data_size, and every refusal
 * is EFAULT; last_error in debugfs has the reason.
 */
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "hw/hw.h"
#include "vfio/vfio.h"
#include "lab/lab.h"

#define GVT_IMAGE_HEAD_SIZE \
	(sizeof(struct gvt_region) + sizeof(struct gvt_image_header))

/* An image, taken apart; the lists are what a restore will install */
struct gvt_image {
	void				*buf;		/* the kernel's copy */
	const char __user		*ubuf;		/* where from; NULL: is there */
	u32				pos;		/* parsed so far */
	u32				data_size;
	const void			*cfg;
	const void			*sreg;
	const void			*vreg;
	const u64			*gtt;
	const struct gvt_ppgtt_entry	*ppgtt;
	unsigned int			nr_ppgtt;
	const struct gvt_workload_entry	*workload;
	unsigned int			nr_workloads;
	struct list_head		roots;
	struct list_head		queue;
};

/* --- save ------------------------------------------------------------ */

/* Each of these moves *at behind what it put there */
static void *gvt_put_record(void **at, u32 type, u32 size)
{
	struct gvt_region record = { .type = type, .size = size };
	void *payload = *at + sizeof(record);

	memcpy(*at, &record, sizeof(record));
	*at = payload + size;
	return payload;
}

static void gvt_put(void **at, u32 type, const void *data, u32 size)
{
	memcpy(gvt_put_record(at, type, size), data, size);
}

static void gvt_put_ppgtts(struct vgpu *vgpu, void **at)
{
	struct gvt_ppgtt_entry *out;
	struct gvt_ppgtt *root;

	out = gvt_put_record(at, GVT_MIGRATION_PPGTT,
			     vgpu->nr_ppgtts * sizeof(*out));
	list_for_each_entry(root, &vgpu->ppgtts, node)
		memcpy(out++, &root->entry, sizeof(*out));
}

static u32 gvt_image_size(struct vgpu *vgpu, unsigned int nr_ppgtts,
			  unsigned int nr_workloads)
{
	return GVT_IMAGE_HEAD_SIZE + 6 * sizeof(struct gvt_region) +
	       GVT_IMAGE_CFG_SIZE + 2 * GVT_IMAGE_REG_SIZE +
	       gvt_gm_entries(vgpu) * sizeof(u64) +
	       nr_ppgtts * sizeof(struct gvt_ppgtt_entry) +
	       nr_workloads * sizeof(struct gvt_workload_entry);
}

u32 gvt_image_max(struct vgpu *vgpu)
{
	return gvt_image_size(vgpu, GVT_PPGTT_MAX, GVT_QUEUE_MAX);
}

u32 gvt_image_now(struct vgpu *vgpu)
{
	u32 size;

	mutex_lock(&vgpu->lock);
	size = gvt_image_size(vgpu, vgpu->nr_ppgtts, vgpu->nr_queued);
	mutex_unlock(&vgpu->lock);
	return size;
}

static int gvt_snapshot(struct vgpu *vgpu, struct gvt_workload_entry *workloads,
			void *buf, u32 room)
{
	unsigned int nr = gvt_submit_save(vgpu, workloads);
	u32 total = gvt_image_size(vgpu, vgpu->nr_ppgtts, nr);
	struct gvt_image_header *head;
	void *at = buf;

	if (total > room) {
		gvt_note(vgpu, "state: image of %u bytes, there is room for %u",
			 total, room);
		return -EFAULT;
	}
	head = gvt_put_record(&at, GVT_MIGRATION_HEAD, sizeof(*head));
	memset(head, 0, sizeof(*head));
	head->version = GVT_IMAGE_VERSION;
	head->data_size = total;
	gvt_put(&at, GVT_MIGRATION_CFG_SPACE, vgpu->cfg, GVT_IMAGE_CFG_SIZE);
	gvt_put(&at, GVT_MIGRATION_SREG, vgpu->sreg, GVT_IMAGE_REG_SIZE);
	gvt_put(&at, GVT_MIGRATION_VREG, vgpu->vreg, GVT_IMAGE_REG_SIZE);
	gvt_put(&at, GVT_MIGRATION_GTT, vgpu->guest_gtt,
		gvt_gm_entries(vgpu) * sizeof(u64));
	gvt_put_ppgtts(vgpu, &at);
	gvt_put(&at, GVT_MIGRATION_WORKLOAD, workloads,
		nr * sizeof(*workloads));
	return WARN_ON(at != buf + total) ? -EFAULT : (int)total;
}

int gvt_image_take(struct vgpu *vgpu, void *buf, u32 room)
{
	struct gvt_workload_entry *workloads;
	int ret;

	workloads = kvcalloc(GVT_QUEUE_MAX, sizeof(*workloads),
			     GFP_KERNEL_ACCOUNT);
	if (!workloads)
		return -ENOMEM;
	mutex_lock(&vgpu->lock);
	if (gvt_defect(vgpu, GVT_DEFECT_SAVE_COUNTS))
		++*(u32 *)vgpu->sreg;
	ret = gvt_snapshot(vgpu, workloads, buf, room);
	mutex_unlock(&vgpu->lock);
	kvfree(workloads);
	return ret;
}

/* state_lock is held from here on */
static int gvt_state_buffer(struct vgpu *vgpu)
{
	if (!vgpu->state_buf)
		vgpu->state_buf = __vmalloc(MIGRATION_IMG_MAX_SIZE,
					    GFP_KERNEL_ACCOUNT | __GFP_ZERO);
	return vgpu->state_buf ? 0 : -ENOMEM;
}

/* A mistake: data_size counts what comes behind the HEAD record */
static void gvt_state_without_head(void *buf)
{
	struct gvt_image_header *head = buf + sizeof(struct gvt_region);

	head->data_size -= GVT_IMAGE_HEAD_SIZE;
}

ssize_t gvt_state_read(struct vgpu *vgpu, char __user *buf, size_t count,
		       u64 off)
{
	int ret;

	if (off && !gvt_defect(vgpu, GVT_DEFECT_STATE_READ_OFFSET))
		return -EFAULT;
	count = min_t(size_t, count, MIGRATION_IMG_MAX_SIZE);
	mutex_lock(&vgpu->state_lock);
	ret = gvt_state_buffer(vgpu);
	if (!ret)
		ret = gvt_image_take(vgpu, vgpu->state_buf,
				     MIGRATION_IMG_MAX_SIZE - 1);
	if (ret > 0 && gvt_defect(vgpu, GVT_DEFECT_STATE_SIZE))
		gvt_state_without_head(vgpu->state_buf);
	if (ret > 0 && copy_to_user(buf, vgpu->state_buf, count))
		ret = -EFAULT;
	mutex_unlock(&vgpu->state_lock);
	return ret < 0 ? ret : count;
}

/* --- restore --------------------------------------------------------- */

static int gvt_bad(struct vgpu *vgpu, const char *what)
{
	gvt_note(vgpu, "state: %s", what);
	return -EFAULT;
}

/* Next @bytes of the image into the kernel's copy, where they are checked */
static int gvt_fetch(struct vgpu *vgpu, struct gvt_image *image, u32 bytes)
{
	if (bytes > image->data_size - image->pos)
		return gvt_bad(vgpu, "a record runs over data_size");
	if (image->ubuf && copy_from_user(image->buf + image->pos,
					  image->ubuf + image->pos, bytes))
		return gvt_bad(vgpu, "the caller's buffer cannot be read");
	image->pos += bytes;
	return 0;
}

/* @room: no image is as large; @count: bytes there are */
static int gvt_get_head(struct vgpu *vgpu, struct gvt_image *image,
			size_t count, u32 room)
{
	const struct gvt_image_header *head =
		image->buf + sizeof(struct gvt_region);
	const struct gvt_region *record = image->buf;
	int ret;

	image->data_size = GVT_IMAGE_HEAD_SIZE;
	if (count < GVT_IMAGE_HEAD_SIZE)
		return gvt_bad(vgpu, "shorter than a header");
	ret = gvt_fetch(vgpu, image, GVT_IMAGE_HEAD_SIZE);
	if (ret)
		return ret;
	if ((record->type != GVT_MIGRATION_HEAD &&
	     !gvt_defect(vgpu, GVT_DEFECT_STATE_TYPE)) ||
	    record->size != sizeof(*head))
		return gvt_bad(vgpu, "does not begin with a HEAD record");
	if (head->version != GVT_IMAGE_VERSION)
		return gvt_bad(vgpu, "unknown version");
	if (head->data_size < (s32)GVT_IMAGE_HEAD_SIZE ||
	    head->data_size >= room || head->data_size > count)
		return gvt_bad(vgpu, "data_size is wrong");
	image->data_size = head->data_size;
	return 0;
}

/* A record of exactly this type; @size is what it must have, or 0 for any */
static int gvt_get_record(struct vgpu *vgpu, struct gvt_image *image, u32 type,
			  u32 size, const void **payload, u32 *got)
{
	struct gvt_region *record = image->buf + image->pos;
	struct gvt_region here;
	int ret;

	ret = gvt_fetch(vgpu, image, sizeof(*record));
	if (ret)
		return ret;
	memcpy(&here, record, sizeof(here));
	if (here.type != type)
		return gvt_bad(vgpu, "record of another type than its place demands");
	if (size && here.size != size)
		return gvt_bad(vgpu, "record of a wrong size");
	*payload = image->buf + image->pos;
	if (got)
		*got = here.size;
	return gvt_fetch(vgpu, image, here.size);
}

static int gvt_check_cfg(struct vgpu *vgpu, const void *cfg)
{
	int differs;

	/* vendor and device, then revision and class */
	mutex_lock(&vgpu->lock);
	differs = memcmp(cfg, vgpu->cfg, 4) || memcmp(cfg + 8, vgpu->cfg + 8, 4);
	mutex_unlock(&vgpu->lock);
	return differs ? gvt_bad(vgpu, "of another PCI device") : 0;
}

static bool gvt_window_ok(u64 base, u64 size)
{
	return !(base & ~GVT_PAGE_MASK) && base + size <= GVT_GM_SIZE;
}

static int gvt_check_pvinfo(struct vgpu *vgpu, const void *vreg)
{
	const struct vgt_if *pvinfo = vreg + VGT_PVINFO_PAGE;
	u64 low = pvinfo->mappable_base, high = pvinfo->nonmappable_base;

	if (pvinfo->magic != VGT_MAGIC ||
	    pvinfo->version_major != VGT_VERSION_MAJOR)
		return gvt_bad(vgpu, "no PVINFO in VREG");
	if (pvinfo->mappable_size != vgpu->low_gm ||
	    pvinfo->nonmappable_size != vgpu->high_gm ||
	    pvinfo->fence_num != GVT_VGPU_FENCES)
		return gvt_bad(vgpu, "of another vGPU type");
	if (!gvt_window_ok(low, vgpu->low_gm) ||
	    !gvt_window_ok(high, vgpu->high_gm) ||
	    (low < high + vgpu->high_gm && high < low + vgpu->low_gm))
		return gvt_bad(vgpu, "impossible GM bases in PVINFO");
	return 0;
}

static int gvt_prepare_roots(struct vgpu *vgpu, struct gvt_image *image)
{
	struct gvt_ppgtt *root;
	unsigned int i;

	if (image->nr_ppgtt > GVT_PPGTT_MAX)
		return gvt_bad(vgpu, "too many PPGTT roots");
	for (i = 0; i < image->nr_ppgtt; i++) {
		root = kzalloc(sizeof(*root), GFP_KERNEL_ACCOUNT);
		if (!root)
			return -ENOMEM;
		list_add_tail(&root->node, &image->roots);
		memcpy(&root->entry, &image->ppgtt[i], sizeof(root->entry));
		root->entry.reserved = 0;	/* padding in the original */
		if (!gvt_ppgtt_valid(&root->entry))
			return gvt_bad(vgpu, "impossible PPGTT root");
	}
	return 0;
}

static int gvt_prepare_queue(struct vgpu *vgpu, struct gvt_image *image)
{
	int ret;

	if (image->nr_workloads > GVT_QUEUE_MAX)
		return gvt_bad(vgpu, "too many workloads");
	if (gvt_submit_check(image->workload, image->nr_workloads))
		return gvt_bad(vgpu, "impossible workload");
	ret = gvt_submit_prepare(image->workload, image->nr_workloads,
				 &image->queue);
	return ret == -EINVAL ? gvt_bad(vgpu, "impossible workload") : ret;
}

static int gvt_get_tables(struct vgpu *vgpu, struct gvt_image *image)
{
	const void *payload;
	u32 size;
	int ret;

	ret = gvt_get_record(vgpu, image, GVT_MIGRATION_PPGTT, 0, &payload,
			     &size);
	if (ret)
		return ret;
	if (size % sizeof(*image->ppgtt))
		return gvt_bad(vgpu, "PPGTT record of a broken size");
	image->ppgtt = payload;
	image->nr_ppgtt = size / sizeof(*image->ppgtt);

	ret = gvt_get_record(vgpu, image, GVT_MIGRATION_WORKLOAD, 0, &payload,
			     &size);
	if (ret)
		return ret;
	if (size % sizeof(*image->workload))
		return gvt_bad(vgpu, "WORKLOAD record of a broken size");
	image->workload = payload;
	image->nr_workloads = size / sizeof(*image->workload);
	return 0;
}

static int gvt_get_image(struct vgpu *vgpu, struct gvt_image *image,
			 size_t count, u32 room)
{
	const void *gtt;
	int ret;

	ret = gvt_get_head(vgpu, image, count, room);
	if (!ret)
		ret = gvt_get_record(vgpu, image, GVT_MIGRATION_CFG_SPACE,
				     GVT_IMAGE_CFG_SIZE, &image->cfg, NULL);
	if (!ret)
		ret = gvt_check_cfg(vgpu, image->cfg);
	if (!ret)
		ret = gvt_get_record(vgpu, image, GVT_MIGRATION_SREG,
				     GVT_IMAGE_REG_SIZE, &image->sreg, NULL);
	if (!ret)
		ret = gvt_get_record(vgpu, image, GVT_MIGRATION_VREG,
				     GVT_IMAGE_REG_SIZE, &image->vreg, NULL);
	if (!ret)
		ret = gvt_check_pvinfo(vgpu, image->vreg);
	if (!ret)
		ret = gvt_get_record(vgpu, image, GVT_MIGRATION_GTT,
				     gvt_gm_entries(vgpu) * sizeof(u64), &gtt,
				     NULL);
	if (ret)
		return ret;
	image->gtt = gtt;
	ret = gvt_get_tables(vgpu, image);
	if (!ret && image->pos != image->data_size)
		ret = gvt_bad(vgpu, "bytes behind the last record");
	if (!ret)
		ret = gvt_prepare_roots(vgpu, image);
	if (!ret)
		ret = gvt_prepare_queue(vgpu, image);
	return ret;
}

/* Nothing in here can fail */
static void gvt_apply(struct vgpu *vgpu, struct gvt_image *image)
{
	memcpy(vgpu->cfg, image->cfg, GVT_IMAGE_CFG_SIZE);
	memcpy(vgpu->sreg, image->sreg, GVT_IMAGE_REG_SIZE);
	memcpy(vgpu->vreg, image->vreg, GVT_IMAGE_REG_SIZE);
	memset(vgpu->elsp_index, 0, sizeof(vgpu->elsp_index));
	gvt_fences_reload(vgpu);
	gvt_gtt_restore(vgpu, image->gtt);
	gvt_ppgtt_replace(vgpu, &image->roots, image->nr_ppgtt);
	gvt_submit_replace(vgpu, &image->queue);
}

/* Take vgpu->lock at a moment when no workload runs; a signal may end the wait */
static int gvt_lock_idle(struct vgpu *vgpu)
{
	mutex_lock(&vgpu->lock);
	while (vgpu->running) {
		mutex_unlock(&vgpu->lock);
		if (wait_event_killable(vgpu->idle, !READ_ONCE(vgpu->running)))
			return -EINTR;
		mutex_lock(&vgpu->lock);
	}
	return 0;
}

static void gvt_image_init(struct gvt_image *image, void *buf,
			   const char __user *ubuf)
{
	memset(image, 0, sizeof(*image));
	image->buf = buf;
	image->ubuf = ubuf;
	INIT_LIST_HEAD(&image->roots);
	INIT_LIST_HEAD(&image->queue);
}

static void gvt_image_fini(struct gvt_image *image)
{
	gvt_ppgtt_free(&image->roots);
	gvt_submit_discard(&image->queue);
}

int gvt_image_apply(struct vgpu *vgpu, struct gvt_image *image)
{
	int ret = gvt_lock_idle(vgpu);

	if (ret)
		return ret;
	gvt_apply(vgpu, image);
	if (gvt_defect(vgpu, GVT_DEFECT_LOAD_LOSES_REGISTER))
		*gvt_vreg32(vgpu, gvt_ring_base[GVT_RING_RCS] +
				  GVT_RING_CSB_PTR) = 0;
	mutex_unlock(&vgpu->lock);
	return 0;
}

ssize_t gvt_state_write(struct vgpu *vgpu, const char __user *buf,
			size_t count, u64 off)
{
	struct gvt_image image;
	int ret;

	if (count > MIGRATION_IMG_MAX_SIZE ||
	    (off && !gvt_defect(vgpu, GVT_DEFECT_STATE_WRITE_OFFSET)))
		return -EFAULT;
	mutex_lock(&vgpu->state_lock);
	ret = gvt_state_buffer(vgpu);
	gvt_image_init(&image, vgpu->state_buf, buf);
	if (!ret)
		ret = gvt_get_image(vgpu, &image, count,
				    MIGRATION_IMG_MAX_SIZE);
	if (!ret)
		ret = gvt_image_apply(vgpu, &image);
	mutex_unlock(&vgpu->state_lock);
	gvt_image_fini(&image);
	return ret ? ret : count;
}

/* --- images of the v2 protocol: mig.c -------------------------------- */

struct gvt_image *gvt_image_parse(struct vgpu *vgpu, void *buf, u32 size)
{
	struct gvt_image *image;
	int ret;

	image = kmalloc(sizeof(*image), GFP_KERNEL_ACCOUNT);
	if (!image)
		return ERR_PTR(-ENOMEM);
	gvt_image_init(image, buf, NULL);
	ret = gvt_get_image(vgpu, image, size, gvt_image_max(vgpu) + 1);
	if (!ret && image->data_size != size)
		ret = gvt_bad(vgpu, "bytes behind data_size");
	if (!ret)
		return image;
	gvt_image_free(image);
	/* no user's memory is involved here */
	return ERR_PTR(ret == -EFAULT ? -EINVAL : ret);
}

void gvt_image_free(struct gvt_image *image)
{
	if (image)
		gvt_image_fini(image);
	kfree(image);
}

void gvt_state_init(struct vgpu *vgpu)
{
	mutex_init(&vgpu->state_lock);
}

void gvt_state_fini(struct vgpu *vgpu)
{
	vfree(vgpu->state_buf);
	vgpu->state_buf = NULL;
}
