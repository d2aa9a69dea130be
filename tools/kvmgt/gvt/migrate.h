/* SPDX-License-Identifier: MIT */
/*
 * Migration of a vGPU: what is new in kvmgt, and declared for the driver's own
 * files.
 *
 * Three address spaces meet here. A guest's graphics address is one in the
 * guest's view of the GGTT, which a migrated vGPU takes along. A host's
 * graphics address is one in the real GGTT, where every vGPU has its own part.
 * Both have an aperture (low, seen through BAR2) and a hidden part (high).
 */
#ifndef _GVT_MIGRATE_H_
#define _GVT_MIGRATE_H_

#include <linux/mutex.h>
#include <linux/types.h>
#include <linux/xarray.h>

struct execlist_ring_context;
struct intel_vgpu;
struct intel_vgpu_workload;

/* The module parameter "migration" */
enum intel_gvt_migration {
	INTEL_GVT_MIGRATION_OFF,	/* as without these patches, in every respect */
	INTEL_GVT_MIGRATION_RFC,	/* the interface of the RFC of 2017 */
};

/* Of each vGPU; all but @written is unused with migration=off */
struct intel_vgpu_migration {
	/*
	 * Of stop, start, reset, save and restore one happens at a time. Taken
	 * before vgpu_lock.
	 */
	struct mutex lock;
	/* No workload is to be picked; changed under gvt->sched_lock */
	bool stopped;
	/* Pages of the guest that this driver wrote, or that the GPU may have */
	struct xarray written;
};

/* migrate_mode.c */
enum intel_gvt_migration intel_gvt_migration(void);

static inline bool intel_gvt_migrates(void)
{
	return intel_gvt_migration() != INTEL_GVT_MIGRATION_OFF;
}

void intel_vgpu_init_migration(struct intel_vgpu *vgpu);
void intel_vgpu_clean_migration(struct intel_vgpu *vgpu);

/* guest_gm.c */
void intel_vgpu_init_guest_gm(struct intel_vgpu *vgpu);
void intel_vgpu_align_guest_aperture(struct intel_vgpu *vgpu);
int intel_vgpu_gmadr_g2h(struct intel_vgpu *vgpu, u64 g_addr, u64 *h_addr);
int intel_vgpu_gmadr_h2g(struct intel_vgpu *vgpu, u64 h_addr, u64 *g_addr);
int intel_vgpu_plane_g2h(struct intel_vgpu *vgpu, u64 start, u32 size, u64 *h_start);
u64 intel_vgpu_host_fence(struct intel_vgpu *vgpu, u32 num);
int intel_vgpu_cmd_g2h(struct intel_vgpu *vgpu, u32 *cmd, u64 g_addr, u32 mask);
int intel_vgpu_reg_g2h(struct intel_vgpu *vgpu, u32 *value);
bool intel_vgpu_bar2_g2h(struct intel_vgpu *vgpu, u64 off, u64 count, u64 *h_off);
u64 intel_vgpu_bar2_start(struct intel_vgpu *vgpu);
void intel_vgpu_set_wa_ctx(struct intel_vgpu_workload *workload,
			   struct execlist_ring_context *shadow);

#endif
