/* SPDX-License-Identifier: GPL-2.0-only */
/* Files in debugfs: what a room needs to show something of its own. */
#ifndef GVT_SAMPLE_DEBUGFS_H
#define GVT_SAMPLE_DEBUGFS_H

#include <linux/fs.h>
#include <linux/module.h>

#include "gvt_sample.h"

extern struct dentry *gvt_debugfs_root;

/* A file of a vGPU, whose data is the vGPU */
struct gvt_show {
	const char			*name;
	umode_t				mode;
	const struct file_operations	*fops;
};

void gvt_debugfs_files(struct vgpu *vgpu, const struct gvt_show *files,
		       unsigned int nr);

/* A binary file is a snapshot, taken by open(): NAME_open() fills it */
struct gvt_snapshot {
	size_t	bytes;
	u64	data[];
};

struct gvt_snapshot *gvt_snapshot_alloc(size_t bytes);
/* -ENOMEM if there is none */
int gvt_snapshot_open(struct file *file, struct gvt_snapshot *snapshot);
ssize_t gvt_snapshot_read(struct file *file, char __user *buf, size_t count,
			  loff_t *ppos);
int gvt_snapshot_release(struct inode *inode, struct file *file);

#define GVT_SNAPSHOT_ATTRIBUTE(name)					\
static const struct file_operations name##_fops = {		\
	.owner		= THIS_MODULE,				\
	.open		= name##_open,				\
	.read		= gvt_snapshot_read,			\
	.llseek		= default_llseek,			\
	.release	= gvt_snapshot_release,			\
}

#endif
