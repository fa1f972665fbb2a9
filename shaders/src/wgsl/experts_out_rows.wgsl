// out[r] = down * x[r] (+ bias) with the matrix of expert ids[r]; a workgroup has one row r and four rows of the matrix.

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
    x_first = r * p.cols;
    let sums = down_rows(start.z, p.row_bytes, first, p.rows - 1u, p.cols, lane);
    let sum = sum_lanes(lane, sums[0]);
    let row = first + lane;
    if lane < 4u && row < p.rows {
        var y = sum[lane];
        if p.has_bias != 0u {
            y += bias[expert * p.rows + row];
        }
        out[r * p.rows + row] = y;
    }
}
