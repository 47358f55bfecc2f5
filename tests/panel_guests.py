"""Guest programs for the panels' tests, those with a page and those without."""

#: Counts rax to 101 by twos, fills rbx with 64 bits that no double holds, and halts.
LOOP = """
start:  mov rax, 1
loop:   add rax, 2
        cmp rax, 101
        jne loop
        mov rbx, 0xfedcba9876543211
        hlt
"""

#: For a page to run without end.
SPIN = "spin: jmp spin\n"

#: Sends back what it gets, and a dot a character to the debug console.
ECHO = """
start:  mov dx, 0x3fd
wait:   in al, dx
        test al, 1
        jz wait
        mov dx, 0x3f8
        in al, dx
        out dx, al
        mov al, '.'
        out 0xe9, al
        jmp start
"""
