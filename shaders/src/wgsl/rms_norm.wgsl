// y[token, i] = x[token, i] * weight[i] / sqrt(mean over i of x[token, i]^2 + eps); one workgroup per token.

struct Shape {
    tokens: u32,
    width: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> shape: Shape;
@group(0) @binding(1) var<storage, read> weight: array<f32>; // [width]
@group(0) @binding(2) var<storage, read> x: array<f32>; // [tokens, width]
@group(0) @binding(3) var<storage, read_write> y: array<f32>; // [tokens, width]

const LANES: u32 = 64u;
var<workgroup> partial: array<f32, LANES>;

@compute @workgroup_size(64)
fn rms_norm(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let token = group.x;
    var sum = 0.0;
    if token < shape.tokens {
        for (var i = lane; i < shape.width; i += LANES) {
            let v = x[token * shape.width + i];
            sum += v * v;
        }
    }
    partial[lane] = sum;
    workgroupBarrier();
    for (var stride = LANES / 2u; stride > 0u; stride /= 2u) {
        if lane < stride {
            partial[lane] += partial[lane + stride];
        }
        workgroupBarrier();
    }
    if token < shape.tokens {
        let scale = inverseSqrt(partial[0] / f32(shape.width) + shape.eps);
        for (var i = lane; i < shape.width; i += LANES) {
            y[token * shape.width + i] = x[token * shape.width + i] * scale * weight[i];
        }
    }
}
