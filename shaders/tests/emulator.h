// A CUDA device in plain C++, one block at a time, for the kernels of shaders/src/cuda as they are.
//
// Every CUDA thread is a coroutine; they run in an order that changes from pass to pass. Barriers, shuffles, mma and ldmatrix wait for all
// threads concerned and check that these are at the same call. Asynchronous copies land as late as the waits allow. Shared memory
// begins as NaNs. Every allocation ends at an unmapped page, so that an access beyond it ends the process.
// Not emulated: timing, warps that run apart within a warp's collective, the tensor cores' own rounding.
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <utility>
#include <vector>

#define TW_HOST
#define __launch_bounds__(...)
struct dim { unsigned x, y, z; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static dim threadIdx, blockIdx, blockDim, gridDim;

[[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "emulator: %s (block %u %u %u, thread %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
    exit(3);
}

struct Copy {
    void* to;
    const void* from;
    unsigned bytes;
};
struct Thread {
    ucontext_t context;
    jmp_buf at;
    bool started, done;
    std::vector<std::vector<Copy>> groups; // oldest first; the last one is open
    char* stack;
};
struct Meeting {
    unsigned arrived;
    unsigned long generation;
    int kind;
    void* slots[1024];
};
static std::vector<Thread> threads(1024);
static Meeting warps[32], block_meeting;
static unsigned current, live;
static jmp_buf scheduler;
static void (*body)();
static unsigned char* shared_memory;

static void yield() {
    unsigned self = current;
    if (_setjmp(threads[self].at) == 0) _longjmp(scheduler, 1);
    current = self;
    threadIdx = {self, 0, 0};
}

// Waits for `count` threads at the same kind of call; the last one runs `act` over what all brought.
template <class Act>
static void meet(Meeting& m, unsigned place, unsigned count, int kind, void* mine, Act act) {
    if (m.arrived == 0) m.kind = kind;
    if (m.kind != kind) fail("threads meet at different calls");
    m.slots[place] = mine;
    if (++m.arrived == count) {
        act(m.slots);
        m.arrived = 0;
        m.generation++;
    } else {
        unsigned long generation = m.generation;
        while (m.generation == generation) yield();
    }
}
template <class Act>
static void in_warp(int kind, void* mine, Act act) {
    meet(warps[current / 32], current % 32, 32, kind, mine, act);
}

typedef uint32_t host_u32;
static float f32_of_bits(host_u32 bits) { float x; memcpy(&x, &bits, 4); return x; }
static host_u32 bits_of_f32(float x) { host_u32 b; memcpy(&b, &x, 4); return b; }
static float f32_of_f16(unsigned short h) {
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    float x = exponent == 0 ? ldexpf((float)mantissa, -24) : exponent == 31 ? (mantissa ? NAN : INFINITY) : ldexpf((float)(mantissa + 1024), exponent - 25);
    return h >> 15 ? -x : x;
}
static unsigned short f16_of_f32(float x) {
    host_u32 sign = bits_of_f32(x) >> 31 << 15;
    float a = fabsf(x);
    if (a != a) return (unsigned short)(sign | 0x7E00);
    if (a >= 65520.0f) return (unsigned short)(sign | 0x7C00);
    if (a < ldexpf(1, -14)) return (unsigned short)(sign | (host_u32)nearbyintf(ldexpf(a, 24)));
    int e;
    frexpf(a, &e); // a = m 2^e, m in [0.5, 1)
    host_u32 mantissa = (host_u32)nearbyintf(ldexpf(a, 11 - e)); // 1024..2048
    return (unsigned short)(sign | (((host_u32)(e + 14) << 10) + mantissa - 1024));
}
static host_u32 bf16_of(float x) {
    host_u32 b = bits_of_f32(x);
    if ((b & 0x7FFFFFFF) > 0x7F800000) return b >> 16 | 0x40;
    return (b + 0x7FFF + (b >> 16 & 1)) >> 16;
}
static host_u32 bf16x2(float low, float high) { return bf16_of(low) | bf16_of(high) << 16; }
static double bf16_value(host_u32 pair, int i) { return f32_of_bits(i ? pair & 0xFFFF0000u : pair << 16); }
static host_u32 bf16x2_fma(host_u32 a, host_u32 b, host_u32 c) {
    float r[2];
    for (int i = 0; i < 2; i++) r[i] = (float)(bf16_value(a, i) * bf16_value(b, i) + bf16_value(c, i));
    return bf16x2(r[0], r[1]);
}
static host_u32 funnel(host_u32 low, host_u32 high, host_u32 shift) { return (host_u32)(((uint64_t)high << 32 | low) >> (shift & 31)); }

struct MmaLane { float* c; host_u32 a[4], b[2]; };
static void mma(float* c, host_u32 a0, host_u32 a1, host_u32 a2, host_u32 a3, host_u32 b0, host_u32 b1) {
    MmaLane mine = {c, {a0, a1, a2, a3}, {b0, b1}};
    in_warp(1, &mine, [](void** slots) {
        double a[16][16], b[16][8];
        for (int l = 0; l < 32; l++) {
            const MmaLane& x = *(MmaLane*)slots[l];
            int g = l / 4, t = l % 4;
            for (int i = 0; i < 2; i++) {
                a[g][2 * t + i] = bf16_value(x.a[0], i);
                a[g + 8][2 * t + i] = bf16_value(x.a[1], i);
                a[g][2 * t + 8 + i] = bf16_value(x.a[2], i);
                a[g + 8][2 * t + 8 + i] = bf16_value(x.a[3], i);
                b[2 * t + i][g] = bf16_value(x.b[0], i);
                b[2 * t + 8 + i][g] = bf16_value(x.b[1], i);
            }
        }
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) {
                int row = l / 4 + 8 * (i / 2), column = l % 4 * 2 + i % 2;
                float* out = ((MmaLane*)slots[l])->c + i;
                double sum = *out;
                for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
                *out = (float)sum;
            }
    });
}
struct MatrixLane { host_u32* r; const void* row; };
static void ldmatrix4(host_u32* r, const void* row) {
    if ((uintptr_t)row % 16) fail("ldmatrix at an unaligned row");
    MatrixLane mine = {r, row};
    in_warp(2, &mine, [](void** slots) {
        for (int l = 0; l < 32; l++)
            for (int m = 0; m < 4; m++)
                memcpy(((MatrixLane*)slots[l])->r + m, (const char*)((MatrixLane*)slots[8 * m + l / 4])->row + l % 4 * 4, 4);
    });
}
struct ShuffleLane { host_u32 value, result; int mask; };
static host_u32 warp_xor_u32(host_u32 x, int mask) {
    ShuffleLane mine = {x, 0, mask};
    in_warp(3, &mine, [](void** slots) {
        for (int l = 0; l < 32; l++) {
            ShuffleLane& to = *(ShuffleLane*)slots[l];
            to.result = ((ShuffleLane*)slots[l ^ to.mask])->value;
        }
    });
    return mine.result;
}
static float warp_xor(float x, int mask) { return f32_of_bits(warp_xor_u32(bits_of_f32(x), mask)); }
static host_u32 warp_ballot(bool x) {
    ShuffleLane mine = {x, 0, 0};
    in_warp(4, &mine, [](void** slots) {
        host_u32 all = 0;
        for (int l = 0; l < 32; l++) all |= ((ShuffleLane*)slots[l])->value << l;
        for (int l = 0; l < 32; l++) ((ShuffleLane*)slots[l])->result = all;
    });
    return mine.result;
}
static void warp_sync() { in_warp(5, nullptr, [](void**) {}); }
static void block_sync() { meet(block_meeting, current, live, 6, nullptr, [](void**) {}); }
static int leading_zeros(host_u32 x) { return x ? __builtin_clz(x) : 32; }

static void copy16(void* to, const void* from, unsigned bytes) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16) fail("asynchronous copy at an unaligned address");
    if (bytes) *(volatile const char*)from; // the address counts even before the copy lands
    threads[current].groups.back().push_back({to, from, bytes});
}
static void copy_commit() { threads[current].groups.emplace_back(); }
template <int PENDING>
static void copy_wait() {
    auto& groups = threads[current].groups;
    while (groups.size() > PENDING + 1) {
        for (const Copy& c : groups.front()) {
            memcpy(c.to, c.from, c.bytes);
            memset((char*)c.to + c.bytes, 0, 16 - c.bytes);
        }
        groups.erase(groups.begin());
    }
}
static unsigned char* emulated_shared() { return shared_memory; }

static void thread_main() {
    body();
    threads[current].done = true;
    _longjmp(scheduler, 1);
}

static void run_block(unsigned shared_bytes) {
    static unsigned order[1024];
    static uint64_t random = 88172645463325252ull;
    memset(shared_memory, 0xFF, 256 * 1024);
    for (auto& w : warps) w.arrived = 0;
    block_meeting.arrived = 0;
    live = blockDim.x;
    for (unsigned i = 0; i < blockDim.x; i++) {
        Thread& t = threads[i];
        t.started = t.done = false;
        t.groups.assign(1, {});
        if (!t.stack) t.stack = (char*)malloc(128 * 1024);
        order[i] = i;
    }
    while (live > 0) {
        for (unsigned i = blockDim.x - 1; i > 0; i--) {
            random ^= random << 13, random ^= random >> 7, random ^= random << 17;
            std::swap(order[i], order[random % (i + 1)]);
        }
        for (volatile unsigned i = 0; i < blockDim.x; i++) {
            Thread& t = threads[order[i]];
            if (t.done) continue;
            current = order[i];
            threadIdx = {current, 0, 0};
            if (_setjmp(scheduler) == 0) {
                if (t.started) _longjmp(t.at, 1);
                t.started = true;
                getcontext(&t.context);
                t.context.uc_stack.ss_sp = t.stack;
                t.context.uc_stack.ss_size = 128 * 1024;
                t.context.uc_link = nullptr;
                makecontext(&t.context, thread_main, 0);
                setcontext(&t.context);
            }
            if (threads[current].done) {
                live--;
                if (block_meeting.arrived) fail("a thread ended while others wait at a barrier");
            }
        }
    }
    for (unsigned i = shared_bytes; i < 256 * 1024; i++)
        if (shared_memory[i] != 0xFF) fail("shared memory written beyond what was asked for");
}

// Kernels by name; arguments come as 8 bytes each, of which the first ones count.
struct Entry {
    std::string name;
    void (*function)();
    void (*call)(void (*)(), const uint64_t*);
};
static std::vector<Entry> entries;
template <class T>
static T argument(const uint64_t* from) {
    T x;
    memcpy(&x, from, sizeof x);
    return x;
}
template <class... A, size_t... I>
static void spread(void (*f)(A...), const uint64_t* v, std::index_sequence<I...>) {
    f(argument<A>(v + I)...);
}
template <class... A>
static void add(const char* name, void (*f)(A...)) {
    entries.push_back({name, (void (*)())f, [](void (*g)(), const uint64_t* v) {
                           spread((void (*)(A...))g, v, std::index_sequence_for<A...>{});
                       }});
}

static const Entry* launched;
static const uint64_t* launched_arguments;
static void read_all(void* to, size_t bytes) {
    if (bytes && fread(to, bytes, 1, stdin) != 1) exit(0);
}
template <class T>
static T read_one() { T x; read_all(&x, sizeof x); return x; }
static void reply(const void* from, size_t bytes) {
    if (bytes) fwrite(from, bytes, 1, stdout);
    fflush(stdout);
}

// Commands on standard input: 1 allocate, 2 write, 3 read, 4 launch.
static int serve() {
    shared_memory = (unsigned char*)aligned_alloc(256, 256 * 1024);
    for (;;) {
        switch (read_one<uint32_t>()) {
        case 1: {
            uint64_t bytes = (read_one<uint64_t>() + 255) / 256 * 256, mapped = (bytes + 4095) / 4096 * 4096;
            char* at = (char*)mmap(nullptr, mapped + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (at == MAP_FAILED) fail("out of memory");
            mprotect(at + mapped, 4096, PROT_NONE);
            uint64_t address = (uint64_t)at + mapped - bytes;
            reply(&address, 8);
            break;
        }
        case 2: {
            char* to = (char*)read_one<uint64_t>();
            read_all(to, read_one<uint64_t>());
            break;
        }
        case 3: {
            const char* from = (const char*)read_one<uint64_t>();
            reply(from, read_one<uint64_t>());
            break;
        }
        case 4: {
            std::string name(read_one<uint32_t>(), 0);
            read_all(&name[0], name.size());
            uint32_t shape[5];
            read_all(shape, sizeof shape);
            std::vector<uint64_t> arguments(read_one<uint32_t>());
            read_all(arguments.data(), arguments.size() * 8);
            launched = nullptr;
            for (const Entry& e : entries)
                if (e.name == name) launched = &e;
            if (!launched) fail(("no kernel " + name).c_str());
            launched_arguments = arguments.data();
            body = [] { launched->call(launched->function, launched_arguments); };
            gridDim = {shape[0], shape[1], shape[2]};
            blockDim = {shape[3], 1, 1};
            for (unsigned z = 0; z < gridDim.z; z++)
                for (unsigned y = 0; y < gridDim.y; y++)
                    for (unsigned x = 0; x < gridDim.x; x++) {
                        blockIdx = {x, y, z};
                        run_block(shape[4]);
                    }
            uint32_t ok = 0;
            reply(&ok, 4);
            break;
        }
        default: fail("unknown command");
        }
    }
}
