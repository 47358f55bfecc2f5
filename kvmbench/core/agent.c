/*
 * kvmbench-agent: the core behind a byte stream.
 *
 *     kvmbench-agent --stdio    requests on standard input, replies on standard output
 *     kvmbench-agent --fd N     both on the inherited descriptor N
 *     kvmbench-agent --tsc-khz  prints the rate of this machine's time stamp counter
 *
 * As process 1 of an appliance it takes no arguments; init.c makes the machine
 * ready and opens the channel.  The stream carries the messages of wire.h one
 * after the other and nothing else; when it ends, so does the agent, and with
 * it every machine.
 */
#define _GNU_SOURCE
#include "agent.h"
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

_Noreturn void leave(int status)
{
    if (getpid() == 1)
        init_end();
    _exit(status);
}

static int run(int in, int out, bool by_port)
{
    struct agent agent = {.in = in, .out = out, .by_port = by_port};
    pthread_condattr_t monotonic;

    if (core_create(&agent.core) != 0) {
        fprintf(stderr, "kvmbench-agent: out of memory\n");
        return 1;
    }
    pthread_mutex_init(&agent.out_lock, NULL);
    pthread_mutex_init(&agent.lock, NULL);
    pthread_cond_init(&agent.started, NULL);
    pthread_cond_init(&agent.main.wake, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&agent.answered, &monotonic);
    pthread_condattr_destroy(&monotonic);
    agent.main.agent = &agent;
    serve_stream(&agent);
    if (!workers_end(&agent))
        leave(1);
    core_destroy(agent.core);
    return 0;
}

/* Keeps descriptors 0 to 2 away from the stream, so that a stray line cannot get into it. */
static bool take_standard_streams(int *in, int *out)
{
    *in = fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 3);
    *out = fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3);
    int nothing = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (*in < 0 || *out < 0 || nothing < 0)
        return false;
    return dup2(nothing, STDIN_FILENO) >= 0 && dup2(STDERR_FILENO, STDOUT_FILENO) >= 0;
}

/* The rate over 50 ms; a pause of the scheduler between the two readings of a pair only widens both. */
static long tsc_khz(void)
{
    struct timespec from, to;

    clock_gettime(CLOCK_MONOTONIC_RAW, &from);
    uint64_t first = __builtin_ia32_rdtsc();
    nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    clock_gettime(CLOCK_MONOTONIC_RAW, &to);
    uint64_t last = __builtin_ia32_rdtsc();
    double ns = (double)(to.tv_sec - from.tv_sec) * 1e9 + (double)(to.tv_nsec - from.tv_nsec);
    return (long)((double)(last - first) / ns * 1e6 + 0.5);
}

int main(int argc, char **argv)
{
    int in = -1, out = -1;

    signal(SIGPIPE, SIG_IGN);
    if (getpid() == 1) {
        bool by_port = false;
        in = init_start(&by_port);
        if (in >= 0 || by_port)
            run(in, in, by_port);
        init_end();
    }
    if (argc == 2 && strcmp(argv[1], "--tsc-khz") == 0) {
        printf("%ld\n", tsc_khz());
        return 0;
    }
    if (argc == 2 && strcmp(argv[1], "--stdio") == 0) {
        if (!take_standard_streams(&in, &out)) {
            fprintf(stderr, "kvmbench-agent: no standard input or output: %s\n", strerror(errno));
            return 1;
        }
    } else if (argc == 3 && strcmp(argv[1], "--fd") == 0) {
        char *end;
        long number = strtol(argv[2], &end, 10);
        if (*argv[2] && !*end && number >= 0 && number < 1 << 20)
            in = out = (int)number;
    }
    if (in < 0) {
        fprintf(stderr, "usage: kvmbench-agent --stdio | --fd NUMBER | --tsc-khz\n");
        return 2;
    }
    return run(in, out, false);
}
