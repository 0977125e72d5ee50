/* A driver library for tests: answers pynvml from a text file that is read anew at every call.
 *
 * The file is named by FAKE_NVML. Each line is a GPU's number, a name and values:
 *
 *     0 uuid GPU-...                   also: name, driver
 *     0 memory TOTAL RESERVED FREE USED
 *     0 compute PID BYTES              one line a process, BYTES may be n/a; also: graphics
 *     0 energy MILLIJOULE              also: power, limit, events, buswidth, clock1, clock2, maxclock2, field197, ...
 *     0 maxgen GENERATION              also: maxwidth, nowgen, nowwidth; mig (1 where it is divided)
 *     7 parent NUMBER                  of a MIG instance, which is found by its uuid alone: leave its number out of the row
 *     0 old-list                       processes are written in an older driver's layout; also: old-memory
 *
 * `error CODE` in place of the values makes the call return that code; so does `0 handle error CODE` for every call
 * about that GPU. What has no line is not supported, except that a list without lines is empty.
 * Both C and C++, as only one of the compilers may be there. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __cplusplus
#define API extern "C"
#else
#define API
#endif

enum { OK = 0, UNINITIALIZED = 1, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
typedef uint64_t u64;

typedef struct { uint32_t version; u64 total, reserved, free, used; } Memory;
typedef struct { u64 total, free, used; } OldMemory;
typedef struct { uint32_t pid; u64 bytes; uint32_t gpu_instance, compute_instance; } Process;
typedef struct { uint32_t pid; u64 bytes; } OldProcess;
typedef struct { uint32_t field, scope; int64_t time, latency; uint32_t type, code; u64 value; } Field;

/* The values of the nth line of that name; returns what the call must return. A handle is the GPU's number + 1. */
static int line(void *gpu, const char *name, int nth, char *values) {
    char text[512], key[64];
    int number, at, code = NOT_SUPPORTED;
    FILE *file = fopen(getenv("FAKE_NVML") ? getenv("FAKE_NVML") : "", "r");
    if (!file) return UNINITIALIZED;
    while (fgets(text, sizeof text, file)) {
        if (sscanf(text, "%d %63s %n", &number, key, &at) < 2 || number + 1 != (int)(intptr_t)gpu) continue;
        text[strcspn(text, "\n")] = 0;
        if (!strcmp(key, "handle") && sscanf(text + at, "error %d", &code)) break;
        if (strcmp(key, name) || nth-- != 0) continue;
        strcpy(values, text + at);
        if (!sscanf(values, "error %d", &code)) code = OK;
    }
    fclose(file);
    return code;
}

static int number(void *gpu, const char *name, u64 *value) {
    char values[512];
    int code = line(gpu, name, 0, values);
    if (code == OK) *value = strtoull(values, NULL, 10);
    return code;
}

static int small_number(void *gpu, const char *name, uint32_t *value) {
    u64 wide = 0;
    int code = number(gpu, name, &wide);
    if (code == OK) *value = (uint32_t)wide;
    return code;
}

static int text(void *gpu, const char *name, char *value, unsigned size) {
    char values[512];
    int code = line(gpu, name, 0, values);
    if (code == OK) snprintf(value, size, "%s", values);
    return code;
}

static int set(void *gpu, const char *name) {
    char values[512];
    return line(gpu, name, 0, values) == OK;
}

static int processes(void *gpu, const char *name, unsigned *count, void *list) {
    char values[512] = "", bytes[64];
    unsigned n = 0, pid;
    int code;
    while ((code = line(gpu, name, n, values)) == OK) {
        if (list && n < *count && sscanf(values, "%u %63s", &pid, bytes) == 2) {
            Process p = {pid, strcmp(bytes, "n/a") ? strtoull(bytes, NULL, 10) : UINT64_MAX, UINT32_MAX, UINT32_MAX};
            OldProcess old = {p.pid, p.bytes};
            if (set(gpu, "old-list")) ((OldProcess *)list)[n] = old;
            else ((Process *)list)[n] = p;
        }
        n++;
    }
    if (code != NOT_SUPPORTED || strstr(values, "error") == values) return code;
    code = list || n == 0 ? OK : INSUFFICIENT_SIZE;
    *count = n;
    return code;
}

API int nvmlInitWithFlags(unsigned flags) { return (void)flags, OK; }
API int nvmlShutdown(void) { return OK; }
API const char *nvmlErrorString(int code) { return (void)code, "a code that pynvml does not know"; }

API int nvmlDeviceGetCount_v2(unsigned *count) {
    char values[512];
    int code;
    for (*count = 0; (code = line((void *)(intptr_t)(*count + 1), "uuid", 0, values)) != NOT_SUPPORTED; ++*count)
        if (code == UNINITIALIZED) return code;
    return OK;
}

API int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **gpu) {
    char values[512];
    *gpu = (void *)(intptr_t)(index + 1);
    return line(*gpu, "uuid", 0, values);
}

API int nvmlDeviceGetHandleByUUID(const char *uuid, void **gpu) {
    char values[512];
    for (intptr_t i = 1; i < 16; i++)
        if (line((void *)i, "uuid", 0, values) == OK && !strcmp(values, uuid)) return *gpu = (void *)i, OK;
    return NOT_FOUND;
}

API int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *instance, void **gpu) {
    u64 number_of_it = 0;
    int code = number(instance, "parent", &number_of_it);
    *gpu = (void *)(intptr_t)(number_of_it + 1);
    return code;
}

API int nvmlDeviceGetMigMode(void *gpu, uint32_t *now, uint32_t *pending) {
    return *pending = 0, small_number(gpu, "mig", now);
}

API int nvmlDeviceGetUUID(void *gpu, char *value, unsigned size) { return text(gpu, "uuid", value, size); }
API int nvmlDeviceGetName(void *gpu, char *value, unsigned size) { return text(gpu, "name", value, size); }
API int nvmlSystemGetDriverVersion(char *value, unsigned size) { return text((void *)1, "driver", value, size); }

API int nvmlDeviceGetMemoryInfo_v2(void *gpu, Memory *memory) {
    char values[512];
    Memory m = {memory->version, 0, 0, 0, 0};
    int code = line(gpu, "memory", 0, values);
    if (code != OK) return code;
    unsigned long long n[4];
    if (sscanf(values, "%llu %llu %llu %llu", n, n + 1, n + 2, n + 3) != 4) return NOT_SUPPORTED;
    m.total = n[0], m.reserved = n[1], m.free = n[2], m.used = n[3];
    OldMemory old = {m.total, m.free, m.used + m.reserved};
    if (set(gpu, "old-memory")) memcpy(memory, &old, sizeof old);
    else *memory = m;
    return OK;
}

API int nvmlDeviceGetComputeRunningProcesses_v3(void *gpu, unsigned *count, void *list) {
    return processes(gpu, "compute", count, list);
}
API int nvmlDeviceGetGraphicsRunningProcesses_v3(void *gpu, unsigned *count, void *list) {
    return processes(gpu, "graphics", count, list);
}

API int nvmlDeviceGetTotalEnergyConsumption(void *gpu, u64 *value) { return number(gpu, "energy", value); }
API int nvmlDeviceGetCurrentClocksEventReasons(void *gpu, u64 *value) { return number(gpu, "events", value); }
API int nvmlDeviceGetPowerUsage(void *gpu, uint32_t *value) { return small_number(gpu, "power", value); }
API int nvmlDeviceGetEnforcedPowerLimit(void *gpu, uint32_t *value) { return small_number(gpu, "limit", value); }

API int nvmlDeviceGetMemoryBusWidth(void *gpu, uint32_t *value) { return small_number(gpu, "buswidth", value); }

API int nvmlDeviceGetMaxPcieLinkGeneration(void *gpu, uint32_t *value) { return small_number(gpu, "maxgen", value); }
API int nvmlDeviceGetMaxPcieLinkWidth(void *gpu, uint32_t *value) { return small_number(gpu, "maxwidth", value); }
API int nvmlDeviceGetCurrPcieLinkGeneration(void *gpu, uint32_t *value) { return small_number(gpu, "nowgen", value); }
API int nvmlDeviceGetCurrPcieLinkWidth(void *gpu, uint32_t *value) { return small_number(gpu, "nowwidth", value); }

API int nvmlDeviceGetClockInfo(void *gpu, unsigned kind, uint32_t *value) {
    char name[32];
    snprintf(name, sizeof name, "clock%u", kind);
    return small_number(gpu, name, value);
}

API int nvmlDeviceGetMaxClockInfo(void *gpu, unsigned kind, uint32_t *value) {
    char name[32];
    snprintf(name, sizeof name, "maxclock%u", kind);
    return small_number(gpu, name, value);
}

API int nvmlDeviceGetFieldValues(void *gpu, int count, Field *fields) {
    char name[32];
    for (int i = 0; i < count; i++) {
        snprintf(name, sizeof name, "field%u", fields[i].field);
        fields[i].code = number(gpu, name, &fields[i].value);  /* each field has a code of its own */
        fields[i].type = 3;
    }
    return OK;
}
