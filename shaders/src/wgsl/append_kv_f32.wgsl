// cache[first + i] = x[i]; one invocation per element.

fn run(group: vec3<u32>, groups: vec3<u32>, lane: u32) {
    let i = (group.y * groups.x + group.x) * LANES + lane;
    if i < p.elements {
        cache[p.first + i] = x[i];
    }
}
