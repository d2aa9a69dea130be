// SPDX-License-Identifier: GPL-2.0-only
/* The v2 protocol's state and its settings, for tests to look at and change. */
#include <linux/debugfs.h>
#include <linux/log2.h>
#include <linux/seq_file.h>
#include <linux/sizes.h>

#include "lab/debugfs.h"
#include "vfio/vfio.h"

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

/* An attribute of debugfs has a protection of its own */
static const struct gvt_show gvt_mig_settings[] = {
	{ "v2_extra_bytes",	0600, &v2_extra_bytes_fops },
	{ "v2_dirty_rate",	0600, &v2_dirty_rate_fops },
	{ "v2_reinit",		0600, &v2_reinit_fops },
	{ "v2_log_page",	0600, &v2_log_page_fops },
};

void gvt_mig_show(struct vgpu *vgpu)
{
	int i;

	if (!gvt_mig_enabled(vgpu))
		return;
	debugfs_create_file("v2_state", 0400, vgpu->debugfs, vgpu,
			    &v2_state_fops);
	for (i = 0; i < ARRAY_SIZE(gvt_mig_settings); i++)
		debugfs_create_file_unsafe(gvt_mig_settings[i].name,
					   gvt_mig_settings[i].mode,
					   vgpu->debugfs, vgpu,
					   gvt_mig_settings[i].fops);
}
