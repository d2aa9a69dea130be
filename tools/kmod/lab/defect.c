// SPDX-License-Identifier: GPL-2.0-only
/*
 * Defects on demand: debugfs' "defect" file of a vGPU.
 *
 *	echo "load-truncated,fd-seekable" >defect	these, and no others
 *	echo >defect					none
 *	cat defect					those that are on
 *
 * What the names mean is in README.md; "defects" one directory up lists them.
 */
#include <linux/bitmap.h>
#include <linux/bitops.h>
#include <linux/err.h>
#include <linux/fs.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "lab/lab.h"

#define GVT_DEFECT_TEXT_MAX	4096	/* bytes in one write() */

static const char * const gvt_defect_names[GVT_DEFECTS] = {
	[GVT_DEFECT_STATE_UNKNOWN]		= "state-unknown",
	[GVT_DEFECT_STATE_ERROR]		= "state-error",
	[GVT_DEFECT_STATE_STUCK]		= "state-stuck",
	[GVT_DEFECT_STATE_NEW_FD]		= "state-new-fd",
	[GVT_DEFECT_STATE_NO_FD]		= "state-no-fd",
	[GVT_DEFECT_ERROR_LEFT]			= "error-left",
	[GVT_DEFECT_STOP_KEEPS_FD]		= "stop-keeps-fd",
	[GVT_DEFECT_STOP_UNREAD]		= "stop-unread",
	[GVT_DEFECT_RESET_STAYS]		= "reset-stays",
	[GVT_DEFECT_RESET_KEEPS_SAVING]		= "reset-keeps-saving",
	[GVT_DEFECT_RESET_KEEPS_RESUMING]	= "reset-keeps-resuming",
	[GVT_DEFECT_CLOSE_KEEPS_FD]		= "close-keeps-fd",
	[GVT_DEFECT_FD_BOTH_WAYS]		= "fd-both-ways",
	[GVT_DEFECT_FD_SEEKABLE]		= "fd-seekable",
	[GVT_DEFECT_FD_ANY_IOCTL]		= "fd-any-ioctl",
	[GVT_DEFECT_READ_RESTARTS]		= "read-restarts",
	[GVT_DEFECT_READ_LOSES]			= "read-loses",
	[GVT_DEFECT_READ_FAULT]			= "read-fault",
	[GVT_DEFECT_SIZE_REFUSED]		= "size-refused",
	[GVT_DEFECT_LOAD_TRUNCATED]		= "load-truncated",
	[GVT_DEFECT_LOAD_SURPLUS]		= "load-surplus",
	[GVT_DEFECT_LOAD_FOREIGN]		= "load-foreign",
	[GVT_DEFECT_LOAD_REFUSED]		= "load-refused",
	[GVT_DEFECT_LOAD_PIECES]		= "load-pieces",
	[GVT_DEFECT_LOAD_NOTHING]		= "load-nothing",
	[GVT_DEFECT_LOAD_LOSES_SEED]		= "load-loses-seed",
	[GVT_DEFECT_PRECOPY_INFO_LATE]		= "precopy-info-late",
	[GVT_DEFECT_PRECOPY_INFO_ARGSZ]		= "precopy-info-argsz",
	[GVT_DEFECT_PRECOPY_INITIAL_STUCK]	= "precopy-initial-stuck",
	[GVT_DEFECT_PRECOPY_NEW_FD]		= "precopy-new-fd",
	[GVT_DEFECT_PRECOPY_ENOMSG]		= "precopy-enomsg",
	[GVT_DEFECT_PRECOPY_RESTARTS]		= "precopy-restarts",
	[GVT_DEFECT_PRECOPY_KEEPS_FD]		= "precopy-keeps-fd",
	[GVT_DEFECT_LOG_ALL]			= "log-all",
	[GVT_DEFECT_LOG_START_TWICE]		= "log-start-twice",
	[GVT_DEFECT_LOG_UNSTARTED]		= "log-unstarted",
	[GVT_DEFECT_LOG_ENDS_AT_STOP]		= "log-ends-at-stop",
	[GVT_DEFECT_LOG_SURVIVES]		= "log-survives",
	[GVT_DEFECT_LOAD_LOSES_REGISTER]	= "load-loses-register",
	[GVT_DEFECT_SAVE_COUNTS]		= "save-counts",
	[GVT_DEFECT_STATUS_NO_FLAG]		= "status-no-flag",
	[GVT_DEFECT_STATUS_BOTH_FLAGS]		= "status-both-flags",
	[GVT_DEFECT_STATUS_UNKNOWN_FLAG]	= "status-unknown-flag",
	[GVT_DEFECT_STATUS_ARGSZ]		= "status-argsz",
	[GVT_DEFECT_STATUS_STOP_TWICE]		= "status-stop-twice",
	[GVT_DEFECT_DIRTY_TAIL]			= "dirty-tail",
	[GVT_DEFECT_DIRTY_OVERRUN]		= "dirty-overrun",
	[GVT_DEFECT_DIRTY_KEEPS_BUFFER]		= "dirty-keeps-buffer",
	[GVT_DEFECT_DIRTY_INVENTED]		= "dirty-invented",
	[GVT_DEFECT_DIRTY_FAULT]		= "dirty-fault",
	[GVT_DEFECT_DIRTY_COPY_FAULT]		= "dirty-copy-fault",
	[GVT_DEFECT_STATE_READ_OFFSET]		= "state-read-offset",
	[GVT_DEFECT_STATE_WRITE_OFFSET]		= "state-write-offset",
	[GVT_DEFECT_STATE_TYPE]			= "state-type",
	[GVT_DEFECT_STATE_SIZE]			= "state-size",
};

bool gvt_defect(const struct vgpu *vgpu, enum gvt_defect defect)
{
	return unlikely(test_bit(defect, vgpu->defects));
}

/* @text is taken apart */
static int gvt_defect_parse(char *text, unsigned long *wanted)
{
	char *name;
	int i;

	bitmap_zero(wanted, GVT_DEFECTS);
	while ((name = strsep(&text, ", \t\n"))) {
		if (!*name)
			continue;
		i = match_string(gvt_defect_names, GVT_DEFECTS, name);
		if (i < 0)
			return -EINVAL;
		__set_bit(i, wanted);
	}
	return 0;
}

static ssize_t gvt_defect_write(struct file *file, const char __user *buf,
				size_t count, loff_t *ppos)
{
	struct vgpu *vgpu = ((struct seq_file *)file->private_data)->private;
	DECLARE_BITMAP(wanted, GVT_DEFECTS);
	char *text;
	int i, ret;

	if (count > GVT_DEFECT_TEXT_MAX)
		return -EINVAL;
	text = memdup_user_nul(buf, count);
	if (IS_ERR(text))
		return PTR_ERR(text);
	ret = strlen(text) == count ? gvt_defect_parse(text, wanted) : -EINVAL;
	kfree(text);
	if (ret)
		return ret;
	for (i = 0; i < GVT_DEFECTS; i++)
		if (test_bit(i, wanted))
			set_bit(i, vgpu->defects);
		else
			clear_bit(i, vgpu->defects);
	return count;
}

static int gvt_defect_show(struct seq_file *m, void *unused)
{
	const struct vgpu *vgpu = m->private;
	int i;

	for_each_set_bit(i, vgpu->defects, GVT_DEFECTS)
		seq_printf(m, "%s\n", gvt_defect_names[i]);
	return 0;
}

static int gvt_defect_open(struct inode *inode, struct file *file)
{
	return single_open(file, gvt_defect_show, inode->i_private);
}

const struct file_operations gvt_defect_fops = {
	.owner		= THIS_MODULE,
	.open		= gvt_defect_open,
	.read		= seq_read,
	.write		= gvt_defect_write,
	.llseek		= seq_lseek,
	.release	= single_release,
};

static int gvt_defects_show(struct seq_file *m, void *unused)
{
	int i;

	for (i = 0; i < GVT_DEFECTS; i++)
		seq_printf(m, "%s\n", gvt_defect_names[i]);
	return 0;
}

static int gvt_defects_open(struct inode *inode, struct file *file)
{
	return single_open(file, gvt_defects_show, NULL);
}

const struct file_operations gvt_defects_fops = {
	.owner		= THIS_MODULE,
	.open		= gvt_defects_open,
	.read		= seq_read,
	.llseek		= seq_lseek,
	.release	= single_release,
};
