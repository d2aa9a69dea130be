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
#include <linux/vfio.h>
#include <linux/xarray.h>

#include "gvt_rfc.h"

struct execlist_ctx_descriptor_format;
struct execlist_ring_context;
struct intel_engine_cs;
struct intel_vgpu;
struct intel_vgpu_elsp_dwords;
struct intel_vgpu_stream;
struct intel_vgpu_workload;

/* The module parameter "migration" */
enum intel_gvt_migration {
	INTEL_GVT_MIGRATION_OFF,	/* none; only what is wrong without it is mended */
	INTEL_GVT_MIGRATION_RFC,	/* the interface of the RFC of 2017 */
	INTEL_GVT_MIGRATION_V2,		/* protocol v2 of <linux/vfio.h> */
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
	/* While stopped: the timer for vblank is to run again */
	bool vblank;
	/* Pages of the guest that this driver wrote, or that the GPU may have */
	struct xarray written;
	/* Why the record is not complete, if it is not */
	int written_err;
	/* Protocol v2's; changed under @lock */
	enum vfio_device_mig_state state;
	struct intel_vgpu_stream *stream;
	/* Ends what is under way; called with @lock held on reset and close */
	void (*end)(struct intel_vgpu *vgpu);
};

/* migrate_mode.c */
enum intel_gvt_migration intel_gvt_migration(void);

static inline bool intel_gvt_migrates(void)
{
	return intel_gvt_migration() != INTEL_GVT_MIGRATION_OFF;
}

static inline bool intel_gvt_migrates_rfc(void)
{
	return intel_gvt_migration() == INTEL_GVT_MIGRATION_RFC;
}

static inline bool intel_gvt_migrates_v2(void)
{
	return intel_gvt_migration() == INTEL_GVT_MIGRATION_V2;
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

/* migrate_run.c */
bool intel_vgpu_is_stopped(struct intel_vgpu *vgpu);
int intel_vgpu_stop(struct intel_vgpu *vgpu);
void intel_vgpu_start(struct intel_vgpu *vgpu);
int intel_vgpu_set_status(struct intel_vgpu *vgpu, const void __user *arg);
void intel_vgpu_reset_stopped(struct intel_vgpu *vgpu);
int intel_vgpu_reset_migration(struct intel_vgpu *vgpu);
void intel_vgpu_close_migration(struct intel_vgpu *vgpu);

/* migrate_dirty.c */
struct intel_vgpu_window {
	u64 first;		/* of the guest's pages */
	u64 nr;
	unsigned long *bitmap;
};

void intel_vgpu_mark(struct intel_vgpu_window *window, u64 gfn, u64 nr);
void intel_vgpu_note_written(struct intel_vgpu *vgpu, unsigned long gfn, unsigned long nr);
void intel_vgpu_note_write(struct intel_vgpu *vgpu, u64 gpa, size_t len);
void intel_vgpu_forget_written(struct intel_vgpu *vgpu);
void intel_vgpu_forget_unmapped(struct intel_vgpu *vgpu, unsigned long gfn, unsigned long nr);
int intel_vgpu_get_dirty(struct intel_vgpu *vgpu, void __user *arg);

/*
 * The RFC's ioctls. Both numbers have since been given to the dma-bufs of the
 * display, which are not to be had together with them.
 */
#define INTEL_VGPU_STATUS_SET \
	_IO(VFIO_TYPE, VFIO_BASE + VFIO_DEVICE_PCI_STATUS_SET_NR)
#define INTEL_VGPU_GET_DIRTY \
	_IO(VFIO_TYPE, VFIO_BASE + VFIO_DEVICE_PCI_GET_DIRTY_BITMAP_NR)

/* migrate_region.c */
size_t intel_vgpu_image_max(struct intel_vgpu *vgpu);
ssize_t intel_vgpu_state_rw(struct intel_vgpu *vgpu, char __user *buf, size_t count, u64 off,
			    bool write);

static inline bool intel_gvt_is_state_region(u64 index)
{
	return intel_gvt_migrates_rfc() && index == VFIO_PCI_DEVICE_STATE_REGION_INDEX;
}

/* migrate_v2.c */
void intel_vgpu_init_v2(struct intel_vgpu *vgpu);

/* What the patches add to the driver's own files */
void intel_vgpu_mark_pinned(struct intel_vgpu *vgpu, struct intel_vgpu_window *window);
int intel_gvt_set_state_region(struct intel_vgpu *vgpu);
int intel_vgpu_requeue_context(struct intel_vgpu *vgpu, const struct intel_engine_cs *engine,
			       struct execlist_ctx_descriptor_format *desc, bool schedule_in,
			       const struct intel_vgpu_elsp_dwords *elsp);
bool intel_vgpu_has_vblank(struct intel_vgpu *vgpu);

#endif
