/* One direction of the link at work, without Python: queues by tenant, the chunks that the GPU has, and a thread that keeps
 * the link busy whatever the interpreter does. The counterpart of missile/pcie/paced.py; docs/pcie.md says what it does.
 *
 * Everything is under one mutex. Whoever calls does what can be done now (`advance`): the caller that submits a copy gives
 * it to the GPU itself, so that nobody has to be woken for it; the thread looks again when chunks should have arrived.
 * No CUDA here: the driver's functions come in as addresses, whose first int is 0 for success. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>

#include "fair.h"
#include "lane.h"

enum { NOT_READY = 600 }; /* CUDA_ERROR_NOT_READY */
enum { DEPTH_MOST = 256, STREAMS = 2, BULK = 0, SMALL = 1 };
enum { EVENT_ISSUED = 1, EVENT_DONE = 2 };

#define FOREVER (INT64_MAX / 2)
#define SOON_NS 1000
#define SPIN_NS 150000  /* an urgent copy that should end within this is not slept for: a sleep may end 100 us late */
#define POLL_NS 20000   /* how often something is looked at that has no expected time */
#define ATTENDED_NS 30000
#define WAKING_NS 10000
#define UNATTENDED_NS 100000
#define MARGIN_NS 60000 /* how late a sleep may end, and the time to issue: kept in hand where the window allows it */

struct calls { /* addresses in the driver, and what they are called with */
    int (*set_context)(void *);
    int (*to_device)(uint64_t target, const void *source, size_t nbytes, void *stream);
    int (*to_host)(void *target, uint64_t source, size_t nbytes, void *stream);
    int (*record)(void *event, void *stream);
    int (*query)(void *event);
    int (*write)(void *stream, uint64_t address, uint32_t value, unsigned flags);
    void *context;
};

struct options {
    struct calls calls;
    struct granularity chunk;
    void *streams[STREAMS];
    void **chunk_events; /* DEPTH_MOST of them per stream, owned by the caller */
    double ns_per_byte, copy_ns, start_ns;
    int64_t bypass;      /* latency-sensitive copies of at most so many bytes go on the second stream */
    int64_t ahead;       /* bytes that the GPU is given ahead while no latency-sensitive tenant is registered, at least */
    int32_t depth, to_host, floor_chunks;
};

struct copy {
    uint64_t id;
    struct copy *next;
    char *host;
    uint64_t device;
    int64_t nbytes, issued;
    void *event, *after; /* recorded after the last chunk; waited for before the first (NULL: none) */
    uint64_t latch;      /* device address of a word that is set behind the last chunk (0: none) */
    uint32_t value;
    int64_t issued_ns;
    struct outcome *outcome; /* told there instead of in a report (NULL: report) */
    int flow, flying, ending, code;
    bool live, queued, over; /* over: nothing more of it will be issued */
};

struct arrival { /* a chunk, where somebody wants to know of each */
    int64_t flow, nbytes, issued_ns, done_ns;
};

struct report { /* what Python is told */
    int64_t kind, id, nbytes, issued_ns, done_ns, state, code;
};

struct chunk {
    struct copy *copy;
    void *event;
    int64_t nbytes, issued_ns, eta_ns;
    bool urgent, last;
};

struct ring {
    struct chunk chunks[DEPTH_MOST];
    uint64_t head, tail; /* [tail, head) */
};

struct queue {
    struct copy *first, *last;
    bool unready; /* its first copy waits for an event */
};

struct vitals { /* of the thread: CPU time, looks, the longest that a sleep was late; and how long the link had nothing to do */
    int64_t cpu_ns, looks, late_ns, dry_ns;
};

struct lane {
    pthread_mutex_t mutex;
    atomic_int waiting; /* threads at the lock */
    pthread_cond_t changed;
    pthread_t pump;
    bool stopping, dead;
    struct options options;
    struct fair fair;
    struct queue queues[MAX_FLOWS];
    struct ring rings[STREAMS];
    int64_t flying, busy_until, looks_at; /* bytes with the GPU; when the thread will look */
    int urgent, unready;
    struct copy **slab;
    uint32_t slab_size, slab_used;
    struct copy *spare;
    struct report *reports;
    size_t report_count, report_room;
    struct arrival *arrivals; /* kept until they are taken; NULL: not kept */
    size_t arrival_count, arrival_room;
    int64_t attended_until; /* the owner has said to come back at once, and does this better than a second thread beside it */
    struct vitals vitals;
};

static int64_t clock_ns(clockid_t which) {
    struct timespec t;
    clock_gettime(which, &t);
    return t.tv_sec * (int64_t)1000000000 + t.tv_nsec;
}

int64_t lane_clock(void) { return clock_ns(CLOCK_MONOTONIC); }

static int64_t monotonic(void) { return lane_clock(); }

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* --- copies */

static struct copy *copy_new(struct lane *lane) {
    struct copy *copy = lane->spare;
    if (copy) {
        lane->spare = copy->next;
    } else {
        if (lane->slab_used == lane->slab_size) {
            uint32_t size = lane->slab_size ? 2 * lane->slab_size : 64;
            struct copy **slab = realloc(lane->slab, size * sizeof *slab);
            if (!slab) return NULL;
            lane->slab = slab;
            lane->slab_size = size;
        }
        copy = calloc(1, sizeof *copy);
        if (!copy) return NULL;
        copy->id = lane->slab_used;
        lane->slab[lane->slab_used++] = copy;
    }
    uint64_t id = copy->id + ((uint64_t)1 << 32); /* the upper half tells a slot's users apart */
    memset(copy, 0, sizeof *copy);
    copy->id = id;
    copy->live = true;
    return copy;
}

static struct copy *copy_find(struct lane *lane, uint64_t id) {
    uint32_t slot = (uint32_t)id;
    if (slot >= lane->slab_used) return NULL;
    struct copy *copy = lane->slab[slot];
    return copy->live && copy->id == id ? copy : NULL;
}

static void tell(struct lane *lane, struct report report) {
    if (lane->report_count == lane->report_room) {
        size_t room = lane->report_room ? 2 * lane->report_room : 256;
        struct report *reports = realloc(lane->reports, room * sizeof *reports);
        if (!reports) abort(); /* a copy that ended and cannot be told of would wait for ever */
        lane->reports = reports;
        lane->report_room = room;
    }
    lane->reports[lane->report_count++] = report;
}

static void note(struct lane *lane, struct arrival arrival) {
    if (lane->arrival_count == lane->arrival_room) {
        struct arrival *more = realloc(lane->arrivals, 2 * lane->arrival_room * sizeof *more);
        if (!more) return;
        lane->arrivals = more;
        lane->arrival_room *= 2;
    }
    lane->arrivals[lane->arrival_count++] = arrival;
}

/* End a copy of which nothing more will be issued, unless the GPU still has chunks of it or it heads its queue. */
static void settle(struct lane *lane, struct copy *copy, int64_t now) {
    if (copy->flying || copy->queued || !copy->live) return;
    if (copy->outcome) *copy->outcome = (struct outcome){copy->issued_ns, now, copy->ending};
    else tell(lane, (struct report){EVENT_DONE, (int64_t)copy->id, copy->issued, copy->issued_ns, now, copy->ending, copy->code});
    copy->live = false;
    copy->next = lane->spare;
    lane->spare = copy;
}

static void cancel(struct copy *copy) {
    if (copy->over) return;
    copy->over = true;
    copy->ending = CANCELLED;
}

static void take_first(struct queue *queue) {
    struct copy *copy = queue->first;
    queue->first = copy->next;
    if (!queue->first) queue->last = NULL;
    copy->next = NULL;
    copy->queued = false;
}

/* Take what is over off the queue's head, and bring the policy's idea of the tenant (awake or not) up to date. */
static void refresh(struct lane *lane, int flow, int64_t now) {
    struct queue *queue = &lane->queues[flow];
    while (queue->first && queue->first->over) {
        struct copy *copy = queue->first;
        take_first(queue);
        settle(lane, copy, now);
    }
    bool unready = false;
    if (queue->first && queue->first->after) {
        int status = lane->options.calls.query(queue->first->after);
        if (status == NOT_READY) unready = true;
        else queue->first->after = NULL; /* an error there surfaces at the copy itself */
    }
    lane->unready += unready - queue->unready;
    queue->unready = unready;
    if (queue->first && !unready) fair_wake(&lane->fair, flow, now);
    else fair_sleep(&lane->fair, flow, now);
}

/* --- with the GPU */

/* What should have arrived by now and has not puts all that is behind it off: the estimate never runs away from the link. */
static void correct(struct lane *lane, int64_t now) {
    struct ring *ring = &lane->rings[BULK];
    if (ring->tail == ring->head) return;
    int64_t late = now - ring->chunks[ring->tail % DEPTH_MOST].eta_ns;
    if (late <= 0) return;
    for (uint64_t i = ring->tail; i != ring->head; i++) ring->chunks[i % DEPTH_MOST].eta_ns += late;
    lane->busy_until += late;
}

/* Returns the time: an end counts from when it was known, not from when somebody began to ask. */
static int64_t arrivals(struct lane *lane, int64_t now) {
    for (int which = 0; which < STREAMS; which++) {
        struct ring *ring = &lane->rings[which];
        while (ring->tail != ring->head) {
            struct chunk *chunk = &ring->chunks[ring->tail % DEPTH_MOST];
            int status = lane->options.calls.query(chunk->event);
            if (status == NOT_READY) break;
            now = monotonic();
            struct copy *copy = chunk->copy;
            ring->tail++;
            lane->flying -= chunk->nbytes;
            lane->urgent -= chunk->urgent;
            copy->flying--;
            if (!status) {
                if (lane->arrivals) note(lane, (struct arrival){copy->flow, chunk->nbytes, chunk->issued_ns, now});
            } else if (copy->ending == DONE) {
                copy->over = true;
                copy->ending = FAILED;
                copy->code = status;
            }
            if (copy->over && copy->queued) refresh(lane, copy->flow, now);
            else if (copy->over) settle(lane, copy, now);
        }
    }
    correct(lane, now);
    if (lane->flying) return now;
    if (lane->fair.awake_count) lane->vitals.dry_ns += now - least(now, lane->busy_until);
    lane->busy_until = 0;
    return now;
}

static void issue(struct lane *lane, const struct pick *pick, int64_t now) {
    struct options *o = &lane->options;
    struct queue *queue = &lane->queues[pick->flow];
    struct copy *copy = queue->first;
    int64_t left = copy->nbytes - copy->issued, nbytes = least(pick->quantum, left);
    int which = pick->latency_sensitive && copy->nbytes <= o->bypass ? SMALL : BULK;
    struct ring *ring = &lane->rings[which];
    void *stream = o->streams[which];
    uint64_t slot = ring->head % DEPTH_MOST;
    bool last = nbytes == left;
    void *event = last && copy->event ? copy->event : o->chunk_events[which * DEPTH_MOST + slot];
    char *host = copy->host + copy->issued;
    uint64_t device = copy->device + (uint64_t)copy->issued;
    int status = o->to_host ? o->calls.to_host(host, device, (size_t)nbytes, stream)
                            : o->calls.to_device(device, host, (size_t)nbytes, stream);
    if (!status && last && copy->latch) status = o->calls.write(stream, copy->latch, copy->value, 0);
    if (!status) status = o->calls.record(event, stream);
    if (status) {
        copy->over = true;
        copy->ending = FAILED;
        copy->code = status;
        refresh(lane, pick->flow, now);
        return;
    }
    double taken = o->copy_ns + (double)nbytes * o->ns_per_byte;
    int64_t begin = now + (int64_t)o->start_ns, eta;
    if (which == SMALL) eta = begin + (int64_t)taken;
    else eta = lane->busy_until = (begin > lane->busy_until ? begin : lane->busy_until) + (int64_t)taken;
    bool urgent = pick->latency_sensitive && last;
    ring->chunks[slot] = (struct chunk){copy, event, nbytes, now, eta, urgent, last};
    ring->head++;
    lane->flying += nbytes;
    lane->urgent += urgent;
    if (!copy->issued) copy->issued_ns = now;
    copy->issued += nbytes;
    copy->flying++;
    fair_charge(&lane->fair, pick, nbytes);
    if (last) {
        if (!copy->outcome)
            tell(lane, (struct report){EVENT_ISSUED, (int64_t)copy->id, copy->nbytes, copy->issued_ns, now, DONE, 0});
        take_first(queue); /* its last chunk's arrival settles it */
        copy->over = true;
        refresh(lane, pick->flow, now);
    }
}

static int64_t window(const struct lane *lane) {
    const struct granularity *chunk = &lane->options.chunk;
    int64_t depth = lane->options.depth;
    if (lane->fair.sensitive) return depth * chunk->brief;
    bool alone = lane->fair.awake_count < 2;
    int64_t whole = depth * (alone ? chunk->solo : chunk->shared);
    int64_t ahead = alone ? lane->options.ahead : lane->options.ahead / 4; /* more would outrun tenants with short queues */
    return whole > ahead ? whole : ahead;
}

static void fill(struct lane *lane, int64_t now) {
    while (lane->fair.awake_count) {
        int64_t most = window(lane);
        bool full = lane->flying >= most;
        if (full && !(lane->fair.sensitive && lane->fair.urgent)) return;
        if (lane->rings[BULK].head - lane->rings[BULK].tail >= DEPTH_MOST) return;
        if (lane->rings[SMALL].head - lane->rings[SMALL].tail >= DEPTH_MOST) return;
        struct pick pick = fair_pick(&lane->fair, now);
        if (pick.flow < 0) return;
        /* A latency-sensitive copy queues behind the window at once: waiting for room would only add our own delay. */
        if (full && !(pick.latency_sensitive && lane->flying < 2 * most)) return;
        if (lane->queues[pick.flow].first->over) {
            refresh(lane, pick.flow, now);
            continue;
        }
        issue(lane, &pick, now);
        /* Whoever stands at the lock may have something urgent. With a chunk on its way the link does not miss the next. */
        if (atomic_load_explicit(&lane->waiting, memory_order_relaxed) && !pick.latency_sensitive) return;
    }
}

static void advance(struct lane *lane) {
    static __thread void *current;
    if (current != lane->options.calls.context) {
        current = lane->options.calls.context;
        lane->options.calls.set_context(current);
    }
    int64_t now = monotonic();
    if (lane->flying) now = arrivals(lane, now);
    if (lane->unready)
        for (int flow = 0; flow < MAX_FLOWS; flow++)
            if (lane->queues[flow].unready) refresh(lane, flow, now);
    fill(lane, now);
}

/* --- when to look again */

static const struct chunk *head_of(const struct ring *ring) {
    return ring->tail == ring->head ? NULL : &ring->chunks[ring->tail % DEPTH_MOST];
}

/* When the link needs more: as the first chunk arrives, or when half of a deep window has been copied. */
static int64_t refill_at(const struct lane *lane, int64_t now) {
    const struct ring *ring = &lane->rings[BULK];
    const struct chunk *first = head_of(ring);
    int64_t slack = lane->busy_until - first->eta_ns;
    int64_t at = first->eta_ns;
    if (!lane->fair.sensitive && slack > 2 * MARGIN_NS) {
        int64_t half = lane->busy_until - slack / 2;
        for (uint64_t i = ring->tail; i != ring->head && ring->chunks[i % DEPTH_MOST].eta_ns <= half; i++)
            at = ring->chunks[i % DEPTH_MOST].eta_ns;
    }
    if (at > now) return at;
    /* Late. With another chunk behind it the link is not waiting for us. */
    double taken = (double)first->nbytes * lane->options.ns_per_byte;
    return now + (ring->head - ring->tail > 1 ? SOON_NS + (int64_t)(taken / 8) : SOON_NS);
}

/* For the thread, which keeps the link busy. That copies have ended is seen by the owner, who waits for it. */
static int64_t pump_deadline(const struct lane *lane, int64_t now) {
    int64_t at = FOREVER;
    if (lane->fair.awake_count && head_of(&lane->rings[BULK])) at = refill_at(lane, now);
    if (lane->unready) at = least(at, now + UNATTENDED_NS); /* should the owner not ask the events himself */
    int64_t eligible = fair_next_eligible(&lane->fair, now);
    if (eligible >= 0) at = least(at, eligible > now ? eligible : now + SOON_NS);
    return at;
}

/* For the owner: when the next copy as a whole may have ended; FOREVER when there is none. */
static int64_t owner_deadline(const struct lane *lane, int64_t now) {
    int64_t at = FOREVER;
    for (int which = 0; which < STREAMS; which++) {
        const struct ring *ring = &lane->rings[which];
        for (uint64_t i = ring->tail; i != ring->head; i++) {
            const struct chunk *chunk = &ring->chunks[i % DEPTH_MOST];
            if (chunk->last && !chunk->copy->outcome) at = least(at, chunk->urgent ? chunk->eta_ns - SPIN_NS : chunk->eta_ns);
        }
    }
    if (lane->urgent && at <= now) return now + SOON_NS;
    if (lane->flying && at <= now) return now + POLL_NS;
    if (!lane->flying && lane->fair.awake_count) { /* rate limits hold back all who have copies waiting */
        int64_t eligible = fair_next_eligible(&lane->fair, now);
        return eligible > now + SOON_NS ? eligible : now + SOON_NS;
    }
    for (int i = 0; i < lane->fair.awake_count; i++) {
        const struct copy *copy = lane->queues[lane->fair.awake[i]].first;
        if (copy->outcome) continue;
        double left = (double)(copy->nbytes - copy->issued) * lane->options.ns_per_byte;
        int64_t from = lane->busy_until > now ? lane->busy_until : now;
        at = least(at, from + (int64_t)left + SOON_NS);
    }
    if (lane->unready) at = least(at, now + POLL_NS);
    return at;
}

/* --- the lock */

/* Held for microseconds: being put to sleep and woken for it takes longer. */
static void enter(struct lane *lane) {
    if (!pthread_mutex_trylock(&lane->mutex)) return;
    atomic_fetch_add(&lane->waiting, 1);
    bool mine = false;
    for (int i = 0; i < 2000 && !mine; i++) {
        lane_pause();
        mine = !pthread_mutex_trylock(&lane->mutex);
    }
    if (!mine) pthread_mutex_lock(&lane->mutex);
    atomic_fetch_sub(&lane->waiting, 1);
}

/* --- the thread */

static void *pump(void *argument) {
    struct lane *lane = argument;
    prctl(PR_SET_TIMERSLACK, 1);
    enter(lane);
    while (!lane->stopping) {
        int64_t now = monotonic();
        bool attended = now < lane->attended_until;
        if (!lane->dead && !attended) advance(lane);
        now = monotonic();
        int64_t at = lane->dead ? FOREVER : pump_deadline(lane, now);
        if (attended && at < lane->attended_until) at = lane->attended_until;
        lane->looks_at = at;
        lane->vitals.looks++;
        lane->vitals.cpu_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID);
        if (at == FOREVER) {
            pthread_cond_wait(&lane->changed, &lane->mutex);
        } else if (lane->fair.urgent && !attended && at - now < SPIN_NS) {
            /* The rest of an urgent copy waits for this look. */
            pthread_mutex_unlock(&lane->mutex);
            while (monotonic() < at) lane_pause();
            enter(lane);
        } else {
            struct timespec until = {at / 1000000000, at % 1000000000};
            bool slept = pthread_cond_timedwait(&lane->changed, &lane->mutex, &until) == ETIMEDOUT;
            int64_t late = monotonic() - at;
            if (slept && late > lane->vitals.late_ns) lane->vitals.late_ns = late;
        }
    }
    pthread_mutex_unlock(&lane->mutex);
    return NULL;
}

/* What every call from outside ends with: the thread is woken when it would look too late. */
static void leave(struct lane *lane) {
    int64_t now = monotonic();
    bool late = !lane->dead && now >= lane->attended_until && pump_deadline(lane, now) + WAKING_NS < lane->looks_at;
    if (late) lane->looks_at = 0;
    pthread_mutex_unlock(&lane->mutex);
    if (late) pthread_cond_signal(&lane->changed); /* with the lock free: waking somebody takes microseconds */
}

/* --- for Python, from any thread */

void *lane_open(const struct options *options) {
    struct lane *lane = calloc(1, sizeof *lane);
    if (!lane) return NULL;
    lane->options = *options;
    lane->fair.chunk = options->chunk;
    size_t events = STREAMS * DEPTH_MOST * sizeof(void *);
    lane->options.chunk_events = malloc(events);
    if (!lane->options.chunk_events) goto failed;
    memcpy(lane->options.chunk_events, options->chunk_events, events);
    pthread_condattr_t monotonic_clock;
    pthread_condattr_init(&monotonic_clock);
    pthread_condattr_setclock(&monotonic_clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&lane->mutex, NULL);
    pthread_cond_init(&lane->changed, &monotonic_clock);
    pthread_condattr_destroy(&monotonic_clock);
    if (!pthread_create(&lane->pump, NULL, pump, lane)) return lane;
    free(lane->options.chunk_events);
failed:
    free(lane);
    return NULL;
}

/* The caller has made sure that the GPU has nothing of it left. */
void lane_close(struct lane *lane) {
    enter(lane);
    lane->stopping = true;
    pthread_cond_signal(&lane->changed);
    pthread_mutex_unlock(&lane->mutex);
    pthread_join(lane->pump, NULL);
    for (uint32_t i = 0; i < lane->slab_used; i++) free(lane->slab[i]);
    free(lane->slab);
    free(lane->reports);
    free(lane->arrivals);
    free(lane->options.chunk_events);
    pthread_cond_destroy(&lane->changed);
    pthread_mutex_destroy(&lane->mutex);
    free(lane);
}

int lane_admit(struct lane *lane, const struct share *share) {
    enter(lane);
    int flow = fair_admit(&lane->fair, share, lane->options.floor_chunks);
    leave(lane);
    return flow;
}

/* Cancels what the tenant has queued; what the GPU has of it arrives. */
void lane_remove(struct lane *lane, int flow) {
    enter(lane);
    int64_t now = monotonic();
    for (struct copy *copy = lane->queues[flow].first; copy; copy = copy->next) cancel(copy);
    refresh(lane, flow, now);
    fair_remove(&lane->fair, flow, now);
    leave(lane);
}

/* Returns the copy's id, 0 without memory. `event` is recorded when its last chunk is issued. */
uint64_t lane_submit(struct lane *lane, int flow, void *host, uint64_t device, int64_t nbytes, void *event, void *after,
                     uint64_t latch, uint32_t value, struct outcome *outcome) {
    enter(lane);
    struct copy *copy = copy_new(lane);
    uint64_t id = 0;
    if (copy) {
        struct queue *queue = &lane->queues[flow];
        id = copy->id;
        copy->host = host;
        copy->device = device;
        copy->nbytes = nbytes;
        copy->event = event;
        copy->after = after;
        copy->latch = latch;
        copy->value = value;
        copy->outcome = outcome;
        copy->issued_ns = -1;
        copy->flow = flow;
        copy->queued = true;
        if (queue->last) queue->last->next = copy;
        else queue->first = copy;
        queue->last = copy;
        if (queue->first == copy) refresh(lane, flow, monotonic());
        if (!lane->dead) advance(lane);
    }
    leave(lane);
    return id;
}

/* Ends a queued copy wherever it stands. One that the GPU has whole, or that is over, stays as it is. */
void lane_cancel(struct lane *lane, int flow, uint64_t id) {
    enter(lane);
    struct copy *copy = copy_find(lane, id);
    struct queue *queue = &lane->queues[flow];
    struct copy *before = NULL, *at = queue->first;
    while (at && at != copy) before = at, at = at->next;
    if (copy && at) {
        int64_t now = monotonic();
        cancel(copy);
        if (before) {
            before->next = copy->next;
            if (queue->last == copy) queue->last = before;
            copy->next = NULL;
            copy->queued = false;
            settle(lane, copy, now);
        } else {
            refresh(lane, flow, now);
        }
    }
    leave(lane);
}

/* Forget everything (the GPU is lost): nothing is told of it, nothing is given to the GPU any more. */
void lane_abandon(struct lane *lane) {
    enter(lane);
    lane->dead = true;
    lane->flying = lane->unready = 0;
    for (int which = 0; which < STREAMS; which++) lane->rings[which].tail = lane->rings[which].head;
    lane->report_count = 0;
    pthread_mutex_unlock(&lane->mutex);
}

/* Do what can be done now, and take up to `most` reports, oldest first. `deadline`: when to come again, -1 for never. */
int64_t lane_step(struct lane *lane, struct report *reports, int64_t most, int64_t *deadline) {
    enter(lane);
    if (!lane->dead) advance(lane);
    int64_t count = least(most, (int64_t)lane->report_count);
    if (count) memcpy(reports, lane->reports, (size_t)count * sizeof *reports);
    lane->report_count -= (size_t)count;
    if (lane->report_count) memmove(lane->reports, lane->reports + count, lane->report_count * sizeof *reports);
    int64_t now = monotonic();
    *deadline = lane->report_count ? now : lane->dead ? FOREVER : owner_deadline(lane, now);
    lane->attended_until = *deadline <= now + SOON_NS ? now + ATTENDED_NS : 0;
    if (*deadline == FOREVER) *deadline = -1;
    leave(lane);
    return count;
}

/* `lane_step` for one who waits for outcomes and comes back at once; reports stay for the owner. False: the GPU is lost. */
int lane_look(struct lane *lane) {
    enter(lane);
    bool alive = !lane->dead;
    if (alive) advance(lane);
    int64_t until = monotonic() + ATTENDED_NS;
    if (until > lane->attended_until) lane->attended_until = until;
    pthread_mutex_unlock(&lane->mutex);
    return alive;
}

/* Bytes that the tenant has waiting. */
int64_t lane_queued(struct lane *lane, int flow) {
    enter(lane);
    int64_t sum = 0;
    for (struct copy *copy = lane->queues[flow].first; copy; copy = copy->next) sum += copy->nbytes - copy->issued;
    pthread_mutex_unlock(&lane->mutex);
    return sum;
}

/* Keep arrivals from now on. */
void lane_record(struct lane *lane) {
    enter(lane);
    if (!lane->arrivals && (lane->arrivals = malloc(1024 * sizeof *lane->arrivals))) lane->arrival_room = 1024;
    leave(lane);
}

/* Take up to `most` arrivals, the oldest ones; returns how many there were. */
int64_t lane_recorded(struct lane *lane, struct arrival *arrivals, int64_t most) {
    enter(lane);
    int64_t count = (int64_t)lane->arrival_count, taken = least(most, count);
    if (taken) memcpy(arrivals, lane->arrivals, (size_t)taken * sizeof *arrivals);
    lane->arrival_count -= (size_t)taken;
    if (lane->arrival_count) memmove(lane->arrivals, lane->arrivals + taken, lane->arrival_count * sizeof *arrivals);
    pthread_mutex_unlock(&lane->mutex);
    return count;
}

void lane_vitals(struct lane *lane, struct vitals *vitals) {
    enter(lane);
    *vitals = lane->vitals;
    pthread_mutex_unlock(&lane->mutex);
}

/* --- the policy alone, for the test that holds it against Python's */

void *fair_open(const struct granularity *chunk) {
    struct fair *fair = calloc(1, sizeof *fair);
    if (fair) fair->chunk = *chunk;
    return fair;
}
void fair_close(struct fair *fair) { free(fair); }
int fair_call_admit(struct fair *fair, const struct share *share, int floor_chunks) {
    return fair_admit(fair, share, floor_chunks);
}
void fair_call_remove(struct fair *fair, int flow, int64_t now) { fair_remove(fair, flow, now); }
void fair_call_wake(struct fair *fair, int flow, int64_t now) { fair_wake(fair, flow, now); }
void fair_call_sleep(struct fair *fair, int flow, int64_t now) { fair_sleep(fair, flow, now); }
int64_t fair_call_next(struct fair *fair, int64_t now) { return fair_next_eligible(fair, now); }
/* Picks and charges min(quantum, nbytes); out: flow, quantum, latency-sensitive, due. */
void fair_call_pick(struct fair *fair, int64_t now, int64_t nbytes, int64_t out[4]) {
    struct pick pick = fair_pick(fair, now);
    out[0] = pick.flow, out[1] = pick.quantum, out[2] = pick.latency_sensitive, out[3] = pick.due;
    if (pick.flow >= 0) fair_charge(fair, &pick, least(nbytes, pick.quantum));
}
/* How far a flow's virtual runtime is above the minimum; to be asked while that fits. */
int64_t fair_call_lag(struct fair *fair, int flow) { return (int64_t)(fair->flows[flow].vruntime - fair->min_vruntime); }
