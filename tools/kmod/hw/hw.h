/* SPDX-License-Identifier: GPL-2.0-only */
/* The simulated GPU and the host's side of it: what its files offer to the others. */
#ifndef GVT_SAMPLE_HW_H
#define GVT_SAMPLE_HW_H

#include "gvt_sample.h"

/* pool.c: Ha, Hh, fences, id out of the host's pool */
int gvt_pool_init(void);
void gvt_pool_fini(void);
unsigned int gvt_pool_available(const struct gvt_type *type);
bool gvt_pool_fits(const struct gvt_type *type);	/* into an empty host */
u64 gvt_pool_aperture(void);		/* bytes: BAR2 of every vGPU */
int gvt_pool_alloc(struct vgpu *vgpu);	/* -ENOSPC; by type: host_*, sizes, id */
void gvt_pool_free(struct vgpu *vgpu);

/* cfg.c; all under lock */
#define GVT_CFG_MSI		0x90	/* the MSI capability's offset */
void gvt_cfg_init(struct vgpu *vgpu);	/* power-on contents, also at reset */
int gvt_cfg_read(struct vgpu *vgpu, u32 off, void *buf, unsigned int bytes);
int gvt_cfg_write(struct vgpu *vgpu, u32 off, const void *buf, unsigned int bytes);
bool gvt_cfg_msi_enabled(struct vgpu *vgpu);
bool gvt_cfg_intx_disabled(struct vgpu *vgpu);

/* irq.c */
int gvt_irq_set(struct vgpu *vgpu, u32 flags, unsigned int index,
		unsigned int start, unsigned int count, void *data);
void gvt_irq_release(struct vgpu *vgpu);	/* drop all eventfds */
/* under lock: an engine's event goes to ISR/IIR and, if enabled, out */
void gvt_irq_event(struct vgpu *vgpu, int ring, enum gvt_event event);
/* under lock: registers 0x44200..0x4433f, 4 bytes, 4-aligned */
bool gvt_irq_owns(u32 off);
void gvt_irq_mmio_write(struct vgpu *vgpu, u32 off, u32 value);
/* under lock, after COMMAND or MSI control changed: INTx is a level */
void gvt_irq_recheck(struct vgpu *vgpu);

/* gtt.c: guest and host GGTT, pins, dirty bitmap, BAR2 */
int gvt_gtt_init(struct vgpu *vgpu);
void gvt_gtt_fini(struct vgpu *vgpu);
u64 gvt_guest_low(struct vgpu *vgpu);	/* Ga, from PVINFO; under lock */
u64 gvt_guest_high(struct vgpu *vgpu);	/* Gh */
/* under lock; -EACCES unless [gma, gma + len) lies in one of the two windows */
int gvt_g2h(struct vgpu *vgpu, u64 gma, u64 len, u64 *hgma);
/*
 * Read or write guest memory through the *host* GGTT: hgma -> entry -> IOVA ->
 * vfio_dma_rw(). Only from the worker (a kernel thread). May be called with or
 * without lock. -EFAULT when an entry on the way is not present.
 */
int gvt_host_rw(struct vgpu *vgpu, u64 hgma, void *buf, size_t len, bool write);
/* @off counts from GVT_GTT_OFFSET; bytes 4 or 8, aligned; under lock */
int gvt_gtt_read(struct vgpu *vgpu, u32 off, void *buf, unsigned int bytes);
int gvt_gtt_write(struct vgpu *vgpu, u32 off, const void *buf, unsigned int bytes);
/* take over a whole guest table, low entries first; under lock */
void gvt_gtt_restore(struct vgpu *vgpu, const u64 *entries);
void gvt_gtt_reset(struct vgpu *vgpu);	/* all scratch, unpin; under lock */
void gvt_gtt_dma_unmap(struct vgpu *vgpu, u64 iova, u64 length);
long gvt_dirty_ioctl(struct vgpu *vgpu, void __user *arg);
ssize_t gvt_bar2_rw(struct vgpu *vgpu, char __user *ubuf, size_t count,
		    u64 off, bool write);
int gvt_bar2_mmap(struct vgpu *vgpu, struct vm_area_struct *vma, u64 off);

/* log.c: which guest memory the hardware has written, for those who ask for it */
void gvt_log_init(struct vgpu *vgpu);
void gvt_log_fini(struct vgpu *vgpu);
/* under state_mutex; @page_size in bytes, a power of two; an empty log */
void gvt_log_on(struct vgpu *vgpu, u64 page_size);
void gvt_log_off(struct vgpu *vgpu);	/* and forgets its pages */
/* the hardware has written guest memory; any lock but gtt_lock's inner ones */
void gvt_log_wrote(struct vgpu *vgpu, u64 iova, u64 len);

/* mmio.c: registers, PVINFO, fences, PPGTT roots, reset. Under lock. */
extern const u32 gvt_ring_base[GVT_RING_COUNT];
int gvt_mmio_init(struct vgpu *vgpu);
void gvt_mmio_fini(struct vgpu *vgpu);
/* @off below GVT_MMIO_SIZE; bytes 1, 2, 4 or 8, naturally aligned */
int gvt_mmio_read(struct vgpu *vgpu, u32 off, void *buf, unsigned int bytes);
int gvt_mmio_write(struct vgpu *vgpu, u32 off, const void *buf, unsigned int bytes);
void gvt_fences_reload(struct vgpu *vgpu);	/* host fences from vreg */
void gvt_fences_clear(struct vgpu *vgpu);	/* host fences only */
bool gvt_ppgtt_valid(const struct gvt_ppgtt_entry *entry);
void gvt_ppgtt_free(struct list_head *roots);
/* replace the roots by a list of struct gvt_ppgtt; takes the list over */
void gvt_ppgtt_replace(struct vgpu *vgpu, struct list_head *roots,
		       unsigned int nr);
/* reset of the hardware; takes lock, waits for the running workload */
void gvt_device_reset(struct vgpu *vgpu);

/* submit.c: ELSP, queue, worker, run state */
int gvt_submit_init(struct vgpu *vgpu);
void gvt_submit_fini(struct vgpu *vgpu);
/* under lock; one DW to an engine's ELSP register; the fourth submits */
int gvt_elsp_write(struct vgpu *vgpu, int ring, u32 value);
/* under lock; drop the queue of the rings in @mask, cancel a running one */
void gvt_submit_reset(struct vgpu *vgpu, unsigned long mask);
/* no lock; return when no workload runs (the queue may hold more) */
void gvt_submit_wait_idle(struct vgpu *vgpu);
void gvt_submit_open(struct vgpu *vgpu);	/* active from now on */
void gvt_submit_close(struct vgpu *vgpu);	/* drop all, wait */
int gvt_submit_stop(struct vgpu *vgpu);		/* idempotent */
int gvt_submit_start(struct vgpu *vgpu);	/* idempotent, cannot fail */
/* under lock; entries in queue order; returns how many (<= GVT_QUEUE_MAX) */
unsigned int gvt_submit_save(struct vgpu *vgpu, struct gvt_workload_entry *out);
/* is this list one that gvt_submit_restore() will take? no lock; -EINVAL */
int gvt_submit_check(const struct gvt_workload_entry *entries, unsigned int nr);
/*
 * under lock; replaces the queue, cannot fail: gvt_submit_prepare() has made
 * the workloads beforehand
 */
int gvt_submit_prepare(const struct gvt_workload_entry *entries, unsigned int nr,
		       struct list_head *out);	/* -ENOMEM, -EINVAL */
void gvt_submit_discard(struct list_head *list);
void gvt_submit_replace(struct vgpu *vgpu, struct list_head *prepared);

/*
 * scan.c: copy ring and privileged batches into a shadow, audit and patch the
 * graphics addresses there. Worker, no lock held. Errors: -EBADRQC unknown
 * command, -EFAULT bad address or length, -EPERM register, -E2BIG too long.
 */
int gvt_scan(struct vgpu *vgpu, struct gvt_workload *workload);
void gvt_scan_free(struct gvt_workload *workload);
/* exec.c: run the shadow through the host GGTT. Worker, no lock held. */
int gvt_exec(struct vgpu *vgpu, struct gvt_workload *workload);

/* show.c: files in debugfs */
void gvt_hw_show(struct vgpu *vgpu);
void gvt_hw_show_host(void);

#endif
