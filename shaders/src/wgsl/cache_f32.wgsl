// Two neighbouring elements of a cache in F32, from an even one on.

fn key2(at: u32) -> vec2<f32> {
    return vec2<f32>(keys[at], keys[at + 1u]);
}

fn value2(at: u32) -> vec2<f32> {
    return vec2<f32>(values[at], values[at + 1u]);
}
