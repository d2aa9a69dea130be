// SPDX-License-Identifier: GPL-2.0-only
/*
 * The simulated engine: runs a scanned workload's shadow. Its addresses are
 * host addresses by now, and every access goes through the host GGTT. Lengths,
 * registers and jumps were checked by the scan.
 */
#include <linux/ktime.h>
#include <linux/sched.h>

#include "hw/hw.h"
#include "lab/lab.h"
#include "gvt_cmd.h"

#define GVT_TIMESTAMP_NS	80	/* 12.5 MHz */
#define GVT_DELAY_MAX_MS	60000

struct gvt_engine {
	struct vgpu		*vgpu;
	struct gvt_workload	*workload;
	unsigned int		pc;	/* index in the shadow */
	unsigned int		level;
	unsigned int		back[GVT_LEVEL_SECOND];	/* where batches return */
};

static int gvt_exec_write(struct gvt_engine *engine, u64 hgma, void *data, u32 bytes)
{
	return gvt_host_rw(engine->vgpu, hgma, data, bytes, true);
}

static int gvt_exec_timestamp(struct gvt_engine *engine, u64 hgma)
{
	u64 now = ktime_get_ns() / GVT_TIMESTAMP_NS;

	return gvt_exec_write(engine, hgma, &now, sizeof(now));
}

static u32 gvt_exec_get(struct gvt_engine *engine, u32 reg)
{
	u32 value;

	mutex_lock(&engine->vgpu->lock);
	value = *gvt_vreg32(engine->vgpu, reg);
	mutex_unlock(&engine->vgpu->lock);
	return value;
}

static void gvt_exec_set(struct gvt_engine *engine, u32 reg, u32 value)
{
	mutex_lock(&engine->vgpu->lock);
	*gvt_vreg32(engine->vgpu, reg) = value;
	mutex_unlock(&engine->vgpu->lock);
}

static void gvt_exec_event(struct gvt_engine *engine, enum gvt_event event)
{
	mutex_lock(&engine->vgpu->lock);
	gvt_irq_event(engine->vgpu, engine->workload->ring, event);
	mutex_unlock(&engine->vgpu->lock);
}

static void gvt_exec_lri(struct gvt_engine *engine, const u32 *cmd, int len)
{
	int at;

	for (at = 1; at < len; at += 2)
		gvt_exec_set(engine, cmd[at], cmd[at + 1]);
}

static int gvt_exec_lrm(struct gvt_engine *engine, const u32 *cmd)
{
	u64 hgma = gvt_cmd_addr(&cmd[2], GVT_ADDR_MASK);
	u32 value;
	int ret;

	ret = gvt_host_rw(engine->vgpu, hgma, &value, sizeof(value), false);
	if (!ret)
		gvt_exec_set(engine, cmd[1], value);
	return ret;
}

static int gvt_exec_srm(struct gvt_engine *engine, const u32 *cmd)
{
	u64 hgma = gvt_cmd_addr(&cmd[2], GVT_ADDR_MASK);
	u32 value = gvt_exec_get(engine, cmd[1]);

	return gvt_exec_write(engine, hgma, &value, sizeof(value));
}

static int gvt_exec_sdi(struct gvt_engine *engine, u32 *cmd, int len)
{
	u64 hgma = gvt_cmd_addr(&cmd[1], GVT_ADDR_MASK);

	return gvt_exec_write(engine, hgma, &cmd[3], (len - 3) * sizeof(u32));
}

static int gvt_post_sync(struct gvt_engine *engine, u32 op, u64 hgma,
			 void *data, u32 bytes)
{
	switch (op) {
	case GVT_POST_SYNC_WRITE:
		return gvt_exec_write(engine, hgma, data, bytes);
	case GVT_POST_SYNC_TIMESTAMP:
		return gvt_exec_timestamp(engine, hgma);
	default:
		return 0;
	}
}

/* Writes a dword or a qword, as its length says */
static int gvt_exec_flush(struct gvt_engine *engine, u32 *cmd, int len)
{
	u64 hgma = gvt_cmd_addr(&cmd[1], GVT_FLUSH_ADDR_MASK);
	int ret;

	ret = gvt_post_sync(engine, GVT_POST_SYNC(cmd[0]), hgma, &cmd[3],
			    (len - 3) * sizeof(u32));
	if (!ret && cmd[0] & GVT_FLUSH_NOTIFY)
		gvt_exec_event(engine, GVT_EVENT_FLUSH_NOTIFY);
	return ret;
}

static int gvt_exec_pipe_control(struct gvt_engine *engine, u32 *cmd)
{
	u64 hgma = gvt_cmd_addr(&cmd[2], GVT_ADDR_MASK);
	int ret;

	ret = gvt_post_sync(engine, GVT_POST_SYNC(cmd[1]), hgma, &cmd[4],
			    sizeof(u64));
	if (!ret && cmd[1] & GVT_PC_NOTIFY)
		gvt_exec_event(engine, GVT_EVENT_FLUSH_NOTIFY);
	return ret;
}

/* To a batch; the scan left its index and level in the shadow */
static void gvt_jump(struct gvt_engine *engine, const u32 *cmd, int len)
{
	if (cmd[2] > engine->level)		/* else chained: no return */
		engine->back[engine->level] = engine->pc + len;
	engine->pc = cmd[1];
	engine->level = cmd[2];
}

static void gvt_return(struct gvt_engine *engine)
{
	engine->level--;
	engine->pc = engine->back[engine->level];
}

/* Everything but jumps */
static int gvt_exec_plain(struct gvt_engine *engine, u32 *cmd, int len)
{
	switch (gvt_cmd_op(cmd[0])) {
	case GVT_OP_USER_INTERRUPT:
		gvt_exec_event(engine, GVT_EVENT_USER);
		return 0;
	case GVT_OP_STORE_DATA_IMM:
		return gvt_exec_sdi(engine, cmd, len);
	case GVT_OP_LRI:
		gvt_exec_lri(engine, cmd, len);
		return 0;
	case GVT_OP_LRM:
		return gvt_exec_lrm(engine, cmd);
	case GVT_OP_SRM:
		return gvt_exec_srm(engine, cmd);
	case GVT_OP_LRR:
		gvt_exec_set(engine, cmd[2], gvt_exec_get(engine, cmd[1]));
		return 0;
	case GVT_OP_FLUSH_DW:
		return gvt_exec_flush(engine, cmd, len);
	case GVT_OP_PIPE_CONTROL:
		return gvt_exec_pipe_control(engine, cmd);
	default:
		return 0;
	}
}

static int gvt_exec_command(struct gvt_engine *engine)
{
	u32 *cmd = &engine->workload->shadow[engine->pc];
	int len = gvt_cmd_dws(cmd[0]);
	int ret;

	switch (gvt_cmd_op(cmd[0])) {
	case GVT_OP_BATCH_START:
		gvt_jump(engine, cmd, len);
		return 0;
	case GVT_OP_BATCH_END:
		gvt_return(engine);
		return 0;
	default:
		break;
	}
	ret = gvt_exec_plain(engine, cmd, len);
	if (ret)
		gvt_note(engine->vgpu, "ring %d, DW %u: memory of command %#x: error %d",
			 engine->workload->ring, engine->pc, cmd[0], ret);
	engine->pc += len;
	return ret;
}

/* The debugfs knob; a cancellation ends it */
static void gvt_exec_delay(struct vgpu *vgpu, struct gvt_workload *workload)
{
	unsigned int ms = READ_ONCE(vgpu->exec_delay_ms);

	ms = min_t(unsigned int, ms, GVT_DELAY_MAX_MS);
	if (ms)
		wait_event_idle_timeout(vgpu->idle,
					READ_ONCE(workload->cancelled),
					msecs_to_jiffies(ms));
}

/* Ends: the scan let the shadow jump forward only, and commands have lengths */
int gvt_exec(struct vgpu *vgpu, struct gvt_workload *workload)
{
	struct gvt_engine engine = { .vgpu = vgpu, .workload = workload };
	int ret = 0;

	gvt_exec_delay(vgpu, workload);
	while (!ret && (engine.level != GVT_LEVEL_RING ||
			engine.pc < workload->ring_dws)) {
		if (READ_ONCE(workload->cancelled))
			return -ECANCELED;
		ret = gvt_exec_command(&engine);
		cond_resched();
	}
	return ret;
}
