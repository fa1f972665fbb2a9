// Puts the ranges of a row together: every range's values and sum count by how far its maximum is below the greatest.

const LEAST: f32 = -1e30;

fn run(group: vec3<u32>, groups: vec3<u32>, lane: u32) {
    let row = group.y * groups.x + group.x;
    if row >= p.rows {
        return;
    }
    let stride = p.value_dim + 2u;
    let base = row * p.ranges * stride;
    var most = LEAST;
    for (var r = 0u; r < p.ranges; r++) {
        most = max(most, parts[base + r * stride + p.value_dim]);
    }
    for (var i = lane; i < p.value_dim; i += LANES) {
        var value = 0.0;
        var sum = 0.0;
        for (var r = 0u; r < p.ranges; r++) {
            let at = base + r * stride;
            let weight = exp(max(parts[at + p.value_dim] - most, -100.0));
            value += weight * parts[at + i];
            sum += weight * parts[at + p.value_dim + 1u];
        }
        out[row * p.value_dim + i] = value / sum;
    }
}
