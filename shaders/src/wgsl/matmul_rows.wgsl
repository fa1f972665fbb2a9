// out[t, h] = weight[h] * x[t, h] (+ bias) for few tokens: a workgroup has four rows of weights, TOKENS tokens and one head.

var<private> x_first: array<u32, TOKENS>;

fn x_row(token: u32) -> u32 {
    return x_first[token];
}

fn run(group: vec3<u32>, groups: vec3<u32>, lane: u32) {
    let first = 4u * group.x;
    let token = TOKENS * group.y;
    let head = group.z;
    for (var t = 0u; t < TOKENS; t++) {
        x_first[t] = min(token + t, p.tokens - 1u) * p.x_stride + (p.first_head + head) * p.x_head_stride;
    }
    let matrix = p.first_byte + head * p.rows * p.row_bytes;
    let sums = w_rows(matrix, p.row_bytes, first, p.rows - 1u, p.cols, lane);
    for (var t = 0u; t < TOKENS; t++) {
        let sum = sum_lanes(lane, sums[t]);
        let row = first + lane;
        if lane < 4u && row < p.rows && token + t < p.tokens {
            var y = sum[lane];
            if p.has_bias != 0u {
                y += bias[p.first_row + row];
            }
            out[(token + t) * p.out_stride + (p.first_head + head) * p.out_head_stride + p.first_row + row] = y;
        }
    }
}
