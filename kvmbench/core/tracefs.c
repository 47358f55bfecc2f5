/* A directory in tracefs, and how it is made and removed.  See tracefs.h. */
#define _GNU_SOURCE
#include "tracefs.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define OUR_PREFIX "kvmbench-"
#define TRACEFS_FILE "available_events"
/* PROC_PID_INIT_INO: the kernel's own process namespace, whose numbers set_event_pid takes. */
#define INITIAL_PID_NAMESPACE 0xeffffffcu
/* Of a directory's name, "kvmbench-PID-TIME": seconds in hexadecimal digits, then nanoseconds in so many. */
#define NANOSECOND_DIGITS 8
#define OPENED_WITHIN_S 60
#define MAX_CPUS 4096
#define MAX_NAME 128

/* Old C libraries have neither the numbers nor the flags of the mount API of Linux 5.2. */
#define CALL_FSOPEN 430
#define CALL_FSCONFIG 431
#define CALL_FSMOUNT 432
#define CONFIG_CMD_CREATE 6
#define OPEN_CLOEXEC 1

static bool is_word(const char *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        char c = bytes[i];
        if (!((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_'))
            return false;
    }
    return n > 0;
}

static bool is_event_of(const char *name, size_t bytes, const char *const *systems)
{
    const char *slash = memchr(name, '/', bytes);
    if (!slash || bytes > MAX_NAME || !is_word(slash + 1, bytes - (size_t)(slash + 1 - name)))
        return false;
    for (; *systems; systems++)
        if (strlen(*systems) == (size_t)(slash - name) && memcmp(*systems, name, strlen(*systems)) == 0)
            return true;
    return false;
}

bool tracefs_is_traced(const char *name, size_t bytes)
{
    /* What explains exits and what a vcpu's thread waited for; not what other programs do. */
    static const char *const systems[] = {"kvm", "kvmmmu", "sched", "irq", "irq_vectors", "timer", NULL};
    return is_event_of(name, bytes, systems);
}

bool tracefs_is_described(const char *name, size_t bytes)
{
    /* What marks are. */
    static const char *const systems[] = {"ftrace", NULL};
    return tracefs_is_traced(name, bytes) || is_event_of(name, bytes, systems);
}

ssize_t tracefs_read_file(int directory, const char *path, char *bytes, size_t room)
{
    int fd = openat(directory, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    size_t done = 0;
    while (done < room) {
        ssize_t n = read(fd, bytes + done, room - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            int error = errno;
            close(fd);
            return -error;
        }
        if (n == 0)
            break;
        done += (size_t)n;
    }
    close(fd);
    return (ssize_t)done;
}

static int write_file(int directory, const char *path, const char *text)
{
    int fd = openat(directory, path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    ssize_t n;
    do
        n = write(fd, text, strlen(text));
    while (n < 0 && errno == EINTR);
    int error = n < 0 ? errno : 0;
    close(fd);
    return -error;
}

static int mount_for_us(void)
{
    int context = (int)syscall(CALL_FSOPEN, "tracefs", OPEN_CLOEXEC);
    if (context < 0)
        return -errno;
    int fd = -1;
    if (syscall(CALL_FSCONFIG, context, CONFIG_CMD_CREATE, NULL, NULL, 0) == 0)
        fd = (int)syscall(CALL_FSMOUNT, context, OPEN_CLOEXEC, 0);
    int error = errno;
    close(context);
    return fd < 0 ? -error : fd;
}

int tracefs_root(void)
{
    static const char *const usual[] = {"/sys/kernel/tracing", "/sys/kernel/debug/tracing"};
    int refused = 0;

    for (size_t n = 0; n < sizeof(usual) / sizeof(*usual); n++) {
        int fd = open(usual[n], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (fd < 0) {
            if (errno == EACCES || errno == EPERM)
                refused = -errno;
            continue;
        }
        /* The directory is there without tracefs, too. */
        if (faccessat(fd, TRACEFS_FILE, F_OK, 0) == 0)
            return fd;
        if (errno == EACCES || errno == EPERM)
            refused = -errno;
        close(fd);
    }
    int fd = mount_for_us();
    return fd < 0 && refused ? refused : fd;
}

/* Whether a killed process has left it: there is no such process, or one that got the number later.  One that has
 * just made its directory has not opened it yet; afterwards the kernel keeps it. */
static bool is_left(const char *name, uint64_t now_s)
{
    char *end;

    if (strncmp(name, OUR_PREFIX, strlen(OUR_PREFIX)) != 0)
        return false;
    name += strlen(OUR_PREFIX);
    long pid = strtol(name, &end, 10);
    if (!is_word(name, (size_t)(end - name)) || pid <= 0 || pid > INT32_MAX || *end != '-')
        return false;
    const char *time = end + 1;
    size_t digits = strspn(time, "0123456789abcdef");
    if (time[digits] || digits <= NANOSECOND_DIGITS || digits > NANOSECOND_DIGITS + 16)
        return false;
    uint64_t made_s = 0;
    for (size_t n = 0; n < digits - NANOSECOND_DIGITS; n++)
        made_s = made_s << 4 | (uint64_t)(time[n] <= '9' ? time[n] - '0' : time[n] - 'a' + 10);
    return (kill((pid_t)pid, 0) < 0 && errno == ESRCH) || (now_s > made_s && now_s - made_s > OPENED_WITHIN_S);
}

/* Removes what killed processes have left. */
static void sweep(int instances, uint64_t now_s)
{
    int again = openat(instances, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *directory = again < 0 ? NULL : fdopendir(again);
    if (!directory) {
        if (again >= 0)
            close(again);
        return;
    }
    for (struct dirent *entry; (entry = readdir(directory));) {
        if (is_left(entry->d_name, now_s))
            unlinkat(instances, entry->d_name, AT_REMOVEDIR);
    }
    closedir(directory);
}

static bool in_initial_pid_namespace(void)
{
    struct stat status;
    return stat("/proc/self/ns/pid", &status) == 0 && status.st_ino == INITIAL_PID_NAMESPACE;
}

/* Has the kernel leave out what other processes do: all threads there are, and those they start. */
static bool filter_own(int instance)
{
    DIR *tasks;

    if (!in_initial_pid_namespace() || write_file(instance, "options/event-fork", "1") != 0 ||
        !(tasks = opendir("/proc/self/task")))
        return false;
    bool done = true;
    for (struct dirent *entry; done && (entry = readdir(tasks));) {
        if (entry->d_name[0] == '.')
            continue;
        int fd = openat(instance, "set_event_pid", O_WRONLY | O_APPEND | O_CLOEXEC);
        /* A thread may have ended meanwhile; its number then matches nothing. */
        done = fd >= 0 && write(fd, entry->d_name, strlen(entry->d_name)) >= 0;
        if (fd >= 0)
            close(fd);
    }
    closedir(tasks);
    if (!done) {
        /* With half of them, events would be missing and nobody told. */
        int fd = openat(instance, "set_event_pid", O_WRONLY | O_TRUNC | O_CLOEXEC);
        if (fd >= 0)
            close(fd);
    }
    return done;
}

static int enable(int instance, const char *name, size_t bytes)
{
    char path[MAX_NAME + 32];

    snprintf(path, sizeof(path), "events/%.*s/enable", (int)bytes, name);
    return write_file(instance, path, "1");
}

static int open_pipes(struct tracefs *fs)
{
    char path[64];
    long configured = sysconf(_SC_NPROCESSORS_CONF);
    uint32_t most = configured > 0 && configured < MAX_CPUS ? (uint32_t)configured : MAX_CPUS;

    fs->pipes = malloc(most * sizeof(*fs->pipes));
    if (!fs->pipes)
        return -ENOMEM;
    for (uint32_t cpu = 0; cpu < most; cpu++)
        fs->pipes[cpu] = -1;
    fs->cpus = most;
    bool any = false;
    for (uint32_t cpu = 0; cpu < most; cpu++) {
        snprintf(path, sizeof(path), "per_cpu/cpu%u/trace_pipe_raw", cpu);
        fs->pipes[cpu] = openat(fs->instance, path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
        if (fs->pipes[cpu] < 0 && errno != ENOENT && errno != ENODEV && errno != ENXIO)
            return -errno;
        any |= fs->pipes[cpu] >= 0; /* processors may be configured and absent */
    }
    return any ? 0 : -ENODEV;
}

static uint32_t ring_page_bytes(const struct tracefs *fs)
{
    char text[32];
    /* Linux 6.8 and later. */
    ssize_t n = tracefs_read_file(fs->instance, "buffer_subbuf_size_kb", text, sizeof(text) - 1);
    if (n <= 0)
        return (uint32_t)sysconf(_SC_PAGESIZE);
    text[n] = 0;
    long kb = strtol(text, NULL, 10);
    return kb >= 1 && kb <= 1024 ? (uint32_t)kb << 10 : (uint32_t)sysconf(_SC_PAGESIZE);
}

static int make_instance(struct tracefs *fs)
{
    struct timespec now;

    fs->instances = openat(fs->root, "instances", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fs->instances < 0)
        return -errno;
    clock_gettime(CLOCK_MONOTONIC, &now);
    sweep(fs->instances, (uint64_t)now.tv_sec);
    char name[sizeof(fs->name)];
    snprintf(name, sizeof(name), OUR_PREFIX "%d-%llx%08lx", (int)getpid(), (unsigned long long)now.tv_sec, now.tv_nsec);
    if (mkdirat(fs->instances, name, 0700) < 0)
        return -errno;
    memcpy(fs->name, name, sizeof(name));
    fs->instance = openat(fs->instances, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return fs->instance < 0 ? -errno : 0;
}

static int enable_all(struct tracefs *fs, const char *names, size_t bytes, uint32_t *which)
{
    *which = 0;
    for (const char *name = names, *end = names + bytes; name < end; (*which)++) {
        const char *stop = memchr(name, '\n', (size_t)(end - name));
        if (!stop)
            return -EINVAL;
        int status = enable(fs->instance, name, (size_t)(stop - name));
        if (status != 0)
            return status;
        name = stop + 1;
    }
    return 0;
}

/* Everything up to the enabled events; 0 or -errno with trouble->step. */
static int prepare(struct tracefs *fs, const char *names, size_t names_bytes, uint32_t buffer_kb, bool own_only,
                   bool *filtered, struct tracefs_trouble *trouble)
{
    char text[32];
    int status;

    trouble->step = KB_TRACE_STEP_MOUNT;
    fs->root = tracefs_root();
    if (fs->root < 0) {
        status = fs->root;
        fs->root = -1;
        return status;
    }
    trouble->step = KB_TRACE_STEP_CREATE;
    status = make_instance(fs);
    if (status == 0)
        status = write_file(fs->instance, "tracing_on", "0");
    if (status != 0)
        return status;
    trouble->step = KB_TRACE_STEP_CLOCK;
    status = write_file(fs->instance, "trace_clock", "mono");
    if (status != 0)
        return status;
    trouble->step = KB_TRACE_STEP_BUFFER;
    snprintf(text, sizeof(text), "%u", buffer_kb);
    status = write_file(fs->instance, "buffer_size_kb", text);
    if (status != 0)
        return status;
    trouble->step = KB_TRACE_STEP_PIPE;
    fs->page_bytes = ring_page_bytes(fs);
    status = open_pipes(fs);
    if (status != 0)
        return status;
    fs->marker = openat(fs->instance, "trace_marker", O_WRONLY | O_CLOEXEC);
    fs->raw_marker = openat(fs->instance, "trace_marker_raw", O_WRONLY | O_CLOEXEC);
    *filtered = own_only && filter_own(fs->instance);
    trouble->step = KB_TRACE_STEP_EVENT;
    return enable_all(fs, names, names_bytes, &trouble->name);
}

bool tracefs_open(struct tracefs *fs, const char *names, size_t names_bytes, uint32_t buffer_kb, bool own_only,
                  bool *filtered, struct tracefs_trouble *trouble)
{
    *fs = (struct tracefs)TRACEFS_NONE;
    *trouble = (struct tracefs_trouble){0};
    trouble->status = prepare(fs, names, names_bytes, buffer_kb, own_only, filtered, trouble);
    if (trouble->status != 0) {
        tracefs_close(fs);
        return false;
    }
    trouble->step = KB_TRACE_STEP_NONE;
    return true;
}

static void close_one(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

void tracefs_close(struct tracefs *fs)
{
    if (fs->instance >= 0)
        tracefs_set(fs, false);
    for (uint32_t cpu = 0; cpu < fs->cpus && fs->pipes; cpu++)
        close_one(&fs->pipes[cpu]);
    free(fs->pipes);
    fs->pipes = NULL;
    fs->cpus = 0;
    close_one(&fs->marker);
    close_one(&fs->raw_marker);
    close_one(&fs->instance);
    /* Last, for the kernel keeps what is open. */
    if (fs->name[0])
        unlinkat(fs->instances, fs->name, AT_REMOVEDIR);
    fs->name[0] = 0;
    close_one(&fs->instances);
    close_one(&fs->root);
}

int tracefs_set(struct tracefs *fs, bool on)
{
    return write_file(fs->instance, "tracing_on", on ? "1" : "0");
}
