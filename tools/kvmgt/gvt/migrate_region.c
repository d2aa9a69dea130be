// SPDX-License-Identifier: MIT
/*
 * The RFC's state region: reading it saves a vGPU, writing it restores one.
 */
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "i915_drv.h"
#include "gvt.h"
#include "migrate_image.h"

/* Of a state all but the GTT: registers, configuration space, lists, headers */
#define STATE_FIXED_SIZE	(2 * GVT_IMAGE_REG_SIZE + SZ_256K)

/**
 * intel_vgpu_image_max - how large is the state region of a vGPU?
 * @vgpu: a vGPU that has its resources
 *
 * Returns: bytes: what the RFC has, or more if the GTT's entries do not fit in
 */
size_t intel_vgpu_image_max(struct intel_vgpu *vgpu)
{
	u64 pages = (vgpu_aperture_sz(vgpu) + vgpu_hidden_sz(vgpu)) >> I915_GTT_PAGE_SHIFT;

	if (STATE_FIXED_SIZE + pages * sizeof(u64) < MIGRATION_IMG_MAX_SIZE)
		return MIGRATION_IMG_MAX_SIZE;
	return MIGRATION_IMG_LARGE_SIZE;
}

static int read_state(struct intel_vgpu *vgpu, char __user *buf, size_t count, void *image)
{
	ssize_t size;

	if (mutex_lock_killable(&vgpu->migration.lock))
		return -EINTR;
	mutex_lock(&vgpu->vgpu_lock);
	size = intel_vgpu_save(vgpu, image, intel_vgpu_image_max(vgpu));
	mutex_unlock(&vgpu->vgpu_lock);
	mutex_unlock(&vgpu->migration.lock);

	if (size < 0)
		return size;
	return copy_to_user(buf, image, count) ? -EFAULT : 0;
}

static int write_state(struct intel_vgpu *vgpu, const char __user *buf, size_t count, void *image)
{
	bool was_stopped;
	int ret;

	if (copy_from_user(image, buf, count))
		return -EFAULT;

	if (mutex_lock_killable(&vgpu->migration.lock))
		return -EINTR;
	was_stopped = intel_vgpu_is_stopped(vgpu);
	ret = intel_vgpu_stop(vgpu);
	if (!ret)
		ret = intel_vgpu_restore(vgpu, image, count);
	if (!was_stopped)
		intel_vgpu_start(vgpu);
	mutex_unlock(&vgpu->migration.lock);
	return ret;
}

/**
 * intel_vgpu_state_rw - read or write the state region
 * @vgpu: a vGPU that is open
 * @buf: the caller's memory
 * @count: bytes
 * @off: offset in the region, 0
 * @write: restore
 *
 * One access is one image: whoever reads less than it has a part of it, whoever
 * writes one and no zeros behind it is as well off as with zeros.
 *
 * Returns: @count, of a read no more than the region; -EFAULT for any failure
 * of an image, as in the RFC
 */
ssize_t intel_vgpu_state_rw(struct intel_vgpu *vgpu, char __user *buf, size_t count, u64 off,
			    bool write)
{
	size_t max = intel_vgpu_image_max(vgpu);
	void *image;
	int ret;

	if (off || (write && count > max))
		return -EFAULT;
	count = min_t(size_t, count, max);

	image = __vmalloc(max, GFP_KERNEL_ACCOUNT | __GFP_ZERO);
	if (!image)
		return -ENOMEM;

	ret = write ? write_state(vgpu, buf, count, image) : read_state(vgpu, buf, count, image);
	vfree(image);
	if (ret)
		return ret == -EINTR || ret == -ENOMEM ? ret : -EFAULT;
	return count;
}
