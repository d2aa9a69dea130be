/* SPDX-License-Identifier: MIT */
/* What kernel 6.1 calls otherwise, or lacks. */
#ifndef _GVT_MIGRATE_COMPAT_H_
#define _GVT_MIGRATE_COMPAT_H_

/* struct intel_vgpu_i2c_edid */
#define target_selected slave_selected

#endif
