// Products of weight rows with few vectors: a read of the weights at the speed of memory.
//
// A block of 4 warps makes 16 rows of one matrix or of two (gate and up); warp w takes chunks w, w + 4, ... of the columns. Raw bytes go
// to a ring in shared memory, STAGES - 1 chunks ahead, in aligned pieces of 16 bytes whatever the rows' alignment. Products run on tensor
// cores without rounding anything: codes are exact in bf16, and an f32 activation is the sum of three bf16 parts that take three of the
// eight columns of an mma, so that one mma serves two tokens. Scales multiply the f32 sums of each group of 32 (or 16).

#define FEW_WARPS 4
// Columns of the products of two tokens.
#define PAIR_COLUMNS 6

// Bytes of shared memory from row to row of a chunk: with the 15 bytes that an unaligned row may begin late, and 8 words between rows
// modulo the 32 banks where the chunk is 144 bytes.
DEV constexpr u32 row_pitch(u32 chunk_bytes) {
    return (chunk_bytes + 15 + 15) / 16 * 16;
}

template <class F, int PAIRS, int MATS>
struct Few {
    static constexpr u32 PITCH = row_pitch(F::CHUNK_BYTES);
    static constexpr u32 STAGE = 16 * MATS * PITCH;
    // A block fits the 99 KiB that consumer cards have.
    static constexpr u32 STAGES = (MATS == 2 && PITCH > 160) || (PAIRS == 4 && PITCH > 240) ? 2 : 3;
    static constexpr u32 X_BYTES = PAIRS * F::GROUPS * PAIR_COLUMNS * 4 * 16;
    static constexpr u32 WARP_BYTES = STAGES * STAGE + X_BYTES;
    // The sums of all warps are put together in the same memory afterwards.
    static constexpr u32 SUM_BYTES = FEW_WARPS * MATS * PAIRS * 16 * 8 * 4;
    static constexpr u32 BYTES = FEW_WARPS * WARP_BYTES > SUM_BYTES ? FEW_WARPS * WARP_BYTES : SUM_BYTES;
};

// Bytes of the columns from `chunk` on, at most a chunk's.
template <class F>
DEV u32 bytes_of_chunk(u64 row_bytes, u32 chunk, u32 chunk_bytes) {
    u64 left = row_bytes - (u64)chunk * chunk_bytes;
    return left < chunk_bytes ? (u32)left : chunk_bytes;
}

template <class F, int PAIRS, int MATS>
DEV void few_load(u8* stage, const u8* first, const u8* second, u64 row_bytes, u32 row0, u32 rows, u32 chunk, u32 lane) {
    using S = Few<F, PAIRS, MATS>;
    constexpr u32 PIECES = S::PITCH / 16;
    u32 bytes = bytes_of_chunk<F>(row_bytes, chunk, F::CHUNK_BYTES);
#pragma unroll 4
    for (u32 base = 0; base < 16 * MATS * PIECES; base += 32) {
        u32 i = base + lane;
        u32 r = i / PIECES, piece = i % PIECES, row = row0 + (r & 15);
        if (i < 16 * MATS * PIECES && row < rows) {
            const u8* matrix = MATS == 1 || r < 16 ? first : second;
            u64 at = (u64)matrix + row * row_bytes + (u64)chunk * F::CHUNK_BYTES;
            u64 from = (at & ~15ull) + 16 * piece;
            if (from < at + bytes) copy16(stage + r * S::PITCH + 16 * piece, (const void*)from, 16);
        }
    }
}

// Activations of a chunk as fragments: 16 bytes per (pair, group, column, t).
template <class F, int PAIRS>
DEV void few_split_x(uint4* xs, const float* x, u64 x_stride, u32 tokens, u32 cols, u32 chunk, u32 lane) {
    constexpr u32 UNITS = F::GROUPS * 4;
    if (lane >= UNITS) return;
    u32 group = lane / 4, t = lane % 4, base = (chunk * F::GROUPS + group) * 32;
#pragma unroll
    for (int token = 0; token < 2 * PAIRS; token++) {
        if ((u32)token >= tokens) break;
        const float* row = x + token * x_stride;
        u32 parts[3][4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 low = base + F::column(t, 2 * j), high = base + F::column(t, 2 * j + 1);
            cut<3>(low < cols ? row[low] : 0.0f, high < cols ? row[high] : 0.0f, &parts[0][j], 4);
        }
#pragma unroll
        for (int p = 0; p < 3; p++) {
            uint4 words;
            words.x = parts[p][0];
            words.y = parts[p][1];
            words.z = parts[p][2];
            words.w = parts[p][3];
            xs[((token / 2 * F::GROUPS + group) * PAIR_COLUMNS + 3 * (token % 2) + p) * 4 + t] = words;
        }
    }
}

// sums[(mat * 2 PAIRS + token) * 16 + row] of the rows row0 to row0 + 15 in `shared`, seen by all threads.
template <class F, int PAIRS, int MATS>
DEV void few_rows(u8* shared, const u8* first, const u8* second, u64 row_bytes, u32 row0, u32 rows, u32 cols, const float* x, u64 x_stride,
                  u32 tokens, float* result, u32 result_index) {
    using S = Few<F, PAIRS, MATS>;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u8* ring = shared + warp * S::WARP_BYTES;
    uint4* xs = (uint4*)(ring + S::STAGES * S::STAGE);
    u32 chunks = (cols + F::GROUPS * 32 - 1) / (F::GROUPS * 32);

    float acc[MATS][PAIRS][4];
    // First bytes of this lane's rows, modulo 16.
    u32 begins[MATS][2];
#pragma unroll
    for (int m = 0; m < MATS; m++) {
        const u8* matrix = m == 0 ? first : second;
#pragma unroll
        for (int h = 0; h < 2; h++) begins[m][h] = (u32)((u64)matrix + (row0 + g + 8 * h) * row_bytes) & 15;
#pragma unroll
        for (int p = 0; p < PAIRS; p++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[m][p][i] = 0.0f;
    }

#pragma unroll
    for (u32 s = 0; s < S::STAGES - 1; s++) {
        u32 chunk = warp + s * FEW_WARPS;
        if (chunk < chunks) few_load<F, PAIRS, MATS>(ring + s * S::STAGE, first, second, row_bytes, row0, rows, chunk, lane);
        copy_commit();
    }
    u32 slot = 0;
    for (u32 chunk = warp; chunk < chunks; chunk += FEW_WARPS) {
        warp_sync(); // the last chunk's activations and slot have been read by all lanes
        u32 ahead = chunk + (S::STAGES - 1) * FEW_WARPS;
        if (ahead < chunks) {
            u32 free = slot == 0 ? S::STAGES - 1 : slot - 1;
            few_load<F, PAIRS, MATS>(ring + free * S::STAGE, first, second, row_bytes, row0, rows, ahead, lane);
        }
        copy_commit();
        few_split_x<F, PAIRS>(xs, x, x_stride, tokens, cols, chunk, lane);
        copy_wait<S::STAGES - 1>();
        warp_sync();

        const u8* stage = ring + slot * S::STAGE;
        u32 left_of_row = cols - chunk * F::GROUPS * 32;
        int groups = left_of_row < F::GROUPS * 32 ? (int)((left_of_row + 31) / 32) : F::GROUPS;
        const u8* row[MATS][2];
        typename F::Header header[MATS][2];
#pragma unroll
        for (int m = 0; m < MATS; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                u32 begin = (begins[m][h] + chunk * (F::CHUNK_BYTES % 16)) & 15;
                row[m][h] = stage + (16 * m + g + 8 * h) * S::PITCH + begin;
                header[m][h] = F::header(row[m][h]);
            }
#pragma unroll F::UNROLL
        for (int group = 0; group < F::GROUPS; group++) {
            if (group >= groups) break;
            uint4 b[PAIRS];
#pragma unroll
            for (int p = 0; p < PAIRS; p++) {
                b[p].x = b[p].y = b[p].z = b[p].w = 0;
                u32 columns = tokens > 2 * p + 1 ? PAIR_COLUMNS : tokens > 2 * p ? 3 : 0;
                if (g < columns) b[p] = xs[((p * F::GROUPS + group) * PAIR_COLUMNS + g) * 4 + t];
            }
#pragma unroll
            for (int m = 0; m < MATS; m++) {
                u32 low[F::PARTS][4], high[F::PARTS][4];
                F::codes(row[m][0], group, t, (int)left_of_row - 32 * group, low);
                F::codes(row[m][1], group, t, (int)left_of_row - 32 * group, high);
                if (!F::SCALED) {
#pragma unroll
                    for (int p = 0; p < PAIRS; p++)
#pragma unroll
                        for (int part = 0; part < F::PARTS; part++) {
                            mma(acc[m][p], low[part][0], high[part][0], low[part][1], high[part][1], b[p].x, b[p].y);
                            mma(acc[m][p], low[part][2], high[part][2], low[part][3], high[part][3], b[p].z, b[p].w);
                        }
                    continue;
                }
                Scale of_low = F::scale(row[m][0], header[m][0], group), of_high = F::scale(row[m][1], header[m][1], group);
#pragma unroll
                for (int p = 0; p < PAIRS; p++) {
                    float* sum = acc[m][p];
                    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                    mma(c, low[0][0], high[0][0], low[0][1], high[0][1], b[p].x, b[p].y);
                    if (F::SCALES_OF_16) {
                        sum[0] += of_low.first * c[0];
                        sum[1] += of_low.first * c[1];
                        sum[2] += of_high.first * c[2];
                        sum[3] += of_high.first * c[3];
                        c[0] = c[1] = c[2] = c[3] = 0.0f;
                    }
                    mma(c, low[0][2], high[0][2], low[0][3], high[0][3], b[p].z, b[p].w);
                    sum[0] += of_low.second * c[0];
                    sum[1] += of_low.second * c[1];
                    sum[2] += of_high.second * c[2];
                    sum[3] += of_high.second * c[3];
                    if (F::HAS_MIN) {
                        // The sums of the activations: a product with ones.
                        float ones[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                        mma(ones, BF16_ONES, BF16_ONES, BF16_ONES, BF16_ONES, b[p].x, b[p].y);
                        mma(ones, BF16_ONES, BF16_ONES, BF16_ONES, BF16_ONES, b[p].z, b[p].w);
                        sum[0] -= of_low.min * ones[0];
                        sum[1] -= of_low.min * ones[1];
                        sum[2] -= of_high.min * ones[2];
                        sum[3] -= of_high.min * ones[3];
                    }
                }
            }
        }
        slot = slot + 1 == S::STAGES ? 0 : slot + 1;
    }

    block_sync(); // the ring is not read any more
    float* sums = (float*)shared; // [warp][mat][pair][row][column]
#pragma unroll
    for (int m = 0; m < MATS; m++)
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            float* at = sums + ((warp * MATS + m) * PAIRS + p) * 128;
            at[g * 8 + 2 * t] = acc[m][p][0];
            at[g * 8 + 2 * t + 1] = acc[m][p][1];
            at[(g + 8) * 8 + 2 * t] = acc[m][p][2];
            at[(g + 8) * 8 + 2 * t + 1] = acc[m][p][3];
        }
    block_sync();
    // The caller's thread wants row r of token k of every matrix, result_index = k * 16 + r.
    u32 r = result_index % 16, token = result_index / 16;
#pragma unroll
    for (int m = 0; m < MATS; m++) {
        float sum = 0.0f;
        if (token < 2 * PAIRS)
#pragma unroll
            for (int w = 0; w < FEW_WARPS; w++) {
                const float* at = sums + ((w * MATS + m) * PAIRS + token / 2) * 128 + r * 8 + 3 * (token % 2);
                sum += at[0] + at[1] + at[2];
            }
        result[m] = sum;
    }
}
