// Two neighbouring elements of a cache in F16, from an even one on.

fn key2(at: u32) -> vec2<f32> {
    return unpack2x16float(keys[at / 2u]);
}

fn value2(at: u32) -> vec2<f32> {
    return unpack2x16float(values[at / 2u]);
}
