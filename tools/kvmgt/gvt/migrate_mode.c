// SPDX-License-Identifier: MIT
/*
 * Which interface for migration the module offers. It is one for all vGPUs and
 * for as long as the module is loaded: a guest whose aperture is at 0 cannot be
 * told that it has moved.
 */
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/string.h>

#include "i915_drv.h"
#include "gvt.h"

static const char * const migration_names[] = {
	[INTEL_GVT_MIGRATION_OFF] = "off",
	[INTEL_GVT_MIGRATION_RFC] = "rfc",
	[INTEL_GVT_MIGRATION_V2] = "v2",
};

static int migration = INTEL_GVT_MIGRATION_RFC;

static int migration_set(const char *val, const struct kernel_param *kp)
{
	int found = sysfs_match_string(migration_names, val);

	if (found < 0)
		return found;

	migration = found;
	return 0;
}

static int migration_get(char *buf, const struct kernel_param *kp)
{
	return sysfs_emit(buf, "%s\n", migration_names[migration]);
}

static const struct kernel_param_ops migration_ops = {
	.set = migration_set,
	.get = migration_get,
};

module_param_cb(migration, &migration_ops, NULL, 0444);
MODULE_PARM_DESC(migration,
		 "Interface for migration: rfc (of 2017; no display by dma-buf), v2 (of linux/vfio.h), or off (default: rfc)");

enum intel_gvt_migration intel_gvt_migration(void)
{
	return migration;
}

/**
 * intel_vgpu_init_migration - prepare a vGPU that is being created
 * @vgpu: a vGPU, zeroed
 */
void intel_vgpu_init_migration(struct intel_vgpu *vgpu)
{
	mutex_init(&vgpu->migration.lock);
	xa_init(&vgpu->migration.written);
}

/**
 * intel_vgpu_clean_migration - free what migration needs of a vGPU
 * @vgpu: a vGPU that is being destroyed
 */
void intel_vgpu_clean_migration(struct intel_vgpu *vgpu)
{
	xa_destroy(&vgpu->migration.written);
	mutex_destroy(&vgpu->migration.lock);
}
