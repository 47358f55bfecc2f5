/* See init.h. */
#define _GNU_SOURCE
#include "init.h"
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define PORT_NAME "kvmbench"
#define PORT_WAIT_MS 20000 /* under emulation on a busy machine a second is nothing */

static char command_line[4096]; /* COMMAND_LINE_SIZE on x86 is 2048 */

__attribute__((format(printf, 1, 2)))
static void say(const char *format, ...)
{
    char line[512];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    dprintf(STDERR_FILENO, "kvmbench: %s\n", line);
    /* Who reads it may end the machine, or in Bochs its time, before a serial line has sent it. */
    tcdrain(STDERR_FILENO);
}

static void mount_at(const char *type, const char *target)
{
    mkdir(target, 0755);
    if (mount(type, target, type, MS_NOSUID | MS_NOEXEC, NULL) < 0 && errno != EBUSY)
        say("cannot mount %s on %s: %s", type, target, strerror(errno));
}

static ssize_t read_text(const char *path, char *text, size_t room)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    size_t used = 0;
    while (used < room - 1) {
        ssize_t got = read(fd, text + used, room - 1 - used);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            break;
        used += (size_t)got;
    }
    close(fd);
    text[used] = 0;
    return (ssize_t)used;
}

static void write_text(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    if (write(fd, text, strlen(text)) < 0)
        say("cannot write %s to %s: %s", text, path, strerror(errno));
    close(fd);
}

/* Copies the value of `name=` on the kernel command line; false if it is not there. */
static bool option(const char *name, char *value, size_t room)
{
    size_t length = strlen(name);

    for (const char *word = command_line; *word; word += strcspn(word, " \n"), word += strspn(word, " \n"))
        if (strncmp(word, name, length) == 0 && word[length] == '=') {
            snprintf(value, room, "%.*s", (int)strcspn(word + length + 1, " \n"), word + length + 1);
            return true;
        }
    return false;
}

/* The parameters of one module: `npt=0 nested=1` from `kvm_amd.npt=0 kvm_amd.nested=1`. */
static void parameters_of(const char *module, char *parameters, size_t room)
{
    size_t length = strlen(module), used = 0;

    parameters[0] = 0;
    for (const char *word = command_line; *word; word += strcspn(word, " \n"), word += strspn(word, " \n")) {
        bool same = true;
        /* '-' and '_' are the same in a module's name, as for the kernel. */
        for (size_t n = 0; n < length && same; n++)
            same = (word[n] == '-' ? '_' : word[n]) == (module[n] == '-' ? '_' : module[n]);
        if (!same || word[length] != '.')
            continue;
        int n = snprintf(parameters + used, room - used, "%.*s ",
                         (int)strcspn(word + length + 1, " \n"), word + length + 1);
        if (n < 0 || (size_t)n >= room - used)
            return;
        used += (size_t)n;
    }
}

/* Whether the processor has a feature, by its name in /proc/cpuinfo. */
static bool processor_has(const char *feature)
{
    static char text[16384]; /* the first processor's entry is about 2 kB */
    size_t length = strlen(feature);

    if (!text[0])
        read_text("/proc/cpuinfo", text, sizeof(text));
    for (const char *place = text; (place = strstr(place, feature)); place += length)
        if (place > text && place[-1] == ' ' && (place[length] == ' ' || place[length] == '\n'))
            return true;
    return false;
}

/* Loads one file of /lib/modules named like kvm-amd.ko. */
static void load_module(const char *file)
{
    char path[300], name[200], parameters[1024];

    snprintf(path, sizeof(path), "/lib/modules/%s", file);
    snprintf(name, sizeof(name), "%.*s", (int)strcspn(file, "."), file);
    /* One initramfs serves both kinds of processor. */
    if ((strcmp(name, "kvm-amd") == 0 && !processor_has("svm")) ||
        (strcmp(name, "kvm-intel") == 0 && !processor_has("vmx")))
        return;
    parameters_of(name, parameters, sizeof(parameters));
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        say("module %s is listed but not in the initramfs: %s", file, strerror(errno));
        return;
    }
    if (syscall(SYS_finit_module, fd, parameters, 0) < 0 && errno != EEXIST)
        say("module %s%s%s does not load: %s", name, parameters[0] ? " with " : "", parameters,
            strerror(errno));
    close(fd);
}

static void load_modules(void)
{
    char list[4096];
    ssize_t size = read_text("/modules", list, sizeof(list));

    if (size < 0) {
        say("no list of modules in the initramfs: %s", strerror((int)-size));
        return;
    }
    for (char *place = NULL, *name = strtok_r(list, " \n", &place); name; name = strtok_r(NULL, " \n", &place))
        load_module(name);
}

/* The virtio-serial port by its name; -ENOENT while there is none. */
static int open_port(void)
{
    DIR *ports = opendir("/sys/class/virtio-ports");
    int fd = -ENOENT;

    if (!ports)
        return -ENOENT;
    for (struct dirent *entry; fd < 0 && (entry = readdir(ports));) {
        char path[320], name[64];
        snprintf(path, sizeof(path), "/sys/class/virtio-ports/%s/name", entry->d_name);
        if (entry->d_name[0] == '.' || read_text(path, name, sizeof(name)) <= 0)
            continue;
        name[strcspn(name, "\n")] = 0;
        if (strcmp(name, PORT_NAME) != 0)
            continue;
        snprintf(path, sizeof(path), "/dev/%s", entry->d_name);
        fd = open(path, O_RDWR | O_CLOEXEC);
        if (fd < 0)
            fd = -errno;
    }
    closedir(ports);
    return fd;
}

static int open_serial(const char *name)
{
    char path[100];
    struct termios line;

    snprintf(path, sizeof(path), "/dev/%s", name);
    int fd = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    /* The line has no flow control. An interrupt at the fourth byte, not the eighth, leaves more time until
     * the 17th is lost; at the first, an emulated processor does nothing but serve interrupts. */
    snprintf(path, sizeof(path), "/sys/class/tty/%s/rx_trig_bytes", name);
    write_text(path, "4");
    if (tcgetattr(fd, &line) == 0) {
        cfmakeraw(&line);
        cfsetspeed(&line, B115200);
        tcsetattr(fd, TCSANOW, &line);
    }
    /* Before this the line echoed, and its driver threw away what came before it was opened: only now
     * may the other side speak. */
    tcflush(fd, TCIOFLUSH);
    static const char ready[] = "\nkvmbench agent\n";
    if (write(fd, ready, sizeof(ready) - 1) < 0) {
        int error = -errno;
        close(fd);
        return error;
    }
    return fd;
}

static int open_channel(bool *by_port)
{
    char name[64];
    int fd = -ENOENT;

    if (option("kvmbench.channel", name, sizeof(name))) {
        if (strcmp(name, "bochs") == 0) {
            int error = port_open();
            *by_port = error == 0;
            if (error)
                say("this Bochs has no channel: %s", strerror(-error));
            return error ? error : -ENOENT;
        }
        fd = open_serial(name);
        if (fd < 0)
            say("the channel /dev/%s cannot be opened: %s", name, strerror(-fd));
        return fd;
    }
    /* The port's name comes in a message of the device, a moment after the driver. */
    for (int waited_ms = 0; waited_ms < PORT_WAIT_MS; waited_ms++) {
        fd = open_port();
        if (fd >= 0)
            return fd;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    say("no virtio-serial port named " PORT_NAME " appeared: %s", strerror(-fd));
    return fd;
}

int init_start(bool *by_port)
{
    mount_at("proc", "/proc");
    mount_at("sysfs", "/sys");
    mount_at("devtmpfs", "/dev");
    /* Unpacking ran without a console if the initramfs lacked /dev/console. */
    int console = open("/dev/console", O_RDWR | O_CLOEXEC);
    if (console >= 0) {
        for (int fd = 0; fd < 3; fd++)
            if (fcntl(fd, F_GETFD) < 0)
                dup2(console, fd);
        if (console > 2)
            close(console);
    }
    mount_at("debugfs", "/sys/kernel/debug");
    mount_at("tracefs", "/sys/kernel/tracing");
    ssize_t got = read_text("/proc/cmdline", command_line, sizeof(command_line));
    if (got < 0)
        say("cannot read the kernel command line: %s", strerror((int)-got));
    /* A region too big for the appliance is then refused by mmap(); by default it would be
     * granted, and the guest's first touch would end in a kernel panic, for process 1 is all
     * the out-of-memory killer finds here. */
    write_text("/proc/sys/vm/overcommit_ratio", "90");
    write_text("/proc/sys/vm/overcommit_memory", "2");
    load_modules();
    if (access("/dev/kvm", F_OK) < 0)
        say("there is no /dev/kvm: KVM's modules did not load, or the processor model lacks SVM or VMX");
    return open_channel(by_port);
}

_Noreturn void init_end(void)
{
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}
