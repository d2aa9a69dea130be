/* SPDX-License-Identifier: GPL-2.0-only */
/* What tests look at and break: what its files offer to the others. */
#ifndef GVT_SAMPLE_LAB_H
#define GVT_SAMPLE_LAB_H

#include "gvt_sample.h"

/* Keep the reason of a refusal for debugfs' last_error. Any context. */
__printf(2, 3) void gvt_note(struct vgpu *vgpu, const char *fmt, ...);
void gvt_note_read(struct vgpu *vgpu, char *text, size_t size);

/* debugfs.c */
void gvt_debugfs_init(void);
void gvt_debugfs_fini(void);
void gvt_debugfs_add(struct vgpu *vgpu);
void gvt_debugfs_remove(struct vgpu *vgpu);

/* defect.c */
bool gvt_defect(const struct vgpu *vgpu, enum gvt_defect defect);

extern const struct file_operations gvt_defect_fops;	/* of one vGPU */
extern const struct file_operations gvt_defects_fops;	/* all that there are */

/* fault.c */
extern const struct file_operations gvt_fault_fops;
void gvt_fault_take(struct vgpu *vgpu, enum gvt_fault_op op,
		    struct gvt_fault *fault);
ssize_t gvt_fault_act(enum gvt_fault_op op, const struct gvt_fault *fault);
ssize_t gvt_fault_begin(struct vgpu *vgpu, enum gvt_fault_op op,
			struct gvt_fault *fault);
ssize_t gvt_fault_end(const struct gvt_fault *fault, ssize_t ret);

#endif
