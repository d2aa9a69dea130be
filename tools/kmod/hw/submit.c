// SPDX-License-Identifier: GPL-2.0-only
/*
 * Submission: ELSP, the queue, the worker that runs it, and RFC patch 7, which
 * stops and starts it.
 *
 * All engines share one queue in order of submission and one worker. A pair
 * written to ELSP makes two workloads; they share a pair number, and element 0
 * remembers the pair's four words.
 */
#include <linux/mm.h>
#include <linux/slab.h>

#include "hw/hw.h"
#include "lab/lab.h"

/* Context descriptor, low word */
#define GVT_DESC_VALID		BIT(0)
#define GVT_DESC_MODE(lo)	(((lo) >> 3) & 3)
#define GVT_DESC_MODE_32BIT	1	/* three levels of page tables */
#define GVT_DESC_MODE_48BIT	3	/* four */
#define GVT_DESC_PRIVILEGE	BIT(8)	/* GGTT, as opposed to ring in PPGTT */

/* ELSP words in the order in which the guest writes them */
enum {
	GVT_ELSP_HI_1,
	GVT_ELSP_LO_1,
	GVT_ELSP_HI_0,
	GVT_ELSP_LO_0,
	GVT_ELSP_WORDS,
};

#define GVT_CTX_HEAD_OFF	(GVT_PAGE_SIZE + 0x14)	/* from LRCA */
#define GVT_CSB_COMPLETE	BIT(4)
#define GVT_CSB_WRITE_MASK	0x7			/* in CSB_PTR; 7: none */
#define GVT_HWS_CSB		0x40			/* in the status page */
#define GVT_HWS_CSB_PTR		0x7c

/* --- the queue ------------------------------------------------------- */

static bool gvt_desc_ok(u32 lo)
{
	return lo & GVT_DESC_VALID && lo & GVT_DESC_PRIVILEGE &&
	       (GVT_DESC_MODE(lo) == GVT_DESC_MODE_32BIT ||
		GVT_DESC_MODE(lo) == GVT_DESC_MODE_48BIT);
}

/* How many workloads are these four words? 1, 2 or -EINVAL */
static int gvt_elsp_elements(const u32 *words)
{
	if (!gvt_desc_ok(words[GVT_ELSP_LO_0]))
		return -EINVAL;
	if (!(words[GVT_ELSP_LO_1] & GVT_DESC_VALID))
		return 1;
	return gvt_desc_ok(words[GVT_ELSP_LO_1]) ? 2 : -EINVAL;
}

static int gvt_workload_add(struct list_head *list, int ring, const u32 *words,
			    unsigned int element, u64 pair)
{
	struct gvt_workload *workload;

	workload = kzalloc(sizeof(*workload), GFP_KERNEL_ACCOUNT);
	if (!workload)
		return -ENOMEM;
	workload->ring = ring;
	workload->element = element;
	workload->pair = pair;
	workload->desc_hi = words[element ? GVT_ELSP_HI_1 : GVT_ELSP_HI_0];
	workload->desc_lo = words[element ? GVT_ELSP_LO_1 : GVT_ELSP_LO_0];
	memcpy(workload->elsp, words, sizeof(workload->elsp));
	list_add_tail(&workload->node, list);
	return 0;
}

/* Append the workloads of four checked words; on error the caller discards */
static int gvt_workloads_add(struct list_head *list, int ring, const u32 *words,
			     u64 pair)
{
	int nr = gvt_elsp_elements(words);
	int element, ret;

	if (nr < 0)
		return nr;
	for (element = 0; element < nr; element++) {
		ret = gvt_workload_add(list, ring, words, element, pair);
		if (ret)
			return ret;
	}
	return nr;
}

void gvt_submit_discard(struct list_head *list)
{
	struct gvt_workload *workload, *next;

	list_for_each_entry_safe(workload, next, list, node) {
		list_del(&workload->node);
		kfree(workload);
	}
}

static void gvt_kick(struct vgpu *vgpu)
{
	if (vgpu->active && !list_empty(&vgpu->queue))
		queue_work(vgpu->wq, &vgpu->work);
}

/* --- ELSP ------------------------------------------------------------ */

static int gvt_check_lrca(struct vgpu *vgpu, u32 lo)
{
	u64 hgma;

	if (!gvt_g2h(vgpu, lo & GVT_PAGE_MASK, 2 * GVT_PAGE_SIZE, &hgma))
		return 0;
	gvt_note(vgpu, "ELSP: context %#x outside the GM", lo);
	return -EFAULT;
}

static int gvt_check_elsp(struct vgpu *vgpu, const u32 *words)
{
	int nr = gvt_elsp_elements(words);
	int ret;

	if (nr < 0) {
		gvt_note(vgpu, "ELSP: bad descriptors %#x, %#x",
			 words[GVT_ELSP_LO_0], words[GVT_ELSP_LO_1]);
		return nr;
	}
	ret = gvt_check_lrca(vgpu, words[GVT_ELSP_LO_0]);
	if (!ret && nr == 2)
		ret = gvt_check_lrca(vgpu, words[GVT_ELSP_LO_1]);
	if (!ret && nr > GVT_QUEUE_MAX - vgpu->nr_queued) {
		gvt_note(vgpu, "ELSP: %u workloads are queued already",
			 vgpu->nr_queued);
		ret = -EBUSY;
	}
	return ret;
}

static int gvt_elsp_submit(struct vgpu *vgpu, int ring, const u32 *words)
{
	LIST_HEAD(list);
	int ret;

	ret = gvt_check_elsp(vgpu, words);
	if (ret)
		return ret;
	ret = gvt_workloads_add(&list, ring, words, vgpu->next_pair++);
	if (ret < 0) {
		gvt_submit_discard(&list);
		return ret;
	}
	list_splice_tail(&list, &vgpu->queue);
	vgpu->nr_queued += ret;
	atomic64_add(ret, &vgpu->counters.workloads_submitted);
	gvt_kick(vgpu);
	return 0;
}

int gvt_elsp_write(struct vgpu *vgpu, int ring, u32 value)
{
	u32 *words = vgpu->elsp[ring];

	lockdep_assert_held(&vgpu->lock);
	words[vgpu->elsp_index[ring]++] = value;
	if (vgpu->elsp_index[ring] < GVT_ELSP_WORDS)
		return 0;
	vgpu->elsp_index[ring] = 0;
	return gvt_elsp_submit(vgpu, ring, words);
}

/* --- completion ------------------------------------------------------ */

/* An address in the guest's GM, under lock, in the worker */
static int gvt_guest_write(struct vgpu *vgpu, u64 gma, void *data, u32 bytes)
{
	u64 hgma;
	int ret;

	ret = gvt_g2h(vgpu, gma, bytes, &hgma);
	return ret ? ret : gvt_host_rw(vgpu, hgma, data, bytes, true);
}

/* The status page's copy; a guest without such a page reads the registers */
static void gvt_csb_to_memory(struct vgpu *vgpu, u32 base, u32 slot, u32 *entry)
{
	u64 page = *gvt_vreg32(vgpu, base + GVT_RING_HWS_PGA) & GVT_PAGE_MASK;

	if (!page)
		return;
	if (!gvt_guest_write(vgpu, page + GVT_HWS_CSB + 8 * slot, entry, 8))
		gvt_guest_write(vgpu, page + GVT_HWS_CSB_PTR, &slot, sizeof(slot));
}

static void gvt_csb_add(struct vgpu *vgpu, struct gvt_workload *workload)
{
	u32 base = gvt_ring_base[workload->ring];
	u32 *ptr = gvt_vreg32(vgpu, base + GVT_RING_CSB_PTR);
	u32 entry[2] = { GVT_CSB_COMPLETE, workload->desc_hi };
	u32 slot = (*ptr & GVT_CSB_WRITE_MASK) + 1;

	if (slot >= GVT_CSB_ENTRIES)
		slot = 0;
	*gvt_vreg32(vgpu, base + GVT_RING_CSB + 8 * slot) = entry[0];
	*gvt_vreg32(vgpu, base + GVT_RING_CSB + 8 * slot + 4) = entry[1];
	gvt_csb_to_memory(vgpu, base, slot, entry);
	*ptr = (*ptr & ~GVT_CSB_WRITE_MASK) | slot;
}

static int gvt_complete(struct vgpu *vgpu, struct gvt_workload *workload)
{
	u64 lrca = workload->desc_lo & GVT_PAGE_MASK;
	u32 head = workload->ring_tail;
	int ret;

	ret = gvt_guest_write(vgpu, lrca + GVT_CTX_HEAD_OFF, &head, sizeof(head));
	if (ret) {
		gvt_note(vgpu, "ring %d: context cannot be written: error %d",
			 workload->ring, ret);
		return ret;
	}
	*gvt_vreg32(vgpu, gvt_ring_base[workload->ring] + GVT_RING_HEAD) = head;
	gvt_csb_add(vgpu, workload);
	gvt_irq_event(vgpu, workload->ring, GVT_EVENT_CONTEXT_SWITCH);
	return 0;
}

/* A cancelled workload leaves no trace; one that failed is dropped */
static void gvt_finish(struct vgpu *vgpu, struct gvt_workload *workload, int ret)
{
	mutex_lock(&vgpu->lock);
	if (!workload->cancelled) {
		if (!ret)
			ret = gvt_complete(vgpu, workload);
		atomic64_inc(ret ? &vgpu->counters.workloads_failed :
				   &vgpu->counters.workloads_completed);
	}
	WRITE_ONCE(vgpu->running, NULL);
	mutex_unlock(&vgpu->lock);
	wake_up_all(&vgpu->idle);
}

/* --- the worker ------------------------------------------------------ */

static struct gvt_workload *gvt_next(struct vgpu *vgpu)
{
	struct gvt_workload *workload = NULL;

	mutex_lock(&vgpu->lock);
	if (vgpu->active)
		workload = list_first_entry_or_null(&vgpu->queue,
						    struct gvt_workload, node);
	if (workload) {
		list_del(&workload->node);
		vgpu->nr_queued--;
		WRITE_ONCE(vgpu->running, workload);
	}
	mutex_unlock(&vgpu->lock);
	return workload;
}

static void gvt_worker(struct work_struct *work)
{
	struct vgpu *vgpu = container_of(work, struct vgpu, work);
	struct gvt_workload *workload;
	int ret;

	while ((workload = gvt_next(vgpu))) {
		ret = gvt_scan(vgpu, workload);
		if (!ret)
			ret = gvt_exec(vgpu, workload);
		gvt_finish(vgpu, workload, ret);
		gvt_scan_free(workload);
		kfree(workload);
		cond_resched();
	}
}

void gvt_submit_wait_idle(struct vgpu *vgpu)
{
	wait_event_idle(vgpu->idle, !READ_ONCE(vgpu->running));
}

/* --- reset, open, close, stop, start --------------------------------- */

void gvt_submit_reset(struct vgpu *vgpu, unsigned long mask)
{
	struct gvt_workload *workload, *next;
	int ring;

	lockdep_assert_held(&vgpu->lock);
	list_for_each_entry_safe(workload, next, &vgpu->queue, node) {
		if (!(mask & BIT(workload->ring)))
			continue;
		list_del(&workload->node);
		vgpu->nr_queued--;
		kfree(workload);
	}
	for (ring = 0; ring < GVT_RING_COUNT; ring++)
		if (mask & BIT(ring))
			vgpu->elsp_index[ring] = 0;
	workload = vgpu->running;
	if (workload && mask & BIT(workload->ring)) {
		WRITE_ONCE(workload->cancelled, true);
		wake_up_all(&vgpu->idle);
	}
}

void gvt_submit_open(struct vgpu *vgpu)
{
	mutex_lock(&vgpu->lock);
	vgpu->opened = true;
	vgpu->active = true;
	gvt_kick(vgpu);
	mutex_unlock(&vgpu->lock);
}

/* After this nothing touches guest memory any more */
void gvt_submit_close(struct vgpu *vgpu)
{
	mutex_lock(&vgpu->lock);
	vgpu->opened = false;
	vgpu->active = false;
	gvt_submit_reset(vgpu, GENMASK(GVT_RING_COUNT - 1, 0));
	mutex_unlock(&vgpu->lock);
	gvt_submit_wait_idle(vgpu);
}

/*
 * The running workload finishes, the queued ones stay. While we wait without
 * the lock another caller may start the vGPU again: the later call wins, and
 * the one that comes to its end later is the later one.
 */
int gvt_submit_stop(struct vgpu *vgpu)
{
	bool was_active;
	int ret = 0;

	mutex_lock(&vgpu->lock);
	was_active = vgpu->active;
	vgpu->active = false;
	while (vgpu->running && !ret) {
		mutex_unlock(&vgpu->lock);
		ret = wait_event_killable(vgpu->idle, !READ_ONCE(vgpu->running));
		mutex_lock(&vgpu->lock);
		if (!ret || !vgpu->running)
			vgpu->active = false;
	}
	if (vgpu->running) {		/* killed: as if never called */
		vgpu->active = was_active;
		gvt_kick(vgpu);
		ret = -EINTR;
	} else {
		ret = 0;
	}
	mutex_unlock(&vgpu->lock);
	return ret;
}

int gvt_submit_start(struct vgpu *vgpu)
{
	mutex_lock(&vgpu->lock);
	vgpu->active = true;
	gvt_kick(vgpu);
	mutex_unlock(&vgpu->lock);
	return 0;
}

/* --- save and restore ------------------------------------------------ */

static bool gvt_has_partner(struct vgpu *vgpu, const struct gvt_workload *workload)
{
	struct gvt_workload *other;

	list_for_each_entry(other, &vgpu->queue, node)
		if (other != workload && other->pair == workload->pair)
			return true;
	return false;
}

/* One workload's words: of the pair, none, or its own as a pair of one */
static void gvt_save_words(struct vgpu *vgpu, const struct gvt_workload *workload,
			   u32 *words)
{
	bool partner = gvt_has_partner(vgpu, workload);

	memset(words, 0, GVT_ELSP_WORDS * sizeof(*words));
	if (partner && workload->element == 0) {
		memcpy(words, workload->elsp, sizeof(workload->elsp));
	} else if (!partner) {
		words[GVT_ELSP_HI_0] = workload->desc_hi;
		words[GVT_ELSP_LO_0] = workload->desc_lo;
	}
}

unsigned int gvt_submit_save(struct vgpu *vgpu, struct gvt_workload_entry *out)
{
	struct gvt_workload *workload;
	unsigned int nr = 0;

	lockdep_assert_held(&vgpu->lock);
	list_for_each_entry(workload, &vgpu->queue, node) {
		out[nr].ring_id = workload->ring;
		gvt_save_words(vgpu, workload, out[nr].data);
		out[nr].index = GVT_ELSP_WORDS - 1;
		nr++;
	}
	return nr;
}

static bool gvt_entry_is_zero(const struct gvt_workload_entry *entry)
{
	return !memchr_inv(entry->data, 0, sizeof(entry->data));
}

/* An entry of zeros needs an earlier pair of its ring that covers it */
int gvt_submit_check(const struct gvt_workload_entry *entries, unsigned int nr)
{
	unsigned int uncovered[GVT_RING_COUNT] = {};
	unsigned int i, total = 0;
	int elements;

	for (i = 0; i < nr; i++) {
		if (entries[i].ring_id < 0 ||
		    entries[i].ring_id >= GVT_RING_COUNT ||
		    entries[i].index >= GVT_ELSP_WORDS)
			return -EINVAL;
		if (gvt_entry_is_zero(&entries[i])) {
			if (!uncovered[entries[i].ring_id]--)
				return -EINVAL;
			continue;
		}
		elements = gvt_elsp_elements(entries[i].data);
		if (elements < 0)
			return elements;
		uncovered[entries[i].ring_id] += elements - 1;
		total += elements;
		if (total > GVT_QUEUE_MAX)
			return -EINVAL;
	}
	return 0;
}

/* Pair numbers count from 0 here; gvt_submit_replace() makes them the vGPU's */
int gvt_submit_prepare(const struct gvt_workload_entry *entries, unsigned int nr,
		       struct list_head *out)
{
	LIST_HEAD(list);
	unsigned int i;
	int ret;

	ret = gvt_submit_check(entries, nr);
	for (i = 0; ret >= 0 && i < nr; i++)
		if (!gvt_entry_is_zero(&entries[i]))
			ret = gvt_workloads_add(&list, entries[i].ring_id,
						entries[i].data, i);
	if (ret < 0) {
		gvt_submit_discard(&list);
		return ret;
	}
	list_splice_tail(&list, out);
	return 0;
}

void gvt_submit_replace(struct vgpu *vgpu, struct list_head *prepared)
{
	struct gvt_workload *workload;
	u64 pairs = 0;

	lockdep_assert_held(&vgpu->lock);
	gvt_submit_discard(&vgpu->queue);
	vgpu->nr_queued = 0;
	list_for_each_entry(workload, prepared, node) {
		pairs = workload->pair + 1;
		workload->pair += vgpu->next_pair;
		vgpu->nr_queued++;
	}
	vgpu->next_pair += pairs;
	list_splice_tail_init(prepared, &vgpu->queue);
	gvt_kick(vgpu);
}

/* --- life ------------------------------------------------------------ */

int gvt_submit_init(struct vgpu *vgpu)
{
	INIT_LIST_HEAD(&vgpu->queue);
	INIT_WORK(&vgpu->work, gvt_worker);
	init_waitqueue_head(&vgpu->idle);
	vgpu->wq = alloc_ordered_workqueue(GVT_NAME, 0);
	return vgpu->wq ? 0 : -ENOMEM;
}

void gvt_submit_fini(struct vgpu *vgpu)
{
	if (vgpu->wq)
		destroy_workqueue(vgpu->wq);
	vgpu->wq = NULL;
	gvt_submit_discard(&vgpu->queue);
	vgpu->nr_queued = 0;
	kvfree(vgpu->last_ring);
	vgpu->last_ring = NULL;
	vgpu->last_ring_dws = 0;
}
