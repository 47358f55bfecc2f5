"""The host's kernel as a drgn program: its memory through the core, its types from BTF, its symbols from kallsyms."""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmbench.errors import HostError, KvmIoctlError, MisuseError, UnsupportedError
from kvmbench.host.client import Core
from kvmbench.host.kernel.btf import Btf
from kvmbench.host.kernel.drgn_types import DrgnTypes
from kvmbench.host.kernel.reader import KernelReader

if TYPE_CHECKING:
    import drgn

_ALL = 1 << 64
# Types of the variables that drgn's helpers and ours begin with: BTF of before Linux 6.16 has none of variables.
_VARIABLES = {
    "init_task": "struct task_struct",
    "init_pid_ns": "struct pid_namespace",
    "init_mm": "struct mm_struct",
    "init_net": "struct net",
    "vm_list": "struct list_head",
    "modules": "struct list_head",
    "slab_caches": "struct list_head",
    "vmemmap_base": "unsigned long",
    "page_offset_base": "unsigned long",
    "vmalloc_base": "unsigned long",
    "jiffies": "unsigned long",
}
# Read at once where much of what is near will be wanted, too.
_BLOCK_BYTES = 1 << 16
_WHY = {
    errno.ENOENT: "this host's kernel has no /proc/kcore (CONFIG_PROC_KCORE), so its memory cannot be read",
    errno.EACCES: "only root may read /proc/kcore: run as root, or connect() to a host that you are root on, such as "
    "the appliance",
    errno.EPERM: "the kernel refuses /proc/kcore (lockdown, or a container without CAP_SYS_RAWIO); the appliance is a "
    "host where it does not",
}


class HostKernel:
    """What is known of the kernel below a host; made once for each host, by `kernel_of`.

    Attributes:
        reader: its memory, in raw bytes.

    Raises:
        UnsupportedError: its memory cannot be read, and why; or drgn is not installed.
    """

    def __init__(self, core: Core) -> None:
        try:
            self.reader = KernelReader(core)
        except KvmIoctlError as error:
            raise UnsupportedError(_WHY.get(error.errno or 0, f"/proc/kcore cannot be read: {error}")) from None
        self._offsets: dict[tuple[str, str], int] = {}
        self._sizes: dict[str, int] = {}
        self._symbols: dict[str, int | None] = {}
        self._blocks: dict[int, bytes | None] | None = None

    @cached_property
    def modules(self) -> list[tuple[str, Btf]]:
        """Names and BTF: the kernel's, and those of KVM's modules that are loaded."""
        try:
            base = Btf(self.reader.btf("vmlinux"), name="BTF of vmlinux")
        except KvmIoctlError as error:
            if error.errno != errno.ENOENT:
                raise
            raise UnsupportedError(
                "this host's kernel has no /sys/kernel/btf/vmlinux (CONFIG_DEBUG_INFO_BTF)"
            ) from None
        found = [("vmlinux", base)]
        for module in ("kvm", "kvm_amd", "kvm_intel"):
            try:
                found.append((module, Btf(self.reader.btf(module), base, name=f"BTF of {module}")))
            except KvmIoctlError as error:  # not loaded, or built into the kernel
                if error.errno != errno.ENOENT:
                    raise
        return found

    @cached_property
    def program(self) -> drgn.Program:
        """drgn's view of it."""
        try:
            import drgn
        except ImportError as error:
            raise UnsupportedError(
                f"kernel types need the package drgn ({error}): pip install 'kvmbench[kernel]'"
            ) from None
        program = drgn.Program(drgn.Platform(drgn.Architecture.X86_64), vmcoreinfo=_vmcoreinfo(self.reader.notes()))
        program.add_memory_segment(0, _ALL - 1, self._reading(drgn.FaultError))
        types = DrgnTypes(program, [btf for _, btf in self.modules])
        program.register_type_finder("BTF", types.find, enable_index=0)
        program.register_object_finder("kvmbench", self._finding(types), enable_index=0)
        if not self._load_symbols(program):
            program.register_symbol_finder("/proc/kallsyms", self._find_symbol, enable_index=0)
        return program

    def load(self) -> None:
        """Reads the types and symbols, which otherwise happens when they are asked for."""
        self.program  # noqa: B018  (a cached property)

    def _reading(self, fault: Callable[..., Exception]) -> Callable[[int, int, int, bool], bytes]:
        def read(address: int, count: int, offset: int, physical: bool) -> bytes:
            data = self.reader.read(address, count) if self._blocks is None else self._read_blocks(address, count)
            if data is None:
                raise fault("not in /proc/kcore", address)
            return data

        return read

    def _read_blocks(self, address: int, count: int) -> bytes | None:
        assert self._blocks is not None
        pieces = []
        for start in range(address & -_BLOCK_BYTES, address + count, _BLOCK_BYTES):
            if start not in self._blocks:
                self._blocks[start] = self.reader.read(start, _BLOCK_BYTES)
            block = self._blocks[start]
            if block is None:  # a segment ends in it
                return self.reader.read(address, count)
            pieces.append(block[max(address - start, 0) : max(address + count - start, 0)])
        return b"".join(pieces)

    @contextlib.contextmanager
    def _in_blocks(self) -> Iterator[None]:
        """Reads far more than it is asked for: what does not change, or not while the vcpus are held."""
        self._blocks = {}
        try:
            yield
        finally:
            self._blocks = None

    def _load_symbols(self, program: drgn.Program) -> bool:
        # The kernel formats /proc/kallsyms line by line, 15 s of it in Bochs; its tables are 2 MB.
        from drgn.helpers.linux.kallsyms import load_module_kallsyms, load_vmlinux_kallsyms

        with self._in_blocks():
            try:
                for name, load in (("vmlinux", load_vmlinux_kallsyms), ("modules", load_module_kallsyms)):
                    program.register_symbol_finder(name, load(program), enable_index=-1)
            except (LookupError, ValueError, NotImplementedError):  # Linux before 6.0 does not say where they are
                return False
        return True

    def _finding(self, types: DrgnTypes) -> Callable[..., Any]:
        import drgn

        def find(program: drgn.Program, name: str, flags: Any, filename: str | None) -> Any:
            found = self._find_variable(program, name, filename) if flags & drgn.FindObjectFlags.VARIABLE else None
            if found is None and flags & drgn.FindObjectFlags.CONSTANT and not filename:
                found = types.find_constant(name)
            return found

        return find

    def _find_variable(self, program: drgn.Program, name: str, filename: str | None) -> Any:
        import drgn

        if name == "VMCOREINFO" and not filename:  # drgn's own, for its helpers
            text = _vmcoreinfo(self.reader.notes()) or b""
            kind = program.array_type(program.int_type("char", 1, True), len(text) + 1)
            return drgn.Object(program, kind, value=text + b"\0")
        if filename or name not in _VARIABLES:
            return None
        try:
            address = program.symbol(name).address
        except LookupError:
            return None
        return drgn.Object(program, _VARIABLES[name], address=address)

    def _find_symbol(self, program: drgn.Program, name: str | None, address: int | None, one: bool) -> list[Any]:
        import drgn

        if name is None or address is not None:
            return []
        if name not in self._symbols:
            found = self.reader.symbols([name])
            self._symbols[name] = next(iter(found.values()), None)
        place = self._symbols[name]
        if place is None:
            return []
        return [drgn.Symbol(name, place, 0, drgn.SymbolBinding.GLOBAL, drgn.SymbolKind.OBJECT)]

    def symbol(self, name: str, *default: Any) -> Any:
        """The address of a symbol.

        Raises:
            UnsupportedError: there is none of that name, and no default was given.
        """
        try:
            return int(self.program.symbol(name).address)
        except LookupError:
            if default:
                return default[0]
        raise UnsupportedError(
            f"this host's kernel has no symbol {name}: it is another than was expected, or hides addresses "
            "(kernel.kptr_restrict)"
        )

    def offset(self, type_: str, member: str) -> int:
        """Bytes from the beginning of a struct to a member, which may be one of a member: "arch.mmu"."""
        import drgn

        key = (type_, member)
        if key not in self._offsets:
            try:
                self._offsets[key] = drgn.offsetof(self.program.type(type_), member)
            except LookupError:
                raise UnsupportedError(f"{type_} of this host's kernel has no member {member}") from None
        return self._offsets[key]

    def has(self, type_: str, member: str) -> bool:
        """Whether there is such a member."""
        try:
            self.offset(type_, member)
        except UnsupportedError:
            return False
        return True

    def size(self, type_: str) -> int:
        """Bytes of a type."""
        import drgn

        if type_ not in self._sizes:
            self._sizes[type_] = drgn.sizeof(self.program.type(type_))
        return self._sizes[type_]

    def bit_fields(self, type_: str) -> dict[str, tuple[int, int]]:
        """Of a struct or union of bit-fields, and of what it has without a name: first bit and width by name."""
        found: dict[str, tuple[int, int]] = {}

        def collect(type_: Any, start: int) -> None:
            for member in type_.members:
                if member.name is None:
                    collect(member.type, start + member.bit_offset)
                elif member.bit_field_size is not None:
                    found[member.name] = start + member.bit_offset, member.bit_field_size

        collect(self.program.type(type_), 0)
        return found

    def u64(self, address: int) -> int:
        """Eight bytes at an address.

        Raises:
            HostError: nothing can be read there.
        """
        data = self.reader.read(address, 8)
        if data is None:
            raise HostError(f"nothing can be read at {address:#x} of the host's kernel")
        return int.from_bytes(data, "little")

    def column(self, objects: Any, type_: str, member: str, dtype: str, start: int = 0) -> Any:
        """A member of many objects.

        Args:
            objects: their bytes, shape (n, size), as `KernelReader.list_objects` gives them.
            start: of the bytes in an object.

        Returns:
            An array of `dtype`, shape (n,).
        """
        at = self.offset(type_, member) - start
        width = np.dtype(dtype).itemsize
        if not 0 <= at <= objects.shape[1] - width:
            raise MisuseError(f"{member} of {type_} lies outside of what was read of it")
        return np.ascontiguousarray(objects[:, at : at + width]).view(dtype).reshape(-1)


def _vmcoreinfo(notes: bytes) -> bytes | None:
    # ELF notes: lengths of name and text and a type, then both, each padded to 4 bytes.
    at = 0
    while at + 12 <= len(notes):
        name_bytes, text_bytes, _ = struct.unpack_from("<III", notes, at)
        name = notes[at + 12 : at + 12 + name_bytes].rstrip(b"\0")
        start = at + 12 + (name_bytes + 3 & ~3)
        if name == b"VMCOREINFO":
            return notes[start : start + text_bytes].rstrip(b"\0")
        at = start + (text_bytes + 3 & ~3)
    return None
