/* What this kernel and machine are, as "key=value" lines.  The files read are
 * the ones named here; a request cannot name any. */
#define _GNU_SOURCE
#include "internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

struct text {
    char *bytes;
    size_t room;
    size_t used;
};

__attribute__((format(printf, 3, 4)))
static void add(struct text *text, const char *key, const char *format, ...)
{
    char value[512];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(value, sizeof(value), format, arguments);
    va_end(arguments);
    value[strcspn(value, "\n")] = 0;
    int n = snprintf(text->bytes + text->used, text->room - text->used, "%s=%s\n", key, value);
    if (n > 0 && (size_t)n < text->room - text->used)
        text->used += (size_t)n;
}

static bool read_line(const char *path, char *line, size_t room)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t got = read(fd, line, room - 1);
    close(fd);
    if (got < 0)
        return false;
    line[got] = 0;
    line[strcspn(line, "\n")] = 0;
    return true;
}

static void add_file(struct text *text, const char *key, const char *path)
{
    char line[256];
    if (read_line(path, line, sizeof(line)))
        add(text, key, "%s", line);
}

/* "module.NAME=1" and "parameter.NAME.PARAMETER=VALUE" of a module that is there. */
static void add_module(struct text *text, const char *name)
{
    char path[256], key[160], line[128];
    struct stat stat_buffer;

    snprintf(path, sizeof(path), "/sys/module/%s", name);
    if (stat(path, &stat_buffer) != 0)
        return;
    snprintf(key, sizeof(key), "module.%s", name);
    add(text, key, "1");
    snprintf(path, sizeof(path), "/sys/module/%s/parameters", name);
    DIR *directory = opendir(path);
    if (!directory)
        return;
    for (struct dirent *entry; (entry = readdir(directory));) {
        if (entry->d_name[0] == '.' || strlen(entry->d_name) > 64)
            continue;
        snprintf(path, sizeof(path), "/sys/module/%s/parameters/%s", name, entry->d_name);
        if (!read_line(path, line, sizeof(line)))
            continue;
        snprintf(key, sizeof(key), "parameter.%s.%s", name, entry->d_name);
        add(text, key, "%s", line);
    }
    closedir(directory);
}

static void add_cpu(struct text *text)
{
    static const char *const wanted[] = {"vendor_id", "cpu family", "model", "model name",
                                         "stepping", "microcode"};
    bool seen[sizeof(wanted) / sizeof(*wanted)] = {false};
    char line[1024];
    int cpus = 0;
    FILE *file = fopen("/proc/cpuinfo", "re");

    if (!file)
        return;
    while (fgets(line, sizeof(line), file)) {
        char *colon = strchr(line, ':');
        if (!colon)
            continue;
        char *end = colon;
        while (end > line && (end[-1] == '\t' || end[-1] == ' '))
            end--;
        *end = 0;
        cpus += strcmp(line, "processor") == 0;
        for (size_t n = 0; n < sizeof(wanted) / sizeof(*wanted); n++)
            if (!seen[n] && strcmp(line, wanted[n]) == 0) {
                char key[32] = "cpu.";
                size_t used = 4;
                for (const char *c = wanted[n]; *c; c++)
                    key[used++] = *c == ' ' ? '_' : *c;
                key[used] = 0;
                add(text, key, "%s", colon + 1 + (colon[1] == ' '));
                seen[n] = true;
            }
    }
    fclose(file);
    add(text, "cpu.count", "%d", cpus);
}

int host_info(struct exchange *x)
{
    static const char *const modules[] = {"kvm", "kvm_amd", "kvm_intel", "kvm_pvm"};
    struct text text = {(char *)x->reply + sizeof(struct kb_header),
                        x->capacity - sizeof(struct kb_header), 0};
    struct utsname name;
    struct stat stat_buffer;

    uname(&name);
    add(&text, "kernel.release", "%s", name.release);
    add(&text, "kernel.version", "%s", name.version);
    add(&text, "machine", "%s", name.machine);
    add(&text, "uid", "%u", (unsigned)getuid());
    add_file(&text, "boot_id", "/proc/sys/kernel/random/boot_id");
    add_file(&text, "clocksource",
             "/sys/devices/system/clocksource/clocksource0/current_clocksource");
    add_file(&text, "transparent_hugepage", "/sys/kernel/mm/transparent_hugepage/enabled");
    add_cpu(&text);
    for (size_t n = 0; n < sizeof(modules) / sizeof(*modules); n++)
        add_module(&text, modules[n]);
    int fd = system_fd(x->core);
    add(&text, "kvm", "%s", fd < 0 ? strerror(-fd) : "ok");
    add(&text, "tracing", "%d",
        stat("/sys/kernel/tracing/events/kvm", &stat_buffer) == 0 &&
            access("/sys/kernel/tracing/trace_pipe", R_OK) == 0);
    add(&text, "kcore", "%d", access("/proc/kcore", R_OK) == 0);
    x->reply_bytes = sizeof(struct kb_header) + text.used;
    return 0;
}
