/* Latency-sensitive copies that arrive at given times, submitted by a loop in C as Python submits: what the lane does to a copy,
 * without what an interpreter and its timers add. One thread that never sleeps. */
#include <stdbool.h>

#include "lane.h"

struct arrival_row { /* in: arrival, flow, nbytes; out: when `lane_submit` was called and had returned, and the outcome */
    int64_t at, flow, nbytes, submitted, given;
    struct outcome outcome;
};

/* Rows in order of arrival. Returns how many were submitted by `end`, once all of these are over or the GPU is lost. */
int64_t source_run(struct lane *lane, struct arrival_row *rows, int64_t count, void *host, uint64_t device, int64_t end) {
    int64_t next = 0, first = 0; /* rows before `first` are over */
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
        for (int i = 0; i < 8; i++) lane_pause();
    }
}
