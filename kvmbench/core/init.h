/*
 * Process 1 of an appliance: what turns a kernel and a handful of modules
 * into a host.
 *
 * The initramfs holds the agent as /init, the modules, and /modules, a text
 * file that names them in the order they are to be loaded.  Module parameters
 * come from the kernel command line in the kernel's own form,
 * `kvm_amd.npt=0`; what is ours there starts with `kvmbench.`:
 *
 *     kvmbench.channel=ttyS1   talk over that serial line, not virtio-serial
 *     kvmbench.channel=bochs   talk over the ports of port.h
 *
 * Whatever goes wrong is told on the console in a line that starts with
 * `kvmbench:`.  A missing module or /dev/kvm is not the end: the agent serves
 * all the same, so that Python gets to say what is missing.
 */
#ifndef KVMBENCH_INIT_H
#define KVMBENCH_INIT_H

#include <stdbool.h>

/* Makes the machine ready and opens the channel to Python.  Returns its file
 * descriptor, or a negative errno when there is none; *by_port: it needs none. */
int init_start(bool *by_port);

/* Powers the machine off; what /init would do by returning is a kernel panic. */
_Noreturn void init_end(void);

#endif
