/* Completely fair scheduling of one direction of the link: missile/pcie/policy.py and bucket.py, rule for rule, in the same
 * exact integers, so that both make the same decisions (tests/pcie/test_pcie_native.py holds one against the other).
 * Pure: no clock, no GPU, no lock. Times in ns. */
#ifndef MISSILE_FAIR_H
#define MISSILE_FAIR_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

typedef __int128 wide;

enum { MAX_FLOWS = 256 };
#define NANO ((wide)1000000000)
#define UNITS_PER_BYTE ((wide)1024)
#define NICE_ZERO ((wide)1024)

struct bucket {
    wide level, capacity; /* bytes x 10^-9 */
    int64_t rate, since;  /* since < 0: paused */
};

struct share {
    int64_t units, credit;  /* weight in 1/1024; wake-up credit in bytes */
    int64_t limit, burst;   /* bytes/s (0: none), bytes */
    int64_t minimum;        /* bytes/s (0: none) */
    int32_t latency_sensitive;
};

struct flow {
    bool used, awake, throttled;
    struct share share;
    wide vruntime, residue;
    struct bucket limit, floor;
};

struct granularity {
    int64_t solo, shared, brief;
};

struct fair {
    struct granularity chunk;
    wide min_vruntime;
    struct flow flows[MAX_FLOWS];
    int awake[MAX_FLOWS]; /* in the order in which they woke, which settles ties */
    int awake_count, sensitive, urgent, limited;
};

struct pick {
    int flow; /* -1: nobody may go now */
    int64_t quantum;
    bool latency_sensitive, due;
};

static inline wide floor_div(wide a, int64_t b) {
    wide q = a / b;
    return q - (a % b < 0);
}

static inline void bucket_refill(struct bucket *b, int64_t now) {
    if (b->since >= 0 && now > b->since) {
        wide level = b->level + (wide)b->rate * (now - b->since);
        b->level = level < b->capacity ? level : b->capacity;
        b->since = now;
    }
}

static inline bool bucket_holds(const struct bucket *b, int64_t nbytes) { return b->level >= nbytes * NANO; }

static inline int64_t bucket_time_of(const struct bucket *b, int64_t nbytes, int64_t now) {
    return now - (int64_t)floor_div(b->level - nbytes * NANO, b->rate);
}

static inline int64_t fair_quantum(const struct fair *f, const struct flow *flow) {
    int64_t quantum = f->sensitive ? f->chunk.brief : f->awake_count > 1 ? f->chunk.shared : f->chunk.solo;
    return flow->share.limit && flow->share.burst < quantum ? flow->share.burst : quantum;
}

static inline void fair_place(struct fair *f, struct flow *flow) {
    wide earliest = f->min_vruntime - flow->share.credit * UNITS_PER_BYTE;
    if (flow->vruntime < earliest) flow->vruntime = earliest;
}

/* Returns the flow's number, or -1 when there are too many. */
static inline int fair_admit(struct fair *f, const struct share *share, int floor_chunks) {
    for (int i = 0; i < MAX_FLOWS; i++) {
        struct flow *flow = &f->flows[i];
        if (flow->used) continue;
        memset(flow, 0, sizeof *flow);
        flow->used = true;
        flow->share = *share;
        flow->vruntime = f->min_vruntime;
        flow->limit = (struct bucket){share->burst * NANO, share->burst * NANO, share->limit, -1};
        flow->floor = (struct bucket){0, floor_chunks * f->chunk.solo * NANO, share->minimum, -1};
        f->sensitive += share->latency_sensitive;
        return i;
    }
    return -1;
}

static inline void fair_wake(struct fair *f, int i, int64_t now) {
    struct flow *flow = &f->flows[i];
    if (flow->awake) return;
    flow->awake = true;
    flow->throttled = false;
    fair_place(f, flow);
    f->awake[f->awake_count++] = i;
    f->urgent += flow->share.latency_sensitive;
    f->limited += flow->share.limit != 0;
    if (flow->share.limit && flow->limit.since < 0) flow->limit.since = now;
    if (flow->share.minimum) {
        wide most = fair_quantum(f, flow) * NANO;
        if (flow->floor.level > most) flow->floor.level = most;
        if (flow->floor.since < 0) flow->floor.since = now;
    }
}

static inline void fair_sleep(struct fair *f, int i, int64_t now) {
    struct flow *flow = &f->flows[i];
    if (!flow->awake) return;
    flow->awake = false;
    int at = 0;
    while (f->awake[at] != i) at++;
    memmove(&f->awake[at], &f->awake[at + 1], sizeof(int) * (size_t)(--f->awake_count - at));
    f->urgent -= flow->share.latency_sensitive;
    f->limited -= flow->share.limit != 0;
    if (flow->share.minimum) {
        bucket_refill(&flow->floor, now);
        flow->floor.since = -1;
    }
}

static inline void fair_remove(struct fair *f, int i, int64_t now) {
    fair_sleep(f, i, now);
    f->sensitive -= f->flows[i].share.latency_sensitive;
    f->flows[i].used = false;
}

static inline bool fair_within_limit(struct fair *f, struct flow *flow, int64_t now) {
    bucket_refill(&flow->limit, now);
    if (!bucket_holds(&flow->limit, fair_quantum(f, flow))) {
        flow->throttled = true;
        return false;
    }
    if (flow->throttled) {
        flow->throttled = false;
        fair_place(f, flow);
    }
    return true;
}

static inline struct pick fair_pick(struct fair *f, int64_t now) {
    int first = -1, due = -1;
    int64_t due_by = 0;
    for (int at = 0; at < f->awake_count; at++) {
        int i = f->awake[at];
        struct flow *flow = &f->flows[i];
        if (flow->share.limit && !fair_within_limit(f, flow, now)) continue;
        if (flow->share.minimum) {
            int64_t quantum = fair_quantum(f, flow);
            bucket_refill(&flow->floor, now);
            if (bucket_holds(&flow->floor, quantum)) {
                int64_t deadline = bucket_time_of(&flow->floor, 2 * quantum, now);
                if (due < 0 || deadline < due_by) due = i, due_by = deadline;
            }
        }
        if (first < 0 || flow->vruntime < f->flows[first].vruntime) first = i;
    }
    if (first < 0) return (struct pick){-1, 0, false, false};
    if (f->flows[first].vruntime > f->min_vruntime) f->min_vruntime = f->flows[first].vruntime;
    int chosen = due >= 0 ? due : first;
    struct flow *flow = &f->flows[chosen];
    return (struct pick){chosen, fair_quantum(f, flow), flow->share.latency_sensitive, due >= 0};
}

static inline void fair_charge(struct fair *f, const struct pick *pick, int64_t nbytes) {
    struct flow *flow = &f->flows[pick->flow];
    if (flow->share.limit) flow->limit.level -= nbytes * NANO;
    if (flow->share.minimum) {
        flow->floor.level -= nbytes * NANO;
        if (flow->floor.level < 0) flow->floor.level = 0;
    }
    wide owed = nbytes * UNITS_PER_BYTE * NICE_ZERO + flow->residue;
    wide advanced = flow->vruntime + owed / flow->share.units;
    flow->residue = owed % flow->share.units;
    if (pick->due) {
        wide ceiling = f->min_vruntime + pick->quantum * UNITS_PER_BYTE * NICE_ZERO / flow->share.units;
        if (ceiling < flow->vruntime) ceiling = flow->vruntime;
        if (advanced > ceiling) advanced = ceiling;
    }
    flow->vruntime = advanced;
}

/* When the first tenant that a rate limit holds back may go on; -1 when none is. */
static inline int64_t fair_next_eligible(const struct fair *f, int64_t now) {
    int64_t first = -1;
    for (int at = 0; f->limited && at < f->awake_count; at++) {
        const struct flow *flow = &f->flows[f->awake[at]];
        int64_t quantum = fair_quantum(f, flow);
        if (!flow->share.limit || bucket_holds(&flow->limit, quantum)) continue;
        int64_t at_ns = bucket_time_of(&flow->limit, quantum, now);
        if (first < 0 || at_ns < first) first = at_ns;
    }
    return first;
}

#endif
