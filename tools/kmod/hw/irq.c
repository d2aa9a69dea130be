// SPDX-License-Identifier: GPL-2.0-only
/*
 * Interrupts: the GT's banks of registers, and the eventfds behind MSI and
 * INTx.
 *
 * Events are pulses: they latch in IIR unless IMR masks them, ISR always reads
 * as 0. While the master is enabled and IIR & IER has a bit, the line is up:
 * that, and each further event, is an MSI; for INTx it is a level.
 */
#include <linux/err.h>
#include <linux/minmax.h>

#include "hw/hw.h"

#define GVT_IRQ_MASTER		0x44200	/* i915: GEN8_MASTER_IRQ */
#define GVT_IRQ_MASTER_ENABLE	BIT(31)
#define GVT_IRQ_BANK(bank)	(0x44300 + 16 * (bank))
#define GVT_IRQ_BANKS		4
#define GVT_IRQ_END		GVT_IRQ_BANK(GVT_IRQ_BANKS)

/* Registers of a bank */
#define GVT_ISR			0x0
#define GVT_IMR			0x4
#define GVT_IIR			0x8
#define GVT_IER			0xc

/* Half banks, and where the master register shows them */
static const struct gvt_irq_source {
	u8	bank;
	u8	shift;
	u8	master_bit;
} gvt_irq_sources[] = {
	[GVT_RING_RCS]	 = { 0,  0, 0 },
	[GVT_RING_BCS]	 = { 0, 16, 1 },
	[GVT_RING_VCS]	 = { 1,  0, 2 },
	[GVT_RING_VCS2]	 = { 1, 16, 3 },
	[GVT_RING_VECS]	 = { 3,  0, 6 },
	/* of no engine, but a guest or an image can set their IIR */
	[GVT_RING_COUNT] = { 2,  0, 4 },
	{ 2, 16, 4 },
	{ 3, 16, 7 },
};

static u32 *gvt_irq_reg(struct vgpu *vgpu, unsigned int bank, unsigned int reg)
{
	return gvt_vreg32(vgpu, GVT_IRQ_BANK(bank) + reg);
}

/* Bring the master's status bits up to date; is the line up? */
static bool gvt_irq_update(struct vgpu *vgpu)
{
	u32 *master = gvt_vreg32(vgpu, GVT_IRQ_MASTER);
	const struct gvt_irq_source *source;
	u32 status = 0, bits;
	int i;

	lockdep_assert_held(&vgpu->lock);
	for (i = 0; i < ARRAY_SIZE(gvt_irq_sources); i++) {
		source = &gvt_irq_sources[i];
		bits = *gvt_irq_reg(vgpu, source->bank, GVT_IIR) &
		       *gvt_irq_reg(vgpu, source->bank, GVT_IER);
		if (bits >> source->shift & 0xffff)
			status |= BIT(source->master_bit);
	}
	*master = (*master & GVT_IRQ_MASTER_ENABLE) | status;
	return (*master & GVT_IRQ_MASTER_ENABLE) && status;
}

static void gvt_irq_signal(struct vgpu *vgpu, struct eventfd_ctx *trigger)
{
	lockdep_assert_held(&vgpu->irq_lock);
	if (!trigger)
		return;
#ifdef GVT_SINCE_6_8
	eventfd_signal(trigger);
#else	/* until 6.7 with a count */
	eventfd_signal(trigger, 1);
#endif
	atomic64_inc(&vgpu->counters.irqs);
}

/* The line is up: MSI if enabled, else INTx, which masks itself */
static void gvt_irq_fire(struct vgpu *vgpu)
{
	bool msi = gvt_cfg_msi_enabled(vgpu);

	if (!msi && gvt_cfg_intx_disabled(vgpu))
		return;
	spin_lock(&vgpu->irq_lock);
	if (msi) {
		gvt_irq_signal(vgpu, vgpu->msi_trigger);
	} else if (vgpu->intx_trigger && !vgpu->intx_masked) {
		vgpu->intx_masked = true;
		gvt_irq_signal(vgpu, vgpu->intx_trigger);
	}
	spin_unlock(&vgpu->irq_lock);
}

void gvt_irq_recheck(struct vgpu *vgpu)
{
	if (gvt_irq_update(vgpu) && !gvt_cfg_msi_enabled(vgpu))
		gvt_irq_fire(vgpu);
}

void gvt_irq_event(struct vgpu *vgpu, int ring, enum gvt_event event)
{
	const struct gvt_irq_source *source = &gvt_irq_sources[ring];
	u32 bit = BIT(source->shift + event);

	if (*gvt_irq_reg(vgpu, source->bank, GVT_IMR) & bit)
		return;
	*gvt_irq_reg(vgpu, source->bank, GVT_IIR) |= bit;
	if (gvt_irq_update(vgpu))
		gvt_irq_fire(vgpu);
}

bool gvt_irq_owns(u32 off)
{
	return off >= GVT_IRQ_MASTER && off < GVT_IRQ_END;
}

/* IIR is write-one-to-clear, ISR and the master's status are read-only */
static void gvt_irq_store(struct vgpu *vgpu, u32 off, u32 value)
{
	u32 *reg = gvt_vreg32(vgpu, off);

	if (off < GVT_IRQ_BANK(0))
		*reg = value;
	else if ((off & 0xc) == GVT_IIR)
		*reg &= ~value;
	else if ((off & 0xc) != GVT_ISR)
		*reg = value;
}

void gvt_irq_mmio_write(struct vgpu *vgpu, u32 off, u32 value)
{
	bool was_up = gvt_irq_update(vgpu);

	gvt_irq_store(vgpu, off, value);
	if (gvt_irq_update(vgpu) && !was_up)
		gvt_irq_fire(vgpu);
}

/* --- VFIO_DEVICE_SET_IRQS -------------------------------------------- */

static struct eventfd_ctx **gvt_irq_trigger(struct vgpu *vgpu,
					    unsigned int index)
{
	return index == VFIO_PCI_MSI_IRQ_INDEX ? &vgpu->msi_trigger :
						 &vgpu->intx_trigger;
}

/* Takes @ctx over, which may be NULL */
static void gvt_irq_replace(struct vgpu *vgpu, unsigned int index,
			    struct eventfd_ctx *ctx)
{
	bool intx = index == VFIO_PCI_INTX_IRQ_INDEX;

	mutex_lock(&vgpu->lock);
	spin_lock(&vgpu->irq_lock);
	swap(*gvt_irq_trigger(vgpu, index), ctx);
	if (intx && (!ctx || !vgpu->intx_trigger))
		vgpu->intx_masked = false;
	spin_unlock(&vgpu->irq_lock);
	if (intx)
		gvt_irq_recheck(vgpu);
	mutex_unlock(&vgpu->lock);
	if (ctx)
		eventfd_ctx_put(ctx);
}

static int gvt_irq_assign(struct vgpu *vgpu, unsigned int index, s32 fd)
{
	struct eventfd_ctx *ctx = NULL;

	if (fd >= 0)
		ctx = eventfd_ctx_fdget(fd);
	if (IS_ERR(ctx))
		return PTR_ERR(ctx);
	gvt_irq_replace(vgpu, index, ctx);
	return 0;
}

/* Userspace's own trigger, to test its handler */
static int gvt_irq_loopback(struct vgpu *vgpu, unsigned int index)
{
	struct eventfd_ctx *ctx;

	spin_lock(&vgpu->irq_lock);
	ctx = *gvt_irq_trigger(vgpu, index);
	gvt_irq_signal(vgpu, ctx);
	spin_unlock(&vgpu->irq_lock);
	return ctx ? 0 : -EINVAL;
}

static int gvt_irq_set_trigger(struct vgpu *vgpu, u32 flags, unsigned int index,
			       unsigned int count, void *data)
{
	u32 kind = flags & VFIO_IRQ_SET_DATA_TYPE_MASK;

	if (kind == VFIO_IRQ_SET_DATA_NONE && !count) {
		gvt_irq_replace(vgpu, index, NULL);
		return 0;
	}
	if (count != 1)
		return -EINVAL;
	switch (kind) {
	case VFIO_IRQ_SET_DATA_NONE:
		return gvt_irq_loopback(vgpu, index);
	case VFIO_IRQ_SET_DATA_BOOL:
		return *(u8 *)data ? gvt_irq_loopback(vgpu, index) : 0;
	case VFIO_IRQ_SET_DATA_EVENTFD:
		return gvt_irq_assign(vgpu, index, *(s32 *)data);
	}
	return -EINVAL;
}

static int gvt_intx_set_mask(struct vgpu *vgpu, u32 flags, unsigned int count,
			     void *data, bool mask)
{
	u32 kind = flags & VFIO_IRQ_SET_DATA_TYPE_MASK;
	bool enabled;

	if (kind == VFIO_IRQ_SET_DATA_EVENTFD)
		return -ENOTTY;
	if (count != 1)
		return -EINVAL;
	if (kind == VFIO_IRQ_SET_DATA_BOOL && !*(u8 *)data)
		return 0;
	mutex_lock(&vgpu->lock);
	spin_lock(&vgpu->irq_lock);
	enabled = vgpu->intx_trigger;
	if (enabled)
		vgpu->intx_masked = mask;
	spin_unlock(&vgpu->irq_lock);
	gvt_irq_recheck(vgpu);		/* the line may still be up */
	mutex_unlock(&vgpu->lock);
	return enabled ? 0 : -EINVAL;
}

/*
 * What vfio_set_irqs_validate_and_prepare() has let pass: @start is 0, @count
 * 0 or 1, @index INTx or MSI, @data as long as that takes. As in vfio-pci,
 * MSI has no mask.
 */
int gvt_irq_set(struct vgpu *vgpu, u32 flags, unsigned int index,
		unsigned int start, unsigned int count, void *data)
{
	u32 action = flags & VFIO_IRQ_SET_ACTION_TYPE_MASK;

	if (start || (index != VFIO_PCI_INTX_IRQ_INDEX &&
		      index != VFIO_PCI_MSI_IRQ_INDEX))
		return -EINVAL;
	if (action == VFIO_IRQ_SET_ACTION_TRIGGER)
		return gvt_irq_set_trigger(vgpu, flags, index, count, data);
	if (index == VFIO_PCI_INTX_IRQ_INDEX &&
	    (action == VFIO_IRQ_SET_ACTION_MASK ||
	     action == VFIO_IRQ_SET_ACTION_UNMASK))
		return gvt_intx_set_mask(vgpu, flags, count, data,
					 action == VFIO_IRQ_SET_ACTION_MASK);
	return -ENOTTY;
}

void gvt_irq_release(struct vgpu *vgpu)
{
	gvt_irq_replace(vgpu, VFIO_PCI_INTX_IRQ_INDEX, NULL);
	gvt_irq_replace(vgpu, VFIO_PCI_MSI_IRQ_INDEX, NULL);
}
