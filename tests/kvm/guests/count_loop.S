# Counts to 10 and keeps the count in memory.
#
# Load:  machine mode "long", at 0x1000 (works at CPL 0 and CPL 3 up to the HLT, which faults at CPL 3)
# Exits: KVM_EXIT_HLT, and nothing before it
# Steps: 2 instructions, then 10 times 4, then the HLT; `loop` is reached 10 times
# End:   the 64 bits at `counter` are 10, rax is 10, ecx is 0

_start:
    xor eax, eax
    mov ecx, 10
loop:
    inc rax
    mov [counter], rax
    dec ecx
    jnz loop
end:
    hlt

.data
.balign 8
counter: .quad 0
