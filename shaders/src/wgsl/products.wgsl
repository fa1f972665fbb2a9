// Reading activations by fours, with zeros behind the end of a row.

fn x4(at: u32, left: u32) -> vec4<f32> {
    if left >= 4u {
        return vec4<f32>(x[at], x[at + 1u], x[at + 2u], x[at + 3u]);
    }
    return vec4<f32>(x[at], select(0.0, x[at + 1u], left > 1u), select(0.0, x[at + 2u], left > 2u), 0.0);
}
