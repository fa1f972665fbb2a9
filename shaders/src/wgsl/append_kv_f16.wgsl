// cache[first + i] = x[i] as F16, two to a word; one invocation per word.

fn run(group: vec3<u32>, groups: vec3<u32>, lane: u32) {
    let i = (group.y * groups.x + group.x) * LANES + lane;
    if 2u * i < p.elements {
        cache[p.first / 2u + i] = pack2x16float(vec2<f32>(x[2u * i], x[2u * i + 1u]));
    }
}
