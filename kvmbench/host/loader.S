# What the BIOS loads from the disc of `boot_disc.py` and starts: it reads the
# kernel and enters it by its PVH entry, without a decompressor or a boot menu.
#
# Layout: two sectors of code and constants at 0x7c00; then, filled in by
# boot_disc.py, the entry, the PVH start info and the table of what to read.
# Sources: El Torito 1.0, "Initial/Default Entry"; ACPI, "INT 15H, E820H"; ATA/ATAPI-6, "PACKET" and
# MMC-3, "READ (12)"; Xen, public/arch-x86/hvm/start_info.h.

	.intel_syntax noprefix
	.set MEMORY_MAP, 0x9000		# as boot_disc.py has it
	.set MAP_ENTRY_BYTES, 24	# of the PVH table; the BIOS fills 20
	.set MAP_ENTRIES, start_info + 48
	.set ATA_DATA, 0x1f0
	.set ATA_COUNT_LOW, 0x1f4
	.set ATA_DEVICE, 0x1f6
	.set ATA_STATUS, 0x1f7
	.set ATA_CONTROL, 0x3f6

	.code16
	.globl _start
_start:
	cli
	cld
	ljmp 0, offset 1f
1:	xor ax, ax
	mov ds, ax
	mov es, ax
	mov ss, ax
	mov sp, 0x7c00
	xor ebx, ebx
	mov edi, offset MEMORY_MAP
2:	mov eax, 0xe820
	mov edx, 0x534d4150		# "SMAP"
	mov ecx, 20
	int 0x15
	jc 3f
	add di, MAP_ENTRY_BYTES
	inc word ptr [MAP_ENTRIES]
	test ebx, ebx
	jnz 2b
3:	cli
	in al, 0x92			# A20 on
	or al, 2
	out 0x92, al
	lgdt [gdt_pointer]
	mov eax, cr0
	or al, 1
	mov cr0, eax
	ljmp 8, offset protected

	.code32
protected:
	mov eax, 0x10
	mov ds, eax
	mov es, eax
	mov ss, eax
	mov esp, 0x7c00
	mov edx, offset ATA_CONTROL
	mov al, 0x0a			# no interrupts
	out dx, al
	mov ebp, offset pieces
4:	mov edi, [ebp]			# where to
	mov esi, [ebp + 4]		# first sector
	mov ebx, [ebp + 8]		# sectors
	add ebp, 12
	test ebx, ebx
	jz 5f
	call read
	jmp 4b
5:	mov ebx, offset start_info
	jmp dword ptr [entry]

wait_ready:				# al = status
	mov edx, offset ATA_STATUS
6:	in al, dx
	test al, 0x80
	jnz 6b
	ret

read:					# changes all but ebp
	bswap esi
	mov [packet + 2], esi
	bswap ebx
	mov [packet + 6], ebx
	call wait_ready
	mov edx, offset ATA_DEVICE
	mov al, 0xa0
	out dx, al
	call wait_ready
	mov edx, 0x1f1			# features: no DMA
	xor eax, eax
	out dx, al
	mov edx, offset ATA_COUNT_LOW
	out dx, al
	inc edx
	mov al, 0xf8			# 31 sectors at a time
	out dx, al
	mov edx, offset ATA_STATUS
	mov al, 0xa0			# PACKET
	out dx, al
	call wait_ready
	mov esi, offset packet
	mov ecx, 6
	mov edx, offset ATA_DATA
	rep outsw
7:	call wait_ready
	test al, 1
	jnz failed
	test al, 8
	jz 8f
	mov edx, offset ATA_COUNT_LOW + 1
	in al, dx
	mov ah, al
	dec edx
	in al, dx
	movzx ecx, ax
	shr ecx, 1
	mov edx, offset ATA_DATA
	rep insw
	jmp 7b
8:	ret

failed:	mov esi, offset complaint	# on the console, com2
	mov ecx, offset complaint_end - complaint
	mov edx, 0x2f8
	rep outsb
9:	hlt
	jmp 9b
complaint:
	.ascii "kvmbench: the disc cannot be read\n"
complaint_end:

	.balign 8
gdt:	.quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
	.word . - gdt - 1
	.long gdt
packet:	.byte 0xa8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0	# READ (12)

	.org 0x200
entry:	.skip 8
start_info:
	.skip 56
pieces:
