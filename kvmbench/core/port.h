/*
 * The channel of an appliance in Bochs: I/O ports that kvmbench's addition to
 * Bochs answers (host/bochs_port.c includes this file; core/port.c is the
 * agent's side).
 *
 * Facts first:
 *  - Bochs has no virtio.  A serial line of 115200 baud takes 87 us of emulated
 *    time a byte, has no flow control, and lost bytes: an exchange took 4 ms.
 *  - Bochs counts time in instructions.  While an IN waits on the real machine,
 *    no emulated time passes and no processor is used.
 *
 * All accesses have four bytes.  A message is any number of bytes, of which
 * the last one to four fill a word whose rest is ignored.
 *
 *  in  KB_PORT_MARK   KB_PORT_PRESENT; all ones where nobody answers
 *  in  KB_PORT_WAIT   how many bytes are to be read, now, from KB_PORT_DATA: at
 *                     most KB_PORT_MOST_BYTES.  Waits, and the whole machine with it, while
 *                     there are none.  0: time is to pass, ask again.
 *                     KB_PORT_ENDED: there will be none.
 *  in  KB_PORT_LOOK   the same, but 0 where KB_PORT_WAIT would wait
 *  in  KB_PORT_DATA   the next four bytes of those announced
 *  out KB_PORT_LOOK   how many bytes follow on KB_PORT_DATA
 *  out KB_PORT_DATA   the next four of these; the last word sends them
 */
#ifndef KVMBENCH_PORT_H
#define KVMBENCH_PORT_H

#define KB_PORT_MARK 0x6b70
#define KB_PORT_WAIT 0x6b74
#define KB_PORT_LOOK 0x6b78
#define KB_PORT_DATA 0x6b7c
#define KB_PORT_PRESENT 0x626d766bu /* "kvmb" */
#define KB_PORT_ENDED 0xffffffffu
#define KB_PORT_MOST_BYTES 65536u

#endif
