// SPDX-License-Identifier: GPL-2.0-only
/*
 * The host's side for tests to look at: /sys/kernel/debug/gvt_sample/.
 *
 * Every file goes through debugfs' own protection: removal waits for what is
 * being opened or read, and turns later reads into EIO. A .release, which is
 * not protected, frees its snapshot and touches nothing else.
 */
#include <linux/debugfs.h>
#include <linux/err.h>
#include <linux/fs.h>
#include <linux/log2.h>
#include <linux/module.h>
#include <linux/overflow.h>
#include <linux/seq_file.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "hw/hw.h"
#include "vfio/vfio.h"
#include "lab/lab.h"

static struct dentry *gvt_debugfs_root;

/* --- last_error ------------------------------------------------------ */

static int last_error_show(struct seq_file *m, void *unused)
{
	struct vgpu *vgpu = m->private;
	char text[sizeof(vgpu->last_error)];

	gvt_note_read(vgpu, text, sizeof(text));
	if (text[0])
		seq_printf(m, "%s\n", text);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(last_error);

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

#define GVT_COUNTER(m, counters, name) \
	seq_printf(m, #name ": %lld\n", \
		   (long long)atomic64_read(&(counters)->name))

static int counters_show(struct seq_file *m, void *unused)
{
	const struct gvt_counters *counters =
		&((struct vgpu *)m->private)->counters;

	GVT_COUNTER(m, counters, status_set);
	GVT_COUNTER(m, counters, get_dirty);
	GVT_COUNTER(m, counters, state_read);
	GVT_COUNTER(m, counters, state_write);
	GVT_COUNTER(m, counters, other_ioctl);
	GVT_COUNTER(m, counters, workloads_submitted);
	GVT_COUNTER(m, counters, workloads_completed);
	GVT_COUNTER(m, counters, workloads_failed);
	GVT_COUNTER(m, counters, fence_errors);
	GVT_COUNTER(m, counters, irqs);
	GVT_COUNTER(m, counters, v2_set_state);
	GVT_COUNTER(m, counters, v2_read);
	GVT_COUNTER(m, counters, v2_write);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(counters);

/* --- v2 -------------------------------------------------------------- */

/* Takes no lock, so that a state that is being changed can be looked at */
static int v2_state_show(struct seq_file *m, void *unused)
{
	seq_printf(m, "%s\n", gvt_mig_state_name(m->private));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(v2_state);

static int v2_extra_bytes_get(void *data, u64 *value)
{
	*value = READ_ONCE(((struct vgpu *)data)->mig.extra_bytes);
	return 0;
}

static int v2_extra_bytes_set(void *data, u64 value)
{
	if (value > GVT_V2_EXTRA_MAX)
		return -EINVAL;
	WRITE_ONCE(((struct vgpu *)data)->mig.extra_bytes, value);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(v2_extra_bytes_fops, v2_extra_bytes_get,
			 v2_extra_bytes_set, "%llu\n");

static int v2_dirty_rate_get(void *data, u64 *value)
{
	*value = READ_ONCE(((struct vgpu *)data)->mig.dirty_rate);
	return 0;
}

static int v2_dirty_rate_set(void *data, u64 value)
{
	if (value > GVT_V2_RATE_MAX)
		return -EINVAL;
	gvt_mig_set_rate(data, value);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(v2_dirty_rate_fops, v2_dirty_rate_get,
			 v2_dirty_rate_set, "%llu\n");

static int v2_reinit_get(void *data, u64 *value)
{
	*value = READ_ONCE(((struct vgpu *)data)->mig.reinit_bytes);
	return 0;
}

static int v2_reinit_set(void *data, u64 value)
{
	if (value > GVT_V2_EXTRA_MAX)
		return -EINVAL;
	WRITE_ONCE(((struct vgpu *)data)->mig.reinit_bytes, value);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(v2_reinit_fops, v2_reinit_get, v2_reinit_set,
			 "%llu\n");

static int v2_log_page_get(void *data, u64 *value)
{
	*value = READ_ONCE(((struct vgpu *)data)->mig.log_page);
	return 0;
}

static int v2_log_page_set(void *data, u64 value)
{
	if (!is_power_of_2(value) || value < GVT_PAGE_SIZE || value > SZ_1G)
		return -EINVAL;
	WRITE_ONCE(((struct vgpu *)data)->mig.log_page, value);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(v2_log_page_fops, v2_log_page_get, v2_log_page_set,
			 "%llu\n");

static void gvt_debugfs_add_v2(struct vgpu *vgpu)
{
	debugfs_create_file("v2_state", 0400, vgpu->debugfs, vgpu,
			    &v2_state_fops);
	debugfs_create_file_unsafe("v2_extra_bytes", 0600, vgpu->debugfs, vgpu,
				   &v2_extra_bytes_fops);
	debugfs_create_file_unsafe("v2_dirty_rate", 0600, vgpu->debugfs, vgpu,
				   &v2_dirty_rate_fops);
	debugfs_create_file_unsafe("v2_reinit", 0600, vgpu->debugfs, vgpu,
				   &v2_reinit_fops);
	debugfs_create_file_unsafe("v2_log_page", 0600, vgpu->debugfs, vgpu,
				   &v2_log_page_fops);
}

/* --- binary files: a snapshot, taken by open() ----------------------- */

struct gvt_snapshot {
	size_t	bytes;
	u64	data[];
};

static struct gvt_snapshot *gvt_snapshot_alloc(size_t bytes)
{
	struct gvt_snapshot *snapshot;

	snapshot = kvzalloc(struct_size(snapshot, data,
					DIV_ROUND_UP(bytes, sizeof(u64))),
			    GFP_KERNEL);
	if (snapshot)
		snapshot->bytes = bytes;
	return snapshot;
}

static int gvt_snapshot_open(struct file *file, struct gvt_snapshot *snapshot)
{
	if (!snapshot)
		return -ENOMEM;
	file->private_data = snapshot;
	return 0;
}

static ssize_t gvt_snapshot_read(struct file *file, char __user *buf,
				 size_t count, loff_t *ppos)
{
	const struct gvt_snapshot *snapshot = file->private_data;

	return simple_read_from_buffer(buf, count, ppos, snapshot->data,
				       snapshot->bytes);
}

static int gvt_snapshot_release(struct inode *inode, struct file *file)
{
	kvfree(file->private_data);
	return 0;
}

#define GVT_SNAPSHOT_FILE(name)					\
static const struct file_operations name##_fops = {		\
	.owner		= THIS_MODULE,				\
	.open		= name##_open,				\
	.read		= gvt_snapshot_read,			\
	.llseek		= default_llseek,			\
	.release	= gvt_snapshot_release,			\
}

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
GVT_SNAPSHOT_FILE(host_ggtt);

static int host_fence_open(struct inode *inode, struct file *file)
{
	struct gvt_snapshot *snapshot =
		gvt_snapshot_alloc(sizeof(gvt_host.fence));

	if (snapshot)
		gvt_copy_u64(snapshot->data, gvt_host.fence, GVT_HOST_FENCES);
	return gvt_snapshot_open(file, snapshot);
}
GVT_SNAPSHOT_FILE(host_fence);

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
GVT_SNAPSHOT_FILE(hw_ggtt);

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
GVT_SNAPSHOT_FILE(hw_fence);

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
GVT_SNAPSHOT_FILE(last_ring);

/* --- the tree -------------------------------------------------------- */

static const struct {
	const char			*name;
	const struct file_operations	*fops;
} gvt_vgpu_files[] = {
	{ "gm_layout",	&gm_layout_fops },
	{ "hw_ggtt",	&hw_ggtt_fops },
	{ "hw_fence",	&hw_fence_fops },
	{ "last_ring",	&last_ring_fops },
	{ "pinned",	&pinned_fops },
	{ "run_state",	&run_state_fops },
	{ "queue",	&queue_fops },
	{ "counters",	&counters_fops },
	{ "last_error",	&last_error_fops },
};

void gvt_debugfs_add(struct vgpu *vgpu)
{
	int i;

	vgpu->debugfs = debugfs_create_dir(dev_name(&vgpu->mdev->dev),
					   gvt_debugfs_root);
	for (i = 0; i < ARRAY_SIZE(gvt_vgpu_files); i++)
		debugfs_create_file(gvt_vgpu_files[i].name, 0400, vgpu->debugfs,
				    vgpu, gvt_vgpu_files[i].fops);
	debugfs_create_file("fault", 0600, vgpu->debugfs, vgpu,
			    &gvt_fault_fops);
	debugfs_create_file("defect", 0600, vgpu->debugfs, vgpu,
			    &gvt_defect_fops);
	debugfs_create_u32("exec_delay_ms", 0600, vgpu->debugfs,
			   &vgpu->exec_delay_ms);
	if (gvt_mig_enabled(vgpu))
		gvt_debugfs_add_v2(vgpu);
}

void gvt_debugfs_remove(struct vgpu *vgpu)
{
	debugfs_remove(vgpu->debugfs);
	vgpu->debugfs = NULL;
}

void gvt_debugfs_init(void)
{
	gvt_debugfs_root = debugfs_create_dir(GVT_NAME, NULL);
	debugfs_create_file("host_ggtt", 0400, gvt_debugfs_root, NULL,
			    &host_ggtt_fops);
	debugfs_create_file("host_fence", 0400, gvt_debugfs_root, NULL,
			    &host_fence_fops);
	debugfs_create_file("defects", 0400, gvt_debugfs_root, NULL,
			    &gvt_defects_fops);
}

void gvt_debugfs_fini(void)
{
	debugfs_remove(gvt_debugfs_root);
	gvt_debugfs_root = NULL;
}
