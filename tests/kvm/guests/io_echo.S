# Sends back every byte that comes in over the serial port, until a line feed.
#
# Load:  machine mode "long", at 0x1000; works at CPL 0 and CPL 3
# Feed:  m.serial.write(b"...\n")
# Exits: for each byte KVM_EXIT_IO in from 0x3fd (line status), in from 0x3f8, out to 0x3f8; before input has come,
#        in from 0x3fd again and again; after the line feed out to 0xf4 of 1 (debug exit, code 3)
# End:   m.serial.text is what was fed, up to and with the line feed

.set COM1, 0x3f8
.set LINE_STATUS, 0x3fd

_start:
wait:
    mov dx, LINE_STATUS
    in al, dx
    test al, 1                        # a byte is waiting
    jz wait
    mov dx, COM1
    in al, dx
    out dx, al
    cmp al, 10
    jne wait
    mov al, 1
    out 0xf4, al
stuck:
    jmp stuck
