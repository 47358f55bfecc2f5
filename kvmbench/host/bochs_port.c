/*
 * What kvmbench adds to Bochs: the ports of core/port.h, a way to save the
 * machine without its window, and the mending of two faults.  Compiled when it is
 * first needed (bochs.py) and loaded with LD_PRELOAD.
 *
 * Facts first (Bochs 2.7 as Debian builds it, with plug-ins):
 *  - The program exports all its symbols, for its plug-ins need them: `SIM`,
 *    `bx_devices` and their methods can be called from here by their mangled names.
 *  - Its display is SDL, from a library that it loads, so that two functions of
 *    SDL can be replaced from here: SDL_CreateWindow, which is called once all
 *    ports can be registered, and SDL_PollEvent, which Bochs calls from a timer,
 *    between two instructions: where its own Suspend button saves the machine.
 *  - A port's function may take its time: Bochs stands still then, and its clock
 *    with it.
 *  - A guest entered with IF clear keeps the machine for itself: Bochs works out
 *    which interrupts are masked when it loads the guest's flags, and only then calls the
 *    processor a guest's, in which an interrupt is an exit whatever IF. No timer fires
 *    then, and no deadline passes, until the guest changes IF. So the mask is worked
 *    out again each time that Bochs looks for events, every 250 us.
 *  - A VM exit of an instruction that runs with TF set (an OUT, a CPUID) leaves the
 *    trap that would have followed it in "pending debug exceptions", where the manual has
 *    them cleared (volume 3, "Saving Non-Register State"). The next entry then begins
 *    with a #DB: a step that does not step, or one in a guest that nobody steps any
 *    more, which knows of none. Later versions of Bochs clear them, but for exits in
 *    the shadow of MOV SS (and some that KVM does not use); so does this file, by a jump
 *    in the place of the first bytes of the function that saves them.
 *
 * Environment: KVMBENCH_BOCHS_CHANNEL is the descriptor of the stream of
 * messages, KVMBENCH_BOCHS_CONTROL that of a socket of packets. A packet to here is
 * the name of a folder to save the machine in once the agent waits for a
 * request; the answer is "saved" or "failed".
 */
#define _GNU_SOURCE
#include "port.h"

#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define SDL "libSDL2-2.0.so.0"
#define FOUR_BYTES 4 /* bx_devices_c's mask: accesses of 1, 2 and 4 bytes are bits 0, 1 and 2 */
#define INHIBIT_DEBUG 2 /* BX_CPU_C's mask: after MOV SS */

typedef uint32_t read_port(void *self, uint32_t port, unsigned bytes);
typedef void write_port(void *self, uint32_t port, uint32_t value, unsigned bytes);

static int channel = -1, control = -1;
static char save_in[512]; /* a folder; empty unless the machine is to be saved */

static struct {
    uint8_t bytes[KB_PORT_MOST_BYTES];
    size_t at, end;
} in;

static struct {
    uint8_t *bytes;
    size_t room, at, end;
} out;

/* At once: this is called from within Bochs. */
__attribute__((format(printf, 1, 2)))
static _Noreturn void die(const char *format, ...)
{
    va_list arguments;

    fputs("kvmbench: ", stderr);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    _exit(1);
}

/* A function of Bochs or SDL; without it the machine cannot work. */
static void *function(void *library, const char *name)
{
    void *found = dlsym(library, name);
    if (!found)
        die("this Bochs has no %s to call", name);
    return found;
}

static void *sdl(const char *name)
{
    return function(dlopen(SDL, RTLD_LAZY), name);
}

static int inherited(const char *name)
{
    const char *value = getenv(name);
    return value ? atoi(value) : -1;
}

/* Reads what there is of the stream; KB_PORT_ENDED at its end. */
static uint32_t receive(bool wait)
{
    struct pollfd from[] = {{channel, POLLIN, 0}, {control, POLLIN, 0}};

    if (save_in[0])
        return 0;
    while (wait && poll(from, 2, -1) < 0 && errno == EINTR)
        ;
    if (from[1].revents) {
        ssize_t bytes = recv(control, save_in, sizeof(save_in) - 1, MSG_DONTWAIT);
        save_in[bytes > 0 ? bytes : 0] = 0;
        if (bytes <= 0)
            control = -1; /* poll() passes over it */
        return 0;
    }
    ssize_t bytes = recv(channel, in.bytes, sizeof(in.bytes), MSG_DONTWAIT);
    if (bytes < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : KB_PORT_ENDED;
    in.at = 0;
    in.end = (size_t)bytes;
    return bytes ? (uint32_t)bytes : KB_PORT_ENDED;
}

static uint32_t read_word(void)
{
    uint32_t word = 0;
    size_t bytes = in.end - in.at < 4 ? in.end - in.at : 4;

    memcpy(&word, in.bytes + in.at, bytes);
    in.at += bytes;
    return word;
}

static void write_word(uint32_t word)
{
    size_t bytes = out.end - out.at < 4 ? out.end - out.at : 4;

    memcpy(out.bytes + out.at, &word, bytes);
    out.at += bytes;
    if (out.at < out.end)
        return;
    for (size_t done = 0; done < out.end;) {
        ssize_t put = send(channel, out.bytes + done, out.end - done, MSG_NOSIGNAL);
        if (put < 0 && errno != EINTR)
            break; /* the next read will tell */
        done += put > 0 ? (size_t)put : 0;
    }
    out.at = out.end = 0;
}

static void announce(size_t bytes)
{
    if (out.room < bytes) {
        free(out.bytes);
        out.bytes = malloc(bytes);
        out.room = bytes;
        if (!out.bytes)
            die("no memory for a message of %zu bytes", bytes);
    }
    out.at = 0;
    out.end = bytes;
}

static uint32_t on_read(void *self, uint32_t port, unsigned bytes)
{
    (void)self, (void)bytes;
    if (port == KB_PORT_DATA)
        return read_word();
    return port == KB_PORT_MARK ? KB_PORT_PRESENT : receive(port == KB_PORT_WAIT);
}

static void on_write(void *self, uint32_t port, uint32_t value, unsigned bytes)
{
    (void)self, (void)bytes;
    if (port == KB_PORT_LOOK)
        announce(value);
    else if (out.at < out.end)
        write_word(value);
}

static void register_ports(void)
{
    void *devices = function(RTLD_DEFAULT, "bx_devices");
    bool (*for_reads)(void *, void *, read_port *, uint32_t, const char *, uint8_t) =
        function(RTLD_DEFAULT, "_ZN12bx_devices_c24register_io_read_handlerEPvPFjS0_jjEjPKch");
    bool (*for_writes)(void *, void *, write_port *, uint32_t, const char *, uint8_t) =
        function(RTLD_DEFAULT, "_ZN12bx_devices_c25register_io_write_handlerEPvPFvS0_jjjEjPKch");

    for (uint32_t port = KB_PORT_MARK; port <= KB_PORT_DATA; port += 4)
        if (!for_reads(devices, NULL, on_read, port, "kvmbench", FOUR_BYTES) ||
            !for_writes(devices, NULL, on_write, port, "kvmbench", FOUR_BYTES))
            die("port %#x is taken in this Bochs", port);
}

static void unmask_interrupts(void)
{
    static void (*mask_changed)(void *processor);
    static void ***processors;

    if (!mask_changed) {
        processors = function(RTLD_DEFAULT, "bx_cpu_array");
        mask_changed = function(RTLD_DEFAULT, "_ZN8BX_CPU_C25handleInterruptMaskChangeEv");
    }
    mask_changed((*processors)[0]);
}

/* The jump there, `jmp *0(%rip)` and an address, and what it replaces. */
static uint8_t *guest_saver, jump[14] = {0xff, 0x25}, replaced[sizeof(jump)];

static void save_guest_state(void *processor)
{
    static void *pending; /* the parameter of Bochs that shows them: "cpu0.debug_trap" of what is saved */
    static void (*set)(void *, int64_t);
    static bool (*inhibited)(void *, unsigned);

    if (!pending) {
        void *simulator = *(void **)function(RTLD_DEFAULT, "SIM");
        void *(*root)(void *) = function(RTLD_DEFAULT, "_ZN13bx_real_sim_c14get_bochs_rootEv");
        void *(*parameter)(void *, const char *, void *) =
            function(RTLD_DEFAULT, "_ZN13bx_real_sim_c9get_paramEPKcP10bx_param_c");
        set = function(RTLD_DEFAULT, "_ZN15bx_shadow_num_c3setEl");
        inhibited = function(RTLD_DEFAULT, "_ZN8BX_CPU_C20interrupts_inhibitedEj");
        pending = parameter(simulator, "cpu0.debug_trap", root(simulator));
        if (!pending)
            die("this Bochs shows no pending debug exceptions");
    }
    if (!inhibited(processor, INHIBIT_DEBUG))
        set(pending, 0);
    memcpy(guest_saver, replaced, sizeof(replaced));
    ((void (*)(void *))guest_saver)(processor);
    memcpy(guest_saver, jump, sizeof(jump));
}

static void replace_guest_saver(void)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    void (*ours)(void *) = save_guest_state;

    guest_saver = function(RTLD_DEFAULT, "_ZN8BX_CPU_C20VMexitSaveGuestStateEv");
    uintptr_t from = (uintptr_t)guest_saver / page * page;
    uintptr_t to = (uintptr_t)guest_saver + sizeof(jump);
    if (mprotect((void *)from, to - from, PROT_READ | PROT_WRITE | PROT_EXEC) < 0)
        die("the code of Bochs cannot be changed: %s", strerror(errno));
    memcpy(jump + 6, &ours, sizeof(ours));
    memcpy(replaced, guest_saver, sizeof(replaced));
    memcpy(guest_saver, jump, sizeof(jump));
}

static void save(void)
{
    void **simulator = function(RTLD_DEFAULT, "SIM");
    bool (*save_state)(void *, const char *) = function(RTLD_DEFAULT, "_ZN13bx_real_sim_c10save_stateEPKc");
    const char *answer = save_state(*simulator, save_in) ? "saved" : "failed";

    save_in[0] = 0;
    send(control, answer, strlen(answer), MSG_NOSIGNAL);
}

__attribute__((visibility("default")))
void *SDL_CreateWindow(const char *title, int x, int y, int width, int height, uint32_t flags)
{
    static bool registered;
    void *(*original)(const char *, int, int, int, int, uint32_t) = sdl("SDL_CreateWindow");

    if (!registered) {
        registered = true;
        channel = inherited("KVMBENCH_BOCHS_CHANNEL");
        control = inherited("KVMBENCH_BOCHS_CONTROL");
        register_ports();
        replace_guest_saver();
    }
    return original(title, x, y, width, height, flags);
}

__attribute__((visibility("default")))
int SDL_PollEvent(void *event)
{
    static int (*original)(void *);

    if (!original)
        original = sdl("SDL_PollEvent");
    if (save_in[0])
        save();
    unmask_interrupts();
    return original(event);
}
