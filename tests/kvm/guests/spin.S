# Never ends and never exits: for deadlines, Ctrl-C and kicks.
#
# Load:  machine mode "long" (with bits=32 "protected" or "pae"), at 0x1000; works at CPL 0 and CPL 3
# Exits: none
# End:   stopped from outside anywhere in the loop; the word at `turns` has grown

_start:
spin:
    inc dword ptr [turns]
    jmp spin

.data
.balign 8
turns: .quad 0
