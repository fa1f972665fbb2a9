// As experts_in_rows, for tiles of up to 32 rows of one expert: a workgroup has one tile and 32 rows of both matrices.

fn x_row(token: u32) -> u32 {
    return row_of[token] / p.rows_per_input * p.cols;
}

fn run(group: vec3<u32>, groups: vec3<u32>, lane: u32) {
    var tile: Tile;
    if !find_tile(group, groups, lane, &tile) {
        return;
    }
    var gates: array<vec4<f32>, 4>;
    var ups: array<vec4<f32>, 4>;
    for (var col = 0u; col < p.cols; col += 32u) {
        load_x(col, p.cols, lane);
        gate_load(tile.start.x, p.gate_row_bytes, tile.first, p.rows - 1u, col, p.cols, lane);
        up_load(tile.start.y, p.up_row_bytes, tile.first, p.rows - 1u, col, p.cols, lane);
        workgroupBarrier();
        gate_multiply(&gates, lane);
        up_multiply(&ups, lane);
        workgroupBarrier();
    }
    for (var t = 0u; t < 4u; t++) {
        let token = lane / 8u * 4u + t;
        for (var i = 0u; i < 4u; i++) {
            let row = tile.first + lane % 8u * 4u + i;
            if token < tile.count && row < p.rows {
                var gate = gates[t][i];
                var up = ups[t][i];
                if p.has_bias != 0u {
                    gate += gate_bias[tile.expert * p.rows + row];
                    up += up_bias[tile.expert * p.rows + row];
                }
                out[row_of[token] * p.rows + row] = activate(gate, up, p.clamped, p.alpha, p.limit);
            }
        }
    }
}
