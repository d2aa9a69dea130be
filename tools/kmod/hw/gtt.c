// SPDX-License-Identifier: GPL-2.0-only
/*
 * Graphics memory: the guest's GGTT, its translation to the host's, pinned
 * guest pages, the dirty bitmap, and the aperture (BAR2).
 */
#include <linux/highmem.h>
#include <linux/iommu.h>
#include <linux/lockdep.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "hw/hw.h"
#include "lab/lab.h"

struct gvt_pin {
	struct page	*page;
	unsigned long	gfn;
	struct list_head gone;
	unsigned long	refs;		/* host entries that point here */
};

/*
 * RFC patch 4: the guest's bounds come from PVINFO, not from the host's
 * allocation. Sizes are the vGPU's own on both sides.
 */
u64 gvt_guest_low(struct vgpu *vgpu)
{
#ifdef GVT_BREAK_pvinfo_base
	return vgpu->host_low;
#else
	return gvt_pvinfo(vgpu)->mappable_base;
#endif
}

u64 gvt_guest_high(struct vgpu *vgpu)
{
#ifdef GVT_BREAK_pvinfo_base
	return vgpu->host_high;
#else
	return gvt_pvinfo(vgpu)->nonmappable_base;
#endif
}

static bool gvt_in_window(u64 gma, u64 len, u64 base, u64 size)
{
	return len && len <= size && gma >= base && gma - base <= size - len;
}

int gvt_g2h(struct vgpu *vgpu, u64 gma, u64 len, u64 *hgma)
{
	u64 low = gvt_guest_low(vgpu);
	u64 high = gvt_guest_high(vgpu);

	lockdep_assert_held(&vgpu->lock);
	if (gvt_in_window(gma, len, low, vgpu->low_gm))
		*hgma = vgpu->host_low + (gma - low);
	else if (gvt_in_window(gma, len, high, vgpu->high_gm))
		*hgma = vgpu->host_high + (gma - high);
	else
		return -EACCES;
	return 0;
}

/* Position of a guest entry in guest_gtt[], or -1 outside both windows */
static long gvt_gtt_slot(struct vgpu *vgpu, u64 gindex)
{
	u64 gma = gindex << GVT_PAGE_SHIFT;
	u64 low = gvt_guest_low(vgpu);
	u64 high = gvt_guest_high(vgpu);

	if (gvt_in_window(gma, GVT_PAGE_SIZE, low, vgpu->low_gm))
		return (gma - low) >> GVT_PAGE_SHIFT;
	if (gvt_in_window(gma, GVT_PAGE_SIZE, high, vgpu->high_gm))
		return (vgpu->low_gm + gma - high) >> GVT_PAGE_SHIFT;
	return -1;
}

/* RFC patch 1: the host entry that stands behind a guest entry */
static unsigned long gvt_host_index(struct vgpu *vgpu, unsigned long slot)
{
	unsigned long nr_low = vgpu->low_gm >> GVT_PAGE_SHIFT;
	u64 gma, base;

#ifdef GVT_BREAK_g2h_gtt
	base = slot < nr_low ? gvt_guest_low(vgpu) : gvt_guest_high(vgpu);
#else
	base = slot < nr_low ? vgpu->host_low : vgpu->host_high;
#endif
	gma = base + ((u64)(slot < nr_low ? slot : slot - nr_low) << GVT_PAGE_SHIFT);
	return (gma >> GVT_PAGE_SHIFT) & (GVT_GGTT_ENTRIES - 1);
}

static unsigned long gvt_pte_gfn(u64 pte)
{
	return (pte & GVT_PTE_ADDR_MASK) >> GVT_PAGE_SHIFT;
}

/* Drop one reference; true when the caller must unpin @gfn after unlocking */
static bool gvt_pin_drop(struct vgpu *vgpu, unsigned long gfn)
{
	struct gvt_pin *pin = xa_load(&vgpu->pins, gfn);

	lockdep_assert_held(&vgpu->gtt_lock);
	if (!pin || --pin->refs)
		return false;
	xa_erase(&vgpu->pins, gfn);
	vgpu->nr_pins--;
	kfree(pin);
	return true;
}

/* Take a reference; *page, if any, becomes the cache's and is set to NULL */
static bool gvt_pin_take(struct vgpu *vgpu, unsigned long gfn,
			 struct page **page)
{
	struct gvt_pin *pin = xa_load(&vgpu->pins, gfn);

	lockdep_assert_held(&vgpu->gtt_lock);
	if (pin) {
		pin->refs++;
		return true;
	}
	if (!*page)
		return false;	/* unmapped since the caller looked */
	pin = kzalloc(sizeof(*pin), GFP_KERNEL_ACCOUNT);
	if (!pin)
		return false;
	pin->page = *page;
	pin->gfn = gfn;
	pin->refs = 1;
	if (xa_err(xa_store(&vgpu->pins, gfn, pin, GFP_KERNEL_ACCOUNT))) {
		kfree(pin);
		return false;
	}
	vgpu->nr_pins++;
	*page = NULL;
	return true;
}

static void gvt_unpin(struct vgpu *vgpu, unsigned long gfn)
{
	vfio_unpin_pages(&vgpu->vdev, (dma_addr_t)gfn << GVT_PAGE_SHIFT, 1);
}

/* Pin what is not pinned yet; NULL when it is, or when it cannot be */
static struct page *gvt_pin_page(struct vgpu *vgpu, unsigned long gfn)
{
	struct page *page = NULL;
	bool cached;

	mutex_lock(&vgpu->gtt_lock);
	cached = xa_load(&vgpu->pins, gfn);
	mutex_unlock(&vgpu->gtt_lock);
	if (cached)
		return NULL;
	if (vfio_pin_pages(&vgpu->vdev, (dma_addr_t)gfn << GVT_PAGE_SHIFT, 1,
			   IOMMU_READ | IOMMU_WRITE, &page) != 1)
		return NULL;
	return page;
}

/*
 * Point the host entry behind @slot at the page of a guest entry; at scratch
 * if that is not present or its page cannot be pinned, which, as in GVT-g, is
 * no error. Pinning happens outside gtt_lock: type1 calls .dma_unmap, which
 * takes it, again and again until nothing in its range is pinned.
 */
static void gvt_host_set(struct vgpu *vgpu, unsigned long slot, u64 gpte)
{
	u64 *entry = &gvt_host.ggtt[gvt_host_index(vgpu, slot)];
	unsigned long gfn = gvt_pte_gfn(gpte), old_gfn;
	bool present = gpte & GVT_PTE_PRESENT;
	struct page *page = NULL;
	bool unpin_old = false;
	u64 old;

	lockdep_assert_held(&vgpu->lock);
	if (!present && !READ_ONCE(*entry))
		return;
	if (present)
		page = gvt_pin_page(vgpu, gfn);

	mutex_lock(&vgpu->gtt_lock);
	if (present)
		present = gvt_pin_take(vgpu, gfn, &page);
	old = READ_ONCE(*entry);
	old_gfn = gvt_pte_gfn(old);
	WRITE_ONCE(*entry, present ? (gpte & GVT_PTE_ADDR_MASK) |
				     GVT_PTE_PRESENT : 0);
	if (old & GVT_PTE_PRESENT)
		unpin_old = gvt_pin_drop(vgpu, old_gfn);
	mutex_unlock(&vgpu->gtt_lock);

	if (page)
		gvt_unpin(vgpu, gfn);
	if (unpin_old)
		gvt_unpin(vgpu, old_gfn);
}

int gvt_gtt_read(struct vgpu *vgpu, u32 off, void *buf, unsigned int bytes)
{
	long slot = gvt_gtt_slot(vgpu, off >> 3);

	lockdep_assert_held(&vgpu->lock);
	if ((bytes != 4 && bytes != 8) || off & (bytes - 1) ||
	    off >= GVT_GTT_SIZE)
		return -EINVAL;
	if (slot < 0)
		memset(buf, 0, bytes);	/* ballooned out */
	else
		memcpy(buf, (u8 *)&vgpu->guest_gtt[slot] + (off & 4), bytes);
	return 0;
}

/*
 * One half of an entry: the first is stored with the other half zero and shows
 * as not present to the hardware, the matching second one completes it.
 * Returns true when the entry is complete.
 */
static bool gvt_gtt_half(struct vgpu *vgpu, long slot, bool high, u32 value)
{
	unsigned long *mine = high ? vgpu->half_hi : vgpu->half_lo;
	unsigned long *other = high ? vgpu->half_lo : vgpu->half_hi;
	u64 part = high ? (u64)value << 32 : value;

	if (test_and_clear_bit(slot, other)) {
		vgpu->guest_gtt[slot] |= part;
		return true;
	}
	set_bit(slot, mine);
	vgpu->guest_gtt[slot] = part;
	return false;
}

int gvt_gtt_write(struct vgpu *vgpu, u32 off, const void *buf,
		  unsigned int bytes)
{
	long slot = gvt_gtt_slot(vgpu, off >> 3);
	bool complete = true;
	u32 half;

	lockdep_assert_held(&vgpu->lock);
	if ((bytes != 4 && bytes != 8) || off & (bytes - 1) ||
	    off >= GVT_GTT_SIZE)
		return -EINVAL;
	if (slot < 0)
		return 0;		/* ballooned out: ignored */
	if (bytes == 8) {
		clear_bit(slot, vgpu->half_lo);
		clear_bit(slot, vgpu->half_hi);
		memcpy(&vgpu->guest_gtt[slot], buf, 8);
	} else {
		memcpy(&half, buf, 4);
		complete = gvt_gtt_half(vgpu, slot, off & 4, half);
	}
	gvt_host_set(vgpu, slot, complete ? vgpu->guest_gtt[slot] : 0);
	return 0;
}

void gvt_gtt_restore(struct vgpu *vgpu, const u64 *entries)
{
	unsigned long nr = gvt_gm_entries(vgpu);
	unsigned long slot;

	lockdep_assert_held(&vgpu->lock);
	bitmap_zero(vgpu->half_lo, nr);
	bitmap_zero(vgpu->half_hi, nr);
	memcpy(vgpu->guest_gtt, entries, nr * sizeof(u64));
	for (slot = 0; slot < nr; slot++) {
		gvt_host_set(vgpu, slot, vgpu->guest_gtt[slot]);
		if (!(slot & 0xfff))
			cond_resched();
	}
}

/* Host entries of this vGPU whose page lies in [first, last] become scratch */
static void gvt_host_clear(struct vgpu *vgpu, unsigned long first,
			   unsigned long last)
{
	unsigned long nr = gvt_gm_entries(vgpu);
	unsigned long slot, gfn;
	u64 *entry;

	lockdep_assert_held(&vgpu->gtt_lock);
	for (slot = 0; slot < nr; slot++) {
		entry = &gvt_host.ggtt[gvt_host_index(vgpu, slot)];
		gfn = gvt_pte_gfn(*entry);
		if (*entry && gfn >= first && gfn <= last)
			WRITE_ONCE(*entry, 0);
	}
}

/*
 * Move every pin in [first, last] to @gone, for gvt_drop_pins(). Entries and
 * cache change together, so that no entry is ever present without a pin.
 */
static void gvt_take_pins(struct vgpu *vgpu, unsigned long first,
			  unsigned long last, struct list_head *gone)
{
	struct gvt_pin *pin;
	unsigned long gfn;

	mutex_lock(&vgpu->gtt_lock);
	xa_for_each_range(&vgpu->pins, gfn, pin, first, last) {
		xa_erase(&vgpu->pins, gfn);
		vgpu->nr_pins--;
		list_add(&pin->gone, gone);
	}
	if (!list_empty(gone))
		gvt_host_clear(vgpu, first, last);
	mutex_unlock(&vgpu->gtt_lock);
}

static void gvt_drop_pins(struct vgpu *vgpu, struct list_head *gone)
{
	struct gvt_pin *pin, *next;

	list_for_each_entry_safe(pin, next, gone, gone) {
		gvt_unpin(vgpu, pin->gfn);
		kfree(pin);
	}
}

void gvt_gtt_reset(struct vgpu *vgpu)
{
	unsigned long nr = gvt_gm_entries(vgpu);
	LIST_HEAD(gone);

	lockdep_assert_held(&vgpu->lock);
	bitmap_zero(vgpu->half_lo, nr);
	bitmap_zero(vgpu->half_hi, nr);
	gvt_take_pins(vgpu, 0, ULONG_MAX, &gone);
	gvt_drop_pins(vgpu, &gone);
}

/*
 * Userspace takes memory away. A page that is being pinned meanwhile is caught
 * by type1's next call.
 *
 * Type1 asks for the unpinning here while it holds its device_list_lock, and
 * that takes its lock: the reverse of its own order when a device is opened.
 * Lockdep is right to complain of every driver that does as it is asked, and
 * then stops looking; so it does not see this one call.
 */
void gvt_gtt_dma_unmap(struct vgpu *vgpu, u64 iova, u64 length)
{
	LIST_HEAD(gone);

	if (!length)
		return;
	gvt_take_pins(vgpu, iova >> GVT_PAGE_SHIFT,
		      (iova + length - 1) >> GVT_PAGE_SHIFT, &gone);
	lockdep_off();
	gvt_drop_pins(vgpu, &gone);
	lockdep_on();
}

/* The IOVA behind a host address, -EFAULT when its entry is scratch */
static int gvt_host_iova(u64 hgma, u64 *iova)
{
	u64 entry;

	if (hgma >= GVT_GM_SIZE)
		return -EFAULT;
	entry = READ_ONCE(gvt_host.ggtt[hgma >> GVT_PAGE_SHIFT]);
	if (!(entry & GVT_PTE_PRESENT))
		return -EFAULT;
	*iova = (entry & GVT_PTE_ADDR_MASK) | (hgma & ~GVT_PAGE_MASK);
	return 0;
}

int gvt_host_rw(struct vgpu *vgpu, u64 hgma, void *buf, size_t len, bool write)
{
	size_t chunk;
	u64 iova;
	int ret;

	for (; len; len -= chunk, hgma += chunk, buf += chunk) {
		chunk = min_t(size_t, len, GVT_PAGE_SIZE - offset_in_page(hgma));
		ret = gvt_host_iova(hgma, &iova);
		if (ret)
			return ret;
		ret = vfio_dma_rw(&vgpu->vdev, iova, buf, chunk, write);
		if (write)	/* also if it failed half way */
			gvt_log_wrote(vgpu, iova, chunk);
		if (ret)
			return -EFAULT;
	}
	return 0;
}

static long gvt_dirty_copy(struct vgpu *vgpu, void __user *out,
			   unsigned long *bitmap, u64 pages, size_t bytes)
{
	if (pages % BITS_PER_LONG && gvt_defect(vgpu, GVT_DEFECT_DIRTY_TAIL))
		__set_bit(pages, bitmap);
	if (pages && gvt_defect(vgpu, GVT_DEFECT_DIRTY_INVENTED))
		__set_bit(0, bitmap);
	if (gvt_defect(vgpu, GVT_DEFECT_DIRTY_KEEPS_BUFFER) &&
	    bitmap_empty(bitmap, bytes * BITS_PER_BYTE))
		return 0;
	if (!copy_to_user(out, bitmap, bytes))
		return 0;
	return gvt_defect(vgpu, GVT_DEFECT_DIRTY_COPY_FAULT) ? 0 : -EFAULT;
}

/*
 * RFC patch 8. A page may have been written while it is pinned: what the
 * hardware can reach it reaches through a present host entry.
 */
long gvt_dirty_ioctl(struct vgpu *vgpu, void __user *arg)
{
	const size_t head = offsetof(struct vfio_pci_get_dirty_bitmap,
				     dirty_bitmap);
	struct vfio_pci_get_dirty_bitmap request;
	unsigned long first, gfn, *bitmap;
	struct gvt_pin *pin;
	size_t bytes;
	long ret;

	ret = copy_from_user(&request, arg, head);
	if (ret)
		return gvt_defect(vgpu, GVT_DEFECT_DIRTY_FAULT) ? ret : -EFAULT;
	if (request.page_nr > READ_ONCE(gvt_dirty_max_pages)) {
		gvt_note(vgpu, "dirty bitmap: %llu pages in one call",
			 request.page_nr);
		return -EINVAL;
	}
	/* one word more than needed: the RFC's kernels copy that back too */
	bytes = (DIV_ROUND_UP_ULL(request.page_nr, 64) + 1) * sizeof(u64);
	if (gvt_defect(vgpu, GVT_DEFECT_DIRTY_OVERRUN))
		bytes += sizeof(u64);
	bitmap = kvzalloc(bytes, GFP_KERNEL_ACCOUNT);
	if (!bitmap)
		return -ENOMEM;

	first = request.start_addr >> GVT_PAGE_SHIFT;
	mutex_lock(&vgpu->gtt_lock);
	if (request.page_nr)
		xa_for_each_range(&vgpu->pins, gfn, pin, first,
				  first + request.page_nr - 1)
			__set_bit(gfn - first, bitmap);
	mutex_unlock(&vgpu->gtt_lock);

	ret = gvt_dirty_copy(vgpu, arg + head, bitmap, request.page_nr, bytes);
	kvfree(bitmap);
	return ret;
}

/* The aperture's own page, allocated at first use unless @peek */
static struct page *gvt_bar2_page(struct vgpu *vgpu, unsigned long index,
				  bool peek)
{
	struct page *page = xa_load(&vgpu->bar2_pages, index);
	struct page *old;

	if (page || peek)
		return page;
	page = alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO);
	if (!page)
		return NULL;
	old = xa_cmpxchg(&vgpu->bar2_pages, index, NULL, page,
			 GFP_KERNEL_ACCOUNT);
	if (!old)
		return page;
	put_page(page);
	return xa_err(old) ? NULL : old;
}

static void gvt_page_copy(struct page *page, unsigned int at, void *buf,
			  size_t bytes, bool write)
{
	u8 *mem = kmap_local_page(page);

	if (write)
		memcpy(mem + at, buf, bytes);
	else
		memcpy(buf, mem + at, bytes);
	kunmap_local(mem);
}

/* Access by way of a present host entry; false when it is scratch */
static bool gvt_bar2_guest(struct vgpu *vgpu, u64 off, void *buf, size_t bytes,
			   bool write)
{
	struct gvt_pin *pin = NULL;
	u64 iova;

	mutex_lock(&vgpu->gtt_lock);
	if (!gvt_host_iova(vgpu->host_low + off, &iova))
		pin = xa_load(&vgpu->pins, iova >> GVT_PAGE_SHIFT);
	if (pin)
		gvt_page_copy(pin->page, offset_in_page(iova), buf, bytes, write);
	mutex_unlock(&vgpu->gtt_lock);
	if (pin && write)
		gvt_log_wrote(vgpu, iova, bytes);
	return pin;
}

static int gvt_bar2_piece(struct vgpu *vgpu, u64 off, void *buf, size_t bytes,
			  bool write)
{
	struct page *page;

	if (gvt_bar2_guest(vgpu, off, buf, bytes, write))
		return 0;
	page = gvt_bar2_page(vgpu, off >> GVT_PAGE_SHIFT, !write);
	if (!page && write)
		return -ENOMEM;
	if (page)
		gvt_page_copy(page, offset_in_page(off), buf, bytes, write);
	else
		memset(buf, 0, bytes);
	return 0;
}

ssize_t gvt_bar2_rw(struct vgpu *vgpu, char __user *ubuf, size_t count,
		    u64 off, bool write)
{
	size_t done = 0, chunk;
	int ret = 0;
	void *buf;

	if (off > vgpu->low_gm || count > vgpu->low_gm - off)
		return -EINVAL;
	buf = kmalloc(GVT_PAGE_SIZE, GFP_KERNEL_ACCOUNT);
	if (!buf)
		return -ENOMEM;
	for (; done < count && !ret; off += chunk, done += ret ? 0 : chunk) {
		chunk = min_t(size_t, count - done,
			      GVT_PAGE_SIZE - offset_in_page(off));
		if (write && copy_from_user(buf, ubuf + done, chunk))
			ret = -EFAULT;
		if (!ret)
			ret = gvt_bar2_piece(vgpu, off, buf, chunk, write);
		if (!ret && !write && copy_to_user(ubuf + done, buf, chunk))
			ret = -EFAULT;
	}
	kfree(buf);
	return done ? done : ret;
}

static vm_fault_t gvt_bar2_fault(struct vm_fault *vmf)
{
	struct vgpu *vgpu = vmf->vma->vm_private_data;
	u64 off = ((u64)vmf->pgoff << PAGE_SHIFT) & GVT_REGION_MASK;
	struct page *page;

	if (off >= vgpu->low_gm)	/* grown by mremap() */
		return VM_FAULT_SIGBUS;
	page = gvt_bar2_page(vgpu, off >> GVT_PAGE_SHIFT, false);
	if (!page)
		return VM_FAULT_OOM;
	get_page(page);
	vmf->page = page;
	return 0;
}

static const struct vm_operations_struct gvt_bar2_vm_ops = {
	.fault = gvt_bar2_fault,
};

/* RFC patch 5: the mappable area is [0, low_gm) whatever the host base is */
int gvt_bar2_mmap(struct vgpu *vgpu, struct vm_area_struct *vma, u64 off)
{
	u64 size = vma->vm_end - vma->vm_start;

	if (!(vma->vm_flags & VM_SHARED) || off > vgpu->low_gm ||
	    size > vgpu->low_gm - off)
		return -EINVAL;
	vma->vm_private_data = vgpu;
	vma->vm_ops = &gvt_bar2_vm_ops;
	return 0;
}

int gvt_gtt_init(struct vgpu *vgpu)
{
	unsigned long nr = gvt_gm_entries(vgpu);

	mutex_init(&vgpu->gtt_lock);
	xa_init_flags(&vgpu->pins, XA_FLAGS_ACCOUNT);
	xa_init_flags(&vgpu->bar2_pages, XA_FLAGS_ACCOUNT);
	vgpu->guest_gtt = vzalloc(nr * sizeof(u64));
	vgpu->half_lo = bitmap_zalloc(nr, GFP_KERNEL);
	vgpu->half_hi = bitmap_zalloc(nr, GFP_KERNEL);
	if (vgpu->guest_gtt && vgpu->half_lo && vgpu->half_hi)
		return 0;
	gvt_gtt_fini(vgpu);
	return -ENOMEM;
}

/* All pins are gone since close_device() */
void gvt_gtt_fini(struct vgpu *vgpu)
{
	unsigned long index;
	struct page *page;

	xa_for_each(&vgpu->bar2_pages, index, page)
		put_page(page);
	xa_destroy(&vgpu->bar2_pages);
	xa_destroy(&vgpu->pins);
	bitmap_free(vgpu->half_lo);
	bitmap_free(vgpu->half_hi);
	vfree(vgpu->guest_gtt);
	vgpu->half_lo = NULL;
	vgpu->half_hi = NULL;
	vgpu->guest_gtt = NULL;
}
