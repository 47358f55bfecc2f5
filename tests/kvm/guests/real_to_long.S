# Starts in real mode at 0x1000, goes on to protected and to long mode, and says so in each.
#
# Load:   machine mode "real", at 0x1000, bits 16
# Output: on the serial port at 0x3f8, "real\nprotected\nlong\n"
# Exits:  KVM_EXIT_IO (out, port 0x3f8, 1 byte) 20 times, then KVM_EXIT_HLT
# End:    CS.L = 1, EFER.LMA = 1, CR0.PE = CR0.PG = 1, rip behind the HLT at the label `done`
#
# Memory: page tables at 0x10000 to 0x12fff (the first 2 MiB mapped to themselves), stack below 0xf000.

.set PML4, 0x10000
.set PDPT, 0x11000
.set PD, 0x12000
.set COM1, 0x3f8

.code16
_start:
    cli
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0xf000
    mov si, offset text_real
    call print16
    lgdt [gdt_pointer]
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    jmp 0x08:protected                # far: CS gets the 32-bit descriptor

print16:                              # si: text that ends in 0
    mov dx, COM1
next16:
    lodsb
    test al, al
    jz done16
    out dx, al
    jmp next16
done16:
    ret

.code32
protected:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, 0xf000
    mov esi, offset text_protected
    call print32
    mov dword ptr [PML4], PDPT + 3    # present, writable
    mov dword ptr [PDPT], PD + 3
    mov dword ptr [PD], 0x83          # present, writable, 2 MiB page
    mov eax, cr4
    or eax, 1 << 5                    # PAE
    mov cr4, eax
    mov eax, PML4
    mov cr3, eax
    mov ecx, 0xc0000080               # EFER
    rdmsr
    or eax, 1 << 8                    # LME
    wrmsr
    mov eax, cr0
    or eax, 1 << 31                   # PG: long mode is active from here, in 32-bit code still
    mov cr0, eax
    jmp 0x18:long_mode                # far: CS gets the 64-bit descriptor

print32:                              # esi: text that ends in 0
    mov dx, COM1
next32:
    lodsb
    test al, al
    jz done32
    out dx, al
    jmp next32
done32:
    ret

.code64
long_mode:
    mov rsi, offset text_long
    mov dx, COM1
next64:
    lodsb
    test al, al
    jz halt
    out dx, al
    jmp next64
halt:
    hlt
done:
    jmp done

.balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff          # 0x08: code, 32 bits, 0 to 4 GiB
    .quad 0x00cf93000000ffff          # 0x10: data, 0 to 4 GiB
    .quad 0x00af9b000000ffff          # 0x18: code, 64 bits
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt

text_real:      .asciz "real\n"
text_protected: .asciz "protected\n"
text_long:      .asciz "long\n"
