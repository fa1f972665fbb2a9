// x[r] *= factors[r], or x *= factor; one invocation per element.

fn run(group: vec3<u32>, groups: vec3<u32>, lane: u32) {
    let i = (group.y * groups.x + group.x) * LANES + lane;
    if i < p.elements {
        if p.has_factors != 0u {
            x[i] *= factors[i / p.width];
        } else {
            x[i] *= p.factor;
        }
    }
}
