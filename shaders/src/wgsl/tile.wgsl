// 32 columns of 32 rows of weights in workgroup memory, decoded once for all tokens of the tile, and their products with `tile_of_x`:
// each of 64 lanes has four rows of weights for four tokens.

var<workgroup> $tile: array<f32, 1056>;

fn $load(matrix: u32, row_bytes: u32, first: u32, last: u32, first_col: u32, cols: u32, lane: u32) {
    for (var quad = lane; quad < 256u; quad += LANES) {
        let row = quad / 8u;
        let col = quad % 8u * 4u;
        var w = vec4<f32>();
        if first_col + col < cols {
            w = $weights(matrix + min(first + row, last) * row_bytes, first_col + col, cols);
        }
        for (var i = 0u; i < 4u; i++) {
            $tile[(col + i) * 33u + row] = w[i];
        }
    }
}

fn $multiply(sums: ptr<function, array<vec4<f32>, 4>>, lane: u32) {
    let row = lane % 8u * 4u;
    let token = lane / 8u * 4u;
    for (var col = 0u; col < 32u; col++) {
        let at = col * 33u + row;
        let w = vec4<f32>($tile[at], $tile[at + 1u], $tile[at + 2u], $tile[at + 3u]);
        for (var t = 0u; t < 4u; t++) {
            (*sums)[t] += w * tile_of_x[col * 33u + token + t];
        }
    }
}
