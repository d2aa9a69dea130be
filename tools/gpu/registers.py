# SPDX-License-Identifier: MIT
"""The table of registers that do more than keep a value, or do not start at zero.

Names and the places that look at them are those of Linux 6.12, below ``drivers/gpu/drm/i915/``. Every other register
keeps what is written, and is mapped by the client.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from tools.gpu.mmio import (
    Acknowledged,
    AuxChannel,
    Behaviour,
    Constant,
    Follows,
    Hook,
    Masked,
    PowerController,
    PowerWells,
    Register,
    ResetControl,
    SelfClearing,
    WriteOneToClear,
)

CSB_ENTRIES: Final = 6
CSB_RESET_POINTERS: Final = (CSB_ENTRIES - 1) << 8 | (CSB_ENTRIES - 1)  # read and write pointer


class EngineLayout(NamedTuple):
    """An engine: its registers' base, its interrupts, its place in other registers' bits."""

    name: str
    base: int
    bank: int  # of the GT's interrupt registers
    shift: int  # of its 16 bits in the bank
    reset: int  # its bit in GDRST
    fault_id: int  # in GEN8_RING_FAULT_REG


ENGINES: Final = (
    EngineLayout("rcs0", 0x02000, bank=0, shift=0, reset=1 << 1, fault_id=0),
    EngineLayout("bcs0", 0x22000, bank=0, shift=16, reset=1 << 3, fault_id=2),
    EngineLayout("vcs0", 0x12000, bank=1, shift=0, reset=1 << 2, fault_id=1),
    EngineLayout("vecs0", 0x1A000, bank=3, shift=0, reset=1 << 4, fault_id=4),
)
"""A GT2's engines: it has no second VCS, whose registers (0x1c000) are memory."""

RING_TAIL, RING_HEAD, RING_START, RING_CTL = 0x30, 0x34, 0x38, 0x3C
RING_ACTHD, RING_ACTHD_UDW = 0x74, 0x5C
RING_IPEHR = 0x68
RING_HWS_PGA = 0x80
RING_MI_MODE = 0x9C
RING_IMR = 0xA8
RING_RESET_CTL = 0xD0
RING_ELSP = 0x230
RING_TIMESTAMP, RING_TIMESTAMP_UDW = 0x358, 0x35C
RING_CSB_BUF = 0x370
RING_CSB_PTR = 0x3A0

GDRST: Final = 0x941C
MASTER_IRQ: Final = 0x44200
RING_FAULT: Final = 0x4094
FAULT_TLB_DATA0: Final = 0x4B10
FAULT_TLB_DATA1: Final = 0x4B14
DPLL_STATUS: Final = 0x6C060

GT_IMR, GT_IIR, GT_IER = 0x44304, 0x44308, 0x4430C
"""The first bank's; the others follow, 16 bytes each."""
GT_BANK: Final = 0x10

_MASKED, _HOOK_TIME = Masked(), Hook("timestamp")
_CLEARED = WriteOneToClear()

ENGINE_TABLE: Final = (
    Register(RING_MI_MODE, "RING_MI_MODE", Hook("mi_mode"), "gt/intel_engine_cs.c: __intel_engine_stop_cs"),
    Register(0xC0, "RING_INSTPM", _MASKED, "gvt/mmio_context.c: gen9_engine_mmio_list"),
    Register(RING_RESET_CTL, "RING_RESET_CTL", ResetControl(), "gt/intel_reset.c: gen8_engine_reset_prepare"),
    Register(RING_ELSP, "RING_ELSP", Hook("elsp"), "gt/intel_execlists_submission.c: write_desc"),
    Register(0x244, "RING_CONTEXT_CONTROL", _MASKED, "gt/intel_lrc.c: init_common_regs"),
    Register(0x29C, "RING_MODE_GEN7", _MASKED, "gt/intel_execlists_submission.c: enable_execlists"),
    Register(RING_TIMESTAMP, "RING_TIMESTAMP", _HOOK_TIME, "i915_ioctl.c: i915_reg_read_ioctl"),
    Register(RING_TIMESTAMP_UDW, "RING_TIMESTAMP_UDW", Hook("timestamp_udw"), "i915_ioctl.c: i915_reg_read_ioctl"),
    Register(
        RING_CSB_PTR, "RING_CONTEXT_STATUS_PTR", Hook("csb_ptr"),
        "gt/intel_execlists_submission.c: reset_csb_pointers", CSB_RESET_POINTERS,
    ),
)  # fmt: skip

_GT_HANDLER: Final = "gt/intel_gt_irq.c: gen8_gt_irq_handler"
_DE_HANDLER: Final = "display/intel_display_irq.c: gen8_de_irq_handler"
_IIRS: Final = (
    *((GT_IIR + GT_BANK * bank, f"GEN8_GT_IIR({bank})", _GT_HANDLER) for bank in range(4)),
    *((0x44408 + 0x10 * pipe, f"GEN8_DE_PIPE_IIR({'ABC'[pipe]})", _DE_HANDLER) for pipe in range(3)),
    (0x44448, "GEN8_DE_PORT_IIR", _DE_HANDLER),
    (0x44468, "GEN8_DE_MISC_IIR", _DE_HANDLER),
    (0x444E8, "GEN8_PCU_IIR", "i915_irq.c: gen8_irq_reset"),
    (0xC4008, "SDEIIR", _DE_HANDLER),
    (0x64838, "EDP_PSR_IIR", "display/intel_display_irq.c: gen8_de_misc_irq_handler"),
)
_AUX: Final = (0x64010, 0x64110, 0x64210, 0x64310)
_TLB: Final = ((0x4260, "GEN8_RTCR"), (0x4264, "GEN8_M1TCR"), (0x426C, "GEN8_BTCR"), (0x4270, "GEN8_VTCR"))

_GT: Final = (
    Register(0xA278, "FORCEWAKE_RENDER_GEN9", Acknowledged(0xD84), "intel_uncore.c: fw_domain_wait_ack_set"),
    Register(0xA270, "FORCEWAKE_MEDIA_GEN9", Acknowledged(0xD88), "intel_uncore.c: fw_domain_wait_ack_set"),
    Register(0xA188, "FORCEWAKE_GT_GEN9", Acknowledged(0x130044), "intel_uncore.c: fw_domain_wait_ack_set"),
    Register(GDRST, "GEN6_GDRST", Hook("gdrst"), "gt/intel_reset.c: gen6_hw_domain_reset"),
    Register(MASTER_IRQ, "GEN8_MASTER_IRQ", Hook("master_irq"), "i915_irq.c: gen8_irq_handler"),
    *(Register(offset, name, _CLEARED, seen_in) for offset, name, seen_in in _IIRS),
    *(Register(offset, name, SelfClearing(1), "gt/intel_tlb.c: wait_for_invalidate") for offset, name in _TLB),
    Register(0x138124, "GEN6_PCODE_MAILBOX", PowerController(), "intel_pcode.c: __snb_pcode_rw"),
    Register(0xC000, "GUC_STATUS", Behaviour(), "gt/uc/intel_uc.c: __intel_uc_reset_hw", 1),  # MIA in reset
    Register(0x8504, "GEN8_RC6_CTX_INFO", Behaviour(), "gt/intel_rc6.c: pctx_corrupted", 1),
    Register(0x9120, "GEN8_FUSE2", Behaviour(), "gt/intel_sseu.c: gen9_sseu_info_init", 1 << 25),  # slice 0
    Register(0x145998, "GEN6_RP_STATE_CAP", Behaviour(), "gt/intel_rps.c: gen6_rps_get_freq_caps", 0x0016_1616),
)  # fmt: skip

_DISPLAY: Final = (
    Register(0x42000, "SKL_FUSE_STATUS", Constant(), "display/intel_display_power_well.c", 0x8E00_0000),
    Register(0x42300, "FPGA_DBG", _CLEARED, "intel_uncore.c: fpga_check_for_unclaimed_mmio"),
    Register(0x44070, "IVB_TIMESTAMP_CTR", _HOOK_TIME, "display/intel_vblank.c"),
    *(
        Register(0x45400 + 4 * each, f"HSW_PWR_WELL_CTL{each + 1}", PowerWells(0x45400, 0x4540C),
                 "display/intel_display_power_well.c: hsw_wait_for_power_well_enable")
        for each in range(4)
    ),
    Register(0x45008, "DBUF_CTL_S0", Follows(1 << 31, 1 << 30), "display/intel_display_power.c: gen9_dbuf_slice_set"),
    Register(0x44FE8, "DBUF_CTL_S1", Follows(1 << 31, 1 << 30), "display/intel_display_power.c: gen9_dbuf_slice_set"),
    Register(
        0x46010, "LCPLL1_CTL", Follows(1 << 31, 1 << 30, also=(DPLL_STATUS, 1 << 0)),
        "display/intel_cdclk.c: skl_dpll0_enable",
    ),
    *(Register(offset, "DP_AUX_CH_CTL", AuxChannel(), "display/intel_dp_aux.c: intel_dp_aux_xfer") for offset in _AUX),
    Register(0xC5108, "GMBUS2", Constant(), "display/intel_gmbus.c: gmbus_wait", 1 << 11 | 1 << 10),  # ready, NAK
)  # fmt: skip


def table() -> tuple[Register, ...]:
    """Return all rows, those of each engine with their offsets into the BAR."""
    of_engines = (
        row._replace(offset=engine.base + row.offset, name=f"{engine.name} {row.name}")
        for engine in ENGINES
        for row in ENGINE_TABLE
    )
    return (*_GT, *_DISPLAY, *of_engines)
