// SPDX-License-Identifier: GPL-2.0-only
/*
 * RFC patch 3: a workload's commands are copied out of guest memory into a
 * shadow, audited, and their graphics addresses translated there. The guest's
 * own memory is only read, and each word of it only once: what it writes there
 * later makes no difference.
 *
 * The shadow is one array: the ring's commands from HEAD to TAIL, then one copy
 * of a batch for each MI_BATCH_BUFFER_START, in the order of these commands in
 * the array. In the array such a command holds the batch's index in DW1 and its
 * level in DW2. So it can only jump forward, and a batch that chains to itself
 * ends at GVT_SHADOW_MAX.
 */
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/sizes.h>
#include <linux/slab.h>

#include "hw/hw.h"
#include "lab/lab.h"
#include "gvt_cmd.h"

#define GVT_SHADOW_DWS		(GVT_SHADOW_MAX / sizeof(u32))
#define GVT_FETCH_BYTES		512	/* of a batch at a time */

/* A context's registers, from the start of the page LRCA + 1 */
#define GVT_CTX_HEAD		(0x14 / 4)
#define GVT_CTX_TAIL		(0x1c / 4)
#define GVT_CTX_START		(0x24 / 4)
#define GVT_CTX_CTL		(0x2c / 4)
#define GVT_CTX_DWS		(0x30 / 4)

#define GVT_HEAD_MASK		0x1ffffc
#define GVT_TAIL_MASK		0x1ffff8
#define GVT_CTL_SIZE_MASK	0x1ff000

struct gvt_scan {
	struct vgpu		*vgpu;
	struct gvt_workload	*workload;
	u32			*dws;		/* the shadow */
	unsigned int		nr;		/* DWs in there */
	unsigned int		room;		/* DWs allocated */
	/* ring or batch being scanned */
	unsigned int		level;
	unsigned int		start;		/* its index in dws[] */
	u64			gma;		/* a batch's address */
	unsigned int		pc;		/* the command, index in dws[] */
};

/* Register ranges, first and last byte, that commands may use */
struct gvt_reg_range {
	u32	first;
	u32	last;
};

static const struct gvt_reg_range gvt_engine_regs[] = {	/* + ring's base */
	{ 0x94, 0x97 },			/* NOPID */
	{ 0x600, 0x67f },		/* 16 general purpose registers */
};

static const struct gvt_reg_range gvt_global_regs[] = {
	{ 0x7000, 0x73ff },		/* render cache and 3D workarounds */
};

static __printf(3, 4)
int gvt_refuse(struct gvt_scan *scan, int err, const char *fmt, ...)
{
	struct va_format vaf;
	va_list args;

	va_start(args, fmt);
	vaf.fmt = fmt;
	vaf.va = &args;
	gvt_note(scan->vgpu, "ring %d, DW %u: %pV", scan->workload->ring,
		 scan->pc, &vaf);
	va_end(args);
	return err;
}

/* --- guest memory into the shadow ------------------------------------ */

static int gvt_scan_g2h(struct vgpu *vgpu, u64 gma, u64 len, u64 *hgma)
{
	int ret;

	mutex_lock(&vgpu->lock);
	ret = gvt_g2h(vgpu, gma, len, hgma);
	mutex_unlock(&vgpu->lock);
	return ret ? -EFAULT : 0;
}

static int gvt_make_room(struct gvt_scan *scan, unsigned int dws)
{
	unsigned int room = scan->room;
	u32 *bigger;

	if (dws > GVT_SHADOW_DWS - scan->nr)
		return gvt_refuse(scan, -E2BIG, "ring and batches are too long");
	dws += scan->nr;
	if (dws <= room)
		return 0;
	room = min_t(unsigned int, max(dws, 2 * room), GVT_SHADOW_DWS);
	bigger = kvmalloc_array(room, sizeof(u32), GFP_KERNEL_ACCOUNT);
	if (!bigger)
		return -ENOMEM;
	if (scan->nr)
		memcpy(bigger, scan->dws, scan->nr * sizeof(u32));
	kvfree(scan->dws);
	scan->dws = bigger;
	scan->room = room;
	return 0;
}

static int gvt_append(struct gvt_scan *scan, u64 hgma, u32 bytes)
{
	int ret;

	if (!bytes)
		return 0;
	ret = gvt_make_room(scan, bytes / sizeof(u32));
	if (ret)
		return ret;
	ret = gvt_host_rw(scan->vgpu, hgma, scan->dws + scan->nr, bytes, false);
	if (ret)
		return gvt_refuse(scan, ret, "commands cannot be read");
	scan->nr += bytes / sizeof(u32);
	return 0;
}

/* The next piece of a batch; it never crosses a page, and the batch no window */
static int gvt_fetch_batch(struct gvt_scan *scan)
{
	u64 done = (u64)(scan->nr - scan->start) * sizeof(u32);
	u32 bytes = GVT_FETCH_BYTES;
	u64 hgma;

	bytes = min_t(u32, bytes, GVT_PAGE_SIZE -
		      ((scan->gma + done) & (GVT_PAGE_SIZE - 1)));
	bytes = min_t(u32, bytes, GVT_SHADOW_MAX - scan->nr * sizeof(u32));
	if (!bytes)
		return gvt_refuse(scan, -E2BIG, "ring and batches are too long");
	if (gvt_scan_g2h(scan->vgpu, scan->gma, done + bytes, &hgma))
		return gvt_refuse(scan, -EFAULT, "batch at %#llx leaves the GM",
				  scan->gma);
	return gvt_append(scan, hgma + done, bytes);
}

/* Have the shadow hold what is below index @end of the ring or batch */
static int gvt_want(struct gvt_scan *scan, unsigned int end)
{
	int ret;

	while (scan->nr < end) {
		if (scan->level == GVT_LEVEL_RING)
			return gvt_refuse(scan, -EFAULT,
					  "command runs over the ring's tail");
		ret = gvt_fetch_batch(scan);
		if (ret)
			return ret;
	}
	return 0;
}

static int gvt_read_context(struct gvt_scan *scan, u32 *regs)
{
	u64 lrca = scan->workload->desc_lo & GVT_PAGE_MASK;
	u64 hgma;

	if (gvt_scan_g2h(scan->vgpu, lrca, 2 * GVT_PAGE_SIZE, &hgma))
		return gvt_refuse(scan, -EFAULT, "context outside the GM");
	if (gvt_host_rw(scan->vgpu, hgma + GVT_PAGE_SIZE, regs,
			GVT_CTX_DWS * sizeof(*regs), false))
		return gvt_refuse(scan, -EFAULT, "context cannot be read");
	return 0;
}

static int gvt_copy_ring(struct gvt_scan *scan)
{
	u32 regs[GVT_CTX_DWS], start, head, tail, size;
	u64 hgma;
	int ret;

	ret = gvt_read_context(scan, regs);
	if (ret)
		return ret;
	start = regs[GVT_CTX_START];
	head = regs[GVT_CTX_HEAD] & GVT_HEAD_MASK;
	tail = regs[GVT_CTX_TAIL] & GVT_TAIL_MASK;
	size = (regs[GVT_CTX_CTL] & GVT_CTL_SIZE_MASK) + GVT_PAGE_SIZE;
	if (!IS_ALIGNED(start, GVT_PAGE_SIZE) || head >= size || tail >= size)
		return gvt_refuse(scan, -EFAULT,
				  "ring %#x, %#x bytes, head %#x, tail %#x",
				  start, size, head, tail);
	if (gvt_scan_g2h(scan->vgpu, start, size, &hgma))
		return gvt_refuse(scan, -EFAULT, "ring %#x outside the GM", start);
	if (head > tail) {			/* wraps around */
		ret = gvt_append(scan, hgma + head, size - head);
		head = 0;
	}
	if (!ret)
		ret = gvt_append(scan, hgma + head, tail - head);
	scan->workload->ring_dws = scan->nr;
	scan->workload->ring_tail = tail;
	return ret;
}

/* --- audit ----------------------------------------------------------- */

/* The hardware status page's address; index forms count from there */
static int gvt_status_page(struct gvt_scan *scan, u64 *gma)
{
	u32 reg = gvt_ring_base[scan->workload->ring] + GVT_RING_HWS_PGA;

	mutex_lock(&scan->vgpu->lock);
	*gma = *gvt_vreg32(scan->vgpu, reg) & GVT_PAGE_MASK;
	mutex_unlock(&scan->vgpu->lock);
	return *gma ? 0 : gvt_refuse(scan, -EFAULT, "no hardware status page");
}

/*
 * Translate the address in DWs @at and @at + 1 of the command; @mask are its
 * bits in the low DW, the others are flags and stay. @index: it is an offset
 * into the hardware status page.
 */
static int gvt_patch(struct gvt_scan *scan, unsigned int at, u32 mask,
		     u32 bytes, u32 align, bool index)
{
	u32 *dw = &scan->dws[scan->pc + at];
	u64 gma = gvt_cmd_addr(dw, mask);
	u64 page, hgma;
	int ret;

	if (gma & (align - 1))
		return gvt_refuse(scan, -EFAULT, "address %#llx not aligned", gma);
	if (index) {
		if (gma > GVT_PAGE_SIZE - bytes)
			return gvt_refuse(scan, -EFAULT, "index %#llx", gma);
		ret = gvt_status_page(scan, &page);
		if (ret)
			return ret;
		gma += page;
	}
	if (gvt_scan_g2h(scan->vgpu, gma, bytes, &hgma))
		return gvt_refuse(scan, -EFAULT, "address %#llx outside the GM", gma);
#ifdef GVT_BREAK_g2h_cmd
	hgma = gma;
#endif
	dw[0] = (lower_32_bits(hgma) & mask) | (dw[0] & ~mask);
	dw[1] = upper_32_bits(hgma) & GVT_ADDR_HIGH_MASK;
	return 0;
}

static bool gvt_reg_in(const struct gvt_reg_range *range, unsigned int nr, u32 reg)
{
	while (nr--)
		if (reg >= range[nr].first && reg <= range[nr].last)
			return true;
	return false;
}

static bool gvt_reg_allowed(u32 reg)
{
	int ring;

	for (ring = 0; ring < GVT_RING_COUNT; ring++)
		if (reg >= gvt_ring_base[ring] &&
		    gvt_reg_in(gvt_engine_regs, ARRAY_SIZE(gvt_engine_regs),
			       reg - gvt_ring_base[ring]))
			return true;
	return gvt_reg_in(gvt_global_regs, ARRAY_SIZE(gvt_global_regs), reg);
}

static int gvt_audit_reg(struct gvt_scan *scan, unsigned int at)
{
	u32 reg = scan->dws[scan->pc + at];

	if (!IS_ALIGNED(reg, 4) || reg >= GVT_MMIO_SIZE)
		return gvt_refuse(scan, -EFAULT, "no register %#x", reg);
	if (!gvt_reg_allowed(reg))
		return gvt_refuse(scan, -EPERM, "register %#x is not for commands",
				  reg);
	return 0;
}

static int gvt_ppgtt(struct gvt_scan *scan)
{
	return gvt_refuse(scan, -EFAULT, "PPGTT is not executed by the sample");
}

static int gvt_audit_lri(struct gvt_scan *scan, unsigned int len)
{
	unsigned int at;
	int ret = 0;

	for (at = 1; !ret && at < len; at += 2)
		ret = gvt_audit_reg(scan, at);
	return ret;
}

static int gvt_audit_lrr(struct gvt_scan *scan)
{
	int ret = gvt_audit_reg(scan, 1);

	return ret ? ret : gvt_audit_reg(scan, 2);
}

static int gvt_audit_reg_mem(struct gvt_scan *scan)
{
	int ret;

	if (!(scan->dws[scan->pc] & GVT_CMD_GGTT))
		return gvt_ppgtt(scan);
	ret = gvt_audit_reg(scan, 1);
	return ret ? ret : gvt_patch(scan, 2, GVT_ADDR_MASK, 4, 4, false);
}

static int gvt_audit_sdi(struct gvt_scan *scan, unsigned int len)
{
	u32 dw0 = scan->dws[scan->pc];

	if (!(dw0 & GVT_CMD_GGTT))
		return gvt_ppgtt(scan);
	return gvt_patch(scan, 1, GVT_ADDR_MASK, (len - 3) * sizeof(u32),
			 dw0 & GVT_SDI_QWORD ? 8 : 4, false);
}

/* May this be written at the end of a flush? */
static int gvt_audit_post_sync(struct gvt_scan *scan, u32 op, bool ggtt)
{
	if (op != GVT_POST_SYNC_WRITE && op != GVT_POST_SYNC_TIMESTAMP)
		return gvt_refuse(scan, -EBADRQC, "post-sync operation %u", op);
	return ggtt ? 0 : gvt_ppgtt(scan);
}

static int gvt_audit_flush(struct gvt_scan *scan)
{
	u32 *cmd = &scan->dws[scan->pc];
	u32 op = GVT_POST_SYNC(cmd[0]);
	int ret;

	if (op == GVT_POST_SYNC_NONE)
		return 0;
	ret = gvt_audit_post_sync(scan, op, cmd[1] & GVT_FLUSH_GGTT);
	if (!ret)
		ret = gvt_patch(scan, 1, GVT_FLUSH_ADDR_MASK, 8, 8,
				cmd[0] & GVT_FLUSH_INDEX);
	if (!ret)
		cmd[0] &= ~GVT_FLUSH_INDEX;
	return ret;
}

static int gvt_audit_pipe_control(struct gvt_scan *scan)
{
	u32 *cmd = &scan->dws[scan->pc];
	u32 op = GVT_POST_SYNC(cmd[1]);
	int ret;

	if (scan->workload->ring != GVT_RING_RCS)
		return gvt_refuse(scan, -EBADRQC, "PIPE_CONTROL is for the render engine");
	if (cmd[1] & GVT_PC_MMIO_WRITE)
		return gvt_refuse(scan, -EBADRQC, "PIPE_CONTROL to a register");
	if (op == GVT_POST_SYNC_NONE)
		return 0;
	ret = gvt_audit_post_sync(scan, op, cmd[1] & GVT_PC_GGTT);
	if (!ret)
		ret = gvt_patch(scan, 2, GVT_ADDR_MASK, 8, 8, cmd[1] & GVT_PC_INDEX);
	if (!ret)
		cmd[1] &= ~GVT_PC_INDEX;
	return ret;
}

/* Who may start whom; the batch itself is fetched later, by gvt_scan_batches() */
static int gvt_audit_batch_start(struct gvt_scan *scan)
{
	u32 *cmd = &scan->dws[scan->pc];
	bool second = cmd[0] & GVT_BBS_SECOND_LEVEL;

	if (scan->level == GVT_LEVEL_SECOND)
		return gvt_refuse(scan, -EFAULT, "a second-level batch starts a batch");
	if (second && scan->level == GVT_LEVEL_RING)
		return gvt_refuse(scan, -EFAULT, "the ring starts a second-level batch");
	if (cmd[0] & GVT_BBS_PPGTT)
		return gvt_ppgtt(scan);
	return 0;
}

static bool gvt_len_ok(u32 dw0, unsigned int len)
{
	switch (gvt_cmd_op(dw0)) {
	case GVT_OP_STORE_DATA_IMM:	/* whole qwords where it says so */
		return len >= 4 && (!(dw0 & GVT_SDI_QWORD) || len % 2);
	case GVT_OP_FLUSH_DW:
		return len == 4 || len == 5;
	case GVT_OP_LRI:
		return len >= 3 && len % 2;
	case GVT_OP_SRM:
	case GVT_OP_LRM:
		return len == 4;
	case GVT_OP_LRR:
	case GVT_OP_BATCH_START:
		return len == 3;
	case GVT_OP_PIPE_CONTROL:
		return len == 6;
	default:
		return len == 1;
	}
}

static int gvt_audit(struct gvt_scan *scan, unsigned int len)
{
	switch (gvt_cmd_op(scan->dws[scan->pc])) {
	case GVT_OP_STORE_DATA_IMM:
		return gvt_audit_sdi(scan, len);
	case GVT_OP_LRI:
		return gvt_audit_lri(scan, len);
	case GVT_OP_SRM:
	case GVT_OP_LRM:
		return gvt_audit_reg_mem(scan);
	case GVT_OP_LRR:
		return gvt_audit_lrr(scan);
	case GVT_OP_FLUSH_DW:
		return gvt_audit_flush(scan);
	case GVT_OP_PIPE_CONTROL:
		return gvt_audit_pipe_control(scan);
	case GVT_OP_BATCH_START:
		return gvt_audit_batch_start(scan);
	case GVT_OP_BATCH_END:
		if (scan->level == GVT_LEVEL_RING)
			return gvt_refuse(scan, -EBADRQC, "batch end in the ring");
		return 0;
	default:
		return 0;
	}
}

/* The command at scan->pc: complete, known, allowed, patched. Its length */
static int gvt_scan_command(struct gvt_scan *scan)
{
	int len, ret;
	u32 dw0;

	if (READ_ONCE(scan->workload->cancelled))
		return -ECANCELED;
	ret = gvt_want(scan, scan->pc + 1);
	if (ret)
		return ret;
	dw0 = scan->dws[scan->pc];
	len = gvt_cmd_dws(dw0);
	if (len < 0)
		return gvt_refuse(scan, len, "unknown command %#x", dw0);
	if (!gvt_len_ok(dw0, len))
		return gvt_refuse(scan, -EFAULT, "length of command %#x", dw0);
	ret = gvt_want(scan, scan->pc + len);
	if (!ret)
		ret = gvt_audit(scan, len);
	return ret ? ret : len;
}

/* Does this command end the batch that it stands in? */
static bool gvt_ends_batch(u32 dw0)
{
	return gvt_cmd_op(dw0) == GVT_OP_BATCH_END ||
	       (gvt_cmd_op(dw0) == GVT_OP_BATCH_START &&
		!(dw0 & GVT_BBS_SECOND_LEVEL));
}

static int gvt_scan_ring(struct gvt_scan *scan)
{
	int len;

	scan->level = GVT_LEVEL_RING;
	for (scan->pc = 0; scan->pc < scan->nr; scan->pc += len) {
		len = gvt_scan_command(scan);
		if (len < 0)
			return len;
		cond_resched();
	}
	return 0;
}

/* A batch at the shadow's end; what was fetched behind its end is dropped */
static int gvt_scan_batch(struct gvt_scan *scan, u64 gma, unsigned int level)
{
	bool end = false;
	int len;

	scan->level = level;
	scan->gma = gma;
	scan->start = scan->nr;
	for (scan->pc = scan->start; !end; scan->pc += len) {
		len = gvt_scan_command(scan);
		if (len < 0)
			return len;
		end = gvt_ends_batch(scan->dws[scan->pc]);
		/* for gvt_scan_batches(): the level that this one starts */
		if (gvt_cmd_op(scan->dws[scan->pc]) == GVT_OP_BATCH_START) {
			scan->dws[scan->pc + 2] &= GVT_ADDR_HIGH_MASK;
			scan->dws[scan->pc + 2] |= (end ? level : GVT_LEVEL_SECOND) << 16;
		}
		cond_resched();
	}
	scan->nr = scan->pc;
	return 0;
}

/* Batches of all MI_BATCH_BUFFER_START, also of those in batches */
static int gvt_scan_batches(struct gvt_scan *scan)
{
	unsigned int ring_dws = scan->workload->ring_dws;
	unsigned int pc, level, start;
	int ret;
	u32 *cmd;
	u64 gma;

	for (pc = 0; pc < scan->nr; pc += gvt_cmd_dws(scan->dws[pc])) {
		cmd = &scan->dws[pc];
		if (gvt_cmd_op(cmd[0]) != GVT_OP_BATCH_START)
			continue;
		level = pc < ring_dws ? GVT_LEVEL_BATCH : cmd[2] >> 16;
		gma = gvt_cmd_addr(&cmd[1], GVT_ADDR_MASK);
		start = scan->nr;
		ret = gvt_scan_batch(scan, gma, level);
		if (ret)
			return ret;
		scan->dws[pc + 1] = start;	/* dws may have moved */
		scan->dws[pc + 2] = level;
	}
	return 0;
}

/* --- the scan -------------------------------------------------------- */

/* The patched ring, jumps still as the guest wrote them, for debugfs */
static int gvt_publish_ring(struct gvt_scan *scan)
{
	struct vgpu *vgpu = scan->vgpu;
	size_t bytes = scan->nr * sizeof(u32);
	u32 *copy = NULL;

	if (bytes) {
		copy = kvmalloc(bytes, GFP_KERNEL_ACCOUNT);
		if (!copy)
			return -ENOMEM;
		memcpy(copy, scan->dws, bytes);
	}
	mutex_lock(&vgpu->lock);
	swap(copy, vgpu->last_ring);
	vgpu->last_ring_dws = scan->nr;
	mutex_unlock(&vgpu->lock);
	kvfree(copy);
	return 0;
}

int gvt_scan(struct vgpu *vgpu, struct gvt_workload *workload)
{
	struct gvt_scan scan = { .vgpu = vgpu, .workload = workload };
	int ret;

	ret = gvt_copy_ring(&scan);
	if (!ret)
		ret = gvt_scan_ring(&scan);
	if (!ret)
		ret = gvt_publish_ring(&scan);
	if (!ret)
		ret = gvt_scan_batches(&scan);
	workload->shadow = scan.dws;
	workload->shadow_dws = scan.nr;
	return ret;
}

void gvt_scan_free(struct gvt_workload *workload)
{
	kvfree(workload->shadow);
	workload->shadow = NULL;
	workload->shadow_dws = 0;
}
