// SPDX-License-Identifier: GPL-2.0-only
/*
 * What tests look at: /sys/kernel/debug/gvt_sample/ and what it has of every
 * room. The rooms add their own files: hw/show.c, vfio/mig_show.c.
 *
 * Every file goes through debugfs' own protection: removal waits for what is
 * being opened or read, and turns later reads into EIO. A .release, which is
 * not protected, frees its snapshot and touches nothing else.
 */
#include <linux/debugfs.h>
#include <linux/fs.h>
#include <linux/overflow.h>
#include <linux/seq_file.h>
#include <linux/slab.h>

#include "lab/lab.h"
#include "lab/debugfs.h"

struct dentry *gvt_debugfs_root;

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

#define GVT_COUNTER(field) { #field, offsetof(struct gvt_counters, field) }

static const struct {
	const char	*name;
	size_t		offset;
} gvt_counter_names[] = {
	GVT_COUNTER(status_set),
	GVT_COUNTER(get_dirty),
	GVT_COUNTER(state_read),
	GVT_COUNTER(state_write),
	GVT_COUNTER(other_ioctl),
	GVT_COUNTER(workloads_submitted),
	GVT_COUNTER(workloads_completed),
	GVT_COUNTER(workloads_failed),
	GVT_COUNTER(fence_errors),
	GVT_COUNTER(irqs),
	GVT_COUNTER(v2_set_state),
	GVT_COUNTER(v2_read),
	GVT_COUNTER(v2_write),
};

static int counters_show(struct seq_file *m, void *unused)
{
	const struct vgpu *vgpu = m->private;
	const void *counters = &vgpu->counters;
	int i;

	for (i = 0; i < ARRAY_SIZE(gvt_counter_names); i++)
		seq_printf(m, "%s: %lld\n", gvt_counter_names[i].name,
			   (long long)atomic64_read(counters +
						    gvt_counter_names[i].offset));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(counters);

/* --- binary files: a snapshot, taken by open() ----------------------- */

struct gvt_snapshot *gvt_snapshot_alloc(size_t bytes)
{
	struct gvt_snapshot *snapshot;

	snapshot = kvzalloc(struct_size(snapshot, data,
					DIV_ROUND_UP(bytes, sizeof(u64))),
			    GFP_KERNEL);
	if (snapshot)
		snapshot->bytes = bytes;
	return snapshot;
}

int gvt_snapshot_open(struct file *file, struct gvt_snapshot *snapshot)
{
	if (!snapshot)
		return -ENOMEM;
	file->private_data = snapshot;
	return 0;
}

ssize_t gvt_snapshot_read(struct file *file, char __user *buf, size_t count,
			  loff_t *ppos)
{
	const struct gvt_snapshot *snapshot = file->private_data;

	return simple_read_from_buffer(buf, count, ppos, snapshot->data,
				       snapshot->bytes);
}

int gvt_snapshot_release(struct inode *inode, struct file *file)
{
	kvfree(file->private_data);
	return 0;
}

/* --- the tree -------------------------------------------------------- */

void gvt_debugfs_files(struct vgpu *vgpu, const struct gvt_show *files,
		       unsigned int nr)
{
	for (; nr; nr--, files++)
		debugfs_create_file(files->name, files->mode, vgpu->debugfs,
				    vgpu, files->fops);
}

static const struct gvt_show gvt_lab_files[] = {
	{ "counters",	0400, &counters_fops },
	{ "last_error",	0400, &last_error_fops },
	{ "fault",	0600, &gvt_fault_fops },
	{ "defect",	0600, &gvt_defect_fops },
};

void gvt_debugfs_add(struct vgpu *vgpu)
{
	vgpu->debugfs = debugfs_create_dir(dev_name(&vgpu->mdev->dev),
					   gvt_debugfs_root);
	gvt_debugfs_files(vgpu, gvt_lab_files, ARRAY_SIZE(gvt_lab_files));
	debugfs_create_u32("exec_delay_ms", 0600, vgpu->debugfs,
			   &vgpu->exec_delay_ms);
}

void gvt_debugfs_remove(struct vgpu *vgpu)
{
	debugfs_remove(vgpu->debugfs);
	vgpu->debugfs = NULL;
}

void gvt_debugfs_init(void)
{
	gvt_debugfs_root = debugfs_create_dir(GVT_NAME, NULL);
	debugfs_create_file("defects", 0400, gvt_debugfs_root, NULL,
			    &gvt_defects_fops);
}

void gvt_debugfs_fini(void)
{
	debugfs_remove(gvt_debugfs_root);
	gvt_debugfs_root = NULL;
}
