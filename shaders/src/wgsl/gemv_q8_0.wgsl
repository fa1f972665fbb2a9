// y[row] = sum over cols of dequantised weight[row, col] * x[col]; one workgroup per row.
// weight: [rows, cols] in Q8_0 blocks of 34 bytes (f16 scale, 32 signed bytes), packed without padding, so blocks straddle words.

struct Shape {
    rows: u32,
    cols: u32,
}

@group(0) @binding(0) var<uniform> shape: Shape;
@group(0) @binding(1) var<storage, read> weight: array<u32>; // [rows * cols / 32 * 34 bytes, rounded up to words]
@group(0) @binding(2) var<storage, read> x: array<f32>; // [cols]
@group(0) @binding(3) var<storage, read_write> y: array<f32>; // [rows]

const LANES: u32 = 64u;
var<workgroup> partial: array<f32, LANES>;

fn byte_at(index: u32) -> u32 {
    return (weight[index / 4u] >> (8u * (index % 4u))) & 0xffu;
}

@compute @workgroup_size(64)
fn gemv_q8_0(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.x;
    let blocks = shape.cols / 32u;
    var sum = 0.0;
    if row < shape.rows {
        for (var b = lane; b < blocks; b += LANES) {
            let start = (row * blocks + b) * 34u;
            let scale = unpack2x16float(byte_at(start) | (byte_at(start + 1u) << 8u)).x;
            var dot = 0.0;
            for (var i = 0u; i < 32u; i++) {
                // Sign-extend the byte: shift it to the top, then arithmetically back.
                let q = bitcast<i32>(byte_at(start + 2u + i) << 24u) >> 24u;
                dot += f32(q) * x[b * 32u + i];
            }
            sum += scale * dot;
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
    if lane == 0u && row < shape.rows {
        y[row] = partial[0];
    }
}
