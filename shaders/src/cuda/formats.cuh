// Weight formats: what a lane needs of a group of 32 weights, as exact bf16 numbers and f32 scales.
//
// A row is read in chunks of GROUPS groups, CHUNK_BYTES each; UNROLL groups are in flight, as registers allow. Lane t of 4 holds eight weights of a group as four registers of two bf16
// codes; `column(t, j)` says which element of the group its j-th code is (the order in which they fall out of the packed words).
// A weight is the sum of its PARTS codes times `scale` minus `min`. Codes are exact: small integers, and floats cut in 2 or 3 parts of
// 8 bits. Layouts: ggml-common.h; the scalar twins are in runtime/src/quant.

// x + y * 1.0 on two bf16.
#define BF16_ONES 0x3F803F80u
DEV u32 bf16x2_add(u32 a, u32 b) { return bf16x2_fma(a, BF16_ONES, b); }

struct Scale {
    float first, second; // of elements 0-15 and 16-31
    float min;           // subtracted from every weight
};

// 0, 2, 1, 3, ...: two codes of a register are two bytes apart in a word.
DEV constexpr int interleaved(int j) { return (j & 4) | (j & 1) << 1 | (j & 2) >> 1; }

// Lane t holds elements 8t to 8t+7.
struct EightOrder {
    static constexpr bool SPLIT = false;
    DEV constexpr int column(int t, int j) { return 8 * t + interleaved(j); }
};
// Lane t holds elements 4t to 4t+3 and 16+4t to 16+4t+3.
struct SplitOrder {
    static constexpr bool SPLIT = true;
    DEV constexpr int column(int t, int j) { return (j & 4) * 4 + 4 * t + interleaved(j & 3); }
};
struct PlainOrder {
    static constexpr bool SPLIT = false;
    DEV constexpr int column(int t, int j) { return 8 * t + j; }
};

// Codes 0..15 in the low nibbles of the bytes of `word`, each less 8.
DEV void nibbles_less_8(u32 word, u32* out) {
    out[0] = bf16x2_add((word & 0x000F000Fu) | 0x43004300u, 0xC308C308u); // (128 + q) - 136
    out[1] = bf16x2_add((word >> 8 & 0x000F000Fu) | 0x43004300u, 0xC308C308u);
}

struct Q4_0 : SplitOrder {
    static constexpr int GROUPS = 8, GROUP_BYTES = 18, CHUNK_BYTES = 144, PARTS = 1, UNROLL = 2, MANY_GROUPS = 2;
    static constexpr bool SCALED = true, SCALES_OF_16 = false, HAS_MIN = false;
    struct Header {};
    DEV Header header(const u8*) { return {}; }
    DEV Scale scale(const u8* row, Header, int group) {
        float d = f32_of_f16(load_u16_even(row + group * GROUP_BYTES));
        return {d, d, 0.0f};
    }
    DEV void codes(const u8* row, int group, int t, int, u32 (*a)[4]) {
        u32 word = load_u32(row + group * GROUP_BYTES + 2 + 4 * t);
        nibbles_less_8(word, a[0]);
        nibbles_less_8(word >> 4, a[0] + 2);
    }
};

struct Q8_0 : EightOrder {
    static constexpr int GROUPS = 8, GROUP_BYTES = 34, CHUNK_BYTES = 272, PARTS = 1, UNROLL = 2, MANY_GROUPS = 2;
    static constexpr bool SCALED = true, SCALES_OF_16 = false, HAS_MIN = false;
    struct Header {};
    DEV Header header(const u8*) { return {}; }
    DEV Scale scale(const u8* row, Header, int group) {
        float d = f32_of_f16(load_u16_even(row + group * GROUP_BYTES));
        return {d, d, 0.0f};
    }
    // A byte v is (128 + its lower seven bits) - (128, or 256 if its top bit is set); bf16 256 is 128 with the bit 0x80.
    DEV u32 bytes(u32 pair) {
        return bf16x2_add((pair & 0x007F007Fu) | 0x43004300u, (pair & 0x00800080u) | 0xC300C300u);
    }
    DEV void codes(const u8* row, int group, int t, int, u32 (*a)[4]) {
        const u8* at = row + group * GROUP_BYTES + 2 + 8 * t;
        u32 low = load_u32(at), high = load_u32(at + 4);
        a[0][0] = bytes(low);
        a[0][1] = bytes(low >> 8);
        a[0][2] = bytes(high);
        a[0][3] = bytes(high >> 8);
    }
};

struct MXFP4 : SplitOrder {
    static constexpr int GROUPS = 8, GROUP_BYTES = 17, CHUNK_BYTES = 136, PARTS = 1, UNROLL = 2, MANY_GROUPS = 2;
    static constexpr bool SCALED = true, SCALES_OF_16 = false, HAS_MIN = false;
    struct Header {};
    DEV Header header(const u8*) { return {}; }
    // 2^(e - 128), the scale of doubled codes; e = 0 and 1 are subnormal numbers.
    DEV Scale scale(const u8* row, Header, int group) {
        u32 e = row[group * GROUP_BYTES];
        float d = f32_of_bits(e < 2 ? 0x00200000u << e : (e - 1) << 23);
        return {d, d, 0.0f};
    }
    // E2M1 to bf16: the three lower bits are an exponent biased by 1 and a mantissa bit, so at bits 8..6 they are the number times 2^-126;
    // multiplied by 2^127 it is doubled, as in the scalar twin.
    DEV u32 e2m1(u32 signs, u32 magnitudes) {
        return bf16x2_fma((signs & 0x80008000u) | (magnitudes & 0x01C001C0u), 0x7F007F00u, 0x80008000u);
    }
    DEV void codes(const u8* row, int group, int t, int, u32 (*a)[4]) {
        u32 word = load_u32(row + group * GROUP_BYTES + 1 + 4 * t);
        a[0][0] = e2m1(word << 12, word << 6);
        a[0][1] = e2m1(word << 4, word >> 2);
        a[0][2] = e2m1(word << 8, word << 2);
        a[0][3] = e2m1(word, word >> 6);
    }
};

struct Q4_K : EightOrder {
    static constexpr int GROUPS = 8, CHUNK_BYTES = 144, PARTS = 1, UNROLL = 2, MANY_GROUPS = 8;
    static constexpr bool SCALED = true, SCALES_OF_16 = false, HAS_MIN = true;
    struct Header {
        u32 scales[2], mins[2]; // a byte per group
        float d, dmin;
    };
    // Blocks are 9 x 16 bytes, so that words are aligned where rows begin at multiples of 4.
    DEV Header header(const u8* row) {
        const u32* w = (const u32*)row;
        u32 a = w[1], b = w[2], c = w[3];
        Header h;
        h.d = f32_of_f16((u16)w[0]);
        h.dmin = f32_of_f16((u16)(w[0] >> 16));
        h.scales[0] = a & 0x3F3F3F3Fu;
        h.mins[0] = b & 0x3F3F3F3Fu;
        h.scales[1] = (c & 0x0F0F0F0Fu) | (a >> 2 & 0x30303030u);
        h.mins[1] = (c >> 4 & 0x0F0F0F0Fu) | (b >> 2 & 0x30303030u);
        return h;
    }
    DEV Scale scale(const u8*, const Header& h, int group) {
        u32 shift = (group & 3) * 8;
        float d = h.d * (float)((group < 4 ? h.scales[0] : h.scales[1]) >> shift & 0xFFu);
        return {d, d, h.dmin * (float)((group < 4 ? h.mins[0] : h.mins[1]) >> shift & 0xFFu)};
    }
    DEV u32 nibbles(u32 word) { return bf16x2_add((word & 0x000F000Fu) | 0x43004300u, 0xC300C300u); }
    DEV void codes(const u8* row, int group, int t, int, u32 (*a)[4]) {
        const uint2 words = *(const uint2*)(row + 16 + 32 * (group >> 1) + 8 * t);
        u32 shift = 4 * (group & 1);
        a[0][0] = nibbles(words.x >> shift);
        a[0][1] = nibbles(words.x >> (8 + shift));
        a[0][2] = nibbles(words.y >> shift);
        a[0][3] = nibbles(words.y >> (8 + shift));
    }
};

struct Q6_K : SplitOrder {
    static constexpr int GROUPS = 8, CHUNK_BYTES = 210, PARTS = 1, UNROLL = 2, MANY_GROUPS = 8;
    static constexpr bool SCALED = true, SCALES_OF_16 = true, HAS_MIN = false;
    struct Header {
        float d;
    };
    DEV Header header(const u8* row) { return {f32_of_f16(load_u16_even(row + 208))}; }
    DEV Scale scale(const u8* row, Header h, int group) {
        u16 pair = load_u16_even(row + 192 + 2 * group);
        return {h.d * (float)(signed char)(pair & 0xFF), h.d * (float)(signed char)(pair >> 8), 0.0f};
    }
    // Groups 0-3 are the first half of 128: group c has its low bits in bytes 32 (c % 2) on, in the nibble c / 2, its high bits at 2c.
    DEV void codes(const u8* row, int group, int t, int, u32 (*a)[4]) {
        int half = group >> 2, c = group & 3;
#pragma unroll
        for (int s = 0; s < 2; s++) {
            u32 low = load_u32(row + 64 * half + 32 * (c & 1) + 16 * s + 4 * t) >> (4 * (c >> 1));
            u32 high = load_u32(row + 128 + 32 * half + 16 * s + 4 * t) >> (2 * c);
            u32 q = (low & 0x0F0F0F0Fu) | (high << 4 & 0x30303030u);
            a[0][2 * s] = bf16x2_add((q & 0x003F003Fu) | 0x43004300u, 0xC320C320u); // (128 + q) - 160
            a[0][2 * s + 1] = bf16x2_add((q >> 8 & 0x003F003Fu) | 0x43004300u, 0xC320C320u);
        }
    }
};

// Numbers without scales. `left` elements of the row are in or after the group; what lies beyond is another row's and counts as zero.
template <int BYTES, int PIECES>
struct Plain : PlainOrder {
    static constexpr int GROUPS = 8 / BYTES, CHUNK_BYTES = 256, PARTS = PIECES, UNROLL = 2, MANY_GROUPS = 2;
    static constexpr bool SCALED = false, SCALES_OF_16 = false, HAS_MIN = false;
    struct Header {};
    DEV Header header(const u8*) { return {}; }
    DEV Scale scale(const u8*, Header, int) { return {1.0f, 1.0f, 0.0f}; }
};

// Cuts two numbers in PARTS bf16 parts each whose sum they are.
template <int PARTS>
DEV void cut(float x, float y, u32* parts, int stride) {
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        u32 part = bf16x2(x, y);
        parts[p * stride] = part;
        x -= bf16_low(part);
        y -= bf16_high(part);
    }
}

struct BF16 : Plain<2, 1> {
    DEV void codes(const u8* row, int group, int t, int left, u32 (*a)[4]) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int at = 8 * t + 2 * j;
            u32 low = at < left ? load_u16_even(row + 64 * group + 2 * at) : 0;
            u32 high = at + 1 < left ? load_u16_even(row + 64 * group + 2 * at + 2) : 0;
            a[0][j] = low | high << 16;
        }
    }
};

struct F16 : Plain<2, 2> {
    DEV void codes(const u8* row, int group, int t, int left, u32 (*a)[4]) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int at = 8 * t + 2 * j;
            float low = at < left ? f32_of_f16(load_u16_even(row + 64 * group + 2 * at)) : 0.0f;
            float high = at + 1 < left ? f32_of_f16(load_u16_even(row + 64 * group + 2 * at + 2)) : 0.0f;
            cut<2>(low, high, &a[0][j], 4);
        }
    }
};

struct F32 : Plain<4, 3> {
    DEV void codes(const u8* row, int group, int t, int left, u32 (*a)[4]) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int at = 8 * t + 2 * j;
            float low = at < left ? *(const float*)(row + 128 * group + 4 * at) : 0.0f;
            float high = at + 1 < left ? *(const float*)(row + 128 * group + 4 * at + 4) : 0.0f;
            cut<3>(low, high, &a[0][j], 4);
        }
    }
};

// The eight weights of lane t, in the order of `column`.
template <class F>
DEV void weights(const u8* row, const typename F::Header& header, int group, int t, int left, float* out) {
    u32 a[F::PARTS][4];
    F::codes(row, group, t, left, a);
    Scale scale = F::scale(row, header, group);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float low = bf16_low(a[0][j]), high = bf16_high(a[0][j]);
#pragma unroll
        for (int p = 1; p < F::PARTS; p++) {
            low += bf16_low(a[p][j]);
            high += bf16_high(a[p][j]);
        }
        if (F::SCALED) {
            float d = j < 2 ? scale.first : scale.second;
            if (!F::SCALES_OF_16) d = scale.first;
            low = d * low - scale.min;
            high = d * high - scale.min;
        }
        out[2 * j] = low;
        out[2 * j + 1] = high;
    }
}
