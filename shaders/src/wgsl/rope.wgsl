// Rotates pairs of elements of every head in place; one invocation per pair.

fn run(group: vec3<u32>, groups: vec3<u32>, lane: u32) {
    let index = (group.y * groups.x + group.x) * LANES + lane;
    let row = index / p.pairs;
    let pair = index % p.pairs;
    if row >= p.tokens * p.heads {
        return;
    }
    let start = row * p.head_stride + p.first;
    let i = start + select(pair, 2u * pair, p.interleaved != 0u);
    let j = start + select(pair + p.pairs, 2u * pair + 1u, p.interleaved != 0u);
    let at = 2u * (row / p.heads * p.pairs + pair);
    let a = x[i];
    let b = x[j];
    x[i] = a * cos_sin[at] - b * cos_sin[at + 1u];
    x[j] = b * cos_sin[at] + a * cos_sin[at + 1u];
}
