// The synthetic best-effort tenants (compiler/synthetic.py): each keeps one part of the GPU busy and little else.

// fp16 is handled as 16 bits and converted in PTX: NVRTC alone brings no cuda_fp16.h.
typedef unsigned short half_bits;

static __device__ float to_float(half_bits h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

static __device__ half_bits to_half(float f) {
    half_bits h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

// The two fp16 values of a 32-bit word, times those of another, summed onto `sum`.
static __device__ float dot2(unsigned a, unsigned b, float sum) {
    sum = fmaf(to_float(a & 0xffff), to_float(b & 0xffff), sum);
    return fmaf(to_float(a >> 16), to_float(b >> 16), sum);
}

// Streams `count` 16-byte words from source to target. Any grid; 256 threads.
extern "C" __global__ void __launch_bounds__(256) stream_copy(const uint4* source, uint4* target, long long count) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) target[i] = source[i];
}

// y = W x for row-major fp16 W of `rows` x `columns`, fp32 sums. One warp per row; 256 threads; columns a multiple of 256.
extern "C" __global__ void __launch_bounds__(256)
gemv(const half_bits* weights, const half_bits* x, half_bits* y, int rows, int columns) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (row >= rows) return;
    const uint4* w = reinterpret_cast<const uint4*>(weights + (long long)row * columns);
    const uint4* v = reinterpret_cast<const uint4*>(x);
    float sum = 0.0f;
#pragma unroll 4
    for (int i = lane; i < columns / 8; i += 32) {
        const uint4 a = __ldcs(w + i);
        const uint4 b = v[i];
        sum = dot2(a.w, b.w, dot2(a.z, b.z, dot2(a.y, b.y, dot2(a.x, b.x, sum))));
    }
#pragma unroll
    for (int step = 16; step; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
    if (lane == 0) y[row] = to_half(sum);
}

// `rounds` rounds of eight independent multiply-adds per thread, no memory but one final store per block.
extern "C" __global__ void __launch_bounds__(256) spin(float* sink, int rounds) {
    float v[8];
    const float scale = 0.999f + 1e-6f * threadIdx.x;
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = k + threadIdx.x;
    for (int i = 0; i < rounds; ++i) {
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] = fmaf(v[k], scale, 0.5f);
    }
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < 8; ++k) sum += v[k];
    if (threadIdx.x == 0) sink[blockIdx.x] = sum;
}

// values[i] += 1: as little work as a kernel can have. 128 threads.
extern "C" __global__ void __launch_bounds__(128) increment(float* values, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) values[i] += 1.0f;
}

// Small pseudo-random fp16 values in (-2^-6, 2^-6), so that data toggles the wires as a model's would. 256 threads.
extern "C" __global__ void __launch_bounds__(256) noise(half_bits* values, long long count, unsigned seed) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        unsigned h = (unsigned)i * 2654435761u + seed;
        h = (h ^ (h >> 15)) * 2246822519u;
        h ^= h >> 13;
        values[i] = to_half(((int)(h & 0xffff) - 32768) * (1.0f / 2097152.0f));
    }
}
