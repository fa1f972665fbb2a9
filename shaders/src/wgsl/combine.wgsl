// y[t] (+)= sum over c of weights[t, c] * x[t * k + c], in the order of the choices; one invocation per element.

fn run(group: vec3<u32>, groups: vec3<u32>, lane: u32) {
    let i = (group.y * groups.x + group.x) * LANES + lane;
    let token = i / p.width;
    if token >= p.tokens {
        return;
    }
    var sum = 0.0;
    for (var row = token * p.k; row < (token + 1u) * p.k; row++) {
        sum += weights[row] * x[row * p.width + i % p.width];
    }
    if p.accumulate != 0u {
        sum += y[i];
    }
    y[i] = sum;
}
