/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * gvt_sample: a GVT-g vGPU in software, with the migration UAPI of the 2017
 * RFC and, if asked for, mainline's v2. What all of the driver's files know;
 * each room has a header of what it offers to the others.
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
#include <linux/vfio.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include "gvt_rfc.h"
#include "gvt_image.h"
#include "gvt_pvinfo.h"
#include "gvt_defects.h"

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

/* The hardware's log of what it writes, log.c; state_mutex switches it */
struct gvt_log {
	bool			on;
	bool			lost;		/* no memory to note a page */
	struct xarray		pages;		/* written since reported */
	unsigned int		shift;		/* of a page, while on */
};

/* The v2 protocol, mig.c */
struct gvt_mig {
	struct mutex		state_mutex;	/* see the top */
	u32			state;		/* enum vfio_device_mig_state */
	struct gvt_mig_file	*file;		/* the session, if there is one */
	u64			extra_bytes;	/* filler in the state */
	u64			seed;		/* of the filler */
	u64			dirty_rate;	/* bytes/s in PRE_COPY */
	u64			reinit_bytes;	/* new initial data, once */
	bool			info2;		/* PRECOPY_INFO may say REINIT */
	u64			log_page;	/* bytes of a page of the next log */
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

	struct mutex		lock;		/* see the top */
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

	struct mutex		gtt_lock;	/* see the top */
	struct xarray		pins;		/* gfn -> struct gvt_pin */
	unsigned long		nr_pins;

	struct xarray		bar2_pages;	/* page index -> struct page */

	struct gvt_log		log;
	struct gvt_mig		mig;

	spinlock_t		irq_lock;	/* see the top */
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

#endif
