"""What breakpoint tests share: a loop, and the mechanisms by the names of the self-check."""

LOOP = """
start:  mov ecx, 5
again:  inc eax
        dec ecx
        jnz again
end:    hlt
"""

MECHANISMS = {"INT3": "int3", "HLT": "hlt", "debug register": "hw_execute", "stepping loop": "step"}
#: Those that write a byte over the instruction.
WRITTEN = {"INT3": "int3", "HLT": "hlt"}
