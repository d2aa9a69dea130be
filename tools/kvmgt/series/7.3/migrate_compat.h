/* SPDX-License-Identifier: MIT */
/* What kernel 7.3 calls otherwise, or lacks: nothing. And what older ones lack. */
#ifndef _GVT_MIGRATE_COMPAT_H_
#define _GVT_MIGRATE_COMPAT_H_

/* struct vfio_migration_ops, since 6.2 */
#define GVT_HAS_MIGRATION_DATA_SIZE

#endif
