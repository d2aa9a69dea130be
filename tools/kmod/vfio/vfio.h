/* SPDX-License-Identifier: GPL-2.0-only */
/* The device as VFIO has it: what its files offer to the others. */
#ifndef GVT_SAMPLE_VFIO_H
#define GVT_SAMPLE_VFIO_H

#include "gvt_sample.h"

/* vgpu.c */
extern struct mdev_driver gvt_mdev_driver;

/* state.c: the RFC's state region; takes state_lock and lock */
void gvt_state_init(struct vgpu *vgpu);
void gvt_state_fini(struct vgpu *vgpu);
ssize_t gvt_state_read(struct vgpu *vgpu, char __user *buf, size_t count, u64 off);
ssize_t gvt_state_write(struct vgpu *vgpu, const char __user *buf, size_t count,
			u64 off);

/* state.c: images for v2. An image from gvt_image_parse() points into buf. */
u32 gvt_image_max(struct vgpu *vgpu);	/* bytes of the largest image */
u32 gvt_image_now(struct vgpu *vgpu);	/* bytes of one taken now; takes lock */
/* bytes of the image, or -ENOMEM, -EFAULT when it does not fit; takes lock */
int gvt_image_take(struct vgpu *vgpu, void *buf, u32 room);
/* check, change nothing; takes lock; an error pointer */
struct gvt_image *gvt_image_parse(struct vgpu *vgpu, void *buf, u32 size);
/* takes lock; -EINTR when killed while it waits, and then nothing has changed */
int gvt_image_apply(struct vgpu *vgpu, struct gvt_image *image);
void gvt_image_free(struct gvt_image *image);	/* NULL is fine */

/*
 * mig.c: the v2 protocol. Without the parameter v2 all of these do nothing but
 * gvt_mig_set_active(), which then is gvt_submit_start() or _stop(), and
 * gvt_mig_reset(), which is gvt_device_reset().
 */
void gvt_mig_init(struct vgpu *vgpu);	/* before the device is registered */
void gvt_mig_fini(struct vgpu *vgpu);
bool gvt_mig_enabled(const struct vgpu *vgpu);
void gvt_mig_close(struct vgpu *vgpu);	/* the last device fd */
void gvt_mig_reset(struct vgpu *vgpu);	/* VFIO_DEVICE_RESET */
/* the RFC's START and STOP; -EBUSY in a state of v2 that is not a run state */
int gvt_mig_set_active(struct vgpu *vgpu, bool active);
const char *gvt_mig_state_name(struct vgpu *vgpu);
void gvt_mig_set_rate(struct vgpu *vgpu, u64 rate);
void gvt_mig_show(struct vgpu *vgpu);	/* mig_show.c: its files in debugfs */
int gvt_feature(struct vfio_device *vdev, u32 flags, void __user *arg,
		size_t argsz);
#define GVT_V2_EXTRA_MAX	BIT_ULL(32)	/* bytes */
#define GVT_V2_RATE_MAX		BIT_ULL(40)	/* bytes/s */

#endif
