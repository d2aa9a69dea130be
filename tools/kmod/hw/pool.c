// SPDX-License-Identifier: GPL-2.0-only
/*
 * The host's pool: who has which part of the 4 GiB GGTT and of the fences.
 *
 *	0          aperture_mb                                4 GiB
 *	| host | low GM -->    | host | ...     <-- high GM | reserved |
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/log2.h>
#include <linux/module.h>
#include <linux/sizes.h>
#include <linux/vmalloc.h>

#include "hw/hw.h"

static uint gvt_aperture_mb = 1024;
module_param_named(aperture_mb, gvt_aperture_mb, uint, 0444);
MODULE_PARM_DESC(aperture_mb, "host's mappable aperture, MiB");

static uint gvt_host_low_mb = 128;
module_param_named(host_low_mb, gvt_host_low_mb, uint, 0444);
MODULE_PARM_DESC(host_low_mb, "host's own share at the bottom of the aperture");

static uint gvt_host_high_mb = 384;
module_param_named(host_high_mb, gvt_host_high_mb, uint, 0444);
MODULE_PARM_DESC(host_high_mb, "host's own share at the bottom of the hidden range");

static uint gvt_top_reserved_mb;
module_param_named(top_reserved_mb, gvt_top_reserved_mb, uint, 0444);
MODULE_PARM_DESC(top_reserved_mb, "hidden GM below 4 GiB that is never given out");

static uint gvt_host_fences = 4;
module_param_named(host_fences, gvt_host_fences, uint, 0444);
MODULE_PARM_DESC(host_fences, "the host's own of the 32 fences");

struct gvt_host gvt_host = {
	.lock = __MUTEX_INITIALIZER(gvt_host.lock),
	.vgpus = LIST_HEAD_INIT(gvt_host.vgpus),
};

static u64 gvt_mb(uint mb)
{
	return (u64)mb * SZ_1M;
}

u64 gvt_pool_aperture(void)
{
	return gvt_mb(gvt_aperture_mb);
}

/* What vGPUs may have: [first, end) of each range */
static u64 gvt_low_first(void)
{
	return gvt_mb(gvt_host_low_mb);
}

static u64 gvt_high_first(void)
{
	return gvt_pool_aperture() + gvt_mb(gvt_host_high_mb);
}

static u64 gvt_high_end(void)
{
	return GVT_GM_SIZE - gvt_mb(gvt_top_reserved_mb);
}

bool gvt_pool_fits(const struct gvt_type *type)
{
	return gvt_pool_aperture() - gvt_low_first() >= type->low_gm;
}

static int gvt_pool_check(void)
{
	if (!is_power_of_2(gvt_aperture_mb) ||
	    gvt_pool_aperture() >= GVT_GM_SIZE) {
		pr_err("aperture_mb=%u: not a power of two below 4096\n",
		       gvt_aperture_mb);
		return -EINVAL;
	}
	if (gvt_low_first() > gvt_pool_aperture()) {
		pr_err("host_low_mb=%u: beyond aperture_mb=%u\n",
		       gvt_host_low_mb, gvt_aperture_mb);
		return -EINVAL;
	}
	if (gvt_mb(gvt_top_reserved_mb) > GVT_GM_SIZE ||
	    gvt_high_first() > gvt_high_end()) {
		pr_err("host_high_mb=%u, top_reserved_mb=%u: beyond 4096 - aperture_mb=%u\n",
		       gvt_host_high_mb, gvt_top_reserved_mb, gvt_aperture_mb);
		return -EINVAL;
	}
	if (gvt_host_fences > GVT_HOST_FENCES) {
		pr_err("host_fences=%u: there are %u\n", gvt_host_fences,
		       GVT_HOST_FENCES);
		return -EINVAL;
	}
	return 0;
}

int gvt_pool_init(void)
{
	int ret = gvt_pool_check();

	if (ret)
		return ret;
	gvt_host.ggtt = vzalloc(GVT_GGTT_ENTRIES * sizeof(u64));
	return gvt_host.ggtt ? 0 : -ENOMEM;
}

void gvt_pool_fini(void)
{
	vfree(gvt_host.ggtt);
	gvt_host.ggtt = NULL;
}

/*
 * As kvmgt counts: by totals, so that creating may still fail when what is
 * left is in pieces.
 */
unsigned int gvt_pool_available(const struct gvt_type *type)
{
	u64 low = gvt_pool_aperture() - gvt_low_first();
	u64 high = gvt_high_end() - gvt_high_first();
	unsigned int fences = GVT_HOST_FENCES - gvt_host_fences;
	unsigned int ids = GVT_MAX_VGPUS;
	struct vgpu *vgpu;
	u64 nr;

	mutex_lock(&gvt_host.lock);
	list_for_each_entry(vgpu, &gvt_host.vgpus, node) {
		low -= vgpu->low_gm;
		high -= vgpu->high_gm;
		fences -= GVT_VGPU_FENCES;
		ids--;
	}
	mutex_unlock(&gvt_host.lock);
	nr = min(low / type->low_gm, high / type->high_gm);
	return min_t(u64, nr, min(fences / GVT_VGPU_FENCES, ids));
}

/* The vGPU in whose part of one kind [base, base + size) reaches, or NULL */
static struct vgpu *gvt_low_owner(u64 base, u64 size)
{
	struct vgpu *vgpu;

	list_for_each_entry(vgpu, &gvt_host.vgpus, node)
		if (base < vgpu->host_low + vgpu->low_gm &&
		    vgpu->host_low < base + size)
			return vgpu;
	return NULL;
}

static struct vgpu *gvt_high_owner(u64 base, u64 size)
{
	struct vgpu *vgpu;

	list_for_each_entry(vgpu, &gvt_host.vgpus, node)
		if (base < vgpu->host_high + vgpu->high_gm &&
		    vgpu->host_high < base + size)
			return vgpu;
	return NULL;
}

static bool gvt_find_low(u64 size, u64 *base)
{
	struct vgpu *owner;

	*base = gvt_low_first();
	while ((owner = gvt_low_owner(*base, size)))
		*base = owner->host_low + owner->low_gm;
	return *base + size <= gvt_pool_aperture();
}

static bool gvt_find_high(u64 size, u64 *base)
{
	u64 end = gvt_high_end();
	struct vgpu *owner;

	while (end >= gvt_high_first() + size) {
		*base = end - size;
		owner = gvt_high_owner(*base, size);
		if (!owner)
			return true;
		end = owner->host_high;
	}
	return false;
}

static bool gvt_find_fences(unsigned int *first)
{
	unsigned long used = 0;
	struct vgpu *vgpu;

	list_for_each_entry(vgpu, &gvt_host.vgpus, node)
		used |= GENMASK(GVT_VGPU_FENCES - 1, 0) << vgpu->fence_first;
	for (*first = gvt_host_fences;
	     *first + GVT_VGPU_FENCES <= GVT_HOST_FENCES; ++*first)
		if (!(used & GENMASK(GVT_VGPU_FENCES - 1, 0) << *first))
			return true;
	return false;
}

static bool gvt_find_id(unsigned int *id)
{
	unsigned long used = BIT(0);
	struct vgpu *vgpu;

	list_for_each_entry(vgpu, &gvt_host.vgpus, node)
		used |= BIT(vgpu->id);
	*id = ffz(used);
	return *id <= GVT_MAX_VGPUS;
}

int gvt_pool_alloc(struct vgpu *vgpu)
{
	const struct gvt_type *type = vgpu->type;
	int ret = -ENOSPC;

	mutex_lock(&gvt_host.lock);
	if (gvt_find_low(type->low_gm, &vgpu->host_low) &&
	    gvt_find_high(type->high_gm, &vgpu->host_high) &&
	    gvt_find_fences(&vgpu->fence_first) && gvt_find_id(&vgpu->id)) {
		vgpu->low_gm = type->low_gm;
		vgpu->high_gm = type->high_gm;
		list_add_tail(&vgpu->node, &gvt_host.vgpus);
		ret = 0;
	}
	mutex_unlock(&gvt_host.lock);
	return ret;
}

void gvt_pool_free(struct vgpu *vgpu)
{
	mutex_lock(&gvt_host.lock);
	list_del(&vgpu->node);
	mutex_unlock(&gvt_host.lock);
}
