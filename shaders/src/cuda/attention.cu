// Causal grouped-query attention over the cache; latent attention over latents is the case of one key-value head.
//
// A block takes 16 query rows, (token, head) pairs that share a key-value head, and a range of positions in tiles of 32; warp w has rows
// w, w + 4, w + 8, w + 12 throughout. Lane p scores position p, so that the running maximum and sum (online softmax, arXiv 1805.02867) are
// warp reductions; then lanes stand for columns of the values. Few tokens over a long context are cut into ranges (flash-decoding):
// their partial results are put together by `attention_merge`. Tiles lie at fixed positions.

#define ATTENTION_ROWS 16
#define ATTENTION_TILE 32
#define WARP_ROWS 4

struct AttentionShape {
    u32 tokens, past, heads, kv_heads, key_dim, value_dim, value_stride, window, chunk, range;
    float scale, softcap;
};

DEV float load_kv(const float* p) { return *p; }
DEV float load_kv(const u16* p) { return f32_of_f16(*p); }
// Four, aligned to their size.
DEV float4 load_kv4(const float* p) { return *(const float4*)p; }
DEV float4 load_kv4(const u16* p) {
    uint2 words = *(const uint2*)p;
    return make_float4(f32_of_f16((u16)words.x), f32_of_f16((u16)(words.x >> 16)), f32_of_f16((u16)words.y), f32_of_f16((u16)(words.y >> 16)));
}

// Positions that the token at position `at` sees begin here.
DEV u32 first_visible(u32 at, u32 window, u32 chunk) {
    u32 first = window && at + 1 > window ? at + 1 - window : 0;
    return chunk ? max_u32(first, at - at % chunk) : first;
}

// Elements from row to row of a tile: 16-byte rows for f32 are 4 words apart modulo the banks, for f16 as well.
template <class E>
DEV constexpr u32 tile_pitch(u32 dim) {
    return (dim + 15) / 16 * 16 + 16 / sizeof(E);
}

template <class E>
DEV void load_tile(E* tile, u32 pitch, const E* from, u64 stride, u32 dim, u32 count) {
    constexpr u32 VECTOR = 16 / sizeof(E);
    if (dim % VECTOR == 0 && stride % VECTOR == 0 && (u64)from % 16 == 0) {
        u32 pieces = dim / VECTOR;
        for (u32 i = threadIdx.x; i < count * pieces; i += blockDim.x) {
            u32 p = i / pieces, piece = i % pieces;
            copy16(tile + p * pitch + piece * VECTOR, from + p * stride + piece * VECTOR, 16);
        }
    } else {
        for (u32 i = threadIdx.x; i < count * dim; i += blockDim.x) tile[i / dim * pitch + i % dim] = from[i / dim * stride + i % dim];
    }
}

// CHUNKS: value columns per lane, value_dim <= 32 CHUNKS.
// Shared: q [16, key_dim + pad] f32, exponentials [16, 32] f32, keys [32, pitch], values [32, pitch] unless they are the keys.
template <class E, int CHUNKS>
DEV void attention(const float* q, const E* keys, const E* values, const float* sinks, float* out, float* partial, const AttentionShape& s) {
    SHARED(shared);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 group = s.heads / s.kv_heads, kv_head = blockIdx.y, rows = s.tokens * group, row0 = blockIdx.x * ATTENTION_ROWS;
    u32 q_pitch = (s.key_dim + 3) / 4 * 4, pitch = tile_pitch<E>(s.key_dim), value_pitch = tile_pitch<E>(s.value_dim);
    bool shared_values = (const void*)values == (const void*)keys;
    float* q_tile = (float*)shared;
    float* weights = q_tile + ATTENTION_ROWS * q_pitch;
    E* key_tile = (E*)(weights + ATTENTION_ROWS * ATTENTION_TILE);
    E* value_tile = shared_values ? key_tile : key_tile + ATTENTION_TILE * pitch;
    if (shared_values) value_pitch = pitch;

    for (u32 i = threadIdx.x; i < ATTENTION_ROWS * q_pitch; i += blockDim.x) {
        u32 row = row0 + i / q_pitch, d = i % q_pitch;
        u64 at = ((u64)(row / group) * s.heads + kv_head * group + row % group) * s.key_dim + d;
        q_tile[i] = row < rows && d < s.key_dim ? q[at] * s.scale : 0.0f;
    }
    // Keys beyond key_dim meet zeros of q, and must be numbers.
    for (u32 i = threadIdx.x; i < ATTENTION_TILE * (q_pitch - s.key_dim); i += blockDim.x) {
        u32 pad = q_pitch - s.key_dim;
        key_tile[i / pad * pitch + s.key_dim + i % pad] = 0;
    }

    float most[WARP_ROWS], sum[WARP_ROWS], acc[WARP_ROWS][CHUNKS];
    u32 from[WARP_ROWS], to[WARP_ROWS];
#pragma unroll
    for (int i = 0; i < WARP_ROWS; i++) {
        u32 row = row0 + warp + 4 * i, at = s.past + row / group;
        from[i] = row < rows ? first_visible(at, s.window, s.chunk) : 0;
        to[i] = row < rows ? at + 1 : 0;
        // A sink is one more logit, seen first, without a value.
        bool sink = sinks && blockIdx.z == 0 && row < rows;
        most[i] = sink ? sinks[kv_head * group + row % group] : -INFINITY;
        sum[i] = sink ? 1.0f : 0.0f;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) acc[i][c] = 0.0f;
    }
    // What the first and the last row of the block see, cut to this block's range.
    u32 last_row = min_u32(row0 + ATTENTION_ROWS, rows) - 1;
    u32 begin = first_visible(s.past + row0 / group, s.window, s.chunk), end = s.past + last_row / group + 1;
    begin = max_u32(begin, blockIdx.z * s.range) / ATTENTION_TILE * ATTENTION_TILE;
    end = gridDim.z == 1 ? end : min_u32(end, (blockIdx.z + 1) * s.range);

    for (u32 start = begin; start < end; start += ATTENTION_TILE) {
        u32 count = min_u32(ATTENTION_TILE, end - start);
        block_sync(); // the last tile has been read; q is there
        u64 key_stride = (u64)s.kv_heads * s.key_dim, value_stride = (u64)s.kv_heads * s.value_stride;
        load_tile(key_tile, pitch, keys + start * key_stride + (u64)kv_head * s.key_dim, key_stride, s.key_dim, count);
        if (!shared_values)
            load_tile(value_tile, value_pitch, values + start * value_stride + (u64)kv_head * s.value_stride, value_stride, s.value_dim, count);
        copy_commit();
        copy_wait<0>();
        block_sync();

        bool there = lane < count;
        float score[WARP_ROWS] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (row0 + warp < rows && there) {
            const E* key = key_tile + lane * pitch;
            for (u32 d = 0; d < q_pitch; d += 4) {
                float4 k = load_kv4(key + d);
#pragma unroll
                for (int i = 0; i < WARP_ROWS; i++) {
                    const float4 x = *(const float4*)(q_tile + (warp + 4 * i) * q_pitch + d);
                    score[i] += x.x * k.x + x.y * k.y + x.z * k.z + x.w * k.w;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < WARP_ROWS; i++) {
            u32 position = start + lane;
            float value = s.softcap > 0.0f ? s.softcap * tanhf(score[i] / s.softcap) : score[i];
            if (!there || position < from[i] || position >= to[i]) value = -INFINITY;
            float new_most = fmaxf(most[i], warp_max(value));
            // Nothing seen yet: no exponential of a difference of infinities.
            float weight = new_most == -INFINITY ? 0.0f : expf(value - new_most);
            float rescale = new_most == -INFINITY ? 1.0f : expf(most[i] - new_most);
            sum[i] = sum[i] * rescale + warp_sum(weight);
            most[i] = new_most;
            weights[(warp + 4 * i) * ATTENTION_TILE + lane] = weight;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) acc[i][c] *= rescale;
        }
        warp_sync();
        if (row0 + warp < rows)
            for (u32 p = 0; p < count; p++) {
                float w[WARP_ROWS];
#pragma unroll
                for (int i = 0; i < WARP_ROWS; i++) w[i] = weights[(warp + 4 * i) * ATTENTION_TILE + p];
                const E* value = value_tile + p * value_pitch;
#pragma unroll
                for (int c = 0; c < CHUNKS; c++) {
                    u32 column = 32 * c + lane;
                    float v = column < s.value_dim ? load_kv(value + column) : 0.0f;
#pragma unroll
                    for (int i = 0; i < WARP_ROWS; i++) acc[i][c] += w[i] * v;
                }
            }
    }

#pragma unroll
    for (int i = 0; i < WARP_ROWS; i++) {
        u32 row = row0 + warp + 4 * i;
        if (row >= rows) continue;
        u64 head_row = (u64)(row / group) * s.heads + kv_head * group + row % group;
        if (gridDim.z == 1) {
            float factor = 1.0f / sum[i];
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
                if (32 * c + lane < s.value_dim) out[head_row * s.value_dim + 32 * c + lane] = acc[i][c] * factor;
        } else {
            // [range, tokens * heads, 2 + value_dim]: maximum, sum, weighted values.
            float* to = partial + ((u64)blockIdx.z * s.tokens * s.heads + head_row) * (2 + s.value_dim);
            if (lane == 0) to[0] = most[i], to[1] = sum[i];
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
                if (32 * c + lane < s.value_dim) to[2 + 32 * c + lane] = acc[i][c];
        }
    }
}

#define ATTENTION(NAME, E, CHUNKS)                                                                                                    \
    KERNEL(128, 1) NAME(const float* q, const u8* keys, const u8* values, const float* sinks, float* out, float* partial, u32 tokens, \
                        u32 past, u32 heads, u32 kv_heads, u32 key_dim, u32 value_dim, u32 value_stride, u32 window, u32 chunk,       \
                        u32 range, float scale, float softcap) {                                                                      \
        AttentionShape s = {tokens, past, heads, kv_heads, key_dim, value_dim, value_stride, window, chunk, range, scale, softcap};   \
        attention<E, CHUNKS>(q, (const E*)keys, (const E*)values, sinks, out, partial, s);                                            \
    }
ATTENTION(attention_f32_64, float, 2)
ATTENTION(attention_f32_128, float, 4)
ATTENTION(attention_f32_256, float, 8)
ATTENTION(attention_f32_512, float, 16)
ATTENTION(attention_f16_64, u16, 2)
ATTENTION(attention_f16_128, u16, 4)
ATTENTION(attention_f16_256, u16, 8)
ATTENTION(attention_f16_512, u16, 16)

// out[row] from the partial results of all ranges. A block per (token, head).
KERNEL(128, 1) attention_merge(const float* partial, float* out, u32 ranges, u32 value_dim) {
    u64 row = blockIdx.x, rows = gridDim.x;
    float most = -INFINITY, sum = 0.0f;
    for (u32 r = 0; r < ranges; r++) most = fmaxf(most, partial[(r * rows + row) * (2 + value_dim)]);
    for (u32 r = 0; r < ranges; r++) {
        const float* part = partial + (r * rows + row) * (2 + value_dim);
        sum += part[0] == -INFINITY ? 0.0f : expf(part[0] - most) * part[1];
    }
    for (u32 d = threadIdx.x; d < value_dim; d += blockDim.x) {
        float value = 0.0f;
        for (u32 r = 0; r < ranges; r++) {
            const float* part = partial + (r * rows + row) * (2 + value_dim);
            if (part[0] != -INFINITY) value += expf(part[0] - most) * part[2 + d];
        }
        out[row * value_dim + d] = value / sum;
    }
}
