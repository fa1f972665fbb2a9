// out = activation(gate, up); one invocation per element.

fn run(group: vec3<u32>, groups: vec3<u32>, lane: u32) {
    let i = (group.y * groups.x + group.x) * LANES + lane;
    if i < p.elements {
        out[i] = activate(gate[i], up[i], p.clamped, p.alpha, p.limit);
    }
}
