// SPDX-License-Identifier: GPL-2.0-only
/*
 * Mainline's migration protocol, v2 of <linux/vfio.h>: sessions, states and
 * VFIO's operations. What a stream holds is told in mig.h.
 */
#include <linux/build_bug.h>
#include <linux/file.h>
#include <linux/ktime.h>
#include <linux/random.h>
#include <linux/slab.h>

#include "mig.h"
#include "hw/hw.h"
#include "lab/lab.h"

/* <linux/vfio.h> of Linux 7.1 */
#define GVT_FEATURE_PRECOPY_INFO2	12
#define GVT_FLAG_PRE_COPY		BIT(2)	/* not there before 6.2 */

/* --- sessions; under state_mutex ------------------------------------- */

static void gvt_session_end(struct vgpu *vgpu)
{
	struct gvt_mig_file *migf = vgpu->mig.file;

	if (!migf)
		return;
	vgpu->mig.file = NULL;
	WRITE_ONCE(migf->over, true);
	mutex_lock(&migf->lock);
	migf->vgpu = NULL;
	gvt_mig_file_empty(migf);
	mutex_unlock(&migf->lock);
	fput(migf->filp);
}

/* But with the mistake it lives on, until another begins or the vGPU ends */
static void gvt_session_end_unless(struct vgpu *vgpu, enum gvt_defect mistake)
{
	if (!gvt_defect(vgpu, mistake))
		gvt_session_end(vgpu);
}

/* The vGPU's session from now on; what is returned is the caller's reference */
static struct file *gvt_session_begin(struct vgpu *vgpu,
				      struct gvt_mig_file *migf)
{
	gvt_session_end(vgpu);		/* there is none, but for a mistake */
	get_file(migf->filp);
	vgpu->mig.file = migf;
	return migf->filp;
}

/* What the device is behind the filler. It must not run any more. */
static int gvt_take_image(struct gvt_mig_file *migf, void *buf, u32 room)
{
	int ret = gvt_image_take(migf->vgpu, buf, room);

	if (ret < 0)
		return ret;
	migf->image = buf;
	migf->image_size = ret;
	return 0;
}

static void gvt_fill_header(struct gvt_mig_file *migf, bool precopy)
{
	const struct gvt_mig *mig = &migf->vgpu->mig;
	struct gvt_mig_header *header = &migf->header;

	BUILD_BUG_ON(sizeof(struct gvt_mig_header) != 64);
	BUILD_BUG_ON(sizeof(struct gvt_mig_record) != 16);
	header->magic = GVT_MIG_MAGIC;
	header->version = GVT_MIG_VERSION;
	header->flags = precopy ? GVT_MIG_PRE_COPY : 0;
	strscpy(header->type, migf->vgpu->type->name, sizeof(header->type));
	header->filler = READ_ONCE(mig->extra_bytes);
	header->seed = mig->seed;
	if (!precopy)
		header->total = sizeof(*header) + header->filler +
				sizeof(migf->record) + migf->image_size;
}

static struct file *gvt_stop_copy(struct vgpu *vgpu)
{
	struct gvt_mig_file *migf = gvt_mig_file_new(vgpu, true);
	u32 room = gvt_image_max(vgpu);
	int ret = -ENOMEM;
	void *buf;

	if (IS_ERR(migf))
		return ERR_CAST(migf);
	buf = kvmalloc(room, GFP_KERNEL_ACCOUNT);
	if (buf)
		ret = gvt_take_image(migf, buf, room);
	if (ret) {
		kvfree(buf);
		fput(migf->filp);
		return ERR_PTR(ret);
	}
	gvt_fill_header(migf, false);
	return gvt_session_begin(vgpu, migf);
}

static struct file *gvt_pre_copy(struct vgpu *vgpu, bool dirtying)
{
	struct gvt_mig_file *migf = gvt_mig_file_new(vgpu, true);

	if (IS_ERR(migf))
		return ERR_CAST(migf);
	gvt_fill_header(migf, true);
	migf->precopy = true;
	migf->dirtying = dirtying;
	migf->since = ktime_get_ns();
	return gvt_session_begin(vgpu, migf);
}

static int gvt_pre_copy_stop(struct vgpu *vgpu)
{
	struct gvt_mig_file *migf = vgpu->mig.file;
	int ret;

	ret = gvt_submit_stop(vgpu);
	if (ret)
		return ret;
	mutex_lock(&migf->lock);
	gvt_dirty_go(migf, false);
	mutex_unlock(&migf->lock);
	return 0;
}

static void gvt_pre_copy_start(struct vgpu *vgpu)
{
	struct gvt_mig_file *migf = vgpu->mig.file;

	mutex_lock(&migf->lock);
	gvt_dirty_go(migf, true);
	if (gvt_defect(vgpu, GVT_DEFECT_PRECOPY_RESTARTS))
		gvt_save_restart(migf);
	mutex_unlock(&migf->lock);
	gvt_submit_start(vgpu);
}

static int gvt_pre_copy_last(struct vgpu *vgpu, bool running)
{
	struct gvt_mig_file *migf = vgpu->mig.file;
	u32 room = gvt_image_max(vgpu);
	void *buf;
	int ret;

	buf = kvmalloc(room, GFP_KERNEL_ACCOUNT);
	if (!buf)
		return -ENOMEM;
	ret = gvt_pre_copy_stop(vgpu);
	if (ret) {
		kvfree(buf);
		return ret;
	}
	mutex_lock(&migf->lock);
	ret = gvt_take_image(migf, buf, room);
	if (!ret)
		migf->precopy = false;
	mutex_unlock(&migf->lock);
	if (ret) {
		kvfree(buf);
		if (running)
			gvt_pre_copy_start(vgpu);
	}
	return ret;
}

/* PRE_COPY is over: the same session goes on, and will come to an end */
static struct file *gvt_pre_copy_end(struct vgpu *vgpu, bool running)
{
	int ret = gvt_pre_copy_last(vgpu, running);

	if (ret)
		return ERR_PTR(ret);
	if (gvt_defect(vgpu, GVT_DEFECT_PRECOPY_NEW_FD))
		return get_file(vgpu->mig.file->filp);
	return NULL;
}

static struct file *gvt_resuming(struct vgpu *vgpu)
{
	struct gvt_mig_file *migf = gvt_mig_file_new(vgpu, false);

	if (IS_ERR(migf))
		return ERR_CAST(migf);
	return gvt_session_begin(vgpu, migf);
}

/* The whole state has come: the vGPU becomes what it says */
static int gvt_resumed_apply(struct vgpu *vgpu, struct gvt_mig_file *migf)
{
	int ret;

	if (gvt_defect(vgpu, GVT_DEFECT_LOAD_NOTHING))
		return 0;
	ret = gvt_image_apply(vgpu, migf->parsed);
	if (ret)
		return ret;
	WRITE_ONCE(vgpu->mig.extra_bytes, migf->header.filler);
	if (!gvt_defect(vgpu, GVT_DEFECT_LOAD_LOSES_SEED))
		vgpu->mig.seed = migf->header.seed;
	return 0;
}

/*
 * Leaving RESUMING. Nothing of the device has changed so far; without a whole
 * state nothing does, and the device is in state ERROR.
 */
static int gvt_resumed(struct vgpu *vgpu)
{
	struct gvt_mig_file *migf = vgpu->mig.file;
	int ret = -EINVAL;

	mutex_lock(&migf->lock);
	if (migf->parsed && !migf->broken)
		ret = gvt_resumed_apply(vgpu, migf);
	else if (gvt_defect(vgpu, migf->broken ? GVT_DEFECT_LOAD_REFUSED :
						 GVT_DEFECT_LOAD_TRUNCATED))
		ret = 0;
	else if (!migf->broken)
		gvt_note(vgpu, "v2: not a whole state");
	mutex_unlock(&migf->lock);
	gvt_session_end(vgpu);
	if (ret)
		WRITE_ONCE(vgpu->mig.state, VFIO_DEVICE_STATE_ERROR);
	return ret;
}

/* A mistake: a session that may not end before it was read to its end */
static bool gvt_saved_unread(struct vgpu *vgpu)
{
	struct gvt_mig_file *migf = vgpu->mig.file;
	bool unread;

	if (!gvt_defect(vgpu, GVT_DEFECT_STOP_UNREAD))
		return false;
	mutex_lock(&migf->lock);
	unread = migf->stage != GVT_STAGE_END;
	mutex_unlock(&migf->lock);
	return unread;
}

/* --- states; under state_mutex --------------------------------------- */

#define GVT_ARC(from, to)	((from) << 8 | (to))

/* The vGPU begins all its DMA itself, so in a P2P state it stands still */
static struct file *gvt_mig_arc(struct vgpu *vgpu, u32 from, u32 to)
{
	switch (GVT_ARC(from, to)) {
	case GVT_ARC(VFIO_DEVICE_STATE_RUNNING, VFIO_DEVICE_STATE_RUNNING_P2P):
	case GVT_ARC(VFIO_DEVICE_STATE_RUNNING, VFIO_DEVICE_STATE_STOP):
		return ERR_PTR(gvt_submit_stop(vgpu));
	case GVT_ARC(VFIO_DEVICE_STATE_RUNNING_P2P, VFIO_DEVICE_STATE_STOP):
	case GVT_ARC(VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_RUNNING_P2P):
		return NULL;
	case GVT_ARC(VFIO_DEVICE_STATE_RUNNING_P2P, VFIO_DEVICE_STATE_RUNNING):
	case GVT_ARC(VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_RUNNING):
		return ERR_PTR(gvt_submit_start(vgpu));

	case GVT_ARC(VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_STOP_COPY):
		return gvt_stop_copy(vgpu);
	case GVT_ARC(VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_RESUMING):
		return gvt_resuming(vgpu);
	case GVT_ARC(VFIO_DEVICE_STATE_RESUMING, VFIO_DEVICE_STATE_STOP):
		return ERR_PTR(gvt_resumed(vgpu));

	case GVT_ARC(VFIO_DEVICE_STATE_RUNNING, VFIO_DEVICE_STATE_PRE_COPY):
		return gvt_pre_copy(vgpu, true);
	case GVT_ARC(VFIO_DEVICE_STATE_RUNNING_P2P,
		     VFIO_DEVICE_STATE_PRE_COPY_P2P):
		return gvt_pre_copy(vgpu, false);
	case GVT_ARC(VFIO_DEVICE_STATE_PRE_COPY, VFIO_DEVICE_STATE_PRE_COPY_P2P):
		return ERR_PTR(gvt_pre_copy_stop(vgpu));
	case GVT_ARC(VFIO_DEVICE_STATE_PRE_COPY_P2P, VFIO_DEVICE_STATE_PRE_COPY):
		gvt_pre_copy_start(vgpu);
		return NULL;
	case GVT_ARC(VFIO_DEVICE_STATE_PRE_COPY, VFIO_DEVICE_STATE_STOP_COPY):
		return gvt_pre_copy_end(vgpu, true);
	case GVT_ARC(VFIO_DEVICE_STATE_PRE_COPY_P2P,
		     VFIO_DEVICE_STATE_STOP_COPY):
		return gvt_pre_copy_end(vgpu, false);

	case GVT_ARC(VFIO_DEVICE_STATE_PRE_COPY, VFIO_DEVICE_STATE_RUNNING):
	case GVT_ARC(VFIO_DEVICE_STATE_PRE_COPY_P2P,
		     VFIO_DEVICE_STATE_RUNNING_P2P):
		gvt_session_end_unless(vgpu, GVT_DEFECT_PRECOPY_KEEPS_FD);
		return NULL;
	case GVT_ARC(VFIO_DEVICE_STATE_STOP_COPY, VFIO_DEVICE_STATE_STOP):
		if (gvt_saved_unread(vgpu))
			return ERR_PTR(-EBUSY);
		gvt_session_end_unless(vgpu, GVT_DEFECT_STOP_KEEPS_FD);
		return NULL;
	}
	return ERR_PTR(-EINVAL);
}

/*
 * The kernel warns about a device that is in state ERROR. And there are kernels
 * whose table leads from STOP_COPY to PRE_COPY by way of STOP_COPY, for ever.
 */
static int gvt_mig_next(struct vgpu *vgpu, u32 target, u32 *next)
{
	enum vfio_device_mig_state found;
	u32 state = vgpu->mig.state;
	int ret;

	if (state == VFIO_DEVICE_STATE_ERROR)
		return -EINVAL;
	if (state == VFIO_DEVICE_STATE_STOP_COPY &&
	    (target == VFIO_DEVICE_STATE_PRE_COPY ||
	     target == VFIO_DEVICE_STATE_PRE_COPY_P2P))
		return -EINVAL;
	ret = vfio_mig_get_next_state(&vgpu->vdev, state, target, &found);
	if (ret)
		return ret;
	*next = found;
	return *next == state ? -EINVAL : 0;
}

static struct file *gvt_mig_go(struct vgpu *vgpu, u32 target)
{
	struct file *filp = NULL;
	u32 next;
	int ret;

	while (vgpu->mig.state != target) {
		ret = gvt_mig_next(vgpu, target, &next);
		if (ret)
			return ERR_PTR(ret);
		filp = gvt_mig_arc(vgpu, vgpu->mig.state, next);
		if (IS_ERR(filp))
			return filp;
		WRITE_ONCE(vgpu->mig.state, next);
		if (next == VFIO_DEVICE_STATE_STOP &&
		    gvt_defect(vgpu, GVT_DEFECT_LOG_ENDS_AT_STOP))
			gvt_log_off(vgpu);
		if (WARN_ON(filp && next != target)) {
			fput(filp);
			return ERR_PTR(-EINVAL);
		}
	}
	return filp;
}

/* A step of gvt_mig_go() that comes with no data fd, by mistake */
static struct file *gvt_mig_go_without(struct vgpu *vgpu, u32 target)
{
	struct file *filp = gvt_mig_go(vgpu, target);

	if (IS_ERR_OR_NULL(filp))
		return filp;
	fput(filp);
	return NULL;
}

/* The mistakes that are made for a whole request; false: none is */
static bool gvt_mig_mistake(struct vgpu *vgpu, u32 target, struct file **filp)
{
	struct gvt_mig *mig = &vgpu->mig;

	*filp = NULL;
	if (target > VFIO_DEVICE_STATE_PRE_COPY_P2P)
		return gvt_defect(vgpu, GVT_DEFECT_STATE_UNKNOWN);
	if (target == VFIO_DEVICE_STATE_ERROR &&
	    gvt_defect(vgpu, GVT_DEFECT_STATE_ERROR)) {
		gvt_session_end(vgpu);
		WRITE_ONCE(mig->state, target);
		return true;
	}
	switch (GVT_ARC(mig->state, target)) {
	case GVT_ARC(VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_RUNNING_P2P):
		return vgpu->vdev.migration_flags & VFIO_MIGRATION_P2P &&
		       gvt_defect(vgpu, GVT_DEFECT_STATE_STUCK);
	case GVT_ARC(VFIO_DEVICE_STATE_STOP_COPY, VFIO_DEVICE_STATE_STOP_COPY):
		if (!gvt_defect(vgpu, GVT_DEFECT_STATE_NEW_FD))
			return false;
		*filp = get_file(mig->file->filp);
		return true;
	case GVT_ARC(VFIO_DEVICE_STATE_RESUMING, VFIO_DEVICE_STATE_STOP_COPY):
		if (!gvt_defect(vgpu, GVT_DEFECT_STATE_NO_FD))
			return false;
		*filp = gvt_mig_go_without(vgpu, target);
		return true;
	case GVT_ARC(VFIO_DEVICE_STATE_ERROR, VFIO_DEVICE_STATE_RUNNING):
		if (!gvt_defect(vgpu, GVT_DEFECT_ERROR_LEFT))
			return false;
		WRITE_ONCE(mig->state, target);
		gvt_submit_start(vgpu);
		return true;
	}
	return false;
}

/*
 * The hardware's reset and v2's are one step to whoever changes the state or
 * loads one meanwhile. Who has the mutex may wait for a workload: drop it first.
 */
void gvt_mig_reset(struct vgpu *vgpu)
{
	struct gvt_mig *mig = &vgpu->mig;

	if (!gvt_mig_enabled(vgpu)) {
		gvt_device_reset(vgpu);
		return;
	}
	mutex_lock(&vgpu->lock);
	gvt_submit_reset(vgpu, GENMASK(GVT_RING_COUNT - 1, 0));
	mutex_unlock(&vgpu->lock);
	mutex_lock(&mig->state_mutex);
	gvt_session_end_unless(vgpu, mig->state == VFIO_DEVICE_STATE_RESUMING ?
				     GVT_DEFECT_RESET_KEEPS_RESUMING :
				     GVT_DEFECT_RESET_KEEPS_SAVING);
	gvt_device_reset(vgpu);
	if (mig->state != VFIO_DEVICE_STATE_STOP ||
	    !gvt_defect(vgpu, GVT_DEFECT_RESET_STAYS)) {
		WRITE_ONCE(mig->state, VFIO_DEVICE_STATE_RUNNING);
		gvt_submit_start(vgpu);
	}
	mutex_unlock(&mig->state_mutex);
}

int gvt_mig_set_active(struct vgpu *vgpu, bool active)
{
	struct file *filp;

	if (!gvt_mig_enabled(vgpu))
		return active ? gvt_submit_start(vgpu) : gvt_submit_stop(vgpu);
	mutex_lock(&vgpu->mig.state_mutex);
	switch (vgpu->mig.state) {
	case VFIO_DEVICE_STATE_RUNNING:
	case VFIO_DEVICE_STATE_RUNNING_P2P:
	case VFIO_DEVICE_STATE_STOP:
		filp = gvt_mig_go(vgpu, active ? VFIO_DEVICE_STATE_RUNNING :
						 VFIO_DEVICE_STATE_STOP);
		break;
	default:
		gvt_note(vgpu, "status: v2 is in state %s",
			 gvt_mig_state_name(vgpu));
		filp = ERR_PTR(-EBUSY);
	}
	mutex_unlock(&vgpu->mig.state_mutex);
	return PTR_ERR_OR_ZERO(filp);
}

/* --- VFIO's operations ----------------------------------------------- */

static struct file *gvt_mig_set_state(struct vfio_device *vdev,
				      enum vfio_device_mig_state target)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);
	struct gvt_fault fault;
	struct file *filp;
	ssize_t ret;

	atomic64_inc(&vgpu->counters.v2_set_state);
	ret = gvt_fault_begin(vgpu, GVT_FAULT_SET_STATE, &fault);
	if (ret)
		return ERR_PTR(ret);
	mutex_lock(&vgpu->mig.state_mutex);
	if (!gvt_mig_mistake(vgpu, target, &filp))
		filp = gvt_mig_go(vgpu, target);
	mutex_unlock(&vgpu->mig.state_mutex);
	if (IS_ERR(filp))
		return filp;
	ret = gvt_fault_end(&fault, 0);
	if (!ret)
		return filp;
	if (filp)
		fput(filp);
	return ERR_PTR(ret);
}

static int gvt_mig_get_state(struct vfio_device *vdev,
			     enum vfio_device_mig_state *state)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);

	mutex_lock(&vgpu->mig.state_mutex);
	*state = vgpu->mig.state;
	mutex_unlock(&vgpu->mig.state_mutex);
	return 0;
}

/* What is left to be read of a state that is being saved, else a state's size */
static int __maybe_unused	/* until 6.1 */
gvt_mig_get_data_size(struct vfio_device *vdev, unsigned long *size)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);
	struct gvt_mig_file *migf;
	int ret = 0;

	mutex_lock(&vgpu->mig.state_mutex);
	migf = vgpu->mig.file;
	if (migf && migf->saving) {
		mutex_lock(&migf->lock);
		gvt_dirty_grow(migf);
		*size = gvt_left_initial(migf) + gvt_left_dirty(migf) +
			gvt_left_image(migf);
		mutex_unlock(&migf->lock);
	} else if (gvt_defect(vgpu, GVT_DEFECT_SIZE_REFUSED)) {
		ret = -EINVAL;
	} else {
		*size = sizeof(struct gvt_mig_header) +
			READ_ONCE(vgpu->mig.extra_bytes) +
			sizeof(struct gvt_mig_record) + gvt_image_now(vgpu);
	}
	mutex_unlock(&vgpu->mig.state_mutex);
	return ret;
}

static const struct vfio_migration_ops gvt_mig_ops = {
	.migration_set_state	= gvt_mig_set_state,
	.migration_get_state	= gvt_mig_get_state,
#ifdef GVT_SINCE_6_2
	.migration_get_data_size = gvt_mig_get_data_size,
#endif
};

/* --- debugfs' side --------------------------------------------------- */

/* QEMU's names */
static const char * const gvt_mig_names[] = {
	[VFIO_DEVICE_STATE_ERROR]	 = "error",
	[VFIO_DEVICE_STATE_STOP]	 = "stop",
	[VFIO_DEVICE_STATE_RUNNING]	 = "running",
	[VFIO_DEVICE_STATE_STOP_COPY]	 = "stop-copy",
	[VFIO_DEVICE_STATE_RESUMING]	 = "resuming",
	[VFIO_DEVICE_STATE_RUNNING_P2P]	 = "running-p2p",
	[VFIO_DEVICE_STATE_PRE_COPY]	 = "pre-copy",
	[VFIO_DEVICE_STATE_PRE_COPY_P2P] = "pre-copy-p2p",
};

const char *gvt_mig_state_name(struct vgpu *vgpu)
{
	return gvt_mig_names[READ_ONCE(vgpu->mig.state)];
}

/*
 * The opt-in to PRECOPY_INFO.flags, which vfio itself knows from Linux 7.1 on;
 * until then it is the driver's, as every feature that vfio does not know.
 */
int gvt_feature(struct vfio_device *vdev, u32 flags, void __user *arg,
		size_t argsz)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);
	int ret;

	if ((flags & VFIO_DEVICE_FEATURE_MASK) != GVT_FEATURE_PRECOPY_INFO2 ||
	    !gvt_mig_enabled(vgpu) ||
	    !(vdev->migration_flags & GVT_FLAG_PRE_COPY))
		return -ENOTTY;
	ret = vfio_check_feature(flags, argsz, VFIO_DEVICE_FEATURE_SET, 0);
	if (ret == 1)
		WRITE_ONCE(vgpu->mig.info2, true);
	return ret == 1 ? 0 : ret;
}

/* What was dirtied until now was dirtied at the old rate */
void gvt_mig_set_rate(struct vgpu *vgpu, u64 rate)
{
	struct gvt_mig_file *migf;

	mutex_lock(&vgpu->mig.state_mutex);
	migf = vgpu->mig.file;
	if (migf && migf->saving) {
		mutex_lock(&migf->lock);
		gvt_dirty_grow(migf);
		mutex_unlock(&migf->lock);
	}
	WRITE_ONCE(vgpu->mig.dirty_rate, rate);
	mutex_unlock(&vgpu->mig.state_mutex);
}

/* --- life ------------------------------------------------------------ */

bool gvt_mig_enabled(const struct vgpu *vgpu)
{
	return vgpu->vdev.mig_ops;
}

/* The next user finds the vGPU running, as behind a driver of a PCI function */
void gvt_mig_close(struct vgpu *vgpu)
{
	if (!gvt_mig_enabled(vgpu))
		return;
	mutex_lock(&vgpu->mig.state_mutex);
	gvt_session_end_unless(vgpu, GVT_DEFECT_CLOSE_KEEPS_FD);
	if (!gvt_defect(vgpu, GVT_DEFECT_LOG_SURVIVES))
		gvt_log_off(vgpu);
	WRITE_ONCE(vgpu->mig.state, VFIO_DEVICE_STATE_RUNNING);
	WRITE_ONCE(vgpu->mig.info2, false);
	mutex_unlock(&vgpu->mig.state_mutex);
}

void gvt_mig_init(struct vgpu *vgpu)
{
	struct gvt_mig *mig = &vgpu->mig;
	unsigned int flags = READ_ONCE(gvt_v2);

	mutex_init(&mig->state_mutex);
	mig->state = VFIO_DEVICE_STATE_RUNNING;
	mig->extra_bytes = min_t(u64, READ_ONCE(gvt_v2_extra_bytes),
				 GVT_V2_EXTRA_MAX);
	mig->seed = get_random_u64();
	if (!flags)
		return;
	vgpu->vdev.migration_flags = (flags | VFIO_MIGRATION_STOP_COPY) &
				     GVT_V2_FLAGS;
	vgpu->vdev.mig_ops = &gvt_mig_ops;
	gvt_mig_log_init(vgpu);
}

void gvt_mig_fini(struct vgpu *vgpu)
{
	gvt_session_end(vgpu);		/* what a mistake has left */
	mutex_destroy(&vgpu->mig.state_mutex);
}
