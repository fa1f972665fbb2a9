// out[r] = (x[r] - mean(x[r])) / sqrt(variance(x[r]) + eps) * weight + bias; one workgroup per row.

fn run(group: vec3<u32>, groups: vec3<u32>, lane: u32) {
    let row = group.y * groups.x + group.x;
    if row >= p.rows {
        return;
    }
    var sum = 0.0;
    for (var i = lane; i < p.width; i += LANES) {
        sum += x_at(row * p.width + i);
    }
    let mean = sum_lanes(lane, vec4<f32>(sum, 0.0, 0.0, 0.0)).x / f32(p.width);
    var squares = 0.0;
    for (var i = lane; i < p.width; i += LANES) {
        let v = x_at(row * p.width + i) - mean;
        squares += v * v;
    }
    let variance = sum_lanes(lane, vec4<f32>(squares, 0.0, 0.0, 0.0)).x / f32(p.width);
    let factor = inverseSqrt(variance + p.eps);
    for (var i = lane; i < p.width; i += LANES) {
        out[row * p.width + i] = (x_at(row * p.width + i) - mean) * factor * weight[i] + bias[i];
    }
}
