# Dies of a triple fault: an undefined instruction with no interrupt descriptor table to say who handles it.
#
# Load:  machine mode "protected", "pae" or "long", at 0x1000, any CPL
# Exits: KVM_EXIT_SHUTDOWN, and nothing before it
# End:   the machine can be reset and run again

_start:
    nop
fault:
    ud2
never:
    jmp never
