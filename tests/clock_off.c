/* A wall clock that is off, for the processes of a test: preloaded, it adds the seconds of CLOCK_OFF to what they read.
 *
 * Monotonic clocks and the times of files stay true. Waits until a time of day are put back to the true clock, else
 * they would last as long as the clock is off. libfaketime 0.9.10 does not serve: under it, time.sleep of Python 3.11
 * fails with EINVAL, or never returns. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const time_t YEARS_30 = 946080000; /* a time beyond is one of day, no uptime */

static time_t off(void) {
    const char *seconds = getenv("CLOCK_OFF");
    return seconds ? (time_t)strtol(seconds, NULL, 10) : 0;
}

static struct timespec true_time(const struct timespec *shown) {
    struct timespec t = *shown;
    if (t.tv_sec > YEARS_30) t.tv_sec -= off();
    return t;
}

int clock_gettime(clockid_t clock, struct timespec *t) {
    int failed = (int)syscall(SYS_clock_gettime, clock, t);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) t->tv_sec += off();
    return failed;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    int failed = (int)syscall(SYS_gettimeofday, t, zone);
    if (!failed) t->tv_sec += off();
    return failed;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}

/* The library's own, in the version that programs of today are linked to. */
static void *real(const char *name) {
    void *found = dlvsym(RTLD_NEXT, name, "GLIBC_2.3.2");
    return found ? found : dlsym(RTLD_NEXT, name);
}

int sem_timedwait(sem_t *restrict s, const struct timespec *restrict until) {
    struct timespec t = true_time(until);
    return ((int (*)(sem_t *, const struct timespec *))real("sem_timedwait"))(s, &t);
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict m, const struct timespec *restrict until) {
    struct timespec t = true_time(until);
    return ((int (*)(pthread_mutex_t *, const struct timespec *))real("pthread_mutex_timedlock"))(m, &t);
}

int pthread_cond_timedwait(pthread_cond_t *restrict c, pthread_mutex_t *restrict m, const struct timespec *restrict until) {
    struct timespec t = true_time(until);
    return ((int (*)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *))real("pthread_cond_timedwait"))(c, m, &t);
}
