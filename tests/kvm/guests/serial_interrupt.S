# Waits in HLT for the serial port's interrupt (line 4) and hands the byte on to the debug console.
#
# Load:  machine mode "protected" with irqchip=True, at 0x1000, CPL 0
# Feed:  m.serial.write(b"!"), or m.irq(4, 1)
# Exits: KVM_EXIT_IO out to 0x3fc and 0x3f9 (the controllers are in the kernel: no exits of theirs); HLT waits inside
#        KVM_RUN; then in from 0x3f8, out to 0xe9, out to 0xf4 of 0 (debug exit, code 1)
# End:   m.debugcon.text is the byte

.set PIC_COMMAND, 0x20
.set PIC_DATA, 0x21
.set VECTORS, 0x20                    # line 0 becomes interrupt 0x20

_start:
    lidt [idt_pointer]
    mov al, 0x11                      # initialise, with four words
    out PIC_COMMAND, al
    mov al, VECTORS
    out PIC_DATA, al
    mov al, 4
    out PIC_DATA, al
    mov al, 1
    out PIC_DATA, al
    mov al, 0xef                      # all lines masked but 4
    out PIC_DATA, al
    mov dx, 0x3fc
    mov al, 8                         # OUT2: the port's interrupt reaches the bus
    out dx, al
    mov dx, 0x3f9
    mov al, 1                         # interrupt when a byte has come
    out dx, al
    sti
wait:
    hlt
    jmp wait

handler:
    mov dx, 0x3f8
    in al, dx
    out 0xe9, al
    mov al, 0x20
    out PIC_COMMAND, al               # end of interrupt
    xor al, al
    out 0xf4, al
    iretd

.data
.balign 8
idt:
    .skip 8 * (VECTORS + 4)
    .word handler, 8                  # selector of the machine's 32-bit code
    .byte 0, 0x8e                     # interrupt gate, 32 bits
    .word 0
idt_pointer:
    .word idt_pointer - idt - 1
    .long idt
