// SPDX-License-Identifier: GPL-2.0-only
/*
 * The data fd of the migration protocol v2.
 */
#include <linux/anon_inodes.h>
#include <linux/compat.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "mig.h"
#include "lab/lab.h"

/* <linux/vfio.h> of Linux 7.1 */
#define GVT_PRECOPY_INFO_REINIT		BIT(0)

/* Before a read or write. What a fault makes of it happens with no lock held. */
static ssize_t gvt_data_begin(struct gvt_mig_file *migf, enum gvt_fault_op op,
			      struct gvt_fault *fault, size_t *count)
{
	struct gvt_counters *counters;

	mutex_lock(&migf->lock);
	if (!migf->vgpu) {
		mutex_unlock(&migf->lock);
		return -ENODEV;
	}
	counters = &migf->vgpu->counters;
	atomic64_inc(op == GVT_FAULT_DATA_READ ? &counters->v2_read :
						 &counters->v2_write);
	gvt_fault_take(migf->vgpu, op, fault);
	mutex_unlock(&migf->lock);
	if (fault->kind == GVT_FAULT_SHORT)
		*count = min_t(size_t, *count, fault->value);
	return gvt_fault_act(op, fault);
}

static ssize_t gvt_data_read(struct file *filp, char __user *buf, size_t count,
			     loff_t *pos)
{
	struct gvt_mig_file *migf = filp->private_data;
	struct gvt_fault fault;
	ssize_t ret;

	if (pos)
		return -ESPIPE;
	ret = gvt_data_begin(migf, GVT_FAULT_DATA_READ, &fault, &count);
	if (ret)
		return ret;
	mutex_lock(&migf->lock);
	ret = migf->vgpu ? gvt_save(migf, buf, count) : -ENODEV;
	mutex_unlock(&migf->lock);
	return gvt_fault_end(&fault, ret);
}

static ssize_t gvt_data_write(struct file *filp, const char __user *buf,
			      size_t count, loff_t *pos)
{
	struct gvt_mig_file *migf = filp->private_data;
	struct gvt_fault fault;
	ssize_t ret;

	if (pos)
		return -ESPIPE;
	ret = gvt_data_begin(migf, GVT_FAULT_DATA_WRITE, &fault, &count);
	if (ret)
		return ret;
	mutex_lock(&migf->lock);
	ret = migf->vgpu ? gvt_load(migf, buf, count) : -ENODEV;
	mutex_unlock(&migf->lock);
	return gvt_fault_end(&fault, ret);
}

/* Whether who reads asked for PRECOPY_INFO.flags: vfio's to note, or ours */
static bool gvt_info2(const struct vgpu *vgpu)
{
#ifdef GVT_SINCE_7_1
	return READ_ONCE(vgpu->vdev.precopy_info_v2);
#else
	return READ_ONCE(vgpu->mig.info2);
#endif
}

/*
 * As if what was sent as initial data had become useless: some of it has to be
 * sent again, and before a stop. Once in a session, for who can be told of it.
 */
static void gvt_reinit(struct gvt_mig_file *migf)
{
	const struct gvt_mig *mig = &migf->vgpu->mig;
	u64 bytes = READ_ONCE(mig->reinit_bytes);

	if (!bytes || !gvt_info2(migf->vgpu) || migf->reinit_done ||
	    gvt_left_initial(migf))
		return;
	bytes = min(round_down(bytes, GVT_MIG_PAGE), gvt_dirty_limit(migf));
	migf->dirty = max(migf->dirty, bytes);
	migf->again = bytes;
	migf->reinit = true;
	migf->reinit_done = true;
}

static void gvt_precopy_bytes(struct gvt_mig_file *migf,
			      struct vfio_precopy_info *info)
{
	u64 again;

	gvt_dirty_grow(migf);
	gvt_reinit(migf);
	again = min(migf->again, gvt_left_dirty(migf));
	info->flags = migf->reinit ? GVT_PRECOPY_INFO_REINIT : 0;
	info->initial_bytes = gvt_left_initial(migf) + again;
	info->dirty_bytes = gvt_left_dirty(migf) - again;
	if (gvt_defect(migf->vgpu, GVT_DEFECT_PRECOPY_INITIAL_STUCK))
		info->initial_bytes = sizeof(migf->header) + migf->header.filler;
}

static long gvt_precopy_info(struct gvt_mig_file *migf, void __user *arg)
{
	const size_t minsz = offsetofend(struct vfio_precopy_info, dirty_bytes);
	struct vfio_precopy_info info;
	long ret = 0;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	mutex_lock(&migf->lock);
	if (!migf->vgpu)
		ret = -ENODEV;
	else if (info.argsz < minsz &&
		 !gvt_defect(migf->vgpu, GVT_DEFECT_PRECOPY_INFO_ARGSZ))
		ret = -EINVAL;
	else if (!migf->precopy &&
		 !gvt_defect(migf->vgpu, GVT_DEFECT_PRECOPY_INFO_LATE))
		ret = -EINVAL;
	else
		gvt_precopy_bytes(migf, &info);
	mutex_unlock(&migf->lock);
	if (!ret && copy_to_user(arg, &info, minsz))
		ret = -EFAULT;
	return ret;
}

static long gvt_data_other_ioctl(struct gvt_mig_file *migf)
{
	bool fine;

	mutex_lock(&migf->lock);
	fine = migf->vgpu && gvt_defect(migf->vgpu, GVT_DEFECT_FD_ANY_IOCTL);
	mutex_unlock(&migf->lock);
	return fine ? 0 : -ENOTTY;
}

static long gvt_data_ioctl(struct file *filp, unsigned int cmd,
			   unsigned long arg)
{
	struct gvt_mig_file *migf = filp->private_data;

	if (cmd != VFIO_MIG_GET_PRECOPY_INFO || !migf->saving)
		return gvt_data_other_ioctl(migf);
	return gvt_precopy_info(migf, (void __user *)arg);
}

void gvt_mig_file_empty(struct gvt_mig_file *migf)
{
	gvt_image_free(migf->parsed);
	migf->parsed = NULL;
	kvfree(migf->image);
	migf->image = NULL;
}

static void gvt_mig_file_free(struct gvt_mig_file *migf)
{
	gvt_mig_file_empty(migf);
	kvfree(migf->chunk);
	mutex_destroy(&migf->lock);
	kfree(migf);
}

static int gvt_data_release(struct inode *inode, struct file *filp)
{
	gvt_mig_file_free(filp->private_data);
	return 0;
}

static const struct file_operations gvt_save_fops = {
	.owner		= THIS_MODULE,
	.read		= gvt_data_read,
	.unlocked_ioctl	= gvt_data_ioctl,
	.compat_ioctl	= compat_ptr_ioctl,
	.llseek		= noop_llseek,		/* never reached: a stream */
	.release	= gvt_data_release,
};

static const struct file_operations gvt_load_fops = {
	.owner		= THIS_MODULE,
	.write		= gvt_data_write,
	.llseek		= noop_llseek,		/* never reached: a stream */
	.release	= gvt_data_release,
};

static int gvt_data_flags(const struct vgpu *vgpu, bool saving)
{
	if (gvt_defect(vgpu, GVT_DEFECT_FD_BOTH_WAYS))
		return O_RDWR;
	return saving ? O_RDONLY : O_WRONLY;
}

struct gvt_mig_file *gvt_mig_file_new(struct vgpu *vgpu, bool saving)
{
	struct gvt_mig_file *migf;
	struct file *filp;

	migf = kzalloc(sizeof(*migf), GFP_KERNEL_ACCOUNT);
	if (!migf)
		return ERR_PTR(-ENOMEM);
	mutex_init(&migf->lock);
	migf->vgpu = vgpu;
	migf->saving = saving;
	gvt_stage_enter(migf, GVT_STAGE_HEADER, sizeof(migf->header));
	migf->chunk = kvmalloc(2 * GVT_MIG_CHUNK, GFP_KERNEL_ACCOUNT);
	if (!migf->chunk) {
		gvt_mig_file_free(migf);
		return ERR_PTR(-ENOMEM);
	}
	filp = anon_inode_getfile(GVT_NAME "_mig",
				  saving ? &gvt_save_fops : &gvt_load_fops,
				  migf, gvt_data_flags(vgpu, saving));
	if (IS_ERR(filp)) {
		gvt_mig_file_free(migf);
		return ERR_CAST(filp);
	}
	stream_open(filp->f_inode, filp);
	if (gvt_defect(vgpu, GVT_DEFECT_FD_SEEKABLE))
		filp->f_mode |= FMODE_LSEEK;
	migf->filp = filp;
	return migf;
}
