// SPDX-License-Identifier: GPL-2.0-only
/*
 * PCI config space: what GVT-g shows of its host's GPU, and which bytes a
 * write changes.
 */
#include <linux/pci_ids.h>
#include <linux/pci_regs.h>
#include <linux/string.h>

#include "hw/hw.h"
#include "lab/lab.h"

#define GVT_CFG_GMCH		0x50	/* i915: SNB_GMCH_CTRL */
#define GVT_GMCH_GTT_8M		0xc0	/* and no stolen memory */
#define GVT_CFG_PM		0xd0
#define GVT_CFG_SWSCI		0xe8
#define GVT_CFG_OPREGION	0xfc
#define GVT_BAR_FLAGS		0xfu	/* type bits of a BAR's low half */

/* Writable bits of the header; everything behind it is plain memory */
static const u8 gvt_cfg_writable[PCI_STD_HEADER_SIZEOF] = {
	[PCI_COMMAND]		= 0xff, 0x07,
	[PCI_STATUS]		= 0x00, 0xf9,	/* the one RW1C byte */
	[PCI_CACHE_LINE_SIZE]	= 0xff,
	[PCI_ROM_ADDRESS]	= 0x01, 0xf8, 0xff, 0xff,
	[PCI_INTERRUPT_LINE]	= 0xff,
};

static u32 gvt_cfg_get(struct vgpu *vgpu, u32 off, unsigned int bytes)
{
	__le32 value = 0;

	memcpy(&value, vgpu->cfg + off, bytes);
	return le32_to_cpu(value);
}

static void gvt_cfg_put(struct vgpu *vgpu, u32 off, unsigned int bytes,
			u32 value)
{
	__le32 le = cpu_to_le32(value);

	memcpy(vgpu->cfg + off, &le, bytes);
}

void gvt_cfg_init(struct vgpu *vgpu)
{
	u16 device = READ_ONCE(gvt_device_id);

	lockdep_assert_held(&vgpu->lock);
	memset(vgpu->cfg, 0, GVT_IMAGE_CFG_SIZE);
	gvt_cfg_put(vgpu, PCI_VENDOR_ID, 2, PCI_VENDOR_ID_INTEL);
	gvt_cfg_put(vgpu, PCI_DEVICE_ID, 2, device);
	gvt_cfg_put(vgpu, PCI_STATUS, 2, PCI_STATUS_CAP_LIST);
	gvt_cfg_put(vgpu, PCI_CLASS_DEVICE, 2, PCI_CLASS_DISPLAY_VGA);
	gvt_cfg_put(vgpu, PCI_BASE_ADDRESS_0, 4, PCI_BASE_ADDRESS_MEM_TYPE_64);
	gvt_cfg_put(vgpu, PCI_BASE_ADDRESS_2, 4, PCI_BASE_ADDRESS_MEM_TYPE_64 |
						 PCI_BASE_ADDRESS_MEM_PREFETCH);
	gvt_cfg_put(vgpu, PCI_SUBSYSTEM_VENDOR_ID, 2, PCI_VENDOR_ID_INTEL);
	gvt_cfg_put(vgpu, PCI_SUBSYSTEM_ID, 2, device);
	gvt_cfg_put(vgpu, PCI_CAPABILITY_LIST, 1, GVT_CFG_MSI);
	gvt_cfg_put(vgpu, PCI_INTERRUPT_PIN, 1, 1);
	gvt_cfg_put(vgpu, GVT_CFG_GMCH, 2, GVT_GMCH_GTT_8M);

	/* one vector, 32-bit address */
	gvt_cfg_put(vgpu, GVT_CFG_MSI + PCI_CAP_LIST_ID, 1, PCI_CAP_ID_MSI);
	gvt_cfg_put(vgpu, GVT_CFG_MSI + PCI_CAP_LIST_NEXT, 1, GVT_CFG_PM);
	gvt_cfg_put(vgpu, GVT_CFG_PM + PCI_CAP_LIST_ID, 1, PCI_CAP_ID_PM);
	gvt_cfg_put(vgpu, GVT_CFG_PM + PCI_PM_PMC, 2, PCI_PM_CAP_DSI | 2);
}

bool gvt_cfg_msi_enabled(struct vgpu *vgpu)
{
	return gvt_cfg_get(vgpu, GVT_CFG_MSI + PCI_MSI_FLAGS, 2) &
	       PCI_MSI_FLAGS_ENABLE;
}

bool gvt_cfg_intx_disabled(struct vgpu *vgpu)
{
	return gvt_cfg_get(vgpu, PCI_COMMAND, 2) & PCI_COMMAND_INTX_DISABLE;
}

static bool gvt_cfg_access_ok(u32 off, unsigned int bytes)
{
	return (bytes == 1 || bytes == 2 || bytes == 4) &&
	       !(off & (bytes - 1)) && off < GVT_IMAGE_CFG_SIZE;
}

int gvt_cfg_read(struct vgpu *vgpu, u32 off, void *buf, unsigned int bytes)
{
	lockdep_assert_held(&vgpu->lock);
	if (!gvt_cfg_access_ok(off, bytes))
		return -EINVAL;
	memcpy(buf, vgpu->cfg + off, bytes);
	return 0;
}

static void gvt_cfg_store(struct vgpu *vgpu, u32 off, const u8 *src,
			  unsigned int bytes)
{
	u8 mask, *byte;

	for (; bytes; bytes--, off++, src++) {
		byte = vgpu->cfg + off;
		mask = off < sizeof(gvt_cfg_writable) ?
		       gvt_cfg_writable[off] : 0xff;
		if (off == PCI_STATUS + 1)
			*byte &= ~(*src & mask);
		else
			*byte = (*byte & ~mask) | (*src & mask);
	}
}

/* All ones ask for the size; otherwise a low half keeps its type bits */
static void gvt_bar_write(struct vgpu *vgpu, u32 off, u32 value)
{
	bool low = !(off & 4);
	u64 size;

	if (off >= PCI_BASE_ADDRESS_4)
		return;			/* no BAR4: reads 0 */
	size = off < PCI_BASE_ADDRESS_2 ? GVT_BAR0_SIZE : gvt_pool_aperture();
	if (value == U32_MAX)
		value = low ? lower_32_bits(-size) : upper_32_bits(-size);
	if (low)
		value = (value & ~GVT_BAR_FLAGS) |
			(gvt_cfg_get(vgpu, off, 4) & GVT_BAR_FLAGS);
	gvt_cfg_put(vgpu, off, 4, value);
}

static void gvt_rom_write(struct vgpu *vgpu, u32 value)
{
	__le32 le = cpu_to_le32(value);

	if ((value & PCI_ROM_ADDRESS_MASK) == PCI_ROM_ADDRESS_MASK)
		gvt_cfg_put(vgpu, PCI_ROM_ADDRESS, 4, 0);	/* no ROM */
	else
		gvt_cfg_store(vgpu, PCI_ROM_ADDRESS, (u8 *)&le, 4);
}

/* Registers that GVT-g takes as a whole only */
static bool gvt_cfg_is_dword(u32 off)
{
	return (off >= PCI_BASE_ADDRESS_0 && off < PCI_CARDBUS_CIS) ||
	       off == PCI_ROM_ADDRESS || off == GVT_CFG_SWSCI ||
	       off == GVT_CFG_OPREGION;
}

static int gvt_cfg_refuse(struct vgpu *vgpu, u32 off, unsigned int bytes)
{
	gvt_note(vgpu, "config space: write of %u bytes at %#x", bytes, off);
	return -EINVAL;
}

int gvt_cfg_write(struct vgpu *vgpu, u32 off, const void *buf,
		  unsigned int bytes)
{
	u32 reg = off & ~3u;
	__le32 value;

	lockdep_assert_held(&vgpu->lock);
	if (!gvt_cfg_access_ok(off, bytes) ||
	    (reg == PCI_COMMAND && bytes > 2) ||
	    (gvt_cfg_is_dword(reg) && bytes != 4))
		return gvt_cfg_refuse(vgpu, off, bytes);
	if (reg >= PCI_BASE_ADDRESS_0 && reg < PCI_CARDBUS_CIS) {
		memcpy(&value, buf, 4);
		gvt_bar_write(vgpu, off, le32_to_cpu(value));
	} else if (reg == PCI_ROM_ADDRESS) {
		memcpy(&value, buf, 4);
		gvt_rom_write(vgpu, le32_to_cpu(value));
	} else {
		gvt_cfg_store(vgpu, off, buf, bytes);
	}
	return 0;
}
