// SPDX-License-Identifier: GPL-2.0-only
/*
 * gvt_sample: module parameters, vGPU types, and the mdev parent, a device of
 * a class of its own: without a driver bound, mdev's type names begin with the
 * class's name.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/device.h>
#include <linux/module.h>
#include <linux/sizes.h>

#include "hw/hw.h"
#include "vfio/vfio.h"
#include "lab/lab.h"

uint gvt_device_id = 0x1612;
module_param_named(device_id, gvt_device_id, uint, 0644);
MODULE_PARM_DESC(device_id, "PCI device id");

bool gvt_migratable = true;
module_param_named(migratable, gvt_migratable, bool, 0644);
MODULE_PARM_DESC(migratable, "report VFIO_DEVICE_FLAGS_MIGRATABLE");

bool gvt_report_pci = true;
module_param_named(report_pci, gvt_report_pci, bool, 0644);
MODULE_PARM_DESC(report_pci, "report VFIO_DEVICE_FLAGS_PCI");

uint gvt_extra_flags;
module_param_named(extra_flags, gvt_extra_flags, uint, 0644);
MODULE_PARM_DESC(extra_flags, "or'ed into the device's flags");

uint gvt_state_cap_type;
module_param_named(state_cap_type, gvt_state_cap_type, uint, 0644);
MODULE_PARM_DESC(state_cap_type, "CAP_TYPE of region 9 (0: none)");

uint gvt_dirty_max_pages = 1 << 20;
module_param_named(dirty_max_pages, gvt_dirty_max_pages, uint, 0644);
MODULE_PARM_DESC(dirty_max_pages, "most pages in one dirty bitmap");

uint gvt_v2;
module_param_named(v2, gvt_v2, uint, 0644);
MODULE_PARM_DESC(v2, "v2 migration of new vGPUs: 1 STOP_COPY, 2 P2P, 4 PRE_COPY (0: none)");

ulong gvt_v2_extra_bytes;
module_param_named(v2_extra_bytes, gvt_v2_extra_bytes, ulong, 0644);
MODULE_PARM_DESC(v2_extra_bytes, "filler in a new vGPU's v2 state, at most 4 GiB");

#define GVT_TYPE(n, low, high, res) {				\
	.type = {						\
		.sysfs_name = "GVTg_V4_" #n,			\
		.pretty_name = "GVTg_V4_" #n,			\
	},							\
	.name = "GVTg_V4_" #n,					\
	.low_gm = (u64)(low) * SZ_1M,				\
	.high_gm = (u64)(high) * SZ_1M,				\
	.weight = 16 / (n),					\
	.resolution = (res),					\
}

/* GVT-g's on Broadwell, smallest first */
static struct gvt_type gvt_types[] = {
	GVT_TYPE(8, 64, 384, "1024x768"),
	GVT_TYPE(4, 128, 512, "1920x1200"),
	GVT_TYPE(2, 256, 1024, "1920x1200"),
	GVT_TYPE(1, 512, 2048, "1920x1200"),
};

static struct mdev_type *gvt_mdev_types[ARRAY_SIZE(gvt_types)];
static struct mdev_parent gvt_parent;
static struct class *gvt_class;
static struct device *gvt_device;

/* As in kvmgt, the list ends at the first type that does not fit */
static unsigned int gvt_offer_types(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(gvt_types); i++) {
		if (!gvt_pool_fits(&gvt_types[i]))
			break;
		gvt_mdev_types[i] = &gvt_types[i].type;
	}
	return i;
}

static int gvt_device_create(void)
{
#ifdef GVT_SINCE_6_4
	gvt_class = class_create(GVT_NAME);
#else	/* until 6.3 with an owner */
	gvt_class = class_create(THIS_MODULE, GVT_NAME);
#endif
	if (IS_ERR(gvt_class))
		return PTR_ERR(gvt_class);
	/* allocated, and freed by a release callback, in the driver core */
	gvt_device = device_create(gvt_class, NULL, MKDEV(0, 0), NULL, GVT_NAME);
	if (!IS_ERR(gvt_device))
		return 0;
	class_destroy(gvt_class);
	return PTR_ERR(gvt_device);
}

static void gvt_device_destroy(void)
{
	device_unregister(gvt_device);
	class_destroy(gvt_class);
}

static int __init gvt_sample_init(void)
{
	unsigned int nr_types;
	int ret;

	ret = gvt_pool_init();
	if (ret)
		return ret;
	nr_types = gvt_offer_types();
	if (!nr_types) {
		pr_err("aperture_mb, host_low_mb: no vGPU type fits\n");
		ret = -EINVAL;
		goto err_pool;
	}
	gvt_debugfs_init();
	gvt_hw_show_host();
	ret = gvt_device_create();
	if (ret)
		goto err_debugfs;
	ret = mdev_register_driver(&gvt_mdev_driver);
	if (ret)
		goto err_device;
	ret = mdev_register_parent(&gvt_parent, gvt_device, &gvt_mdev_driver,
				   gvt_mdev_types, nr_types);
	if (ret)
		goto err_driver;
	return 0;

err_driver:
	mdev_unregister_driver(&gvt_mdev_driver);
err_device:
	gvt_device_destroy();
err_debugfs:
	gvt_debugfs_fini();
err_pool:
	gvt_pool_fini();
	return ret;
}

static void __exit gvt_sample_exit(void)
{
	mdev_unregister_parent(&gvt_parent);
	mdev_unregister_driver(&gvt_mdev_driver);
	gvt_device_destroy();
	gvt_debugfs_fini();
	gvt_pool_fini();
}

module_init(gvt_sample_init);
module_exit(gvt_sample_exit);

MODULE_DESCRIPTION("GVT-g vGPU in software, with the migration UAPIs of the 2017 RFC and v2");
MODULE_AUTHOR("vfio_mig authors");
MODULE_LICENSE("GPL");
