// What goes into a down projection. `clamped` selects gpt-oss's rule with its `alpha` and `limit`, else it is silu(gate) * up.

fn sigmoid(x: f32) -> f32 {
    // Below -88 the exponential would overflow.
    return 1.0 / (1.0 + exp(min(-x, 88.0)));
}

fn activate(gate: f32, up: f32, clamped: u32, alpha: f32, limit: f32) -> f32 {
    if clamped == 0u {
        return gate * sigmoid(gate) * up;
    }
    let g = min(gate, limit);
    return g * sigmoid(alpha * g) * (clamp(up, -limit, limit) + 1.0);
}
