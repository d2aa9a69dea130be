# SPDX-License-Identifier: MIT
# Made by tools/gen_uapi.py from cdefs/*.h; do not edit.
from collections.abc import Mapping
from typing import Any, Generic, Literal, TypeVar, overload

T = TypeVar("T")

class CData: ...

class Array(CData, Generic[T]):
    def __getitem__(self, index: int) -> T: ...
    def __setitem__(self, index: int, value: T) -> None: ...
    def __len__(self) -> int: ...

class vfio_group_status(CData):
    argsz: int
    flags: int

class vfio_info_cap_header(CData):
    id: int
    version: int
    next: int

class vfio_device_info(CData):
    argsz: int
    flags: int
    num_regions: int
    num_irqs: int
    cap_offset: int

class vfio_region_info(CData):
    argsz: int
    flags: int
    index: int
    cap_offset: int
    size: int
    offset: int

class vfio_region_sparse_mmap_area(CData):
    offset: int
    size: int

class vfio_region_info_cap_sparse_mmap(CData):
    header: vfio_info_cap_header
    nr_areas: int
    reserved: int
    areas: Array[vfio_region_sparse_mmap_area]

class vfio_region_info_cap_type(CData):
    header: vfio_info_cap_header
    type: int
    subtype: int

class vfio_iommu_type1_dma_map(CData):
    argsz: int
    flags: int
    vaddr: int
    iova: int
    size: int

class vfio_device_bind_iommufd(CData):
    argsz: int
    flags: int
    iommufd: int
    out_devid: int

class vfio_device_attach_iommufd_pt(CData):
    argsz: int
    flags: int
    pt_id: int

class vfio_iommu_type1_dirty_bitmap(CData):
    argsz: int
    flags: int
    data: Array[int]

class vfio_device_feature(CData):
    argsz: int
    flags: int
    data: Array[int]

class vfio_device_feature_migration(CData):
    flags: int

class vfio_device_feature_mig_state(CData):
    device_state: int
    data_fd: int

class vfio_precopy_info(CData):
    argsz: int
    flags: int
    initial_bytes: int
    dirty_bytes: int

class vfio_device_feature_dma_logging_control(CData):
    page_size: int
    num_ranges: int
    __reserved: int
    ranges: int

class vfio_device_feature_dma_logging_range(CData):
    iova: int
    length: int

class vfio_device_feature_dma_logging_report(CData):
    iova: int
    length: int
    page_size: int
    bitmap: int

class vfio_device_feature_mig_data_size(CData):
    stop_copy_length: int

class iommu_ioas_alloc(CData):
    size: int
    flags: int
    out_ioas_id: int

class iommu_ioas_map(CData):
    size: int
    flags: int
    ioas_id: int
    __reserved: int
    user_va: int
    length: int
    iova: int

class iommu_hwpt_alloc(CData):
    size: int
    flags: int
    dev_id: int
    pt_id: int
    out_hwpt_id: int
    __reserved: int
    data_type: int
    data_len: int
    data_uptr: int

class iommu_hw_info(CData):
    size: int
    flags: int
    dev_id: int
    data_len: int
    data_uptr: int
    out_data_type: int
    __reserved: int
    out_capabilities: int

class iommu_hwpt_set_dirty_tracking(CData):
    size: int
    flags: int
    hwpt_id: int
    __reserved: int

class iommu_hwpt_get_dirty_bitmap(CData):
    size: int
    hwpt_id: int
    flags: int
    __reserved: int
    iova: int
    length: int
    page_size: int
    data: int

class kvm_userspace_memory_region(CData):
    slot: int
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int

class kvm_create_device(CData):
    type: int
    fd: int
    flags: int

class kvm_device_attr(CData):
    flags: int
    group: int
    attr: int
    addr: int

class vfio_pci_status_set(CData):
    argsz: int
    flags: int

class vfio_pci_get_dirty_bitmap(CData):
    start_addr: int
    page_nr: int
    dirty_bitmap: Array[int]

class gvt_region(CData):
    type: int
    size: int

class gvt_image_header(CData):
    version: int
    data_size: int
    crc_check: int
    global_data: Array[int]

class gvt_ppgtt_entry(CData):
    page_table_level: int
    reserved: int
    pdp: Array[int]

class gvt_workload_entry(CData):
    ring_id: int
    data: Array[int]
    index: int

class vgt_if(CData):
    magic: int
    version_major: int
    version_minor: int
    vgt_id: int
    vgt_caps: int
    rsv1: Array[int]
    mappable_base: int
    mappable_size: int
    nonmappable_base: int
    nonmappable_size: int
    fence_num: int
    rsv2: Array[int]
    v2g_notify: int
    display_ready: int
    rsv3: Array[int]
    g2v_notify: int
    rsv4: Array[int]
    cursor_x_hot: int
    cursor_y_hot: int
    pdp: Array[int]
    execlist_context_descriptor_lo: int
    execlist_context_descriptor_hi: int
    rsv5: Array[int]

class _FFI:
    @overload
    def new(
        self, cdecl: Literal["struct vfio_group_status *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_group_status: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_info_cap_header *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_info_cap_header: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_device_info *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_device_info: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_region_info *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_region_info: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_region_sparse_mmap_area *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_region_sparse_mmap_area: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_region_info_cap_sparse_mmap *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_region_info_cap_sparse_mmap: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_region_info_cap_type *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_region_info_cap_type: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_iommu_type1_dma_map *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_iommu_type1_dma_map: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_device_bind_iommufd *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_device_bind_iommufd: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_device_attach_iommufd_pt *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_device_attach_iommufd_pt: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_iommu_type1_dirty_bitmap *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_iommu_type1_dirty_bitmap: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_device_feature *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_device_feature: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_device_feature_migration *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_device_feature_migration: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_device_feature_mig_state *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_device_feature_mig_state: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_precopy_info *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_precopy_info: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_device_feature_dma_logging_control *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_device_feature_dma_logging_control: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_device_feature_dma_logging_range *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_device_feature_dma_logging_range: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_device_feature_dma_logging_report *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_device_feature_dma_logging_report: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_device_feature_mig_data_size *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_device_feature_mig_data_size: ...
    @overload
    def new(
        self, cdecl: Literal["struct iommu_ioas_alloc *"], init: Mapping[str, Any] = ..., /
    ) -> iommu_ioas_alloc: ...
    @overload
    def new(
        self, cdecl: Literal["struct iommu_ioas_map *"], init: Mapping[str, Any] = ..., /
    ) -> iommu_ioas_map: ...
    @overload
    def new(
        self, cdecl: Literal["struct iommu_hwpt_alloc *"], init: Mapping[str, Any] = ..., /
    ) -> iommu_hwpt_alloc: ...
    @overload
    def new(
        self, cdecl: Literal["struct iommu_hw_info *"], init: Mapping[str, Any] = ..., /
    ) -> iommu_hw_info: ...
    @overload
    def new(
        self, cdecl: Literal["struct iommu_hwpt_set_dirty_tracking *"], init: Mapping[str, Any] = ..., /
    ) -> iommu_hwpt_set_dirty_tracking: ...
    @overload
    def new(
        self, cdecl: Literal["struct iommu_hwpt_get_dirty_bitmap *"], init: Mapping[str, Any] = ..., /
    ) -> iommu_hwpt_get_dirty_bitmap: ...
    @overload
    def new(
        self, cdecl: Literal["struct kvm_userspace_memory_region *"], init: Mapping[str, Any] = ..., /
    ) -> kvm_userspace_memory_region: ...
    @overload
    def new(
        self, cdecl: Literal["struct kvm_create_device *"], init: Mapping[str, Any] = ..., /
    ) -> kvm_create_device: ...
    @overload
    def new(
        self, cdecl: Literal["struct kvm_device_attr *"], init: Mapping[str, Any] = ..., /
    ) -> kvm_device_attr: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_pci_status_set *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_pci_status_set: ...
    @overload
    def new(
        self, cdecl: Literal["struct vfio_pci_get_dirty_bitmap *"], init: Mapping[str, Any] = ..., /
    ) -> vfio_pci_get_dirty_bitmap: ...
    @overload
    def new(
        self, cdecl: Literal["struct gvt_region *"], init: Mapping[str, Any] = ..., /
    ) -> gvt_region: ...
    @overload
    def new(
        self, cdecl: Literal["struct gvt_image_header *"], init: Mapping[str, Any] = ..., /
    ) -> gvt_image_header: ...
    @overload
    def new(
        self, cdecl: Literal["struct gvt_ppgtt_entry *"], init: Mapping[str, Any] = ..., /
    ) -> gvt_ppgtt_entry: ...
    @overload
    def new(
        self, cdecl: Literal["struct gvt_workload_entry *"], init: Mapping[str, Any] = ..., /
    ) -> gvt_workload_entry: ...
    @overload
    def new(
        self, cdecl: Literal["struct vgt_if *"], init: Mapping[str, Any] = ..., /
    ) -> vgt_if: ...
    @overload
    def new(self, cdecl: Literal["int *"], init: int = ..., /) -> Array[int]: ...
    def sizeof(self, cdecl: CData | Literal[
        "struct vfio_group_status",
        "struct vfio_info_cap_header",
        "struct vfio_device_info",
        "struct vfio_region_info",
        "struct vfio_region_sparse_mmap_area",
        "struct vfio_region_info_cap_sparse_mmap",
        "struct vfio_region_info_cap_type",
        "struct vfio_iommu_type1_dma_map",
        "struct vfio_device_bind_iommufd",
        "struct vfio_device_attach_iommufd_pt",
        "struct vfio_iommu_type1_dirty_bitmap",
        "struct vfio_device_feature",
        "struct vfio_device_feature_migration",
        "struct vfio_device_feature_mig_state",
        "struct vfio_precopy_info",
        "struct vfio_device_feature_dma_logging_control",
        "struct vfio_device_feature_dma_logging_range",
        "struct vfio_device_feature_dma_logging_report",
        "struct vfio_device_feature_mig_data_size",
        "struct iommu_ioas_alloc",
        "struct iommu_ioas_map",
        "struct iommu_hwpt_alloc",
        "struct iommu_hw_info",
        "struct iommu_hwpt_set_dirty_tracking",
        "struct iommu_hwpt_get_dirty_bitmap",
        "struct kvm_userspace_memory_region",
        "struct kvm_create_device",
        "struct kvm_device_attr",
        "struct vfio_pci_status_set",
        "struct vfio_pci_get_dirty_bitmap",
        "struct gvt_region",
        "struct gvt_image_header",
        "struct gvt_ppgtt_entry",
        "struct gvt_workload_entry",
        "struct vgt_if",
    ], /) -> int: ...
    def offsetof(self, cdecl: Literal[
        "struct vfio_group_status",
        "struct vfio_info_cap_header",
        "struct vfio_device_info",
        "struct vfio_region_info",
        "struct vfio_region_sparse_mmap_area",
        "struct vfio_region_info_cap_sparse_mmap",
        "struct vfio_region_info_cap_type",
        "struct vfio_iommu_type1_dma_map",
        "struct vfio_device_bind_iommufd",
        "struct vfio_device_attach_iommufd_pt",
        "struct vfio_iommu_type1_dirty_bitmap",
        "struct vfio_device_feature",
        "struct vfio_device_feature_migration",
        "struct vfio_device_feature_mig_state",
        "struct vfio_precopy_info",
        "struct vfio_device_feature_dma_logging_control",
        "struct vfio_device_feature_dma_logging_range",
        "struct vfio_device_feature_dma_logging_report",
        "struct vfio_device_feature_mig_data_size",
        "struct iommu_ioas_alloc",
        "struct iommu_ioas_map",
        "struct iommu_hwpt_alloc",
        "struct iommu_hw_info",
        "struct iommu_hwpt_set_dirty_tracking",
        "struct iommu_hwpt_get_dirty_bitmap",
        "struct kvm_userspace_memory_region",
        "struct kvm_create_device",
        "struct kvm_device_attr",
        "struct vfio_pci_status_set",
        "struct vfio_pci_get_dirty_bitmap",
        "struct gvt_region",
        "struct gvt_image_header",
        "struct gvt_ppgtt_entry",
        "struct gvt_workload_entry",
        "struct vgt_if",
    ], field: str, /) -> int: ...
    def integer_const(self, name: Literal[
        "VFIO_API_VERSION",
        "VFIO_TYPE1_IOMMU",
        "VFIO_TYPE1v2_IOMMU",
        "VFIO_GROUP_FLAGS_VIABLE",
        "VFIO_GROUP_FLAGS_CONTAINER_SET",
        "VFIO_DEVICE_FLAGS_RESET",
        "VFIO_DEVICE_FLAGS_PCI",
        "VFIO_DEVICE_FLAGS_PLATFORM",
        "VFIO_DEVICE_FLAGS_AMBA",
        "VFIO_DEVICE_FLAGS_CCW",
        "VFIO_DEVICE_FLAGS_AP",
        "VFIO_DEVICE_FLAGS_FSL_MC",
        "VFIO_DEVICE_FLAGS_CAPS",
        "VFIO_REGION_INFO_FLAG_READ",
        "VFIO_REGION_INFO_FLAG_WRITE",
        "VFIO_REGION_INFO_FLAG_MMAP",
        "VFIO_REGION_INFO_FLAG_CAPS",
        "VFIO_REGION_INFO_CAP_SPARSE_MMAP",
        "VFIO_REGION_INFO_CAP_TYPE",
        "VFIO_PCI_BAR0_REGION_INDEX",
        "VFIO_PCI_BAR2_REGION_INDEX",
        "VFIO_PCI_ROM_REGION_INDEX",
        "VFIO_PCI_CONFIG_REGION_INDEX",
        "VFIO_PCI_VGA_REGION_INDEX",
        "VFIO_DMA_MAP_FLAG_READ",
        "VFIO_DMA_MAP_FLAG_WRITE",
        "VFIO_IOMMU_DIRTY_PAGES_FLAG_START",
        "VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP",
        "VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP",
        "VFIO_DEVICE_FEATURE_MASK",
        "VFIO_DEVICE_FEATURE_GET",
        "VFIO_DEVICE_FEATURE_SET",
        "VFIO_DEVICE_FEATURE_PROBE",
        "VFIO_DEVICE_FEATURE_MIGRATION",
        "VFIO_MIGRATION_STOP_COPY",
        "VFIO_MIGRATION_P2P",
        "VFIO_MIGRATION_PRE_COPY",
        "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE",
        "VFIO_DEVICE_STATE_ERROR",
        "VFIO_DEVICE_STATE_STOP",
        "VFIO_DEVICE_STATE_RUNNING",
        "VFIO_DEVICE_STATE_STOP_COPY",
        "VFIO_DEVICE_STATE_RESUMING",
        "VFIO_DEVICE_STATE_RUNNING_P2P",
        "VFIO_DEVICE_STATE_PRE_COPY",
        "VFIO_DEVICE_STATE_PRE_COPY_P2P",
        "VFIO_PRECOPY_INFO_REINIT",
        "VFIO_DEVICE_FEATURE_DMA_LOGGING_START",
        "VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP",
        "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT",
        "VFIO_DEVICE_FEATURE_MIG_DATA_SIZE",
        "VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2",
        "IOMMU_IOAS_MAP_FIXED_IOVA",
        "IOMMU_IOAS_MAP_WRITEABLE",
        "IOMMU_IOAS_MAP_READABLE",
        "IOMMU_HWPT_ALLOC_DIRTY_TRACKING",
        "IOMMU_HW_CAP_DIRTY_TRACKING",
        "IOMMU_HWPT_DIRTY_TRACKING_ENABLE",
        "KVM_DEV_TYPE_VFIO",
        "KVM_DEV_VFIO_GROUP",
        "KVM_DEV_VFIO_GROUP_ADD",
        "VFIO_DEVICE_FLAGS_MIGRATABLE",
        "VFIO_PCI_DEVICE_STATE_REGION_INDEX",
        "VFIO_PCI_RFC_NUM_REGIONS",
        "VFIO_DEVICE_PCI_STATUS_SET_NR",
        "VFIO_DEVICE_PCI_GET_DIRTY_BITMAP_NR",
        "VFIO_DEVICE_PCI_STOP",
        "VFIO_DEVICE_PCI_START",
        "MIGRATION_IMG_MAX_SIZE",
        "MIGRATION_IMG_LARGE_SIZE",
        "GVT_MIGRATION_NONE",
        "GVT_MIGRATION_HEAD",
        "GVT_MIGRATION_CFG_SPACE",
        "GVT_MIGRATION_VREG",
        "GVT_MIGRATION_SREG",
        "GVT_MIGRATION_GTT",
        "GVT_MIGRATION_PPGTT",
        "GVT_MIGRATION_WORKLOAD",
        "GVT_IMAGE_VERSION",
        "GVT_IMAGE_CFG_SIZE",
        "GVT_IMAGE_REG_SIZE",
        "GVT_RING_RCS",
        "GVT_RING_BCS",
        "GVT_RING_VCS",
        "GVT_RING_VCS2",
        "GVT_RING_VECS",
        "GVT_RING_COUNT",
        "GVT_BAR0_SIZE",
        "GVT_MMIO_SIZE",
        "GVT_GTT_OFFSET",
        "GVT_GTT_SIZE",
        "GVT_FENCE_OFFSET",
        "VGT_PVINFO_PAGE",
        "VGT_PVINFO_SIZE",
        "VGT_MAGIC",
        "VGT_VERSION_MAJOR",
        "VGT_VERSION_MINOR",
        "VGT_CAPS_FULL_PPGTT",
        "VGT_CAPS_HWSP_EMULATION",
        "VGT_CAPS_HUGE_GTT",
        "VGT_G2V_PPGTT_L3_PAGE_TABLE_CREATE",
        "VGT_G2V_PPGTT_L3_PAGE_TABLE_DESTROY",
        "VGT_G2V_PPGTT_L4_PAGE_TABLE_CREATE",
        "VGT_G2V_PPGTT_L4_PAGE_TABLE_DESTROY",
        "VGT_G2V_EXECLIST_CONTEXT_CREATE",
        "VGT_G2V_EXECLIST_CONTEXT_DESTROY",
    ], /) -> int: ...
    def buffer(self, cdata: CData, size: int = ..., /) -> bytearray: ...

ffi: _FFI
