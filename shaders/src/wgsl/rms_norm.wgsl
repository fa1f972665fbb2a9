// out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight[r % period]; one workgroup per row.

fn run(group: vec3<u32>, groups: vec3<u32>, lane: u32) {
    let row = group.y * groups.x + group.x;
    if row >= p.rows {
        return;
    }
    var squares = 0.0;
    for (var i = lane; i < p.width; i += LANES) {
        let v = x_at(row * p.width + i);
        squares += v * v;
    }
    let sum = sum_lanes(lane, vec4<f32>(squares, 0.0, 0.0, 0.0)).x;
    let factor = inverseSqrt(sum / f32(p.width) + p.eps);
    for (var i = lane; i < p.width; i += LANES) {
        var v = x_at(row * p.width + i) * factor;
        if p.has_weight != 0u {
            v *= weight[row % p.period * p.width + i];
        }
        out[row * p.width + i] = v;
    }
}
