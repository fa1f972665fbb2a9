// Products of weight rows with many vectors: tiles of 128 weight rows x 128 tokens on tensor cores.
//
// Activations are rounded to bf16 beforehand (`round_rows`), rows padded with zeros to a multiple of 64. Weights stay in their format up to
// shared memory, where a step of 64 columns is decoded and rounded to bf16 while the copies of the next step are under way. 8 warps:
// warp (wr, wt) makes weight rows 32 wr to 32 wr + 31 (with gate and up: 16 of each, so that both are in one thread) by every second
// group of 16 tokens. Errors: one rounding to bf16 of each factor, sums in f32.

#define MANY_THREADS 256
#define MANY_ROWS 128
#define MANY_TOKENS 128
#define MANY_STEP 64
// Elements from row to row of a bf16 tile: 4 words more than 32, so that ldmatrix meets every bank once.
#define TILE_PITCH 72

template <class F>
struct Many {
    static constexpr u32 CHUNK_BYTES = F::CHUNK_BYTES * F::MANY_GROUPS / F::GROUPS;
    static constexpr u32 PITCH = row_pitch(CHUNK_BYTES);
    static constexpr u32 STEPS = F::MANY_GROUPS / 2;
    static constexpr u32 TILE = 128 * TILE_PITCH * 2;
    // Raw weights, decoded weights, two tiles of activations, the places of the tokens' rows.
    static constexpr u32 BYTES = MANY_ROWS * PITCH + 3 * TILE + MANY_TOKENS * 4;
};
template <class F, int MATS>
DEV void many_load_weights(u8* raw, const u8* first, const u8* second, u64 row_bytes, u32 row0, u32 rows, u32 chunk) {
    using S = Many<F>;
    constexpr u32 PIECES = S::PITCH / 16;
    u32 bytes = bytes_of_chunk<F>(row_bytes, chunk, S::CHUNK_BYTES);
    for (u32 i = threadIdx.x; i < MANY_ROWS * PIECES; i += MANY_THREADS) {
        u32 r = i / PIECES, piece = i % PIECES;
        u32 row = row0 + (MATS == 2 ? r % 64 : r);
        if (row < rows) {
            const u8* matrix = MATS == 1 || r < 64 ? first : second;
            u64 at = (u64)matrix + row * row_bytes + (u64)chunk * S::CHUNK_BYTES;
            u64 from = (at & ~15ull) + 16 * piece;
            if (from < at + bytes) copy16(raw + r * S::PITCH + 16 * piece, (const void*)from, 16);
        }
    }
}

// Columns 64 step to 64 step + 63 of the tokens' rows; zeros where there is no token.
DEV void many_load_x(u16* tile, const u16* x, u64 x_pitch, const u32* places, u32 step) {
#pragma unroll
    for (u32 i = threadIdx.x; i < MANY_TOKENS * 8; i += MANY_THREADS) {
        u32 token = i / 8, piece = i % 8, place = places[token];
        const u16* from = x + (place == ABSENT ? 0 : place * x_pitch) + (u64)step * MANY_STEP + piece * 8;
        copy16(tile + token * TILE_PITCH + piece * 8, from, place == ABSENT ? 0 : 16);
    }
}

// Decodes two groups of every row into the bf16 tile; 8 weights per unit.
template <class F, int MATS>
DEV void many_decode(u16* tile, const u8* raw, const u8* first, const u8* second, u64 row_bytes, u32 row0, u32 rows, u32 cols, u32 chunk,
                     u32 step_of_chunk) {
    using S = Many<F>;
#pragma unroll 1
    for (u32 unit = threadIdx.x; unit < MANY_ROWS * 8; unit += MANY_THREADS) {
        u32 r = unit / 8, half = unit / 4 % 2, t = unit % 4;
        u32 row = row0 + (MATS == 2 ? r % 64 : r);
        int group = 2 * step_of_chunk + half;
        int left = (int)cols - (int)(chunk * S::STEPS * MANY_STEP) - 32 * group;
        float w[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        if (row < rows && left > 0) {
            const u8* matrix = MATS == 1 || r < 64 ? first : second;
            u32 begin = ((u32)(u64)matrix + (u32)(row * row_bytes) + chunk * S::CHUNK_BYTES) & 15;
            const u8* at = raw + r * S::PITCH + begin;
            weights<F>(at, F::header(at), group, t, left, w);
        }
        float natural[8];
#pragma unroll
        for (int j = 0; j < 8; j++) natural[F::SPLIT ? (j & 4) | interleaved(j & 3) : F::column(0, j)] = w[j];
        u32 pairs[4];
#pragma unroll
        for (int j = 0; j < 4; j++) pairs[j] = bf16x2(natural[2 * j], natural[2 * j + 1]);
        u16* to = tile + r * TILE_PITCH + 32 * half;
        if (F::SPLIT) {
            *(uint2*)(to + 4 * t) = make_uint2(pairs[0], pairs[1]);
            *(uint2*)(to + 16 + 4 * t) = make_uint2(pairs[2], pairs[3]);
        } else {
            *(uint4*)(to + 8 * t) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
}

// acc[m16 tile][n8 tile] of this warp: token tile j is 16 tokens from (2 (j / 2) + wt) * 16 + 8 (j % 2) on.
// `places[i]` is the row of x of token i, ABSENT beyond the last.
template <class F, int MATS>
DEV void many_tile(u8* shared, const u8* first, const u8* second, u64 row_bytes, u32 row0, u32 rows, u32 cols, const u16* x, u64 x_pitch,
                   u32 tokens, float (*acc)[8][4]) {
    using S = Many<F>;
    u8* raw = shared;
    u16* w_tile = (u16*)(raw + MANY_ROWS * S::PITCH);
    u16* x_tiles = w_tile + S::TILE / 2;
    const u32* places = (const u32*)((u8*)x_tiles + 2 * S::TILE);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, wr = warp / 2, wt = warp % 2;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) acc[i][j][c] = 0.0f;

    u32 steps = (cols + MANY_STEP - 1) / MANY_STEP;
    many_load_weights<F, MATS>(raw, first, second, row_bytes, row0, rows, 0);
    many_load_x(x_tiles, x, x_pitch, places, 0);
    for (u32 step = 0; step < steps; step++) {
        u32 chunk = step / S::STEPS, of_chunk = step % S::STEPS;
        copy_commit();
        copy_wait<0>();
        block_sync(); // this step's copies are there for all, and the last step's tiles have been read
        if (step + 1 < steps) many_load_x(x_tiles + (step + 1) % 2 * (S::TILE / 2), x, x_pitch, places, step + 1);
        many_decode<F, MATS>(w_tile, raw, first, second, row_bytes, row0, rows, cols, chunk, of_chunk);
        block_sync(); // decoded
        if (of_chunk + 1 == S::STEPS && step + 1 < steps)
            many_load_weights<F, MATS>(raw, first, second, row_bytes, row0, rows, chunk + 1);

        const u16* x_tile = x_tiles + step % 2 * (S::TILE / 2);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 a[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                u32 row = (MATS == 2 ? 64 * i + 16 * wr : 32 * wr + 16 * i) + lane % 16;
                ldmatrix4(a[i], w_tile + row * TILE_PITCH + 16 * k + lane / 16 * 8);
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 token = (2 * j + wt) * 16;
                if (token >= tokens) break;
                u32 b[4];
                ldmatrix4(b, x_tile + (token + lane % 8 + lane / 16 * 8) * TILE_PITCH + 16 * k + lane / 8 % 2 * 8);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    mma(acc[i][2 * j], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
                    mma(acc[i][2 * j + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
                }
            }
        }
    }
}

// Where the value c of acc[i][j] belongs: token of the tile, row of the matrix.
DEV u32 many_token(int j, int c) {
    u32 lane = threadIdx.x % 32, wt = threadIdx.x / 32 % 2;
    return (2 * (j / 2) + wt) * 16 + 8 * (j % 2) + lane % 4 * 2 + c % 2;
}
template <int MATS>
DEV u32 many_row(int i, int c) {
    u32 lane = threadIdx.x % 32, wr = threadIdx.x / 64;
    return (MATS == 2 ? 16 * wr : 32 * wr + 16 * i) + lane / 4 + 8 * (c / 2);
}
