// out[r, out_start + i] = x[r, x_start + i]; one invocation per element.

fn run(group: vec3<u32>, groups: vec3<u32>, lane: u32) {
    let index = (group.y * groups.x + group.x) * LANES + lane;
    let row = index / p.width;
    let i = index % p.width;
    if row < p.rows {
        out[row * p.out_stride + p.out_start + i] = x[row * p.x_stride + p.x_start + i];
    }
}
