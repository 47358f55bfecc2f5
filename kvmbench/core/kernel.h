/*
 * The host kernel's own memory, read and never written: /proc/kcore, which shows it as an ELF core file, and what says
 * how it is laid out: the kernel's BTF and its symbols.
 *
 * Only root may (CAP_SYS_RAWIO and CAP_SYSLOG), and many kernels have no /proc/kcore: then no handle is given.  What is
 * read belongs to a kernel that goes on running, so whoever asks takes the vcpus out of the guest first, and expects
 * pointers that lead nowhere: a range that cannot be read is told as such, and a list is followed no further than asked.
 */
#ifndef KVMBENCH_KERNEL_H
#define KVMBENCH_KERNEL_H

#include "internal.h"

int kernel_open(struct exchange *x);
int kernel_text(struct exchange *x);
int kernel_read(struct exchange *x);
int kernel_list(struct exchange *x);
int kernel_descriptor(struct exchange *x);
void kernel_free(struct object *object);
/* Room for the replies; of requests of at least their struct's bytes. */
size_t kernel_text_room(const struct kb_kernel_text *request);
size_t kernel_read_room(const uint8_t *bytes, size_t request_bytes);
size_t kernel_list_room(const struct kb_kernel_list *request);

#endif
