// out[t] = table[ids[t]] for tokens whose row is among the `rows` bound ones from `first_row` on; four elements per invocation.

fn run(group: vec3<u32>, groups: vec3<u32>, lane: u32) {
    let quads = (p.cols + 3u) / 4u;
    let index = (group.y * groups.x + group.x) * LANES + lane;
    let token = index / quads;
    if token >= p.tokens {
        return;
    }
    let row = ids[token] - p.first_row;
    if ids[token] < p.first_row || row >= p.rows {
        return;
    }
    let col = 4u * (index % quads);
    let block = p.first_byte + row * p.row_bytes + col / w_BLOCK_ELEMENTS * w_BLOCK_BYTES;
    let w = w_weight4(block, col % w_BLOCK_ELEMENTS);
    for (var i = 0u; i < min(4u, p.cols - col); i++) {
        out[token * p.cols + col + i] = w[i];
    }
}
