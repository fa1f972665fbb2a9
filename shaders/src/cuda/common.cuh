// Types, conversions and the few instructions that CUDA C++ has no function for.
//
// Everything compiles twice: by NVRTC for a device, and by a host compiler with TW_HOST for the emulator of the tests
// (`shaders/tests/emulator.h`), which supplies threads, barriers, mma, ldmatrix and asynchronous copies in plain C++.
// No header is included, so that NVRTC needs nothing but itself.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef TW_HOST
#define DEV static inline
#define KERNEL(THREADS, BLOCKS) static void
#define SHARED(NAME) u8* NAME = emulated_shared()
#else
#define DEV static __device__ __forceinline__
#define KERNEL(THREADS, BLOCKS) extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#define SHARED(NAME) extern __shared__ __align__(16) u8 NAME[]
#endif

#ifndef INFINITY
#define INFINITY f32_of_bits(0x7F800000u)
#endif

// "Not in this buffer" in a table of experts.
#define ABSENT 0xFFFFFFFFu

DEV u32 min_u32(u32 a, u32 b) { return a < b ? a : b; }
DEV u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }

#ifndef TW_HOST
DEV float f32_of_bits(u32 bits) { return __uint_as_float(bits); }
DEV u32 bits_of_f32(float x) { return __float_as_uint(x); }

DEV float f32_of_f16(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

DEV u16 f16_of_f32(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Two bf16, `low` in the lower half, rounded to nearest even.
DEV u32 bf16x2(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// a * b + c on two bf16 each.
DEV u32 bf16x2_fma(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Bytes `shift / 8` to `shift / 8 + 3` of the eight bytes low, high.
DEV u32 funnel(u32 low, u32 high, u32 shift) { return __funnelshift_r(low, high, shift); }

// c += a b: a 16x16 bf16 (rows), b 16x8 bf16 (columns), c f32. With g = lane / 4 and t = lane % 4 a lane holds
// a[0]: row g, columns 2t and 2t+1; a[1]: row g+8; a[2]: row g, columns 2t+8 and 2t+9; a[3]: row g+8, the same;
// b0: rows 2t and 2t+1 of column g; b1: rows 2t+8 and 2t+9; c: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1). (PTX ISA, mma.m16n8k16)
DEV void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DEV u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEV void ldmatrix4(u32* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Copies 16 bytes to shared memory without registers; `bytes` of them from `from`, zeros for the rest.
DEV void copy16(void* to, const void* from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
DEV void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING groups of this thread's copies are under way.
template <int PENDING>
DEV void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

DEV float warp_xor(float x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
DEV u32 warp_xor_u32(u32 x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
DEV u32 warp_ballot(bool x) { return __ballot_sync(0xFFFFFFFFu, x); }
DEV void warp_sync() { __syncwarp(); }
DEV void block_sync() { __syncthreads(); }
DEV int leading_zeros(u32 x) { return __clz((int)x); }
#endif

DEV float bf16_low(u32 pair) { return f32_of_bits(pair << 16); }
DEV float bf16_high(u32 pair) { return f32_of_bits(pair & 0xFFFF0000u); }

DEV float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) x += warp_xor(x, mask);
    return x;
}

DEV float warp_max(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) x = fmaxf(x, warp_xor(x, mask));
    return x;
}

// The block's sum in every thread; `scratch` holds a float per warp. Threads may use `scratch` again after the next barrier.
DEV float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    block_sync();
    float sum = 0.0f;
    for (u32 w = 0; w < blockDim.x / 32; w++) sum += scratch[w];
    return sum;
}

DEV float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// 0: silu(gate) * up. 1: gpt-oss, gate * sigmoid(alpha gate) * (up + 1), both cut at `limit`.
DEV float activate(u32 kind, float alpha, float limit, float gate, float up) {
    if (kind == 0) return gate * sigmoid(gate) * up;
    gate = fminf(gate, limit);
    up = fminf(fmaxf(up, -limit), limit);
    return gate * sigmoid(alpha * gate) * (up + 1.0f);
}

// Little-endian words at any address: whole aligned words around them are read.
DEV u32 load_u32(const u8* p) {
    const u32* w = (const u32*)((u64)p & ~3ull);
    return funnel(w[0], ((u64)p & 3) ? w[1] : 0u, ((u32)(u64)p & 3) * 8);
}
// At an even address.
DEV u16 load_u16_even(const u8* p) { return *(const u16*)p; }
