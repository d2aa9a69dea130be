// SPDX-License-Identifier: MIT
/*
 * Migration protocol v2 of <linux/vfio.h>.
 *
 * A vGPU has no peers that could address it by DMA, and begins all of its own:
 * in a P2P state it stands still. There is no PRE_COPY, as a state is a few
 * megabytes, and no log of dirty pages: the container knows what was pinned for
 * the GPU, and what vfio_dma_rw() wrote.
 *
 * The data of a session is one image, of the same records as the RFC's
 * (migrate_image.h). It is taken whole on the way to STOP_COPY, and checked and
 * loaded whole on the way from RESUMING to STOP.
 */
#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/module.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "i915_drv.h"
#include "gvt.h"
#include "migrate_compat.h"
#include "migrate_image.h"

/* For what a guest may have any number of: page tables, work, half entries */
#define SPARE_BYTES	SZ_1M

/* A session: what its data fd and the vGPU share. The file frees it. */
struct intel_vgpu_stream {
	struct file *filp;
	struct mutex lock;	/* protects what follows; taken after migration.lock */
	bool over;		/* the vGPU has left the state that it was for */
	void *image;
	size_t room;
	size_t size;		/* bytes of the image that are there */
	size_t pos;		/* bytes of it that were read */
};

/* --- the data fd ------------------------------------------------------ */

static ssize_t stream_read(struct file *filp, char __user *buf, size_t count, loff_t *ppos)
{
	struct intel_vgpu_stream *stream = filp->private_data;
	ssize_t ret;

	if (ppos)
		return -ESPIPE;

	mutex_lock(&stream->lock);
	count = min(count, stream->size - stream->pos);
	if (stream->over) {
		ret = -ENODEV;
	} else if (copy_to_user(buf, stream->image + stream->pos, count)) {
		ret = -EFAULT;
	} else {
		stream->pos += count;
		ret = count;
	}
	mutex_unlock(&stream->lock);
	return ret;
}

static ssize_t stream_write(struct file *filp, const char __user *buf, size_t count,
			    loff_t *ppos)
{
	struct intel_vgpu_stream *stream = filp->private_data;
	ssize_t ret;

	if (ppos)
		return -ESPIPE;

	mutex_lock(&stream->lock);
	if (stream->over) {
		ret = -ENODEV;
	} else if (count > stream->room - stream->size) {
		ret = -EINVAL;	/* no vGPU of this type has so much */
	} else if (copy_from_user(stream->image + stream->size, buf, count)) {
		ret = -EFAULT;
	} else {
		stream->size += count;
		ret = count;
	}
	mutex_unlock(&stream->lock);
	return ret;
}

static void free_stream(struct intel_vgpu_stream *stream)
{
	vfree(stream->image);
	mutex_destroy(&stream->lock);
	kfree(stream);
}

static int stream_release(struct inode *inode, struct file *filp)
{
	free_stream(filp->private_data);
	return 0;
}

static const struct file_operations save_fops = {
	.owner = THIS_MODULE,
	.read = stream_read,
	.release = stream_release,
};

static const struct file_operations load_fops = {
	.owner = THIS_MODULE,
	.write = stream_write,
	.release = stream_release,
};

static struct intel_vgpu_stream *new_stream(struct intel_vgpu *vgpu, bool saving)
{
	struct intel_vgpu_stream *stream = kzalloc_obj(*stream, GFP_KERNEL_ACCOUNT);
	struct file *filp;

	if (!stream)
		return ERR_PTR(-ENOMEM);

	mutex_init(&stream->lock);
	stream->room = intel_vgpu_image_size(vgpu) + SPARE_BYTES;
	stream->image = __vmalloc(stream->room, GFP_KERNEL_ACCOUNT);
	if (!stream->image) {
		free_stream(stream);
		return ERR_PTR(-ENOMEM);
	}

	filp = anon_inode_getfile("kvmgt_mig", saving ? &save_fops : &load_fops, stream,
				  saving ? O_RDONLY : O_WRONLY);
	if (IS_ERR(filp)) {
		free_stream(stream);
		return ERR_CAST(filp);
	}
	stream_open(file_inode(filp), filp);
	stream->filp = filp;
	return stream;
}

/* --- sessions; under migration.lock ----------------------------------- */

static void end_session(struct intel_vgpu *vgpu)
{
	struct intel_vgpu_stream *stream = vgpu->migration.stream;

	if (!stream)
		return;

	vgpu->migration.stream = NULL;
	mutex_lock(&stream->lock);
	stream->over = true;
	/* whoever keeps the fd open need not keep the memory */
	vfree(stream->image);
	stream->image = NULL;
	stream->size = 0;
	stream->pos = 0;
	mutex_unlock(&stream->lock);
	fput(stream->filp);
}

/* The file is the caller's; the vGPU has a reference of its own */
static struct file *begin_session(struct intel_vgpu *vgpu, struct intel_vgpu_stream *stream)
{
	vgpu->migration.stream = stream;
	return get_file(stream->filp);
}

static struct file *begin_save(struct intel_vgpu *vgpu)
{
	struct intel_vgpu_stream *stream = new_stream(vgpu, true);
	ssize_t size;

	if (IS_ERR(stream))
		return ERR_CAST(stream);

	mutex_lock(&vgpu->vgpu_lock);
	size = intel_vgpu_save(vgpu, stream->image, stream->room);
	mutex_unlock(&vgpu->vgpu_lock);
	if (size < 0) {
		fput(stream->filp);
		return ERR_PTR(size);
	}

	stream->size = size;
	return begin_session(vgpu, stream);
}

static struct file *begin_load(struct intel_vgpu *vgpu)
{
	struct intel_vgpu_stream *stream = new_stream(vgpu, false);

	if (IS_ERR(stream))
		return ERR_CAST(stream);
	return begin_session(vgpu, stream);
}

/*
 * The data has come. The vGPU becomes what it says, or stays what it was and is
 * in state ERROR: there is nothing that a user could add to a session that is
 * over. A reset leads out of there.
 */
static int end_load(struct intel_vgpu *vgpu)
{
	struct intel_vgpu_stream *stream = vgpu->migration.stream;
	size_t size;
	void *image;
	int ret;

	/* out of the session, so that no writer can change it any more */
	mutex_lock(&stream->lock);
	image = stream->image;
	size = stream->size;
	stream->image = NULL;
	stream->over = true;
	mutex_unlock(&stream->lock);
	end_session(vgpu);

	ret = intel_vgpu_restore(vgpu, image, size);
	vfree(image);
	if (ret)
		WRITE_ONCE(vgpu->migration.state, VFIO_DEVICE_STATE_ERROR);
	return ret;
}

/* --- states; under migration.lock ------------------------------------- */

static struct file *go(struct intel_vgpu *vgpu, enum vfio_device_mig_state from,
		       enum vfio_device_mig_state to)
{
	switch (from) {
	case VFIO_DEVICE_STATE_RUNNING:
		return ERR_PTR(intel_vgpu_stop(vgpu));
	case VFIO_DEVICE_STATE_RUNNING_P2P:
		if (to == VFIO_DEVICE_STATE_RUNNING)
			intel_vgpu_start(vgpu);
		return NULL;
	case VFIO_DEVICE_STATE_STOP:
		if (to == VFIO_DEVICE_STATE_STOP_COPY)
			return begin_save(vgpu);
		if (to == VFIO_DEVICE_STATE_RESUMING)
			return begin_load(vgpu);
		return NULL;
	case VFIO_DEVICE_STATE_STOP_COPY:
		end_session(vgpu);
		return NULL;
	case VFIO_DEVICE_STATE_RESUMING:
		return ERR_PTR(end_load(vgpu));
	default:
		return ERR_PTR(-EINVAL);
	}
}

static struct file *go_all_the_way(struct intel_vgpu *vgpu, enum vfio_device_mig_state target)
{
	struct intel_vgpu_migration *migration = &vgpu->migration;
	struct file *filp = NULL;

	while (migration->state != target) {
		enum vfio_device_mig_state next;
		int ret;

		/* the kernel would warn about it */
		if (migration->state == VFIO_DEVICE_STATE_ERROR)
			return ERR_PTR(-EINVAL);
		ret = vfio_mig_get_next_state(&vgpu->vfio_device, migration->state, target, &next);
		if (ret)
			return ERR_PTR(ret);

		filp = go(vgpu, migration->state, next);
		if (IS_ERR(filp))
			return filp;
		WRITE_ONCE(migration->state, next);
		if (WARN_ON(filp && next != target)) {
			fput(filp);
			return ERR_PTR(-EINVAL);
		}
	}
	return filp;
}

static struct file *set_state(struct vfio_device *vfio_dev, enum vfio_device_mig_state target)
{
	struct intel_vgpu *vgpu = container_of(vfio_dev, struct intel_vgpu, vfio_device);
	struct file *filp;

	if (mutex_lock_killable(&vgpu->migration.lock))
		return ERR_PTR(-EINTR);
	filp = go_all_the_way(vgpu, target);
	mutex_unlock(&vgpu->migration.lock);
	return filp;
}

static int get_state(struct vfio_device *vfio_dev, enum vfio_device_mig_state *state)
{
	struct intel_vgpu *vgpu = container_of(vfio_dev, struct intel_vgpu, vfio_device);

	*state = READ_ONCE(vgpu->migration.state);
	return 0;
}

#ifdef GVT_HAS_MIGRATION_DATA_SIZE
static int get_data_size(struct vfio_device *vfio_dev, unsigned long *size)
{
	*size = intel_vgpu_image_size(container_of(vfio_dev, struct intel_vgpu, vfio_device));
	return 0;
}
#endif

static const struct vfio_migration_ops migration_ops = {
	.migration_set_state = set_state,
	.migration_get_state = get_state,
#ifdef GVT_HAS_MIGRATION_DATA_SIZE
	.migration_get_data_size = get_data_size,
#endif
};

/* A vGPU that was reset runs, and so does one that is opened again. */
static void end_v2(struct intel_vgpu *vgpu)
{
	lockdep_assert_held(&vgpu->migration.lock);

	end_session(vgpu);
	WRITE_ONCE(vgpu->migration.state, VFIO_DEVICE_STATE_RUNNING);
}

/**
 * intel_vgpu_init_v2 - offer protocol v2, if it was asked for
 * @vgpu: a vGPU that is being created
 */
void intel_vgpu_init_v2(struct intel_vgpu *vgpu)
{
	if (!intel_gvt_migrates_v2())
		return;

	vgpu->migration.state = VFIO_DEVICE_STATE_RUNNING;
	vgpu->migration.end = end_v2;
	vgpu->vfio_device.migration_flags = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P;
	vgpu->vfio_device.mig_ops = &migration_ops;
}
