"""drgn's types out of BTF: drgn itself reads only DWARF, which a stock kernel does not carry.

A kernel has a hundred thousand types, so each is made when it is asked for; members name theirs lazily, as types may
refer to each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmbench.errors import LoadError
from kvmbench.host.kernel.btf import Btf, BtfType, Kind, Member

if TYPE_CHECKING:
    import drgn

_WORDS_OF = {Kind.VOLATILE: "VOLATILE", Kind.CONST: "CONST", Kind.RESTRICT: "RESTRICT"}
_SIGNED, _CHAR, _BOOL = 1, 2, 4


class DrgnTypes:
    """Types of one program.

    Args:
        program: a `drgn.Program` of a 64-bit platform.
        modules: BTF by module, the kernel's first.
    """

    def __init__(self, program: drgn.Program, modules: list[Btf]) -> None:
        import drgn

        self._drgn = drgn
        self._program = program
        self._modules = modules
        self._made: dict[tuple[int, int], drgn.Type] = {}
        kinds = drgn.TypeKind
        self._kinds = {
            kinds.STRUCT: (Kind.STRUCT,), kinds.UNION: (Kind.UNION,), kinds.ENUM: (Kind.ENUM, Kind.ENUM64),
            kinds.TYPEDEF: (Kind.TYPEDEF,), kinds.INT: (Kind.INT,), kinds.BOOL: (Kind.INT,), kinds.FLOAT: (Kind.FLOAT,),
        }  # fmt: skip

    def find(self, program: drgn.Program, kinds: Any, name: str, filename: str | None) -> drgn.Type | None:
        """What `drgn.Program.register_type_finder` takes."""
        if filename:
            return None
        wanted = tuple(kind for each in kinds for kind in self._kinds.get(each, ()))
        # A module's own, and then the kernel's: the kernel often knows a module's structs by name only.
        for btf in reversed(self._modules):
            found = btf.find(name, *wanted) if wanted else None
            if found is not None:
                made = self.type(btf, found.number)
                if made.kind in kinds:
                    return made
        return None

    def find_constant(self, name: str) -> drgn.Object | None:
        """An enumerator by its name."""
        for btf in reversed(self._modules):
            found = btf.find_enumerator(name)
            if found is not None:
                return self._drgn.Object(self._program, self.type(btf, found.number), btf.enumerators(found)[name])
        return None

    def type(self, btf: Btf, number: int) -> drgn.Type:
        """The type of a number.

        Raises:
            LoadError: the BTF is damaged.
        """
        described = btf.type(number)
        # The kernel's types have the same number in every module.
        owner = btf if number >= btf.first else self._modules[0]
        key = (id(owner), number)
        if key not in self._made:
            self._made[key] = self._make(owner, described)
        return self._made[key]

    def _make(self, btf: Btf, one: BtfType) -> drgn.Type:
        program, name = self._program, one.name
        match one.kind:
            case Kind.VOID:
                return program.void_type()
            case Kind.INT:
                encoding = one.tail[0] >> 24
                if encoding & _BOOL:
                    return program.bool_type(name, one.size_or_type)
                return program.int_type(name, one.size_or_type, bool(encoding & _SIGNED))
            case Kind.FLOAT:
                return program.float_type(name, one.size_or_type)
            case Kind.PTR:
                return program.pointer_type(self.type(btf, one.size_or_type))
            case Kind.ARRAY:
                element = self.type(btf, one.tail[0])
                return program.array_type(element, one.tail[2]) if one.tail[2] else program.array_type(element)
            case Kind.STRUCT:
                return program.struct_type(name or None, one.size_or_type, self._members(btf, one))
            case Kind.UNION:
                return program.union_type(name or None, one.size_or_type, self._members(btf, one))
            case Kind.FWD:
                return self._forward(one)
            case Kind.ENUM | Kind.ENUM64:
                return self._enumeration(btf, one)
            case Kind.TYPEDEF:
                return program.typedef_type(name, self.type(btf, one.size_or_type))
            case Kind.VOLATILE | Kind.CONST | Kind.RESTRICT:
                qualifier = getattr(self._drgn.Qualifiers, _WORDS_OF[one.kind])
                referred = self.type(btf, one.size_or_type)
                return referred.qualified(referred.qualifiers | qualifier)
            case Kind.TYPE_TAG:
                return self.type(btf, one.size_or_type)
            case Kind.FUNC_PROTO:
                return self._function(btf, one)
            case Kind.FUNC | Kind.VAR:
                return self.type(btf, one.size_or_type)
        raise LoadError(f"BTF type {one.number} ({one.kind.name} {name!r}) is no type of a value")

    def _forward(self, one: BtfType) -> drgn.Type:
        kind = Kind.UNION if one.flag else Kind.STRUCT
        for btf in reversed(self._modules):
            whole = btf.find(one.name, kind)
            if whole is not None:
                return self.type(btf, whole.number)
        make = self._program.union_type if one.flag else self._program.struct_type
        return make(one.name)

    def _members(self, btf: Btf, one: BtfType) -> list[drgn.TypeMember]:
        drgn = self._drgn
        found = []
        for member in btf.members(one):
            # drgn asks when it needs it, by when the type that refers to itself is made.
            kind = self._bit_field(btf, member) if member.bits else self._later(btf, member.type)
            found.append(drgn.TypeMember(kind, member.name or None, member.bit_offset))
        return found

    def _later(self, btf: Btf, number: int) -> Callable[[], drgn.Type]:
        return lambda: self.type(btf, number)

    def _bit_field(self, btf: Btf, member: Member) -> Callable[[], drgn.Object]:
        return lambda: self._drgn.Object(self._program, self.type(btf, member.type), bit_field_size=member.bits)

    def _enumeration(self, btf: Btf, one: BtfType) -> drgn.Type:
        make = self._drgn.TypeEnumerator
        enumerators = [make(name, value) for name, value in btf.enumerators(one).items()]
        compatible = self._program.int_type("int" if one.flag else "unsigned int", one.size_or_type, one.flag)
        return self._program.enum_type(one.name or None, compatible, enumerators)

    def _function(self, btf: Btf, one: BtfType) -> drgn.Type:
        parameters, variadic = [], False
        for name, number in zip(one.tail[0::2], one.tail[1::2], strict=True):
            if number == 0 and name == 0:
                variadic = True
            else:
                parameters.append(self._drgn.TypeParameter(self._later(btf, number), btf.text(name) or None))
        return self._program.function_type(self.type(btf, one.size_or_type), parameters, variadic)
