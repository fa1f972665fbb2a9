// For few tokens: a lane's part of the products of four rows of weights from row `first` on with TOKENS rows of x, one vector per token.

fn $rows(matrix: u32, row_bytes: u32, first: u32, last: u32, cols: u32, lane: u32) -> array<vec4<f32>, TOKENS> {
    let row0 = matrix + first * row_bytes;
    let row1 = matrix + min(first + 1u, last) * row_bytes;
    let row2 = matrix + min(first + 2u, last) * row_bytes;
    let row3 = matrix + min(first + 3u, last) * row_bytes;
    var sums: array<vec4<f32>, TOKENS>;
    for (var col = 4u * lane; col < cols; col += 4u * LANES) {
        let w0 = $weights(row0, col, cols);
        let w1 = $weights(row1, col, cols);
        let w2 = $weights(row2, col, cols);
        let w3 = $weights(row3, col, cols);
        for (var t = 0u; t < TOKENS; t++) {
            let v = x4(x_row(t) + col, cols - col);
            sums[t] += vec4<f32>(dot(w0, v), dot(w1, v), dot(w2, v), dot(w3, v));
        }
    }
    return sums;
}
