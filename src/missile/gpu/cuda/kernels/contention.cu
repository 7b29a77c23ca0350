// A victim that passes over its memory and is timed, and an aggressor that loops over its own, in one launch.
//
// One block per SM; the SM's id decides the role. Being one launch, both sides surely run at the same time, and times
// are taken on the GPU: no launch overhead is in them. Memory is a list of 256-byte units, each moved whole by one warp.
// A block keeps its share of the list in shared memory, so that reading the list does not disturb what is measured.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

enum Access { READ = 0, READ_WRITE = 1, WRITE = 2 };

// Device-side state of one measurement; the host zeroes it before each launch.
struct State {
    u32 arrived;         // blocks that have started
    u32 turn;            // arrivals at the victims' barrier, all passes together
    u32 phase;           // WARMING, TIMED, OVER: what the aggressor goes by
    u32 ready;           // aggressor blocks that have run for WARM_NS
    u64 aggressor_units; // moved while TIMED
    u64 timed_ns;        // how long TIMED lasted
    u64 sink;
};
const u64 WARM_NS = 200000;  // time enough to fill any L2 several times over
enum Phase { WARMING = 0, TIMED = 1, OVER = 2 };

// One side's memory: n units of 256 bytes, unit i at base + 256 * units[i].
struct Side {
    u64 base;
    const u32* units;
    i64 n;
    int blocks;  // SMs on this side
    int access;
};

__device__ u32 sm_id() {
    u32 id;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(id));
    return id;
}

__device__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
    return now;
}

__device__ u32 peek(const u32* p) {
    u32 value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
}

__device__ u64 load_l2(u64 address) {
    u64 value;
    asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

__device__ void store_l2(u64 address, u64 value) {
    asm volatile("st.global.cg.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

extern __shared__ u32 share[];

// A block's part of its side's list: every blocks-th unit from its rank on, or a stretch of the list where that does not
// fit in shared memory (what is staged again and again had better be contiguous).
struct Share {
    const u32* units;  // shared memory where it fits, else the list itself
    i64 count;
    i64 first, step;
};

// The whole block calls this, when no warp of it needs what `share` holds any more.
__device__ Share stage(const Share& part) {
    for (i64 i = threadIdx.x; i < part.count; i += blockDim.x) share[i] = part.units[part.first + i * part.step];
    __syncthreads();
    return {share, part.count, 0, 1};
}

__device__ Share take_share(const Side& side, int rank, i64 shared_units) {
    i64 count = rank < side.n ? (side.n - rank + side.blocks - 1) / side.blocks : 0;
    i64 each = (side.n + side.blocks - 1) / side.blocks, first = each * rank;
    if (each <= shared_units) return stage({side.units, count, rank, side.blocks});
    i64 left = side.n > first ? side.n - first : 0;
    return {side.units, left < each ? left : each, first, 1};
}

// A warp's next BATCH units of its block's share, from index i on, `stride` apart; the loads are in flight together.
// Returns how many there were.
template <int BATCH>
__device__ int move_units(const Side& side, const Share& mine, i64 i, i64 stride, u64 zero, u64& value) {
    u64 address[BATCH], got[BATCH];
    int valid = 0;
#pragma unroll
    for (int u = 0; u < BATCH; u++) {
        i64 j = i + u * stride;
        if (j >= mine.count) break;
        address[u] = side.base + 256ull * mine.units[mine.first + j * mine.step] + 8 * (threadIdx.x % 32);
        if (BATCH == 1) address[u] += value & zero;  // the chain: this address needs the last value
        valid++;
    }
    if (side.access != WRITE) {
#pragma unroll
        for (int u = 0; u < BATCH; u++)
            if (u < valid) got[u] = load_l2(address[u]);
#pragma unroll
        for (int u = 0; u < BATCH; u++)
            if (u < valid) value ^= got[u];
    }
    if (side.access != READ) {
#pragma unroll
        for (int u = 0; u < BATCH; u++)
            if (u < valid) store_l2(address[u], side.access == WRITE ? 0 : got[u]);
    }
    return valid;
}

// A pass over all of `mine`. A share that does not fit in shared memory comes in parts: were each entry read where it is
// used, a pass would wait for the list, which lies anywhere in memory, and not for what is measured.
template <int BATCH>
__device__ void pass_over(const Side& side, const Share& mine, i64 shared_units, u64 zero, u64& value) {
    const i64 warps = blockDim.x / 32, warp = threadIdx.x / 32;
    if (mine.units == share) {
        for (i64 i = warp; i < mine.count; i += warps * BATCH) move_units<BATCH>(side, mine, i, warps, zero, value);
        return;
    }
    for (i64 from = 0; from < mine.count; from += shared_units) {
        i64 count = mine.count - from < shared_units ? mine.count - from : shared_units;
        __syncthreads();
        Share part = stage({mine.units, count, mine.first + from * mine.step, mine.step});
        for (i64 i = warp; i < count; i += warps * BATCH) move_units<BATCH>(side, part, i, warps, zero, value);
    }
}

// All victim blocks wait for each other; `turn` counts arrivals since the launch.
__device__ void victims_meet(State* state, int blocks, u32& meetings) {
    __syncthreads();
    meetings++;
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(&state->turn, 1u);
        while (peek(&state->turn) < meetings * (u32)blocks) {}
    }
    __syncthreads();
}

// BATCH 1 chases one load at a time, more is for bandwidth.
template <int BATCH>
__device__ void be_victim(State* state, const Side& side, const Share& mine, int rank, int repeats, int passes,
                          i64 shared_units, u64 zero, int aggressors, u64* begins, u64* ends) {
    u64 value = 0, timed = 0;
    u32 meetings = 0;
    if (rank == 0 && threadIdx.x == 0)
        while (peek(&state->ready) < (u32)aggressors) {}
    for (int repeat = -1; repeat < repeats; repeat++) {  // the first round warms caches and TLBs and is not timed
        victims_meet(state, side.blocks, meetings);
        if (repeat == 0 && rank == 0 && threadIdx.x == 0) {
            timed = nanoseconds();
            atomicExch(&state->phase, TIMED);
        }
        if (repeat >= 0 && threadIdx.x == 0) begins[(i64)repeat * side.blocks + rank] = nanoseconds();
        for (int pass = 0; pass < passes; pass++) pass_over<BATCH>(side, mine, shared_units, zero, value);
        // Loads have ended when their values are used, stores when a fence says so.
        if (value == ~zero) state->sink = value;
        if (side.access != READ) __threadfence();
        __syncthreads();
        if (repeat >= 0 && threadIdx.x == 0) ends[(i64)repeat * side.blocks + rank] = nanoseconds();
    }
    victims_meet(state, side.blocks, meetings);
    if (rank == 0 && threadIdx.x == 0) {
        state->timed_ns = nanoseconds() - timed;
        atomicExch(&state->phase, OVER);
    }
}

// window_ns > 0: there is no victim, and the aggressor's first thread keeps the time.
__device__ void be_aggressor(State* state, const Side& side, const Share& mine, int rank, u64 window_ns, u64 zero) {
    const i64 warps = blockDim.x / 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0 && !mine.count) atomicAdd(&state->ready, 1u);
    if (warp >= mine.count) return;
    const bool keeper = window_ns && rank == 0 && threadIdx.x == 0;
    const u64 began = nanoseconds();
    u64 value = 0, counted = 0, timed = 0;
    u32 phase = WARMING;
    bool warm = threadIdx.x != 0;
    i64 i = warp;
    while (phase != OVER) {
        u64 moved = 0;
        for (int batch = 0; batch < 8; batch++) {
            moved += move_units<8>(side, mine, i, warps, zero, value);
            i += warps * 8;
            if (i >= mine.count) i = warp;
        }
        if (phase == TIMED) counted += moved;
        if (!warm && nanoseconds() - began > WARM_NS) {
            atomicAdd(&state->ready, 1u);
            warm = true;
        }
        if (keeper && phase == WARMING && nanoseconds() - began > window_ns / 4) {
            timed = nanoseconds();
            atomicExch(&state->phase, TIMED);
        }
        if (keeper && phase == TIMED && nanoseconds() - timed > window_ns) {
            state->timed_ns = nanoseconds() - timed;
            atomicExch(&state->phase, OVER);
        }
        phase = peek(&state->phase);
    }
    if (value == ~zero) state->sink = value;
    if (threadIdx.x % 32 == 0) atomicAdd(&state->aggressor_units, counted);
}

// role_of_sm[id]: 0 idle, r > 0 victim of rank r - 1, r < 0 aggressor of rank -r - 1.
// begins, ends: (repeats, victim blocks), ns of the GPU's global timer. zero must be 0.
extern "C" __global__ void __launch_bounds__(1024) contention(State* state, const int* role_of_sm, int sms, Side victim, Side aggressor,
                                      int repeats, int passes, int chase, u64 window_ns, i64 shared_units, u64 zero,
                                      u64* begins, u64* ends) {
    __syncthreads();
    if (threadIdx.x == 0) {
        atomicAdd(&state->arrived, 1u);
        while (peek(&state->arrived) < gridDim.x) __nanosleep(100);
    }
    __syncthreads();
    u32 id = sm_id();
    int role = id < (u32)sms ? role_of_sm[id] : 0;
    if (role > 0) {
        Share mine = take_share(victim, role - 1, shared_units);
        if (chase)
            be_victim<1>(state, victim, mine, role - 1, repeats, passes, shared_units, zero, aggressor.blocks, begins, ends);
        else
            be_victim<8>(state, victim, mine, role - 1, repeats, passes, shared_units, zero, aggressor.blocks, begins, ends);
    } else if (role < 0) {
        Share mine = take_share(aggressor, -role - 1, shared_units);
        be_aggressor(state, aggressor, mine, -role - 1, window_ns, zero);
    }
}
