// Kernels that read weights, for one format F.

// out[t, h] = x[t, h] * weight[h]^T (+ bias), 2 PAIRS tokens per block. Grid: (rows / 16, heads, tokens / 2 PAIRS).
template <class F, int PAIRS>
DEV void matmul_few(u8* shared, const u8* weight, u64 row_bytes, u32 rows, u32 cols, const float* bias, const float* x, u32 x_stride, u32 x_head,
                    float* out, u32 out_stride, u32 out_head, u32 tokens) {
    u32 head = blockIdx.y, row0 = blockIdx.x * 16, token0 = blockIdx.z * 2 * PAIRS;
    weight += head * rows * row_bytes;
    x += (u64)token0 * x_stride;
    out += (u64)token0 * out_stride;
    tokens = min_u32(tokens - token0, 2 * PAIRS);
    float result[1];
    few_rows<F, PAIRS, 1>(shared, weight, weight, row_bytes, row0, rows, cols, x + (u64)head * x_head, x_stride, tokens, result, threadIdx.x);
    u32 row = row0 + threadIdx.x % 16, token = threadIdx.x / 16;
    if (row < rows && token < tokens)
        out[(u64)token * out_stride + (u64)head * out_head + row] = result[0] + (bias ? bias[head * rows + row] : 0.0f);
}

KERNEL(128, 4) matmul_few_2(const u8* weight, u64 row_bytes, u32 rows, u32 cols, const float* bias, const float* x, u32 x_stride, u32 x_head, float* out, u32 out_stride, u32 out_head, u32 tokens) {
    static_assert(Few<FORMAT, 1, 1>::BYTES == SHARED_matmul_few_2, "registry");
    SHARED(shared);
    matmul_few<FORMAT, 1>(shared, weight, row_bytes, rows, cols, bias, x, x_stride, x_head, out, out_stride, out_head, tokens);
}

KERNEL(128, 2) matmul_few_8(const u8* weight, u64 row_bytes, u32 rows, u32 cols, const float* bias, const float* x, u32 x_stride, u32 x_head, float* out, u32 out_stride, u32 out_head, u32 tokens) {
    static_assert(Few<FORMAT, 4, 1>::BYTES == SHARED_matmul_few_8, "registry");
    SHARED(shared);
    matmul_few<FORMAT, 4>(shared, weight, row_bytes, rows, cols, bias, x, x_stride, x_head, out, out_stride, out_head, tokens);
}

// Where a matrix of an expert begins, in units of 16 bytes; ABSENT also for experts that the layer does not have.
DEV u32 expert_at(const u32* table, u32 num_experts, u32 expert, u32 matrix) {
    return expert < num_experts ? table[3 * expert + matrix] : ABSENT;
}

// inner[r] = activation(gate(x), up(x)) for row r of (token, choice). Grid: (rows, inner_size / 16).
KERNEL(128, 3) experts_few_gate_up(const u8* base, const u32* table, u32 num_experts, const u32* ids, const float* x, u32 rows_per_input, float* inner, const float* gate_bias, const float* up_bias, u32 inner_size, u32 hidden, u64 row_bytes, u32 activation, float alpha, float limit) {
    static_assert(Few<FORMAT, 1, 2>::BYTES == SHARED_experts_few_gate_up, "registry");
    SHARED(shared);
    u32 r = blockIdx.x, expert = ids[r], row0 = blockIdx.y * 16;
    u32 gate = expert_at(table, num_experts, expert, 0), up = expert_at(table, num_experts, expert, 1);
    if (gate == ABSENT) return;
    float result[2];
    few_rows<FORMAT, 1, 2>(shared, base + 16ull * gate, base + 16ull * up, row_bytes, row0, inner_size, hidden,
                           x + (u64)(r / rows_per_input) * hidden, 0, 1, result, threadIdx.x);
    u32 row = row0 + threadIdx.x;
    if (threadIdx.x < 16 && row < inner_size) {
        u64 at = (u64)expert * inner_size + row;
        float g = result[0] + (gate_bias ? gate_bias[at] : 0.0f), u = result[1] + (up_bias ? up_bias[at] : 0.0f);
        inner[(u64)r * inner_size + row] = activate(activation, alpha, limit, g, u);
    }
}

// out[r] = down(inner[r]). Grid: (rows, hidden / 16).
KERNEL(128, 4) experts_few_down(const u8* base, const u32* table, u32 num_experts, const u32* ids, const float* inner, const float* bias, float* out, u32 hidden, u32 inner_size, u64 row_bytes) {
    static_assert(Few<FORMAT, 1, 1>::BYTES == SHARED_experts_few_down, "registry");
    SHARED(shared);
    u32 r = blockIdx.x, expert = ids[r], row0 = blockIdx.y * 16, down = expert_at(table, num_experts, expert, 2);
    if (down == ABSENT) return;
    float result[1];
    few_rows<FORMAT, 1, 1>(shared, base + 16ull * down, base, row_bytes, row0, hidden, inner_size, inner + (u64)r * inner_size, 0, 1, result,
                           threadIdx.x);
    u32 row = row0 + threadIdx.x;
    if (threadIdx.x < 16 && row < hidden) out[(u64)r * hidden + row] = result[0] + (bias ? bias[(u64)expert * hidden + row] : 0.0f);
}

// F32 is never rounded: many tokens go through the kernels above, too.
#ifndef EXACT
DEV u32* many_places(u8* shared) { return (u32*)(shared + Many<FORMAT>::BYTES - MANY_TOKENS * 4); }

// As matmul_few for many tokens; x is bf16 [heads, tokens, x_pitch]. Grid: (tokens / 128, rows / 128, heads).
KERNEL(256, 2) matmul_many(const u8* weight, u64 row_bytes, u32 rows, u32 cols, const float* bias, const u16* x, u32 x_pitch, float* out, u32 out_stride, u32 out_head, u32 tokens) {
    static_assert(Many<FORMAT>::BYTES == SHARED_matmul_many, "registry");
    SHARED(shared);
    u32 head = blockIdx.z, row0 = blockIdx.y * MANY_ROWS, token0 = blockIdx.x * MANY_TOKENS;
    u32 count = min_u32(tokens - token0, MANY_TOKENS);
    weight += head * rows * row_bytes;
    x += (u64)head * tokens * x_pitch;
    u32* places = many_places(shared);
    if (threadIdx.x < MANY_TOKENS) places[threadIdx.x] = threadIdx.x < count ? token0 + threadIdx.x : ABSENT;
    block_sync();
    float acc[2][8][4];
    many_tile<FORMAT, 1>(shared, weight, weight, row_bytes, row0, rows, cols, x, x_pitch, count, acc);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                u32 token = many_token(j, c), row = row0 + many_row<1>(i, c);
                if (token < count && row < rows)
                    out[(u64)(token0 + token) * out_stride + (u64)head * out_head + row] =
                        acc[i][j][c] + (bias ? bias[head * rows + row] : 0.0f);
            }
}

// The rows of a block: up to 4 tiles of one expert that follow each other make one of 128 rows. False if another block has them.
struct Tile {
    u32 expert, first, count;
};
// The next tile goes on where this one ends.
DEV bool follows(const u32* tiles, u32 index) {
    const u32 *a = tiles + 3 * index, *b = a + 3;
    return a[0] == b[0] && a[1] + a[2] == b[1];
}
DEV bool many_tiles_of(const u32* tiles, u32 num_tiles, u32 index, Tile* tile) {
    tile->expert = tiles[3 * index];
    // Tiles of this expert directly before this one.
    u32 before = 0;
    for (u32 back = 0;; back += 32) {
        u32 distance = back + threadIdx.x % 32 + 1;
        bool other = distance > index || !follows(tiles, index - distance);
        u32 others = warp_ballot(other);
        if (others) {
            u32 lowest = 31 - leading_zeros(others & (0u - others));
            before = back + lowest;
            break;
        }
    }
    if (before % 4 != 0) return false;
    tile->first = tiles[3 * index + 1];
    tile->count = tiles[3 * index + 2];
    for (u32 next = index + 1; next < min_u32(index + 4, num_tiles); next++) {
        if (!follows(tiles, next - 1)) break;
        tile->count += tiles[3 * next + 2];
    }
    return true;
}

// inner[r] as bf16 [rows, inner_pitch], zeros beyond inner_size; x is bf16 [inputs, x_pitch]. Grid: (tiles, inner_pitch / 64).
KERNEL(256, 2) experts_many_gate_up(const u8* base, const u32* table, u32 num_experts, const u32* order, const u32* tiles, u32 num_tiles, const u16* x, u32 x_pitch, u32 rows_per_input, u16* inner, u32 inner_pitch, const float* gate_bias, const float* up_bias, u32 inner_size, u32 hidden, u64 row_bytes, u32 activation, float alpha, float limit) {
    static_assert(Many<FORMAT>::BYTES == SHARED_experts_many_gate_up, "registry");
    SHARED(shared);
    Tile tile;
    if (!many_tiles_of(tiles, num_tiles, blockIdx.x, &tile)) return;
    u32 gate = expert_at(table, num_experts, tile.expert, 0), up = expert_at(table, num_experts, tile.expert, 1), row0 = blockIdx.y * 64;
    if (gate == ABSENT) return;
    u32* places = many_places(shared);
    if (threadIdx.x < MANY_TOKENS) places[threadIdx.x] = threadIdx.x < tile.count ? order[tile.first + threadIdx.x] / rows_per_input : ABSENT;
    block_sync();
    float acc[2][8][4];
    many_tile<FORMAT, 2>(shared, base + 16ull * gate, base + 16ull * up, row_bytes, row0, inner_size, hidden, x, x_pitch, tile.count, acc);
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            u32 token = many_token(j, c), row = row0 + many_row<2>(0, c);
            if (token >= tile.count || row >= inner_pitch) continue;
            float value = 0.0f;
            if (row < inner_size) {
                u64 at = (u64)tile.expert * inner_size + row;
                float g = acc[0][j][c] + (gate_bias ? gate_bias[at] : 0.0f), u = acc[1][j][c] + (up_bias ? up_bias[at] : 0.0f);
                value = activate(activation, alpha, limit, g, u);
            }
            inner[(u64)order[tile.first + token] * inner_pitch + row] = (u16)bf16x2(value, 0.0f);
        }
}

// out[r] = down(inner[r]). Grid: (tiles, hidden / 128).
KERNEL(256, 2) experts_many_down(const u8* base, const u32* table, u32 num_experts, const u32* order, const u32* tiles, u32 num_tiles, const u16* inner, u32 inner_pitch, const float* bias, float* out, u32 hidden, u32 inner_size, u64 row_bytes) {
    static_assert(Many<FORMAT>::BYTES == SHARED_experts_many_down, "registry");
    SHARED(shared);
    Tile tile;
    if (!many_tiles_of(tiles, num_tiles, blockIdx.x, &tile)) return;
    u32 down = expert_at(table, num_experts, tile.expert, 2), row0 = blockIdx.y * MANY_ROWS;
    if (down == ABSENT) return;
    u32* places = many_places(shared);
    if (threadIdx.x < MANY_TOKENS) places[threadIdx.x] = threadIdx.x < tile.count ? order[tile.first + threadIdx.x] : ABSENT;
    block_sync();
    float acc[2][8][4];
    many_tile<FORMAT, 1>(shared, base + 16ull * down, base, row_bytes, row0, hidden, inner_size, inner, inner_pitch, tile.count, acc);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                u32 token = many_token(j, c), row = row0 + many_row<1>(i, c);
                if (token < tile.count && row < hidden)
                    out[(u64)places[token] * hidden + row] = acc[i][j][c] + (bias ? bias[(u64)tile.expert * hidden + row] : 0.0f);
            }
}

#endif

// out[t] = table[ids[t]]. Grid: tokens.
KERNEL(128, 1) embed(const u8* table, u64 row_bytes, u32 rows, u32 width, const u32* ids, float* out) {
    const u8* row = table + (u64)min_u32(ids[blockIdx.x], rows - 1) * row_bytes;
    out += (u64)blockIdx.x * width;
    for (u32 unit = threadIdx.x; unit < (width + 31) / 32 * 4; unit += blockDim.x) {
        u32 group = unit / 4, t = unit % 4, chunk = group / FORMAT::GROUPS;
        const u8* at = row + (u64)chunk * FORMAT::CHUNK_BYTES;
        float w[8];
        weights<FORMAT>(at, FORMAT::header(at), group % FORMAT::GROUPS, t, (int)width - 32 * (int)group, w);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            u32 column = 32 * group + FORMAT::column(t, j);
            if (column < width) out[column] = w[j];
        }
    }
}
