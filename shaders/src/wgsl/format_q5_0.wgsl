// Q5_0: f16 scale, 32 fifth bits, nibbles as in Q4_0; minus 16.

const $BLOCK_ELEMENTS: u32 = 32u;
const $BLOCK_BYTES: u32 = 22u;

fn $weight4(block: u32, i: u32) -> vec4<f32> {
    let nibbles = (word_at(block + 6u + (i & 15u)) >> ((i >> 4u) * 4u)) & 0x0f0f0f0fu;
    let high = (vec4<u32>(word_at(block + 2u) >> i) >> vec4<u32>(0u, 1u, 2u, 3u)) & vec4<u32>(1u);
    return half_at(block) * (codes(nibbles) + 16.0 * vec4<f32>(high) - 16.0);
}
