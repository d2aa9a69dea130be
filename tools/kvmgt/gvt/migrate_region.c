// SPDX-License-Identifier: MIT
/*
 * The RFC's state region: reading it saves a vGPU, writing it restores one.
 */
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "i915_drv.h"
#include "gvt.h"
#include "migrate_image.h"

static int read_state(struct intel_vgpu *vgpu, char __user *buf, size_t count, void *image)
{
	ssize_t size;

	if (mutex_lock_killable(&vgpu->migration.lock))
		return -EINTR;
	mutex_lock(&vgpu->vgpu_lock);
	size = intel_vgpu_save(vgpu, image, MIGRATION_IMG_MAX_SIZE);
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
	void *image;
	int ret;

	if (off || (write && count > MIGRATION_IMG_MAX_SIZE))
		return -EFAULT;
	count = min_t(size_t, count, MIGRATION_IMG_MAX_SIZE);

	image = __vmalloc(MIGRATION_IMG_MAX_SIZE, GFP_KERNEL_ACCOUNT | __GFP_ZERO);
	if (!image)
		return -ENOMEM;

	ret = write ? write_state(vgpu, buf, count, image) : read_state(vgpu, buf, count, image);
	vfree(image);
	if (ret)
		return ret == -EINTR || ret == -ENOMEM ? ret : -EFAULT;
	return count;
}
