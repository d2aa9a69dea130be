// SPDX-License-Identifier: GPL-2.0-only
/* The simulated GPU and the host's side of it, for tests to look at. */
#include <linux/debugfs.h>
#include <linux/seq_file.h>
#include <linux/string.h>

#include "hw/hw.h"
#include "lab/debugfs.h"

/* --- text files ------------------------------------------------------ */

static int gm_layout_show(struct seq_file *m, void *unused)
{
	struct vgpu *vgpu = m->private;
	u64 low, high;

	mutex_lock(&vgpu->lock);
	low = gvt_guest_low(vgpu);
	high = gvt_guest_high(vgpu);
	mutex_unlock(&vgpu->lock);
	seq_printf(m, "host_low: %#llx\nhost_high: %#llx\n", vgpu->host_low,
		   vgpu->host_high);
	seq_printf(m, "guest_low: %#llx\nguest_high: %#llx\n", low, high);
	seq_printf(m, "low_size: %#llx\nhigh_size: %#llx\n", vgpu->low_gm,
		   vgpu->high_gm);
	seq_printf(m, "fence_first: %#x\nvgpu_id: %#x\n", vgpu->fence_first,
		   vgpu->id);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(gm_layout);

static int pinned_show(struct seq_file *m, void *unused)
{
	struct vgpu *vgpu = m->private;
	unsigned long gfn;
	void *pin;

	mutex_lock(&vgpu->gtt_lock);
	xa_for_each(&vgpu->pins, gfn, pin)
		seq_printf(m, "%#llx\n", (u64)gfn << GVT_PAGE_SHIFT);
	mutex_unlock(&vgpu->gtt_lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(pinned);

static int run_state_show(struct seq_file *m, void *unused)
{
	struct vgpu *vgpu = m->private;

	seq_puts(m, READ_ONCE(vgpu->active) ? "running\n" : "stopped\n");
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(run_state);

static int queue_show(struct seq_file *m, void *unused)
{
	struct vgpu *vgpu = m->private;
	struct gvt_workload *workload;

	mutex_lock(&vgpu->lock);
	list_for_each_entry(workload, &vgpu->queue, node)
		seq_printf(m, "%d %#x %#x\n", workload->ring,
			   workload->desc_hi, workload->desc_lo);
	mutex_unlock(&vgpu->lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(queue);

/* --- binary files ---------------------------------------------------- */

static void gvt_copy_u64(u64 *to, const u64 *from, size_t nr)
{
	for (; nr; nr--)
		*to++ = READ_ONCE(*from++);
}

static int host_ggtt_open(struct inode *inode, struct file *file)
{
	struct gvt_snapshot *snapshot =
		gvt_snapshot_alloc(GVT_GGTT_ENTRIES * sizeof(u64));

	if (snapshot)
		gvt_copy_u64(snapshot->data, gvt_host.ggtt, GVT_GGTT_ENTRIES);
	return gvt_snapshot_open(file, snapshot);
}
GVT_SNAPSHOT_ATTRIBUTE(host_ggtt);

static int host_fence_open(struct inode *inode, struct file *file)
{
	struct gvt_snapshot *snapshot =
		gvt_snapshot_alloc(sizeof(gvt_host.fence));

	if (snapshot)
		gvt_copy_u64(snapshot->data, gvt_host.fence, GVT_HOST_FENCES);
	return gvt_snapshot_open(file, snapshot);
}
GVT_SNAPSHOT_ATTRIBUTE(host_fence);

static int hw_ggtt_open(struct inode *inode, struct file *file)
{
	struct vgpu *vgpu = inode->i_private;
	unsigned long nr_low = vgpu->low_gm >> GVT_PAGE_SHIFT;
	unsigned long nr_high = vgpu->high_gm >> GVT_PAGE_SHIFT;
	struct gvt_snapshot *snapshot =
		gvt_snapshot_alloc((nr_low + nr_high) * sizeof(u64));

	if (snapshot) {
		mutex_lock(&vgpu->gtt_lock);
		gvt_copy_u64(snapshot->data,
			     gvt_host.ggtt + (vgpu->host_low >> GVT_PAGE_SHIFT),
			     nr_low);
		gvt_copy_u64(snapshot->data + nr_low,
			     gvt_host.ggtt + (vgpu->host_high >> GVT_PAGE_SHIFT),
			     nr_high);
		mutex_unlock(&vgpu->gtt_lock);
	}
	return gvt_snapshot_open(file, snapshot);
}
GVT_SNAPSHOT_ATTRIBUTE(hw_ggtt);

static int hw_fence_open(struct inode *inode, struct file *file)
{
	struct vgpu *vgpu = inode->i_private;
	struct gvt_snapshot *snapshot =
		gvt_snapshot_alloc(GVT_VGPU_FENCES * sizeof(u64));

	if (snapshot)
		gvt_copy_u64(snapshot->data,
			     gvt_host.fence + vgpu->fence_first,
			     GVT_VGPU_FENCES);
	return gvt_snapshot_open(file, snapshot);
}
GVT_SNAPSHOT_ATTRIBUTE(hw_fence);

static int last_ring_open(struct inode *inode, struct file *file)
{
	struct vgpu *vgpu = inode->i_private;
	struct gvt_snapshot *snapshot;

	mutex_lock(&vgpu->lock);
	snapshot = gvt_snapshot_alloc(vgpu->last_ring_dws * sizeof(u32));
	if (snapshot && vgpu->last_ring)
		memcpy(snapshot->data, vgpu->last_ring, snapshot->bytes);
	mutex_unlock(&vgpu->lock);
	return gvt_snapshot_open(file, snapshot);
}
GVT_SNAPSHOT_ATTRIBUTE(last_ring);

/* --- the tree -------------------------------------------------------- */

static const struct gvt_show gvt_hw_files[] = {
	{ "gm_layout",	0400, &gm_layout_fops },
	{ "hw_ggtt",	0400, &hw_ggtt_fops },
	{ "hw_fence",	0400, &hw_fence_fops },
	{ "last_ring",	0400, &last_ring_fops },
	{ "pinned",	0400, &pinned_fops },
	{ "run_state",	0400, &run_state_fops },
	{ "queue",	0400, &queue_fops },
};

void gvt_hw_show(struct vgpu *vgpu)
{
	gvt_debugfs_files(vgpu, gvt_hw_files, ARRAY_SIZE(gvt_hw_files));
}

void gvt_hw_show_host(void)
{
	debugfs_create_file("host_ggtt", 0400, gvt_debugfs_root, NULL,
			    &host_ggtt_fops);
	debugfs_create_file("host_fence", 0400, gvt_debugfs_root, NULL,
			    &host_fence_fops);
}
