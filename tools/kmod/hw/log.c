// SPDX-License-Identifier: GPL-2.0-only
/*
 * The hardware's log of guest memory that it writes, in pages of a size that
 * its user chooses. state_mutex is held to switch it, no lock to note a write.
 */
#include <linux/log2.h>

#include "hw/hw.h"

void gvt_log_init(struct vgpu *vgpu)
{
	xa_init_flags(&vgpu->log.pages, XA_FLAGS_ACCOUNT);
}

void gvt_log_fini(struct vgpu *vgpu)
{
	xa_destroy(&vgpu->log.pages);
}

void gvt_log_on(struct vgpu *vgpu, u64 page_size)
{
	gvt_log_off(vgpu);	/* what came late into the last log */
	vgpu->log.lost = false;
	WRITE_ONCE(vgpu->log.shift, ilog2(page_size));
	/* Pairs with gvt_log_wrote(), which must see the size before */
	smp_store_release(&vgpu->log.on, true);
}

void gvt_log_off(struct vgpu *vgpu)
{
	WRITE_ONCE(vgpu->log.on, false);
	xa_destroy(&vgpu->log.pages);
}

/* After the write: a report between the two must not forget it */
void gvt_log_wrote(struct vgpu *vgpu, u64 iova, u64 len)
{
	struct gvt_log *log = &vgpu->log;
	unsigned long page, last;
	unsigned int shift;

	/* Pairs with gvt_log_on(): who sees the log sees its page size */
	if (!smp_load_acquire(&log->on) || !len)
		return;
	shift = READ_ONCE(log->shift);
	last = (iova + len - 1) >> shift;
	for (page = iova >> shift; page <= last; page++)
		if (xa_err(xa_store(&log->pages, page, xa_mk_value(0),
				    GFP_KERNEL_ACCOUNT)))
			WRITE_ONCE(log->lost, true);
}
