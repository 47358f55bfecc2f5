"""Cells that make a machine, for the notebooks of the browser tests."""

LOOP = """
import kvmbench as kb, kvmbench_widgets as kw
host = kb.connect({host!r}, quiet=True)
m = kb.Machine(host, mode="long")
m.load_asm('''
start:  mov rax, 1
loop:   add rax, 2
        cmp rax, 101
        jne loop
        mov rbx, 0xfedcba9876543211
        hlt
spin:   jmp spin
''', at=0x1000)
cpu = m.cpu
"""
MACHINE = LOOP.format(host="local")
APPLIANCE = LOOP.format(host="appliance")
