# auto-generated file
import _cffi_backend

ffi = _cffi_backend.FFI('vfio_mig.dirty._gmp',
    _version = 0x2601,
    _types = b'\x00\x00\x04\x0D\x00\x00\x04\x03\x00\x00\x09\x01\x00\x00\x00\x0F\x00\x00\x0A\x01',
    _globals = (b'\x00\x00\x00\x23__gmpn_popcount',0,),
)
