// y[r] += sigmoid(dot(input[r], gate)) * x[r]; one workgroup per row.

fn run(group: vec3<u32>, groups: vec3<u32>, lane: u32) {
    let row = group.y * groups.x + group.x;
    if row >= p.rows {
        return;
    }
    var part = 0.0;
    for (var i = lane; i < p.cols; i += LANES) {
        part += input[row * p.cols + i] * gate[i];
    }
    let factor = sigmoid(sum_lanes(lane, vec4<f32>(part, 0.0, 0.0, 0.0)).x);
    for (var i = lane; i < p.width; i += LANES) {
        y[row * p.width + i] += factor * x[row * p.width + i];
    }
}
