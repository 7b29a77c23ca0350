/* Latency-sensitive copies that arrive at given times, submitted by a loop in C as Python submits: what the lane does to a copy,
 * without what an interpreter and its timers add. One thread that spins while anything is outstanding or about to arrive. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <sys/prctl.h>
#include <time.h>

#include "lane.h"

struct arrival_row { /* in: arrival, flow, nbytes; out: when `lane_submit` was called and had returned, and the outcome */
    int64_t at, flow, nbytes, submitted, given;
    struct outcome outcome;
};

static void sleep_until(int64_t at) {
    struct timespec until = {at / 1000000000, at % 1000000000};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, 0) == EINTR) {}
}

/* Rows in order of arrival. Between arrivals it sleeps until `early` ns before the next one (0: it never sleeps) while nothing
 * is outstanding. Returns how many rows were submitted by `end`, once all of these are over or the GPU is lost. */
int64_t source_run(struct lane *lane, struct arrival_row *rows, int64_t count, void *host, uint64_t device, int64_t early,
                   int64_t end) {
    int64_t next = 0, first = 0; /* rows before `first` are over */
    prctl(PR_SET_TIMERSLACK, 1);
    for (;;) {
        int64_t now = lane_clock();
        bool open = next < count && now < end;
        if (!open && first == next) return next;
        if (open && rows[next].at <= now) {
            struct arrival_row *row = &rows[next++];
            row->submitted = now;
            if (!lane_submit(lane, (int)row->flow, host, device, row->nbytes, 0, 0, 0, 0, &row->outcome)) {
                row->outcome.state = FAILED;
                row->outcome.done = now;
            }
            row->given = lane_clock();
            continue;
        }
        while (first < next && rows[first].outcome.done) first++;
        if (first < next && !lane_look(lane)) return next;
        if (first == next && open && early && rows[next].at - now > early) sleep_until(rows[next].at - early);
        for (int i = 0; i < 8; i++) lane_pause();
    }
}
