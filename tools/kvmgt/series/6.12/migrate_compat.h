/* SPDX-License-Identifier: MIT */
/* What kernel 6.12 calls otherwise, or lacks. */
#ifndef _GVT_MIGRATE_COMPAT_H_
#define _GVT_MIGRATE_COMPAT_H_

/* struct vfio_migration_ops, since 6.2 */
#define GVT_HAS_MIGRATION_DATA_SIZE

#include <linux/slab.h>

/* Of the stable kernels the later ones have them. */
#ifndef kmalloc_obj
#define kmalloc_obj(obj, gfp) kmalloc(sizeof(obj), gfp)
#endif
#ifndef kzalloc_obj
#define kzalloc_obj(obj, gfp) kzalloc(sizeof(obj), gfp)
#endif

#endif
