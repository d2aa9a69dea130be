// SPDX-License-Identifier: GPL-2.0-only
/*
 * Faults on demand: debugfs' "fault" file makes the n-th request of a kind
 * fail, fall short or take long, so that tests see what a client makes of it.
 *
 *	echo "state_read 1 errno 5" >fault	the next one fails, not done
 *	echo "start 2 after 5" >fault		done, and then reported as failed
 *	echo "state_write 1 short 4096" >fault	returns this many bytes; a write
 *						is not done
 *	echo "data_write 1 short 10" >fault	on a data fd: takes or gives no more
 *						than this, and loses nothing
 *	echo "stop 1 delay 300" >fault		takes 300 ms longer
 *	echo clear >fault
 *
 * Each kind of request has one rule; a rule that has come true is gone.
 */
#include <linux/debugfs.h>
#include <linux/errno.h>
#include <linux/fs.h>
#include <linux/kernel.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include "lab/lab.h"

#define GVT_FAULT_DELAY_MAX	10000	/* ms */
#define GVT_FAULT_NTH_MAX	1000000
#define GVT_FAULT_TEXT_MAX	64

static const char * const gvt_fault_ops[GVT_FAULT_OPS] = {
	[GVT_FAULT_STOP]	= "stop",
	[GVT_FAULT_START]	= "start",
	[GVT_FAULT_DIRTY]	= "dirty",
	[GVT_FAULT_STATE_READ]	= "state_read",
	[GVT_FAULT_STATE_WRITE]	= "state_write",
	[GVT_FAULT_RESET]	= "reset",
	[GVT_FAULT_SET_STATE]	= "set_state",
	[GVT_FAULT_DATA_READ]	= "data_read",
	[GVT_FAULT_DATA_WRITE]	= "data_write",
};

static const char * const gvt_fault_kinds[GVT_FAULT_KINDS] = {
	[GVT_FAULT_ERRNO]	= "errno",
	[GVT_FAULT_AFTER]	= "after",
	[GVT_FAULT_SHORT]	= "short",
	[GVT_FAULT_DELAY]	= "delay",
};

static const unsigned int gvt_fault_limits[GVT_FAULT_KINDS] = {
	[GVT_FAULT_ERRNO]	= MAX_ERRNO,
	[GVT_FAULT_AFTER]	= MAX_ERRNO,
	[GVT_FAULT_SHORT]	= MIGRATION_IMG_MAX_SIZE - 1,
	[GVT_FAULT_DELAY]	= GVT_FAULT_DELAY_MAX,
};

/* If this request meets its rule, that is copied to @fault and gone */
void gvt_fault_take(struct vgpu *vgpu, enum gvt_fault_op op,
		    struct gvt_fault *fault)
{
	struct gvt_fault *rule = &vgpu->faults[op];

	fault->kind = GVT_FAULT_KINDS;
	spin_lock(&vgpu->fault_lock);
	if (rule->nth && !--rule->nth)
		*fault = *rule;
	spin_unlock(&vgpu->fault_lock);
}

/* gvt_fault_begin() for who has taken the rule already; may sleep */
ssize_t gvt_fault_act(enum gvt_fault_op op, const struct gvt_fault *fault)
{
	switch (fault->kind) {
	case GVT_FAULT_ERRNO:
		return -(ssize_t)fault->value;
	case GVT_FAULT_DELAY:
		schedule_timeout_killable(msecs_to_jiffies(fault->value));
		return 0;
	case GVT_FAULT_SHORT:
		return op == GVT_FAULT_STATE_WRITE ? fault->value : 0;
	default:
		return 0;
	}
}

/*
 * Before a request: 0 to go on, or what to return instead. What is left to do
 * behind the request is kept in @fault for gvt_fault_end(). No lock held.
 */
ssize_t gvt_fault_begin(struct vgpu *vgpu, enum gvt_fault_op op,
			struct gvt_fault *fault)
{
	gvt_fault_take(vgpu, op, fault);
	return gvt_fault_act(op, fault);
}

ssize_t gvt_fault_end(const struct gvt_fault *fault, ssize_t ret)
{
	if (ret < 0)
		return ret;
	if (fault->kind == GVT_FAULT_AFTER)
		return -(ssize_t)fault->value;
	if (fault->kind == GVT_FAULT_SHORT)
		return min_t(ssize_t, ret, fault->value);
	return ret;
}

static bool gvt_fault_can_be_short(enum gvt_fault_op op)
{
	return op == GVT_FAULT_STATE_READ || op == GVT_FAULT_STATE_WRITE ||
	       op == GVT_FAULT_DATA_READ || op == GVT_FAULT_DATA_WRITE;
}

static int gvt_fault_set(struct vgpu *vgpu, char *text)
{
	unsigned int nth, value;
	char op[16], kind[16];
	int o, k;

	if (sysfs_streq(text, "clear")) {
		spin_lock(&vgpu->fault_lock);
		memset(vgpu->faults, 0, sizeof(vgpu->faults));
		spin_unlock(&vgpu->fault_lock);
		return 0;
	}
	if (sscanf(text, "%15s %u %15s %u", op, &nth, kind, &value) != 4)
		return -EINVAL;
	o = match_string(gvt_fault_ops, GVT_FAULT_OPS, op);
	k = match_string(gvt_fault_kinds, GVT_FAULT_KINDS, kind);
	if (o < 0 || k < 0 || !nth || nth > GVT_FAULT_NTH_MAX || !value ||
	    value > gvt_fault_limits[k])
		return -EINVAL;
	if (k == GVT_FAULT_SHORT && !gvt_fault_can_be_short(o))
		return -EINVAL;
	spin_lock(&vgpu->fault_lock);
	vgpu->faults[o].nth = nth;
	vgpu->faults[o].kind = k;
	vgpu->faults[o].value = value;
	spin_unlock(&vgpu->fault_lock);
	return 0;
}

static ssize_t gvt_fault_write(struct file *file, const char __user *buf,
			       size_t count, loff_t *ppos)
{
	struct seq_file *m = file->private_data;
	char text[GVT_FAULT_TEXT_MAX];
	int ret;

	if (!count || count >= sizeof(text))
		return -EINVAL;
	if (copy_from_user(text, buf, count))
		return -EFAULT;
	text[count] = '\0';
	ret = gvt_fault_set(m->private, text);
	return ret ? ret : count;
}

static int gvt_fault_show(struct seq_file *m, void *unused)
{
	struct gvt_fault rules[GVT_FAULT_OPS];
	struct vgpu *vgpu = m->private;
	int i;

	spin_lock(&vgpu->fault_lock);
	memcpy(rules, vgpu->faults, sizeof(rules));
	spin_unlock(&vgpu->fault_lock);
	for (i = 0; i < GVT_FAULT_OPS; i++)
		if (rules[i].nth)
			seq_printf(m, "%s %u %s %u\n", gvt_fault_ops[i],
				   rules[i].nth, gvt_fault_kinds[rules[i].kind],
				   rules[i].value);
	return 0;
}

static int gvt_fault_open(struct inode *inode, struct file *file)
{
	return single_open(file, gvt_fault_show, inode->i_private);
}

const struct file_operations gvt_fault_fops = {
	.owner		= THIS_MODULE,
	.open		= gvt_fault_open,
	.read		= seq_read,
	.write		= gvt_fault_write,
	.llseek		= seq_lseek,
	.release	= single_release,
};
