// SPDX-License-Identifier: MIT
/*
 * Stop and start of a vGPU.
 *
 * A vGPU that is stopped stays active in GVT's sense, it is open and its guest
 * may access it; but nothing of it changes by itself: no workload is executed,
 * no vblank is counted, no clock goes on. Workloads that the guest has queued,
 * or queues now, wait.
 */
#include <linux/uaccess.h>
#include <linux/wait.h>

#include "i915_drv.h"
#include "gvt.h"
#include "sched_policy.h"

static void set_stopped(struct intel_vgpu *vgpu, bool stopped)
{
	/*
	 * pick_next_workload() looks at it under this lock, and counts what it
	 * has picked before it lets go: after this the count can only go down.
	 */
	mutex_lock(&vgpu->gvt->sched_lock);
	WRITE_ONCE(vgpu->migration.stopped, stopped);
	mutex_unlock(&vgpu->gvt->sched_lock);
}

/**
 * intel_vgpu_is_stopped - tell whether a vGPU is stopped
 * @vgpu: a vGPU
 *
 * Returns: whether it is
 */
bool intel_vgpu_is_stopped(struct intel_vgpu *vgpu)
{
	return READ_ONCE(vgpu->migration.stopped);
}

static bool is_idle(struct intel_vgpu *vgpu)
{
	return !atomic_read(&vgpu->submission.running_workload_num);
}

static void resume_vgpu(struct intel_vgpu *vgpu)
{
	struct intel_gvt *gvt = vgpu->gvt;
	struct intel_engine_cs *engine;
	enum intel_engine_id id;

	mutex_lock(&vgpu->vgpu_lock);
	set_stopped(vgpu, false);
	if (vgpu->submission.active)
		intel_vgpu_start_schedule(vgpu);
	if (vgpu->migration.vblank)
		vgpu_update_vblank_emulation(vgpu, true);
	vgpu->migration.vblank = false;
	mutex_unlock(&vgpu->vgpu_lock);

	intel_gvt_kick_schedule(gvt);
	for_each_engine(engine, gvt->gt, id)
		wake_up(&gvt->scheduler.waitq[id]);
}

/**
 * intel_vgpu_stop - stop a vGPU
 * @vgpu: a vGPU that is open
 *
 * Waits for the workload that is being executed. Stopping twice is stopping.
 *
 * Returns: 0, or -EINTR when the caller is killed meanwhile; the vGPU goes on
 * then
 */
int intel_vgpu_stop(struct intel_vgpu *vgpu)
{
	struct intel_gvt_workload_scheduler *scheduler = &vgpu->gvt->scheduler;

	lockdep_assert_held(&vgpu->migration.lock);

	if (intel_vgpu_is_stopped(vgpu))
		return 0;

	set_stopped(vgpu, true);
	if (wait_event_killable(scheduler->workload_complete_wq, is_idle(vgpu))) {
		resume_vgpu(vgpu);
		return -EINTR;
	}

	mutex_lock(&vgpu->vgpu_lock);
	/* The render registers go back into the virtual ones. */
	intel_vgpu_stop_schedule(vgpu);
	vgpu->migration.vblank = hrtimer_active(&vgpu->vblank_timer.timer);
	hrtimer_cancel(&vgpu->vblank_timer.timer);
	mutex_unlock(&vgpu->vgpu_lock);

	return 0;
}

/**
 * intel_vgpu_start - let a vGPU go on
 * @vgpu: a vGPU that is open
 *
 * Starting one that runs changes nothing.
 */
void intel_vgpu_start(struct intel_vgpu *vgpu)
{
	lockdep_assert_held(&vgpu->migration.lock);

	if (intel_vgpu_is_stopped(vgpu))
		resume_vgpu(vgpu);
}

static void drop_page_tables(struct intel_vgpu *vgpu)
{
	struct intel_vgpu_mm *mm;

	/* A guest that has announced one twice has it twice. */
	while ((mm = list_first_entry_or_null(&vgpu->gtt.ppgtt_mm_list_head,
					      struct intel_vgpu_mm, ppgtt_mm.list)))
		intel_vgpu_destroy_mm(mm);
}

static void drop_partial_ptes(struct intel_vgpu *vgpu)
{
	struct intel_gvt_partial_pte *pte, *next;

	list_for_each_entry_safe(pte, next, &vgpu->gtt.ggtt_mm->ggtt_mm.partial_pte_list, list) {
		list_del(&pte->list);
		kfree(pte);
	}
}

/**
 * intel_vgpu_reset_stopped - reset a vGPU, and leave nothing of what it was
 * @vgpu: a vGPU that is open and stopped
 *
 * GVT's own reset keeps a page table that was announced twice, half-written
 * entries of the GGTT, and the execution lists of engines that the guest has not
 * turned on again. As nothing is being executed, nobody but the guest and its
 * queue uses them.
 */
void intel_vgpu_reset_stopped(struct intel_vgpu *vgpu)
{
	lockdep_assert_held(&vgpu->vgpu_lock);

	intel_vgpu_clean_workloads(vgpu, ALL_ENGINES);
	if (!vgpu->d3_entered)
		drop_page_tables(vgpu);
	intel_gvt_reset_vgpu_locked(vgpu, true, 0);
	memset(vgpu->submission.execlist, 0, sizeof(vgpu->submission.execlist));
	drop_partial_ptes(vgpu);
	vgpu->migration.vblank = false;
	intel_vgpu_forget_written(vgpu);
}

/**
 * intel_vgpu_reset_migration - reset a vGPU for its user
 * @vgpu: a vGPU that is open
 *
 * Afterwards it runs, whatever it did before.
 *
 * Returns: 0, or -EINTR where the caller was killed, with the vGPU as it was
 */
int intel_vgpu_reset_migration(struct intel_vgpu *vgpu)
{
	int ret;

	if (!intel_gvt_migrates()) {
		intel_gvt_reset_vgpu(vgpu);
		return 0;
	}

	/* whoever has it may be waiting for a workload that does not end */
	if (mutex_lock_killable(&vgpu->migration.lock))
		return -EINTR;
	ret = intel_vgpu_stop(vgpu);
	if (!ret) {
		mutex_lock(&vgpu->vgpu_lock);
		intel_vgpu_reset_stopped(vgpu);
		mutex_unlock(&vgpu->vgpu_lock);
		intel_vgpu_start(vgpu);
		if (vgpu->migration.end)
			vgpu->migration.end(vgpu);
	}
	mutex_unlock(&vgpu->migration.lock);

	return ret;
}

/**
 * intel_vgpu_close_migration - forget what does not outlive an open vGPU
 * @vgpu: a vGPU that is being closed, and was deactivated
 */
void intel_vgpu_close_migration(struct intel_vgpu *vgpu)
{
	mutex_lock(&vgpu->migration.lock);
	if (vgpu->migration.end)
		vgpu->migration.end(vgpu);
	set_stopped(vgpu, false);
	vgpu->migration.vblank = false;
	intel_vgpu_forget_written(vgpu);
	mutex_unlock(&vgpu->migration.lock);
}

/**
 * intel_vgpu_set_status - do VFIO_DEVICE_PCI_STATUS_SET
 * @vgpu: a vGPU that is open
 * @arg: the caller's struct vfio_pci_status_set
 *
 * Returns: 0; -EFAULT, -EINVAL; -EINTR where the caller was killed
 */
int intel_vgpu_set_status(struct intel_vgpu *vgpu, const void __user *arg)
{
	struct vfio_pci_status_set status;
	int ret = 0;

	if (copy_from_user(&status, arg, sizeof(status)))
		return -EFAULT;
	/*
	 * VFIO_DEVICE_QUERY_GFX_PLANE has the same number. Its users ask with
	 * both flags, or with a third, what they can have, and here get the
	 * answer that it is nothing.
	 */
	if (status.argsz < sizeof(status) ||
	    (status.flags != VFIO_DEVICE_PCI_STOP && status.flags != VFIO_DEVICE_PCI_START))
		return -EINVAL;

	if (mutex_lock_killable(&vgpu->migration.lock))
		return -EINTR;
	if (status.flags == VFIO_DEVICE_PCI_STOP)
		ret = intel_vgpu_stop(vgpu);
	else
		intel_vgpu_start(vgpu);
	mutex_unlock(&vgpu->migration.lock);
	return ret;
}
