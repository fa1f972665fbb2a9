// out[t, h] = weight[h] * x[t, h] (+ bias) for many tokens: a workgroup has 32 rows of weights, 32 tokens and one head.

var<private> first_token: u32;
var<private> x_head: u32;

fn x_row(token: u32) -> u32 {
    return min(first_token + token, p.tokens - 1u) * p.x_stride + x_head;
}

fn run(group: vec3<u32>, groups: vec3<u32>, lane: u32) {
    let first = 32u * group.x;
    let head = group.z;
    first_token = 32u * group.y;
    x_head = (p.first_head + head) * p.x_head_stride;
    let matrix = p.first_byte + head * p.rows * p.row_bytes;
    var sums: array<vec4<f32>, 4>;
    for (var col = 0u; col < p.cols; col += 32u) {
        load_x(col, p.cols, lane);
        w_load(matrix, p.row_bytes, first, p.rows - 1u, col, p.cols, lane);
        workgroupBarrier();
        w_multiply(&sums, lane);
        workgroupBarrier();
    }
    for (var t = 0u; t < 4u; t++) {
        let token = first_token + lane / 8u * 4u + t;
        for (var i = 0u; i < 4u; i++) {
            let row = first + lane % 8u * 4u + i;
            if token < p.tokens && row < p.rows {
                var y = sums[t][i];
                if p.has_bias != 0u {
                    y += bias[p.first_row + row];
                }
                out[token * p.out_stride + (p.first_head + head) * p.out_head_stride + p.first_row + row] = y;
            }
        }
    }
}
