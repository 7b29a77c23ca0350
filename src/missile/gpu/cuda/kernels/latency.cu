// Latency of single loads past L1, from chosen SMs to chosen addresses.
//
// One block per SM (the launcher asks for so much shared memory that no two fit on one), one thread in each that works.
// All blocks meet before any begins: a block that left early would make room for a second one on its SM.
//
// -DLOADS=n: loads in a chain; unrolled, so that nothing but the loads is timed.
#ifndef LOADS
#define LOADS 4
#endif

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

__device__ u32 sm_id() {
    u32 id;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(id));
    return id;
}

__device__ u32 cycles() {
    u32 now;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
    return now;
}

__device__ u32 load_l2(u64 address) {
    u32 value;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

__device__ void meet(u32* arrived, u32 blocks) {
    __syncthreads();
    if (threadIdx.x == 0) {
        atomicAdd(arrived, 1u);
        while (*(volatile u32*)arrived < blocks) __nanosleep(100);
    }
    __syncthreads();
}

// slot_of_sm[id] < 0: this SM does not measure. out is (slots, n), row-major: cycles of the fastest of `repeats` chains.
// zero must be 0: the compiler does not know it, so each load's address depends on the load before, whatever is read.
extern "C" __global__ void latency(const i64* addresses, i64 n, const int* slot_of_sm, int sms, int slots, int repeats,
                                   u32 zero, u32* arrived, u32* out) {
    __shared__ volatile u32 sink;
    meet(arrived, gridDim.x);
    u32 id = sm_id();
    if (threadIdx.x != 0 || id >= (u32)sms) return;
    int slot = slot_of_sm[id];
    if (slot < 0) return;
    u32* row = out + (i64)slot * n;
    // SMs start apart, so that no two of them time the same slice's same line at once.
    i64 start = n / slots * slot;
    for (i64 k = 0; k < n; k++) {
        i64 i = start + k;
        if (i >= n) i -= n;
        u64 p = (u64)__ldg(addresses + i);
        p += load_l2(p) & zero;  // brings the line into L2 and its translation into the TLB
        sink = (u32)p;
        u32 best = 0xffffffffu;
#pragma unroll 1  // all repeats run the same instructions
        for (int repeat = 0; repeat < repeats; repeat++) {
            u32 begin = cycles();
#pragma unroll
            for (int load = 0; load < LOADS; load++) p += load_l2(p) & zero;
            sink = (u32)p;  // issues only when the chain's last value is there, and before the clock is read
            best = min(best, cycles() - begin);
        }
        row[i] = best;
    }
}

// The SM that each block of a full grid runs on, shape (gridDim.x,).
extern "C" __global__ void which_sm(u32* arrived, u32* out) {
    meet(arrived, gridDim.x);
    if (threadIdx.x == 0) out[blockIdx.x] = sm_id();
}
