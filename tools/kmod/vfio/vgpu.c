// SPDX-License-Identifier: GPL-2.0-only
/*
 * One vGPU: its life, and its VFIO device.
 */
#include <linux/module.h>
#include <linux/pci_regs.h>
#include <linux/slab.h>
#include <linux/sysfs.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "hw/hw.h"
#include "vfio/vfio.h"
#include "lab/lab.h"

#define GVT_STATE_INDEX	VFIO_PCI_DEVICE_STATE_REGION_INDEX
#define GVT_STATUS_SET	_IO(VFIO_TYPE, VFIO_BASE + VFIO_DEVICE_PCI_STATUS_SET_NR)
#define GVT_GET_DIRTY	_IO(VFIO_TYPE, VFIO_BASE + \
			    VFIO_DEVICE_PCI_GET_DIRTY_BITMAP_NR)

/* --- regions --------------------------------------------------------- */

#define GVT_CHUNK	256		/* divides every region's parts */

static u64 gvt_region_size(unsigned int index)
{
	switch (index) {
	case VFIO_PCI_BAR0_REGION_INDEX:
		return GVT_BAR0_SIZE;
	case VFIO_PCI_BAR2_REGION_INDEX:
		return gvt_pool_aperture();
	case VFIO_PCI_CONFIG_REGION_INDEX:
		return GVT_IMAGE_CFG_SIZE;
	case GVT_STATE_INDEX:
		return MIGRATION_IMG_MAX_SIZE;
	}
	return 0;
}

/* The guest's write to config space, which may change how interrupts go out */
static int gvt_config_write(struct vgpu *vgpu, u32 off, const void *buf,
			    unsigned int bytes)
{
	u32 reg = off & ~3u;
	int ret = gvt_cfg_write(vgpu, off, buf, bytes);

	if (!ret && (reg == PCI_COMMAND || reg == GVT_CFG_MSI))
		gvt_irq_recheck(vgpu);
	return ret;
}

static int gvt_piece(struct vgpu *vgpu, unsigned int index, u32 off, void *buf,
		     unsigned int bytes, bool write)
{
	if (index == VFIO_PCI_CONFIG_REGION_INDEX)
		return write ? gvt_config_write(vgpu, off, buf, bytes) :
			       gvt_cfg_read(vgpu, off, buf, bytes);
	if (off < GVT_MMIO_SIZE)
		return write ? gvt_mmio_write(vgpu, off, buf, bytes) :
			       gvt_mmio_read(vgpu, off, buf, bytes);
	if (off >= GVT_GTT_OFFSET) {
		off -= GVT_GTT_OFFSET;
		return write ? gvt_gtt_write(vgpu, off, buf, bytes) :
			       gvt_gtt_read(vgpu, off, buf, bytes);
	}
	gvt_note(vgpu, "BAR0: nothing at %#x", off);
	return -EINVAL;
}

/* As large as alignment and length allow; entries of the GTT in one go */
static unsigned int gvt_piece_bytes(unsigned int index, u32 off, size_t left)
{
	unsigned int bytes = 4;

	if (index == VFIO_PCI_BAR0_REGION_INDEX && off >= GVT_GTT_OFFSET)
		bytes = 8;
	while (bytes > left || off & (bytes - 1))
		bytes /= 2;
	return bytes;
}

/* Under lock. What a piece before the failing one has done stays done. */
static int gvt_chunk(struct vgpu *vgpu, unsigned int index, u32 off, u8 *buf,
		     size_t left, bool write)
{
	unsigned int bytes;
	int ret;

	for (; left; left -= bytes, off += bytes, buf += bytes) {
		bytes = gvt_piece_bytes(index, off, left);
		ret = gvt_piece(vgpu, index, off, buf, bytes, write);
		if (ret)
			return ret;
	}
	return 0;
}

/* Config space and BAR0; as in kvmgt, whatever goes wrong is EFAULT */
static ssize_t gvt_pieces_rw(struct vgpu *vgpu, unsigned int index,
			     char __user *ubuf, size_t count, u32 off,
			     bool write)
{
	u8 buf[GVT_CHUNK];
	size_t done, bytes;
	int ret;

	for (done = 0; done < count; done += bytes, off += bytes) {
		bytes = min_t(size_t, count - done,
			      GVT_CHUNK - (off & (GVT_CHUNK - 1)));
		if (write && copy_from_user(buf, ubuf + done, bytes))
			return -EFAULT;
		mutex_lock(&vgpu->lock);
		ret = gvt_chunk(vgpu, index, off, buf, bytes, write);
		mutex_unlock(&vgpu->lock);
		if (ret)
			return -EFAULT;
		if (!write && copy_to_user(ubuf + done, buf, bytes))
			return -EFAULT;
		cond_resched();
	}
	return count;
}

static ssize_t gvt_state_rw(struct vgpu *vgpu, char __user *ubuf, size_t count,
			    u64 off, bool write)
{
	struct gvt_fault fault;
	ssize_t ret;

	atomic64_inc(write ? &vgpu->counters.state_write :
			     &vgpu->counters.state_read);
	ret = gvt_fault_begin(vgpu, write ? GVT_FAULT_STATE_WRITE :
					    GVT_FAULT_STATE_READ, &fault);
	if (ret)
		return ret;
	ret = write ? gvt_state_write(vgpu, ubuf, count, off) :
		      gvt_state_read(vgpu, ubuf, count, off);
	return gvt_fault_end(&fault, ret);
}

static ssize_t gvt_rw(struct vgpu *vgpu, char __user *ubuf, size_t count,
		      loff_t *ppos, bool write)
{
	u64 index = (u64)*ppos >> GVT_REGION_SHIFT;
	u64 off = *ppos & GVT_REGION_MASK;
	u64 size = index < VFIO_PCI_RFC_NUM_REGIONS ? gvt_region_size(index) : 0;
	ssize_t ret;

	if (!size)
		return -EINVAL;
	if (!count)
		return 0;
	if (index == GVT_STATE_INDEX)	/* past the loop and the position */
		return gvt_state_rw(vgpu, ubuf, count, off, write);
	if (off >= size || count > size - off)
		return -EINVAL;
	if (index == GVT_BAR2_INDEX)
		ret = gvt_bar2_rw(vgpu, ubuf, count, off, write);
	else
		ret = gvt_pieces_rw(vgpu, index, ubuf, count, off, write);
	if (ret > 0)
		*ppos += ret;
	return ret;
}

static ssize_t gvt_read(struct vfio_device *vdev, char __user *buf,
			size_t count, loff_t *ppos)
{
	return gvt_rw(vdev_to_vgpu(vdev), buf, count, ppos, false);
}

static ssize_t gvt_write(struct vfio_device *vdev, const char __user *buf,
			 size_t count, loff_t *ppos)
{
	return gvt_rw(vdev_to_vgpu(vdev), (char __user *)buf, count, ppos, true);
}

static int gvt_mmap(struct vfio_device *vdev, struct vm_area_struct *vma)
{
	u64 pos = (u64)vma->vm_pgoff << PAGE_SHIFT;

	if (pos >> GVT_REGION_SHIFT != GVT_BAR2_INDEX)
		return -EINVAL;
	return gvt_bar2_mmap(vdev_to_vgpu(vdev), vma, pos & GVT_REGION_MASK);
}

/* --- ioctls ---------------------------------------------------------- */

static long gvt_get_info(struct vgpu *vgpu, void __user *arg)
{
	const size_t minsz = offsetofend(struct vfio_device_info, num_irqs);
	struct vfio_device_info info;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz)
		return -EINVAL;
	info.flags = VFIO_DEVICE_FLAGS_RESET | READ_ONCE(gvt_extra_flags);
	if (READ_ONCE(gvt_report_pci))
		info.flags |= VFIO_DEVICE_FLAGS_PCI;
	if (READ_ONCE(gvt_migratable))		/* RFC patch 6 */
		info.flags |= VFIO_DEVICE_FLAGS_MIGRATABLE;
	info.num_regions = VFIO_PCI_RFC_NUM_REGIONS;
	info.num_irqs = VFIO_PCI_NUM_IRQS;
	return copy_to_user(arg, &info, minsz) ? -EFAULT : 0;
}

/* RFC patch 5: the aperture is at 0 of BAR2, wherever the host has it */
static int gvt_add_sparse(struct vgpu *vgpu, struct vfio_info_cap *caps)
{
	struct vfio_region_info_cap_sparse_mmap *sparse;
	size_t size = struct_size(sparse, areas, 1);
	int ret;

	sparse = kzalloc(size, GFP_KERNEL);
	if (!sparse)
		return -ENOMEM;
	sparse->header.id = VFIO_REGION_INFO_CAP_SPARSE_MMAP;
	sparse->header.version = 1;
	sparse->nr_areas = 1;
	sparse->areas[0].offset = 0;
	sparse->areas[0].size = vgpu->low_gm;
	ret = vfio_info_add_capability(caps, &sparse->header, size);
	kfree(sparse);
	return ret;
}

/* What a device of another protocol has at this index, for tests */
static int gvt_add_type(u32 type, struct vfio_info_cap *caps)
{
	struct vfio_region_info_cap_type cap = {
		.header.id = VFIO_REGION_INFO_CAP_TYPE,
		.header.version = 1,
		.type = type,
		.subtype = 1,
	};

	return vfio_info_add_capability(caps, &cap.header, sizeof(cap));
}

static int gvt_describe_region(struct vgpu *vgpu, struct vfio_region_info *info,
			       struct vfio_info_cap *caps)
{
	u32 type;

	info->offset = (u64)info->index << GVT_REGION_SHIFT;
	info->size = gvt_region_size(info->index);
	info->cap_offset = 0;
	info->flags = info->size ? VFIO_REGION_INFO_FLAG_READ |
				   VFIO_REGION_INFO_FLAG_WRITE : 0;
	if (info->index == GVT_BAR2_INDEX) {
		info->flags |= VFIO_REGION_INFO_FLAG_MMAP;
		return gvt_add_sparse(vgpu, caps);
	}
	type = READ_ONCE(gvt_state_cap_type);
	if (info->index == GVT_STATE_INDEX && type)
		return gvt_add_type(type, caps);
	return 0;
}

#ifdef GVT_SINCE_6_19
/* vfio copies from and to the user, and the capabilities */
static int gvt_get_region_info_caps(struct vfio_device *vdev,
				    struct vfio_region_info *info,
				    struct vfio_info_cap *caps)
{
	if (info->index >= VFIO_PCI_RFC_NUM_REGIONS)
		return -EINVAL;
	return gvt_describe_region(vdev_to_vgpu(vdev), info, caps);
}
#else
/* The chain behind the struct, or the size that it would take */
static int gvt_copy_caps(struct vfio_region_info *info,
			 struct vfio_info_cap *caps, void __user *arg)
{
	if (!caps->size)
		return 0;
	info->flags |= VFIO_REGION_INFO_FLAG_CAPS;
	if (info->argsz < sizeof(*info) + caps->size) {
		info->argsz = sizeof(*info) + caps->size;
		return 0;
	}
	vfio_info_cap_shift(caps, sizeof(*info));
	info->cap_offset = sizeof(*info);
	return copy_to_user(arg + sizeof(*info), caps->buf, caps->size) ?
	       -EFAULT : 0;
}

static long gvt_get_region_info(struct vgpu *vgpu, void __user *arg)
{
	const size_t minsz = offsetofend(struct vfio_region_info, offset);
	struct vfio_info_cap caps = {};
	struct vfio_region_info info;
	int ret;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz || info.index >= VFIO_PCI_RFC_NUM_REGIONS)
		return -EINVAL;
	ret = gvt_describe_region(vgpu, &info, &caps);
	if (!ret)
		ret = gvt_copy_caps(&info, &caps, arg);
	if (!ret && copy_to_user(arg, &info, minsz))
		ret = -EFAULT;
	kfree(caps.buf);
	return ret;
}
#endif

static unsigned int gvt_irq_count(unsigned int index)
{
	return index == VFIO_PCI_INTX_IRQ_INDEX ||
	       index == VFIO_PCI_MSI_IRQ_INDEX;
}

static long gvt_get_irq_info(void __user *arg)
{
	const size_t minsz = offsetofend(struct vfio_irq_info, count);
	struct vfio_irq_info info;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz || !gvt_irq_count(info.index))
		return -EINVAL;
	info.count = 1;
	info.flags = VFIO_IRQ_INFO_EVENTFD;
	if (info.index == VFIO_PCI_INTX_IRQ_INDEX)
		info.flags |= VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED;
	else
		info.flags |= VFIO_IRQ_INFO_NORESIZE;
	return copy_to_user(arg, &info, minsz) ? -EFAULT : 0;
}

static long gvt_set_irqs(struct vgpu *vgpu, void __user *arg)
{
	const size_t minsz = offsetofend(struct vfio_irq_set, count);
	struct vfio_irq_set hdr;
	size_t data_size = 0;
	void *data = NULL;
	int ret;

	if (copy_from_user(&hdr, arg, minsz))
		return -EFAULT;
	ret = vfio_set_irqs_validate_and_prepare(&hdr, gvt_irq_count(hdr.index),
						 VFIO_PCI_NUM_IRQS, &data_size);
	if (ret)
		return ret;
	if (data_size) {
		data = memdup_user(arg + minsz, data_size);
		if (IS_ERR(data))
			return PTR_ERR(data);
	}
	ret = gvt_irq_set(vgpu, hdr.flags, hdr.index, hdr.start, hdr.count,
			  data);
	kfree(data);
	return ret;
}

static int gvt_set_active(struct vgpu *vgpu, bool active)
{
	struct gvt_fault fault;
	int ret;

	ret = gvt_fault_begin(vgpu, active ? GVT_FAULT_START : GVT_FAULT_STOP,
			      &fault);
	if (ret)
		return ret;
	return gvt_fault_end(&fault, gvt_mig_set_active(vgpu, active));
}

static long gvt_dirty(struct vgpu *vgpu, void __user *arg)
{
	struct gvt_fault fault;
	long ret;

	ret = gvt_fault_begin(vgpu, GVT_FAULT_DIRTY, &fault);
	return ret ? ret : gvt_fault_end(&fault, gvt_dirty_ioctl(vgpu, arg));
}

static int gvt_reset(struct vgpu *vgpu)
{
	struct gvt_fault fault;
	int ret;

	ret = gvt_fault_begin(vgpu, GVT_FAULT_RESET, &fault);
	if (ret)
		return ret;
	gvt_mig_reset(vgpu);
	return gvt_fault_end(&fault, 0);
}

/* Mistakes: flags that name no request ask for nothing */
static bool gvt_status_passes(struct vgpu *vgpu, u32 flags)
{
	if (!flags)
		return gvt_defect(vgpu, GVT_DEFECT_STATUS_NO_FLAG);
	if (flags == (VFIO_DEVICE_PCI_STOP | VFIO_DEVICE_PCI_START))
		return gvt_defect(vgpu, GVT_DEFECT_STATUS_BOTH_FLAGS);
	return gvt_defect(vgpu, GVT_DEFECT_STATUS_UNKNOWN_FLAG);
}

/* RFC patch 7 */
static long gvt_status_set(struct vgpu *vgpu, void __user *arg)
{
	struct vfio_pci_status_set status;

	if (copy_from_user(&status, arg, sizeof(status)))
		return -EFAULT;
	if (status.argsz < sizeof(status) &&
	    !gvt_defect(vgpu, GVT_DEFECT_STATUS_ARGSZ))
		return -EINVAL;
	switch (status.flags) {
	case VFIO_DEVICE_PCI_STOP:
		if (!READ_ONCE(vgpu->active) &&
		    gvt_defect(vgpu, GVT_DEFECT_STATUS_STOP_TWICE))
			return -EINVAL;
		return gvt_set_active(vgpu, false);
	case VFIO_DEVICE_PCI_START:
		return gvt_set_active(vgpu, true);
	}
	gvt_note(vgpu, "status: flags %#x", status.flags);
	return gvt_status_passes(vgpu, status.flags) ? 0 : -EINVAL;
}

static long gvt_other_ioctl(struct vgpu *vgpu, unsigned int cmd,
			    void __user *arg)
{
	switch (cmd) {
	case VFIO_DEVICE_GET_INFO:
		return gvt_get_info(vgpu, arg);
#ifndef GVT_SINCE_6_19
	case VFIO_DEVICE_GET_REGION_INFO:
		return gvt_get_region_info(vgpu, arg);
#endif
	case VFIO_DEVICE_GET_IRQ_INFO:
		return gvt_get_irq_info(arg);
	case VFIO_DEVICE_SET_IRQS:
		return gvt_set_irqs(vgpu, arg);
	case VFIO_DEVICE_RESET:
		return gvt_reset(vgpu);
	}
	return -ENOTTY;
}

static long gvt_ioctl(struct vfio_device *vdev, unsigned int cmd,
		      unsigned long arg)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);

	switch (cmd) {
	case GVT_STATUS_SET:
		atomic64_inc(&vgpu->counters.status_set);
		return gvt_status_set(vgpu, (void __user *)arg);
	case GVT_GET_DIRTY:
		atomic64_inc(&vgpu->counters.get_dirty);
		return gvt_dirty(vgpu, (void __user *)arg);
	}
	atomic64_inc(&vgpu->counters.other_ioctl);
	return gvt_other_ioctl(vgpu, cmd, (void __user *)arg);
}

/* --- life ------------------------------------------------------------ */

static int gvt_open_device(struct vfio_device *vdev)
{
	gvt_submit_open(vdev_to_vgpu(vdev));
	return 0;
}

/* Registers, config space, guest GGTT and host fences stay as they are */
static void gvt_close_device(struct vfio_device *vdev)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);

	gvt_mig_close(vgpu);
	gvt_submit_close(vgpu);
	mutex_lock(&vgpu->lock);
	gvt_gtt_reset(vgpu);
	mutex_unlock(&vgpu->lock);
	gvt_irq_release(vgpu);
}

static void gvt_dma_unmap(struct vfio_device *vdev, u64 iova, u64 length)
{
	gvt_gtt_dma_unmap(vdev_to_vgpu(vdev), iova, length);
}

static int gvt_cfg_alloc(struct vgpu *vgpu)
{
	vgpu->cfg = kzalloc(GVT_IMAGE_CFG_SIZE, GFP_KERNEL_ACCOUNT);
	if (!vgpu->cfg)
		return -ENOMEM;
	mutex_lock(&vgpu->lock);
	gvt_cfg_init(vgpu);
	mutex_unlock(&vgpu->lock);
	return 0;
}

static int gvt_init_parts(struct vgpu *vgpu)
{
	int ret;

	gvt_log_init(vgpu);
	ret = gvt_cfg_alloc(vgpu);
	if (ret)
		return ret;
	ret = gvt_mmio_init(vgpu);
	if (ret)
		goto err_cfg;
	ret = gvt_gtt_init(vgpu);
	if (ret)
		goto err_mmio;
	ret = gvt_submit_init(vgpu);
	if (ret)
		goto err_gtt;
	gvt_state_init(vgpu);
	return 0;

err_gtt:
	gvt_gtt_fini(vgpu);
err_mmio:
	gvt_mmio_fini(vgpu);
err_cfg:
	kfree(vgpu->cfg);
	return ret;
}

/* vfio frees the zeroed struct itself when this fails, without .release */
static int gvt_init_device(struct vfio_device *vdev)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);
	int ret;

	vgpu->mdev = to_mdev_device(vdev->dev);
	vgpu->type = container_of(vgpu->mdev->type, struct gvt_type, type);
	mutex_init(&vgpu->lock);
	spin_lock_init(&vgpu->irq_lock);
	spin_lock_init(&vgpu->fault_lock);
	ret = gvt_pool_alloc(vgpu);
	if (ret)
		return ret;
	ret = gvt_init_parts(vgpu);
	if (ret)
		gvt_pool_free(vgpu);
	else
		gvt_mig_init(vgpu);
	return ret;
}

static void gvt_release_device(struct vfio_device *vdev)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);

	gvt_mig_fini(vgpu);
	gvt_state_fini(vgpu);
	gvt_submit_fini(vgpu);
	gvt_gtt_fini(vgpu);
	gvt_mmio_fini(vgpu);
	gvt_log_fini(vgpu);
	kfree(vgpu->cfg);
	kvfree(vgpu->last_ring);
	gvt_pool_free(vgpu);
#ifndef GVT_SINCE_6_2
	vfio_free_device(vdev);	/* until 6.1 the driver's to do */
#endif
}

static const struct vfio_device_ops gvt_device_ops = {
	.name		= GVT_NAME,
	.init		= gvt_init_device,
	.release	= gvt_release_device,
	.open_device	= gvt_open_device,
	.close_device	= gvt_close_device,
	.read		= gvt_read,
	.write		= gvt_write,
	.ioctl		= gvt_ioctl,
#ifdef GVT_SINCE_6_19
	.get_region_info_caps = gvt_get_region_info_caps,
#endif
	.device_feature	= gvt_feature,
	.mmap		= gvt_mmap,
	.dma_unmap	= gvt_dma_unmap,
#ifdef GVT_SINCE_6_2
	.bind_iommufd	= vfio_iommufd_emulated_bind,
	.unbind_iommufd	= vfio_iommufd_emulated_unbind,
	.attach_ioas	= vfio_iommufd_emulated_attach_ioas,
#endif
#ifdef GVT_SINCE_6_6
	.detach_ioas	= vfio_iommufd_emulated_detach_ioas,
#endif
};

static int gvt_probe(struct mdev_device *mdev)
{
	struct vgpu *vgpu;
	int ret;

	vgpu = vfio_alloc_device(vgpu, vdev, &mdev->dev, &gvt_device_ops);
	if (IS_ERR(vgpu))
		return PTR_ERR(vgpu);
	dev_set_drvdata(&mdev->dev, vgpu);
	gvt_debugfs_add(vgpu);
	gvt_hw_show(vgpu);
	gvt_mig_show(vgpu);
	ret = vfio_register_emulated_iommu_dev(&vgpu->vdev);
	if (!ret)
		return 0;
	gvt_debugfs_remove(vgpu);
	vfio_put_device(&vgpu->vdev);
	return ret;
}

/* Waits until the last fd is closed */
static void gvt_remove(struct mdev_device *mdev)
{
	struct vgpu *vgpu = dev_get_drvdata(&mdev->dev);

	vfio_unregister_group_dev(&vgpu->vdev);
	gvt_debugfs_remove(vgpu);
	vfio_put_device(&vgpu->vdev);
}

static unsigned int gvt_get_available(struct mdev_type *type)
{
	return gvt_pool_available(container_of(type, struct gvt_type, type));
}

/* kvmgt's text: nothing else tells the sizes of GM */
static ssize_t gvt_show_description(struct mdev_type *mtype, char *buf)
{
	const struct gvt_type *type = container_of(mtype, struct gvt_type, type);

	return sysfs_emit(buf,
			  "low_gm_size: %lluMB\nhigh_gm_size: %lluMB\n"
			  "fence: %d\nresolution: %s\nweight: %u\n",
			  type->low_gm >> 20, type->high_gm >> 20,
			  GVT_VGPU_FENCES, type->resolution, type->weight);
}

struct mdev_driver gvt_mdev_driver = {
	.device_api		= VFIO_DEVICE_API_PCI_STRING,
	.probe			= gvt_probe,
	.remove			= gvt_remove,
	.get_available		= gvt_get_available,
	.show_description	= gvt_show_description,
	.driver = {
		.name		= GVT_NAME "_mdev",
		.owner		= THIS_MODULE,
		.mod_name	= KBUILD_MODNAME,
	},
};
