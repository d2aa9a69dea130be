// SPDX-License-Identifier: GPL-2.0-only
/*
 * DMA logging: the pages that a vGPU wrote to, as VFIO's feature reports them.
 */
#include <linux/iova_bitmap.h>
#include <linux/module.h>
#include <linux/version.h>

#include "mig.h"

/*
 * iova_bitmap_set() is vfio's until 6.6. Then it is a part of iommufd, and
 * where that is not built there is a stub, and REPORT is EOPNOTSUPP.
 */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
#define GVT_LOGGING
#elif IS_ENABLED(CONFIG_IOMMUFD_DRIVER)
#define GVT_LOGGING
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 13, 0)
MODULE_IMPORT_NS(IOMMUFD);
#else
MODULE_IMPORT_NS("IOMMUFD");
#endif
#endif

void gvt_log_off(struct vgpu *vgpu)
{
	WRITE_ONCE(vgpu->mig.logging, false);
	xa_destroy(&vgpu->mig.log);
}

/* After the write: a report between the two must not forget it */
void gvt_mig_wrote(struct vgpu *vgpu, u64 iova, u64 len)
{
	struct gvt_mig *mig = &vgpu->mig;
	unsigned long gfn, last;

	if (!READ_ONCE(mig->logging) || !len)
		return;
	last = (iova + len - 1) >> GVT_PAGE_SHIFT;
	for (gfn = iova >> GVT_PAGE_SHIFT; gfn <= last; gfn++)
		if (xa_err(xa_store(&mig->log, gfn, xa_mk_value(0),
				    GFP_KERNEL_ACCOUNT)))
			WRITE_ONCE(mig->log_lost, true);
}

#ifdef GVT_LOGGING
/* All of what the vGPU writes is logged: it can hold any number of ranges */
static int gvt_log_start(struct vfio_device *vdev,
			 struct rb_root_cached *ranges, u32 nnodes,
			 u64 *page_size)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);
	int ret = -EINVAL;

	mutex_lock(&vgpu->mig.state_mutex);
	if (!vgpu->mig.logging ||
	    gvt_defect(vgpu, GVT_DEFECT_LOG_START_TWICE)) {
		gvt_log_off(vgpu);	/* what came late into the last log */
		vgpu->mig.log_lost = false;
		WRITE_ONCE(vgpu->mig.logging, true);
		*page_size = GVT_PAGE_SIZE;
		ret = 0;
	}
	mutex_unlock(&vgpu->mig.state_mutex);
	return ret;
}

static int gvt_log_stop(struct vfio_device *vdev)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);

	mutex_lock(&vgpu->mig.state_mutex);
	gvt_log_off(vgpu);
	mutex_unlock(&vgpu->mig.state_mutex);
	return 0;
}

static void gvt_log_move(struct vgpu *vgpu, unsigned long iova,
			 unsigned long length, struct iova_bitmap *dirty)
{
	unsigned long first = iova >> GVT_PAGE_SHIFT;
	unsigned long last = (iova + length - 1) >> GVT_PAGE_SHIFT;
	unsigned long gfn;
	void *entry;

	xa_for_each_range(&vgpu->mig.log, gfn, entry, first, last) {
		xa_erase(&vgpu->mig.log, gfn);
		iova_bitmap_set(dirty, max(gfn << GVT_PAGE_SHIFT, iova), 1);
		cond_resched();
	}
}

static int gvt_log_read_and_clear(struct vfio_device *vdev, unsigned long iova,
				  unsigned long length,
				  struct iova_bitmap *dirty)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);
	int ret = 0;

	mutex_lock(&vgpu->mig.state_mutex);
	if (!vgpu->mig.logging)
		ret = gvt_defect(vgpu, GVT_DEFECT_LOG_UNSTARTED) ? 0 : -EINVAL;
	else if (READ_ONCE(vgpu->mig.log_lost))
		ret = -EIO;
	else if (length && gvt_defect(vgpu, GVT_DEFECT_LOG_ALL))
		iova_bitmap_set(dirty, iova, length);
	else if (length)
		gvt_log_move(vgpu, iova, length, dirty);
	mutex_unlock(&vgpu->mig.state_mutex);
	return ret;
}

static const struct vfio_log_ops gvt_log_ops = {
	.log_start		= gvt_log_start,
	.log_stop		= gvt_log_stop,
	.log_read_and_clear	= gvt_log_read_and_clear,
};

void gvt_log_init(struct vgpu *vgpu)
{
	vgpu->vdev.log_ops = &gvt_log_ops;
}
#else
void gvt_log_init(struct vgpu *vgpu)
{
}
#endif
