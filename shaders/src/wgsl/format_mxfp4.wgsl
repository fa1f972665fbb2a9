// MXFP4: a power of two, 32 FP4 (E2M1) codes in the order of Q4_0's nibbles. Code values are taken twofold, so that they are integers,
// and the scale is halved: 2^(exponent - 128).

const $BLOCK_ELEMENTS: u32 = 32u;
const $BLOCK_BYTES: u32 = 17u;

fn $half_scale(exponent: u32) -> f32 {
    return bitcast<f32>(select((exponent - 1u) << 23u, 0x00200000u << (exponent & 1u), exponent < 2u));
}

// Twice the value of codes 0..7 is 0, 1, 2, 3, 4, 6, 8, 12; codes 8..15 are the same below zero.
fn $doubled(code: vec4<u32>) -> vec4<f32> {
    let mantissa = code & vec4<u32>(1u);
    let exponent = (code >> vec4<u32>(1u)) & vec4<u32>(3u);
    let normal = ((mantissa | vec4<u32>(2u)) << max(exponent, vec4<u32>(1u))) >> vec4<u32>(1u);
    let magnitude = vec4<f32>(select(normal, mantissa, exponent == vec4<u32>(0u)));
    return select(magnitude, -magnitude, code >= vec4<u32>(8u));
}

fn $weight4(block: u32, i: u32) -> vec4<f32> {
    let nibbles = (word_at(block + 1u + (i & 15u)) >> ((i >> 4u) * 4u)) & 0x0f0f0f0fu;
    return $half_scale(byte_at(block)) * $doubled(unpack4xU8(nibbles));
}
