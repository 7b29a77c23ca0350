/* A driver whose link takes real time: copies move their bytes at once and end when a serial link at the given rate would
 * have moved them. Streams are numbers 1..15; events hold the time at which they are reached. */
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int64_t stream_free[16], link_free[2];
static double ns_per_byte = 0.02, per_copy_ns = 2000;
static int broken;
static int64_t copies;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * (int64_t)1000000000 + t.tv_nsec;
}

void fake_reset(double rate_ns) {
    memset(stream_free, 0, sizeof stream_free);
    memset(link_free, 0, sizeof link_free);
    ns_per_byte = rate_ns;
    broken = 0;
    copies = 0;
}
void fake_break(int status) { broken = status; }
int64_t fake_copies(void) { return copies; }

static int move(char *target, const char *source, uint64_t n, void *stream, int direction) {
    if (broken) return broken;
    if ((uint64_t)(direction ? source : target) < 4096) return 1; /* CUDA_ERROR_INVALID_VALUE */
    pthread_mutex_lock(&mutex);
    memcpy(target, source, n);
    int64_t begin = now(), *ready = &stream_free[(uint64_t)stream & 15];
    if (*ready > begin) begin = *ready;
    if (link_free[direction] > begin) begin = link_free[direction];
    *ready = link_free[direction] = begin + (int64_t)(per_copy_ns + n * ns_per_byte);
    copies++;
    pthread_mutex_unlock(&mutex);
    return 0;
}

int fake_set_context(void *context) { return context ? 0 : 201; }
int fake_to_device(uint64_t target, const void *source, uint64_t n, void *stream) {
    return move((char *)target, source, n, stream, 0);
}
int fake_to_host(void *target, uint64_t source, uint64_t n, void *stream) {
    return move(target, (const char *)source, n, stream, 1);
}
int fake_record(void *event, void *stream) {
    *(int64_t *)event = stream_free[(uint64_t)stream & 15];
    return broken;
}
int fake_write(void *stream, uint64_t address, uint32_t value, unsigned flags) {
    *(uint32_t *)address = value;
    return broken | (int)flags | !stream;
}
int fake_query(void *event) { return broken ? broken : now() < *(volatile int64_t *)event ? 600 : 0; }
