// SPDX-License-Identifier: GPL-2.0-only
/*
 * DMA logging: the pages that a vGPU wrote to, as VFIO's feature reports them.
 */
#include <linux/iova_bitmap.h>
#include <linux/module.h>

#include "hw/hw.h"
#include "lab/lab.h"
#include "mig.h"

/*
 * iova_bitmap_set() is vfio's until 6.6. Then it is a part of iommufd, and
 * where that is not built there is a stub, and REPORT is EOPNOTSUPP.
 */
#ifndef GVT_SINCE_6_7
#define GVT_LOGGING
#elif IS_ENABLED(CONFIG_IOMMUFD_DRIVER)
#define GVT_LOGGING
#ifndef GVT_SINCE_6_13
MODULE_IMPORT_NS(IOMMUFD);
#else
MODULE_IMPORT_NS("IOMMUFD");
#endif
#endif

#ifdef GVT_LOGGING
/* All of what the vGPU writes is logged: it can hold any number of ranges */
static int gvt_log_start(struct vfio_device *vdev,
			 struct rb_root_cached *ranges, u32 nnodes,
			 u64 *page_size)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);
	int ret = -EINVAL;

	mutex_lock(&vgpu->mig.state_mutex);
	if (!vgpu->log.on || gvt_defect(vgpu, GVT_DEFECT_LOG_START_TWICE)) {
		*page_size = READ_ONCE(vgpu->mig.log_page);
		gvt_log_on(vgpu, *page_size);
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

/* As hardware does, it forgets a page of which a part was asked for */
static void gvt_log_move(struct vgpu *vgpu, unsigned long iova,
			 unsigned long length, struct iova_bitmap *dirty)
{
	unsigned int shift = vgpu->log.shift;
	unsigned long end = iova + length - 1;
	unsigned long page, from, to;
	void *entry;

	xa_for_each_range(&vgpu->log.pages, page, entry, iova >> shift,
			  end >> shift) {
		xa_erase(&vgpu->log.pages, page);
		from = max(page << shift, iova);
		to = min((page << shift) + BIT(shift) - 1, end);
		iova_bitmap_set(dirty, from, to - from + 1);
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
	if (!vgpu->log.on)
		ret = gvt_defect(vgpu, GVT_DEFECT_LOG_UNSTARTED) ? 0 : -EINVAL;
	else if (READ_ONCE(vgpu->log.lost))
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

void gvt_mig_log_init(struct vgpu *vgpu)
{
	vgpu->mig.log_page = GVT_PAGE_SIZE;
	vgpu->vdev.log_ops = &gvt_log_ops;
}
#else
void gvt_mig_log_init(struct vgpu *vgpu)
{
	vgpu->mig.log_page = GVT_PAGE_SIZE;
}
#endif
