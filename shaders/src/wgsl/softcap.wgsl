// cap * tanh(x / cap), or x where the cap is 0. The argument is kept where tanh does not overflow.

fn capped(x: f32, cap: f32) -> f32 {
    if cap == 0.0 {
        return x;
    }
    return cap * tanh(clamp(x / cap, -15.0, 15.0));
}
