# SPDX-License-Identifier: MIT
import pytest

from tools.vm.kernlog import faults

# Lines of real kernels' logs.
WARN = """\
[   12.1] gvt_sample: loading out-of-tree module taints kernel.
[   12.345678] ------------[ cut here ]------------
[   12.345700] WARNING: CPU: 1 PID: 211 at drivers/vfio/vfio_main.c:297 vfio_device_put+0x1a/0x20 [vfio]
[   12.345800] Modules linked in: gvt_sample(OE) vfio_iommu_type1 vfio mdev
[   12.346000] Call Trace:
[   12.346100]  <TASK>
[   12.349000] ---[ end trace 0000000000000000 ]---
[   13.000000] something else
"""

COMPLAINTS = [
    "[    6.993654] Kernel panic - not syncing: sysrq triggered crash",
    "[   10.1] BUG: kernel NULL pointer dereference, address: 0000000000000010",
    "[   10.1] BUG: unable to handle page fault for address: ffffffffc0000000",
    "[   10.1] BUG: sleeping function called from invalid context at kernel/locking/mutex.c:580",
    "[   10.1] BUG: scheduling while atomic: insmod/123/0x00000002",
    "[   10.1] BUG: Bad page state in process pytest  pfn:0a1b2",
    "[   10.1] Oops: 0000 [#1] PREEMPT SMP PTI",
    "[   10.1] Oops: Oops: 0000 [#1] PREEMPT SMP NOPTI",
    "[   10.1] Oops: general protection fault, probably for non-canonical address 0xdead000000000100: 0000 [#1] SMP",
    "[   10.1] general protection fault, probably for non-canonical address 0x6b6b6b6b6b6b6b6b: 0000 [#1] SMP",
    "[   10.1] kernel BUG at mm/slub.c:4310!",
    "[   10.1] watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [pytest:300]",
    "[  243.1] INFO: task rmmod:412 blocked for more than 120 seconds.",
    "[   30.1] rcu: INFO: rcu_preempt self-detected stall on CPU",
    "[   30.1] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
    "[   10.1] UBSAN: array-index-out-of-bounds in gtt.c:12:3",
    "[   10.1] refcount_t: underflow; use-after-free.",
    "[   10.1] list_del corruption. next->prev should be ffff888003b1f0c8",
    "[   10.1] kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
    "[   10.1] WARNING: possible circular locking dependency detected",
    "[   10.1] WARNING: suspicious RCU usage",
    "[   10.1] WARNING: mm/page_alloc.c:4930 at __alloc_pages+0x200/0x340, CPU#0: bash/1",
    "[   10.1] WARNING: HARDIRQ-safe -> HARDIRQ-unsafe lock order detected",
    "[   10.1] WARNING: lock held when returning to user space!",
    "[   10.1] WARNING: Nested lock was not taken",
    "[   10.1] WARNING: bad unlock balance detected!",
    "[   10.1] [ BUG: Invalid wait context ]",
    "[   10.1] INFO: trying to register non-static key.",
    "[   10.1] BUG: MAX_LOCKDEP_CHAINS too low!",  # the validator is off from here on
    "[   10.1] kmemleak: Cannot allocate a kmemleak_object structure",
    "[   10.1] kmemleak: Memory pool empty, consider increasing CONFIG_DEBUG_KMEMLEAK_MEM_POOL_SIZE",
    "[   10.1] kmemleak: Kernel memory leak detector disabled",
    "[   10.1] i915 0000:00:02.0: [drm] *ERROR* GT0: GuC initialization failed -110",
    "[   10.1] i915 0000:00:02.0: [drm:intel_power_well_enable [i915]] *ERROR* power well 1 timed out",
    "[   10.1] [drm:drm_atomic_helper_wait_for_flip_done] *ERROR* [CRTC:80:pipe A] flip_done timed out",
    "[   10.1][  T123] [drm] *ERROR* x",
    "[   10.1][  T123] BUG: KASAN: slab-use-after-free in gvt_read+0x10/0x20 [gvt_sample]",
]

HARMLESS = [
    "[    0.3] Spectre V2 : WARNING: Unprivileged eBPF is enabled with eIBRS on, data leaks possible!",
    "[    1.1] MMIO Stale Data: Unknown: No mitigations",
    "[    2.3] Invalid ELF header magic: != ELF",
    "[   10.1] traps: sh[212] general protection fault ip:7f12 sp:7ffc error:0 in libc.so.6[7f0000+1000]",
    "[   10.1] pytest[300]: segfault at 0 ip 0000 sp 0000 error 4 in libc.so.6",
    "[   10.1] gvt_sample: BUG: is what this message is about",
    "[   10.1] gvt_sample: loading out-of-tree module taints kernel.",
    "[   10.1] gvt_sample: module verification failed: signature and/or required key missing - tainting kernel",
    "[    0.0] Kernel command line: quiet panic=-1 oops=panic loglevel=5",
    "[    0.0] DEBUG: nothing",
    "[    5.1] virtme-ng-init: WARNING: failed to mount /x",
    "[    1.0] kmemleak: Kernel memory leak detector initialized (mem pool available: 15764)",
    "[    9.0] kmemleak: Cannot allocate a scan area, scanning the full object",  # slower, and as good
    "[    9.0] FAULT_INJECTION: forcing a failure.",
    "[    1.2] kmemleak: Automatic memory scanning thread started",
    "[   71.5] i915 0000:00:02.0: [drm] Failed to find VBIOS tables (VBT)",
    "[   71.6] i915 0000:00:02.0: Direct firmware load for i915/skl_dmc_ver1_27.bin failed with error -2",
    "[   71.7] pytest: [drm] *ERROR* is what this message is about",
    "[   16.4] sysrq: Power Off",
    "[    0.1] rcu: Preemptible hierarchical RCU implementation.",
    "",
]


def test_a_warn_is_shown_from_its_first_line_to_its_end() -> None:
    shown = faults(WARN)
    assert shown[0].endswith("[ cut here ]------------")
    assert shown[-1].endswith("[ end trace 0000000000000000 ]---")
    assert len(shown) == 6


@pytest.mark.parametrize("line", COMPLAINTS)
def test_a_complaint_of_the_kernel_is_found(line: str) -> None:
    assert faults(f"[    0.0] Linux version 6.12\n{line}\n") == [line]


@pytest.mark.parametrize("line", HARMLESS)
def test_other_messages_are_no_complaint(line: str) -> None:
    assert faults(line) == []


def test_an_error_of_a_graphics_driver_is_one_line() -> None:
    error = "[   10.1] i915 0000:00:02.0: [drm] *ERROR* x"
    assert faults(f"{error}\n[   10.2] something else\n") == [error]
    assert len(faults(WARN.replace("Call Trace:", "[drm] *ERROR* x"))) == 6


def test_a_storm_of_complaints_is_cut() -> None:
    assert len(faults(WARN * 200)) == 300
