// Operations without weights in a file's format: norms, rotary positions, sums, routing, conversion.

// out = x / sqrt(mean(x^2) + eps) * weight[row % period]. A block per row.
KERNEL(256, 1) rms_norm(const float* x, const float* weight, u32 period, float* out, u32 width, float eps) {
    SHARED(shared);
    u64 row = blockIdx.x;
    x += row * width;
    out += row * width;
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) sum += x[i] * x[i];
    float factor = 1.0f / sqrtf(block_sum(sum, (float*)shared) / (float)width + eps);
    const float* w = weight + row % period * width;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) out[i] = x[i] * factor * (weight ? w[i] : 1.0f);
}

// out = (x - mean) / sqrt(variance + eps) * weight + bias. A block per row.
KERNEL(256, 1) layer_norm(const float* x, const float* weight, const float* bias, float* out, u32 width, float eps) {
    SHARED(shared);
    float* scratch = (float*)shared;
    u64 row = blockIdx.x;
    x += row * width;
    out += row * width;
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) sum += x[i];
    float mean = block_sum(sum, scratch) / (float)width, squares = 0.0f;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) squares += (x[i] - mean) * (x[i] - mean);
    float factor = 1.0f / sqrtf(block_sum(squares, scratch + 32) / (float)width + eps);
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) out[i] = (x[i] - mean) * factor * weight[i] + bias[i];
}

// A thread per (token, head, pair).
KERNEL(256, 1) rope(float* x, const float* cos_sin, u32 tokens, u32 heads, u32 head_stride, u32 first, u32 pairs, u32 interleaved_pairs) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (u64)tokens * heads * pairs) return;
    u32 pair = (u32)(i % pairs);
    u64 head = i / pairs; // over all tokens
    const float* angle = cos_sin + (head / heads * pairs + pair) * 2;
    float* at = x + head * head_stride + first + (interleaved_pairs ? 2 * pair : pair);
    u32 distance = interleaved_pairs ? 1 : pairs;
    float a = at[0], b = at[distance];
    at[0] = a * angle[0] - b * angle[1];
    at[distance] = b * angle[0] + a * angle[1];
}

KERNEL(256, 1) copy_columns(const float* x, u32 x_stride, u32 x_start, float* out, u32 out_stride, u32 out_start, u32 rows, u32 width) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (u64)rows * width) return;
    u64 row = i / width, column = i % width;
    out[row * out_stride + out_start + column] = x[row * x_stride + x_start + column];
}

// cache[first + i] = x[i] for all elements, as f16 if asked.
KERNEL(256, 1) append_kv(const float* x, u8* cache, u32 half, u64 first, u64 elements) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= elements) return;
    if (half)
        ((u16*)cache)[first + i] = f16_of_f32(x[i]);
    else
        ((float*)cache)[first + i] = x[i];
}

// x[r] *= factors ? factors[r] : factor.
KERNEL(256, 1) scale_rows(float* x, float factor, const float* factors, u32 rows, u32 width) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (u64)rows * width) x[i] *= factors ? factors[i / width] : factor;
}

// y += factor * x.
KERNEL(256, 1) axpy(const float* x, float* y, float factor, u32 elements) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < elements) y[i] += factor * x[i];
}

// y[r] += sigmoid(dot(input[r], gate)) * x[r]. A block per row.
KERNEL(256, 1) gated_axpy(const float* x, const float* input, const float* gate, float* y, u32 width, u32 cols) {
    SHARED(shared);
    u64 row = blockIdx.x;
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < cols; i += blockDim.x) sum += input[row * cols + i] * gate[i];
    float factor = sigmoid(block_sum(sum, (float*)shared));
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) y[row * width + i] += factor * x[row * width + i];
}

KERNEL(256, 1) activate_pairs(const float* gate, const float* up, float* out, u32 elements, u32 activation, float alpha, float limit) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < elements) out[i] = activate(activation, alpha, limit, gate[i], up[i]);
}

// x = cap * tanh(factor * x / cap), or factor * x where cap is 0.
KERNEL(256, 1) scale_cap(float* x, u32 elements, float factor, float cap) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= elements) return;
    float value = factor * x[i];
    x[i] = cap > 0.0f ? cap * tanhf(value / cap) : value;
}

// y[t] (+)= sum over choices of weights[t, c] * x[t * k + c], in their order.
KERNEL(256, 1) combine(const float* x, const float* weights, float* y, u32 tokens, u32 k, u32 width, u32 accumulate) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (u64)tokens * width) return;
    u64 token = i / width, column = i % width;
    float sum = accumulate ? y[i] : 0.0f;
    for (u32 c = 0; c < k; c++) sum += weights[token * k + c] * x[(token * k + c) * width + column];
    y[i] = sum;
}

// Rows rounded to bf16, padded with zeros to `pitch`: out[head, t] = x[t, head]. A thread per two elements. Grid: (pairs / 256, tokens, heads).
KERNEL(256, 1) round_rows(const float* x, u32 x_stride, u32 x_head, u32 cols, u16* out, u32 pitch) {
    u32 column = 2 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (column >= pitch) return;
    u64 token = blockIdx.y, head = blockIdx.z;
    const float* row = x + token * x_stride + head * x_head;
    u32 pair = bf16x2(column < cols ? row[column] : 0.0f, column + 1 < cols ? row[column + 1] : 0.0f);
    *(u32*)(out + (head * gridDim.y + token) * pitch + column) = pair;
}

// The k best experts of a token and their weights (the rules: runtime/src/exec/route.rs). A warp per token.
// Shared: scores and worths [num_experts] each, then the chosen [k] as (score, expert).
KERNEL(32, 1) route(const float* logits, const float* selection_bias, u32* ids, float* weights, u32 num_experts, u32 k, u32 is_sigmoid, u32 normalize, u32 softmax_after_topk, float scale) {
    SHARED(shared);
    float *scores = (float*)shared, *worths = scores + num_experts, *chosen_score = worths + num_experts;
    u32* chosen = (u32*)(chosen_score + k);
    u32 lane = threadIdx.x;
    logits += (u64)blockIdx.x * num_experts;
    // Experts are ranked by logits, which never tie by rounding as scores do; with a bias by score plus bias.
    float most = -INFINITY, sum = 0.0f;
    for (u32 e = lane; e < num_experts; e += 32) most = fmaxf(most, logits[e]);
    most = warp_max(most);
    bool softmax = !is_sigmoid && !softmax_after_topk;
    if (softmax) {
        for (u32 e = lane; e < num_experts; e += 32) sum += expf(logits[e] - most);
        sum = warp_sum(sum);
    }
    for (u32 e = lane; e < num_experts; e += 32) {
        float score = is_sigmoid ? sigmoid(logits[e]) : softmax ? expf(logits[e] - most) / sum : logits[e];
        scores[e] = score;
        worths[e] = selection_bias ? score + selection_bias[e] : logits[e];
    }
    warp_sync();
    for (u32 c = 0; c < k; c++) {
        float best = -INFINITY;
        u32 place = 0;
        for (u32 e = lane; e < num_experts; e += 32)
            if (worths[e] > best) best = worths[e], place = e;
        if (best == -INFINITY) place = num_experts;
#pragma unroll
        for (int mask = 16; mask > 0; mask >>= 1) {
            float other = warp_xor(best, mask);
            u32 other_place = warp_xor_u32(place, mask);
            if (other > best || (other == best && other_place < place)) best = other, place = other_place;
        }
        if (place == num_experts) place = 0; // every worth is minus infinity or no number
        if (lane == 0) {
            chosen[c] = place;
            chosen_score[c] = scores[place];
            worths[place] = -INFINITY;
        }
        warp_sync();
    }
    if (lane != 0) return;
    // Heaviest first, among equals the lower expert: with a bias the best choice is not always the heaviest.
    for (u32 i = 1; i < k; i++)
        for (u32 j = i; j > 0; j--) {
            bool before = chosen_score[j] > chosen_score[j - 1] || (chosen_score[j] == chosen_score[j - 1] && chosen[j] < chosen[j - 1]);
            if (!before) break;
            float score = chosen_score[j];
            u32 expert = chosen[j];
            chosen_score[j] = chosen_score[j - 1], chosen[j] = chosen[j - 1];
            chosen_score[j - 1] = score, chosen[j - 1] = expert;
        }
    if (softmax_after_topk) {
        float heaviest = chosen_score[0];
        float total = 0.0f;
        for (u32 c = 0; c < k; c++) total += chosen_score[c] = expf(chosen_score[c] - heaviest);
        for (u32 c = 0; c < k; c++) chosen_score[c] /= total;
    }
    float total = normalize ? 1e-20f : 1.0f;
    if (normalize)
        for (u32 c = 0; c < k; c++) total += chosen_score[c];
    for (u32 c = 0; c < k; c++) {
        ids[(u64)blockIdx.x * k + c] = chosen[c];
        weights[(u64)blockIdx.x * k + c] = chosen_score[c] * (scale / total);
    }
}

// How fast tensor cores multiply bf16 when nothing else is to be done: 8 independent products per warp and round, 4096 operations each.
KERNEL(256, 1) mma_rate(float* out, u32 rounds) {
    float sums[8][4];
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int c = 0; c < 4; c++) sums[i][c] = 0.0f;
    // Numbers near one with lane-dependent bits, so that multipliers are not idle.
    u32 a = 0x3F803F80u + threadIdx.x * 0x00010003u % 0x00400040u, b = 0x3F803F80u + threadIdx.x * 0x00050001u % 0x00400040u;
    for (u32 r = 0; r < rounds; r++)
#pragma unroll
        for (int i = 0; i < 8; i++) mma(sums[i], a, a + i, a + 2 * i, a + 3 * i, b, b + i);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += sums[i][0] + sums[i][1] + sums[i][2] + sums[i][3];
    out[(u64)blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
