// SPDX-License-Identifier: MIT
/*
 * Which of the guest's pages a vGPU may have written.
 *
 * Two kinds of them: those that are pinned for the GPU now, which the driver
 * has a record of; and those that were, or that the driver itself wrote, which
 * are remembered here. The latter stay until the vGPU is closed, reset or
 * restored, or until the page is no longer the guest's: that somebody has read
 * the bitmap does not mean that they have copied the pages.
 */
#include <linux/bitmap.h>
#include <linux/sched.h>
#include <linux/uaccess.h>

#include "i915_drv.h"
#include "gvt.h"

/* As much as a consumer needs; with it no count can overflow */
#define MAX_PAGES	BIT_ULL(31)
/* Pages that are looked at in one go: 32 KiB of bitmap */
#define CHUNK_PAGES	BIT(18)

/**
 * intel_vgpu_note_written - remember pages that were, or may have been, written
 * @vgpu: a vGPU
 * @gfn: the first of them
 * @nr: how many
 *
 * Where memory is short a page may be missing from the record; the error is
 * kept, and reported instead of a bitmap with a hole.
 */
void intel_vgpu_note_written(struct intel_vgpu *vgpu, unsigned long gfn, unsigned long nr)
{
	unsigned long i;

	/* with protocol v2 the container is asked */
	if (!intel_gvt_migrates_rfc())
		return;

	for (i = 0; i < nr; i++) {
		void *old = xa_store(&vgpu->migration.written, gfn + i,
				     xa_mk_value(1), GFP_KERNEL_ACCOUNT);

		if (xa_is_err(old))
			WRITE_ONCE(vgpu->migration.written_err, xa_err(old));
	}
}

/**
 * intel_vgpu_note_write - remember what the driver writes
 * @vgpu: a vGPU
 * @gpa: where in the guest's memory
 * @len: bytes
 */
void intel_vgpu_note_write(struct intel_vgpu *vgpu, u64 gpa, size_t len)
{
	if (len)
		intel_vgpu_note_written(vgpu, gpa >> PAGE_SHIFT,
					((gpa + len - 1) >> PAGE_SHIFT) - (gpa >> PAGE_SHIFT) + 1);
}

/**
 * intel_vgpu_forget_written - start a new record
 * @vgpu: a vGPU
 */
void intel_vgpu_forget_written(struct intel_vgpu *vgpu)
{
	xa_destroy(&vgpu->migration.written);
	WRITE_ONCE(vgpu->migration.written_err, 0);
}

/**
 * intel_vgpu_forget_unmapped - forget pages that are no longer the guest's
 * @vgpu: a vGPU
 * @gfn: the first of them
 * @nr: how many
 */
void intel_vgpu_forget_unmapped(struct intel_vgpu *vgpu, unsigned long gfn, unsigned long nr)
{
	unsigned long index;
	void *entry;

	if (!nr)
		return;

	xa_for_each_range(&vgpu->migration.written, index, entry, gfn, gfn + nr - 1)
		xa_erase(&vgpu->migration.written, index);
}

/**
 * intel_vgpu_mark - mark pages in a bitmap
 * @window: the bitmap, and the pages it is for
 * @gfn: the first page to mark
 * @nr: how many; those that are not in the window are left out
 */
void intel_vgpu_mark(struct intel_vgpu_window *window, u64 gfn, u64 nr)
{
	u64 start = max(gfn, window->first);
	u64 end = min(gfn + nr, window->first + window->nr);

	if (start < end)
		bitmap_set(window->bitmap, start - window->first, end - start);
}

static void mark_written(struct intel_vgpu *vgpu, struct intel_vgpu_window *window)
{
	unsigned long index;
	void *entry;

	xa_for_each_range(&vgpu->migration.written, index, entry, window->first,
			  window->first + window->nr - 1)
		__set_bit(index - window->first, window->bitmap);
}

/**
 * intel_vgpu_get_dirty - answer VFIO_DEVICE_PCI_GET_DIRTY_BITMAP
 * @vgpu: a vGPU that is open
 * @arg: the caller's struct vfio_pci_get_dirty_bitmap
 *
 * Nothing changes by asking. A range that is not the guest's has no bits.
 *
 * Returns: 0; -EINVAL for a range that is too long or ends nowhere, -EFAULT,
 * -ENOMEM, also where the record is not complete
 */
int intel_vgpu_get_dirty(struct intel_vgpu *vgpu, void __user *arg)
{
	struct vfio_pci_get_dirty_bitmap __user *user = arg;
	struct vfio_pci_get_dirty_bitmap head;
	struct intel_vgpu_window window;
	u64 first, done;
	int ret = 0;

	if (copy_from_user(&head, user, sizeof(head)))
		return -EFAULT;

	first = head.start_addr >> PAGE_SHIFT;
	if (head.page_nr > MAX_PAGES || head.page_nr > (U64_MAX >> PAGE_SHIFT) - first)
		return -EINVAL;

	window.bitmap = bitmap_alloc(CHUNK_PAGES, GFP_KERNEL_ACCOUNT);
	if (!window.bitmap)
		return -ENOMEM;

	for (done = 0; done < head.page_nr && !ret; done += window.nr) {
		window.first = first + done;
		window.nr = min_t(u64, head.page_nr - done, CHUNK_PAGES);
		bitmap_zero(window.bitmap, CHUNK_PAGES);
		intel_vgpu_mark_pinned(vgpu, &window);
		mark_written(vgpu, &window);
		if (copy_to_user(user->dirty_bitmap + done / BITS_PER_BYTE, window.bitmap,
				 BITS_TO_LONGS(window.nr) * sizeof(long)))
			ret = -EFAULT;
		if (fatal_signal_pending(current))
			ret = -EINTR;
		cond_resched();
	}
	bitmap_free(window.bitmap);

	return ret ?: READ_ONCE(vgpu->migration.written_err);
}
