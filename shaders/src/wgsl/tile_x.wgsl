// For many tokens: 32 columns of 32 rows of x in workgroup memory, by columns; a column takes 33 places, so that lanes that write
// neighbouring columns use different banks.

var<workgroup> tile_of_x: array<f32, 1056>;

fn load_x(first_col: u32, cols: u32, lane: u32) {
    for (var quad = lane; quad < 256u; quad += LANES) {
        let row = quad / 8u;
        let col = quad % 8u * 4u;
        var v = vec4<f32>();
        if first_col + col < cols {
            v = x4(x_row(row) + first_col + col, cols - first_col - col);
        }
        for (var i = 0u; i < 4u; i++) {
            tile_of_x[(col + i) * 33u + row] = v[i];
        }
    }
}
