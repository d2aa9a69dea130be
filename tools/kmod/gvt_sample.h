/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * gvt_sample: a GVT-g vGPU in software, with the migration UAPI of the 2017
 * RFC and, if asked for, mainline's v2. The internal contract between the
 * driver's files.
 *
 * Words: GM is graphics memory. A guest sees its share of the 4 GiB GGTT at
 * guest addresses (gma), the simulated hardware has it at host addresses
 * (hgma). "Low" GM is the aperture, "high" GM is the hidden part.
 *
 * Locks, outermost first:
 *   mig.state_mutex v2's state, its session, DMA logging on or off
 *   migf->lock      a session of v2, mig.c; held while user memory is copied,
 *                   so what is said of state_lock holds for it and for
 *                   state_mutex as well
 *   vgpu->state_lock  the state region's buffer; the one lock that is held
 *                   while user memory is copied, so nothing that a page fault
 *                   can reach may take it
 *   vgpu->lock      registers, config space, guest GGTT, queue, run state;
 *                   may be held around vfio_dma_rw() and vfio_pin_pages()
 *   vgpu->gtt_lock  host GGTT entries of this vGPU and the pin cache; taken in
 *                   .dma_unmap, hence never held around a vfio_* call
 *   vgpu->irq_lock  eventfd contexts and INTx mask (spinlock)
 * Elsewhere user memory is copied with no lock held.
 */
#ifndef GVT_SAMPLE_H
#define GVT_SAMPLE_H

#include <linux/bits.h>
#include <linux/eventfd.h>
#include <linux/list.h>
#include <linux/mdev.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/version.h>
#include <linux/vfio.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include "gvt_rfc.h"
#include "gvt_image.h"
#include "gvt_pvinfo.h"
#include "defect.h"

#define GVT_NAME		"gvt_sample"

#define GVT_PAGE_SHIFT		12
#define GVT_PAGE_SIZE		BIT(GVT_PAGE_SHIFT)
#define GVT_PAGE_MASK		(~(u64)(GVT_PAGE_SIZE - 1))

/* The simulated hardware: 4 GiB of GM, 8-byte entries, 32 fences */
#define GVT_GM_SIZE		BIT_ULL(32)
#define GVT_GGTT_ENTRIES	BIT(20)
#define GVT_HOST_FENCES		32
#define GVT_VGPU_FENCES		4
#define GVT_MAX_VGPUS		7

/* GGTT entries, guest's and host's; a host entry that is 0 means scratch */
#define GVT_PTE_PRESENT		BIT_ULL(0)
#define GVT_PTE_ADDR_MASK	GENMASK_ULL(45, 12)

#define GVT_BAR2_INDEX		VFIO_PCI_BAR2_REGION_INDEX
#define GVT_REGION_SHIFT	40
#define GVT_REGION_MASK		(BIT_ULL(GVT_REGION_SHIFT) - 1)

#define GVT_QUEUE_MAX		256	/* queued workloads per vGPU */
#define GVT_PPGTT_MAX		64	/* PPGTT roots per vGPU */
#define GVT_SHADOW_MAX		SZ_2M	/* shadow ring + batches, bytes */

/* Offsets of ring registers from the ring's base (i915: RING_*) */
#define GVT_RING_TAIL		0x30
#define GVT_RING_HEAD		0x34
#define GVT_RING_START		0x38
#define GVT_RING_CTL		0x3c
#define GVT_RING_HWS_PGA	0x80
#define GVT_RING_ELSP		0x230
#define GVT_RING_MODE		0x29c
#define GVT_RING_CSB		0x370	/* 6 entries of two DWs */
#define GVT_RING_CSB_PTR	0x3a0
#define GVT_CSB_ENTRIES		6

enum gvt_event {			/* bit inside an engine's 16 bits */
	GVT_EVENT_USER = 0,		/* MI_USER_INTERRUPT */
	GVT_EVENT_FLUSH_NOTIFY = 4,	/* PIPE_CONTROL / MI_FLUSH_DW notify */
	GVT_EVENT_CONTEXT_SWITCH = 8,
};

struct gvt_type {
	struct mdev_type	type;	/* first: container_of() */
	const char		*name;	/* "GVTg_V4_8" */
	u64			low_gm;	/* bytes */
	u64			high_gm;
	unsigned int		weight;
	const char		*resolution;
};

/* The host's side of all vGPUs together: pool.c */
struct gvt_host {
	struct mutex	lock;		/* allocation of GM, fences and ids */
	u64		*ggtt;		/* GVT_GGTT_ENTRIES: IOVA | present */
	u64		fence[GVT_HOST_FENCES];
	struct list_head vgpus;
};

extern struct gvt_host gvt_host;

/* Module parameters, main.c */
extern uint gvt_device_id;		/* PCI device id, 0x1612 */
extern bool gvt_migratable;		/* report the RFC's flag; 1 */
extern bool gvt_report_pci;		/* report the PCI flag; 1 */
extern uint gvt_extra_flags;		/* or'ed into device info flags; 0 */
extern uint gvt_state_cap_type;		/* CAP_TYPE on region 9; 0: none */
extern uint gvt_dirty_max_pages;	/* per ioctl, EINVAL above; 1 << 20 */
extern uint gvt_v2;			/* VFIO_MIGRATION_* flags; 0: no v2 */
extern ulong gvt_v2_extra_bytes;	/* of a new vGPU; 0 */

struct vgpu;

/* One submitted context; submit.c owns it */
struct gvt_workload {
	struct list_head	node;
	int			ring;		/* GVT_RING_* */
	u32			desc_lo;	/* context descriptor */
	u32			desc_hi;
	u32			elsp[4];	/* guest write order, see cdefs */
	unsigned int		element;	/* 0 or 1 of the ELSP pair */
	u64			pair;		/* same number: same ELSP pair */
	bool			cancelled;	/* reset or close while running */
	/* filled by the scan, worker only */
	u32			*shadow;	/* patched commands: ring, batches */
	unsigned int		shadow_dws;
	unsigned int		ring_dws;	/* the ring's part */
	u32			ring_tail;	/* HEAD after completion */
};

struct gvt_ppgtt {
	struct list_head	node;
	struct gvt_ppgtt_entry	entry;
};

struct gvt_counters {
	atomic64_t	status_set;		/* RFC ioctl +14, any outcome */
	atomic64_t	get_dirty;		/* RFC ioctl +15, any outcome */
	atomic64_t	state_read;
	atomic64_t	state_write;
	atomic64_t	other_ioctl;
	atomic64_t	workloads_submitted;
	atomic64_t	workloads_completed;
	atomic64_t	workloads_failed;
	atomic64_t	fence_errors;
	atomic64_t	irqs;			/* eventfd signals */
	atomic64_t	v2_set_state;		/* any outcome */
	atomic64_t	v2_read;		/* of a data fd that is alive */
	atomic64_t	v2_write;
};

/* Faults on demand, fault.c */
enum gvt_fault_op {
	GVT_FAULT_STOP,
	GVT_FAULT_START,
	GVT_FAULT_DIRTY,
	GVT_FAULT_STATE_READ,
	GVT_FAULT_STATE_WRITE,
	GVT_FAULT_RESET,
	GVT_FAULT_SET_STATE,		/* v2 */
	GVT_FAULT_DATA_READ,		/* v2, of a data fd */
	GVT_FAULT_DATA_WRITE,
	GVT_FAULT_OPS,
};

enum gvt_fault_kind {
	GVT_FAULT_ERRNO,
	GVT_FAULT_AFTER,
	GVT_FAULT_SHORT,
	GVT_FAULT_DELAY,
	GVT_FAULT_KINDS,		/* also: none */
};

struct gvt_fault {
	unsigned int		nth;	/* 1: the next request; 0: no rule */
	enum gvt_fault_kind	kind;
	unsigned int		value;	/* errno, bytes or ms */
};

struct gvt_image;			/* state.c */
struct gvt_mig_file;			/* mig.c: a v2 session */

/* The v2 protocol, mig.c */
struct gvt_mig {
	struct mutex		state_mutex;
	u32			state;		/* enum vfio_device_mig_state */
	struct gvt_mig_file	*file;		/* the session, if there is one */
	u64			extra_bytes;	/* filler in the state */
	u64			seed;		/* of the filler */
	u64			dirty_rate;	/* bytes/s in PRE_COPY */
	u64			reinit_bytes;	/* new initial data, once */
	bool			info2;		/* PRECOPY_INFO may say REINIT */
	bool			logging;	/* DMA logging is on */
	bool			log_lost;	/* no memory to note a page */
	struct xarray		log;		/* its pages written since reported */
	unsigned int		log_shift;	/* of a page of the log, while on */
	u64			log_page;	/* the next log's: its bytes */
};

struct vgpu {
	struct vfio_device	vdev;		/* first: vfio_alloc_device() */
	struct mdev_device	*mdev;
	const struct gvt_type	*type;
	struct list_head	node;		/* gvt_host.vgpus */
	unsigned int		id;		/* 1..GVT_MAX_VGPUS */

	/* host allocation, fixed for life: bytes in the GGTT's address space */
	u64			host_low;	/* Ha */
	u64			host_high;	/* Hh */
	u64			low_gm;		/* Sa */
	u64			high_gm;	/* Sh */
	unsigned int		fence_first;	/* index into gvt_host.fence */

	struct mutex		lock;
	u8			*cfg;		/* GVT_IMAGE_CFG_SIZE */
	u8			*vreg;		/* GVT_MMIO_SIZE, vmalloc */
	u8			*sreg;		/* GVT_MMIO_SIZE, vmalloc; opaque */
	u64			*guest_gtt;	/* low entries, then high; vmalloc */
	unsigned long		*half_lo;	/* bitmap: low half waits for high */
	unsigned long		*half_hi;
	struct list_head	ppgtts;
	unsigned int		nr_ppgtts;
	struct mutex		state_lock;	/* protects state_buf */
	void			*state_buf;	/* MIGRATION_IMG_MAX_SIZE, lazily */

	/* submission, submit.c */
	bool			opened;
	bool			active;		/* runs: RFC START, v2 RUNNING */
	struct list_head	queue;		/* struct gvt_workload */
	unsigned int		nr_queued;
	struct gvt_workload	*running;
	u32			elsp[GVT_RING_COUNT][4];
	unsigned int		elsp_index[GVT_RING_COUNT];
	u64			next_pair;
	struct workqueue_struct	*wq;
	struct work_struct	work;
	wait_queue_head_t	idle;
	unsigned int		exec_delay_ms;	/* debugfs knob, per workload */

	struct mutex		gtt_lock;
	struct xarray		pins;		/* gfn -> struct gvt_pin */
	unsigned long		nr_pins;

	struct xarray		bar2_pages;	/* page index -> struct page */

	struct gvt_mig		mig;

	spinlock_t		irq_lock;
	struct eventfd_ctx	*msi_trigger;
	struct eventfd_ctx	*intx_trigger;
	struct eventfd_ctx	*intx_unmask;	/* unused: unmask is by call */
	bool			intx_masked;

	/* what debugfs shows */
	struct gvt_counters	counters;
	struct dentry		*debugfs;
	u32			*last_ring;	/* patched commands, under lock */
	unsigned int		last_ring_dws;
	char			last_error[96];	/* why something was refused */
	spinlock_t		fault_lock;	/* innermost */
	struct gvt_fault	faults[GVT_FAULT_OPS];
	DECLARE_BITMAP(defects, GVT_DEFECTS);
};

static inline struct vgpu *vdev_to_vgpu(struct vfio_device *vdev)
{
	return container_of(vdev, struct vgpu, vdev);
}

/* A plain register; @off 4-aligned and below GVT_MMIO_SIZE. Under lock. */
static inline u32 *gvt_vreg32(struct vgpu *vgpu, u32 off)
{
	return (u32 *)(vgpu->vreg + off);
}

static inline struct vgt_if *gvt_pvinfo(struct vgpu *vgpu)
{
	return (struct vgt_if *)(vgpu->vreg + VGT_PVINFO_PAGE);
}

static inline unsigned long gvt_gm_entries(const struct vgpu *vgpu)
{
	return (vgpu->low_gm + vgpu->high_gm) >> GVT_PAGE_SHIFT;
}

/* Keep the reason of a refusal for debugfs' last_error. Any context. */
__printf(2, 3) void gvt_note(struct vgpu *vgpu, const char *fmt, ...);
void gvt_note_read(struct vgpu *vgpu, char *text, size_t size);

/* pool.c: Ha, Hh, fences, id out of the host's pool */
int gvt_pool_init(void);
void gvt_pool_fini(void);
unsigned int gvt_pool_available(const struct gvt_type *type);
bool gvt_pool_fits(const struct gvt_type *type);	/* into an empty host */
u64 gvt_pool_aperture(void);		/* bytes: BAR2 of every vGPU */
int gvt_pool_alloc(struct vgpu *vgpu);	/* -ENOSPC; by type: host_*, sizes, id */
void gvt_pool_free(struct vgpu *vgpu);

/* vgpu.c */
extern struct mdev_driver gvt_mdev_driver;

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

/* debugfs.c */
void gvt_debugfs_init(void);
void gvt_debugfs_fini(void);
void gvt_debugfs_add(struct vgpu *vgpu);
void gvt_debugfs_remove(struct vgpu *vgpu);

/* fault.c */
extern const struct file_operations gvt_fault_fops;
void gvt_fault_take(struct vgpu *vgpu, enum gvt_fault_op op,
		    struct gvt_fault *fault);
ssize_t gvt_fault_act(enum gvt_fault_op op, const struct gvt_fault *fault);
ssize_t gvt_fault_begin(struct vgpu *vgpu, enum gvt_fault_op op,
			struct gvt_fault *fault);
ssize_t gvt_fault_end(const struct gvt_fault *fault, ssize_t ret);

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

/* state.c: the RFC's state region; takes state_lock and lock */
void gvt_state_init(struct vgpu *vgpu);
void gvt_state_fini(struct vgpu *vgpu);
ssize_t gvt_state_read(struct vgpu *vgpu, char __user *buf, size_t count, u64 off);
ssize_t gvt_state_write(struct vgpu *vgpu, const char __user *buf, size_t count,
			u64 off);

/* state.c: images for v2. An image from gvt_image_parse() points into buf. */
u32 gvt_image_max(struct vgpu *vgpu);	/* bytes of the largest image */
u32 gvt_image_now(struct vgpu *vgpu);	/* bytes of one taken now; takes lock */
/* bytes of the image, or -ENOMEM, -EFAULT when it does not fit; takes lock */
int gvt_image_take(struct vgpu *vgpu, void *buf, u32 room);
/* check, change nothing; takes lock; an error pointer */
struct gvt_image *gvt_image_parse(struct vgpu *vgpu, void *buf, u32 size);
/* takes lock; -EINTR when killed while it waits, and then nothing has changed */
int gvt_image_apply(struct vgpu *vgpu, struct gvt_image *image);
void gvt_image_free(struct gvt_image *image);	/* NULL is fine */

/*
 * mig.c: the v2 protocol. Without the parameter v2 all of these do nothing but
 * gvt_mig_set_active(), which then is gvt_submit_start() or _stop(), and
 * gvt_mig_reset(), which is gvt_device_reset().
 */
void gvt_mig_init(struct vgpu *vgpu);	/* before the device is registered */
void gvt_mig_fini(struct vgpu *vgpu);
bool gvt_mig_enabled(const struct vgpu *vgpu);
void gvt_mig_close(struct vgpu *vgpu);	/* the last device fd */
void gvt_mig_reset(struct vgpu *vgpu);	/* VFIO_DEVICE_RESET */
/* the RFC's START and STOP; -EBUSY in a state of v2 that is not a run state */
int gvt_mig_set_active(struct vgpu *vgpu, bool active);
/* the hardware has written guest memory; any lock but gtt_lock's inner ones */
void gvt_mig_wrote(struct vgpu *vgpu, u64 iova, u64 len);
const char *gvt_mig_state_name(struct vgpu *vgpu);
void gvt_mig_set_rate(struct vgpu *vgpu, u64 rate);
int gvt_feature(struct vfio_device *vdev, u32 flags, void __user *arg,
		size_t argsz);
#define GVT_V2_EXTRA_MAX	BIT_ULL(32)	/* bytes */
#define GVT_V2_RATE_MAX		BIT_ULL(40)	/* bytes/s */

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

#endif
