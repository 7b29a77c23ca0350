/* What other files in C use of a lane (lane.c says what each does). */
#ifndef MISSILE_LANE_H
#define MISSILE_LANE_H

#include <stdatomic.h>
#include <stdint.h>

enum { DONE = 0, CANCELLED = 1, FAILED = 2 };

struct lane;

struct outcome { /* of one copy, ns; done: 0 until it is over, written with the lane's lock held */
    int64_t issued, done, state;
};

int64_t lane_clock(void);
uint64_t lane_submit(struct lane *lane, int flow, void *host, uint64_t device, int64_t nbytes, void *event, void *after,
                     uint64_t latch, uint32_t value, struct outcome *outcome);
int lane_look(struct lane *lane);

static inline void lane_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    atomic_signal_fence(memory_order_seq_cst);
#endif
}

#endif
