// out[r] = activation(gate * x[r / rows_per_input], up * x[...]) with the matrices of expert ids[r]; a workgroup has one row r and four
// rows of both matrices.

var<private> x_first: u32;

fn x_row(token: u32) -> u32 {
    return x_first;
}

fn run(group: vec3<u32>, groups: vec3<u32>, lane: u32) {
    let r = group.z * groups.y + group.y;
    if r >= p.num_rows {
        return;
    }
    let expert = ids[r];
    var start: vec3<u32>;
    if !find_expert(expert, &start) {
        return;
    }
    let first = 4u * group.x;
    x_first = r / p.rows_per_input * p.cols;
    let gates = gate_rows(start.x, p.gate_row_bytes, first, p.rows - 1u, p.cols, lane);
    let ups = up_rows(start.y, p.up_row_bytes, first, p.rows - 1u, p.cols, lane);
    let gate_sum = sum_lanes(lane, gates[0]);
    let up_sum = sum_lanes(lane, ups[0]);
    let row = first + lane;
    if lane < 4u && row < p.rows {
        var gate = gate_sum[lane];
        var up = up_sum[lane];
        if p.has_bias != 0u {
            gate += gate_bias[expert * p.rows + row];
            up += up_bias[expert * p.rows + row];
        }
        out[r * p.rows + row] = activate(gate, up, p.clamped, p.alpha, p.limit);
    }
}
