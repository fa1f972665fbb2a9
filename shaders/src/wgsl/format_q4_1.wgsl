// Q4_1: f16 scale and minimum; nibbles as in Q4_0.

const $BLOCK_ELEMENTS: u32 = 32u;
const $BLOCK_BYTES: u32 = 20u;

fn $weight4(block: u32, i: u32) -> vec4<f32> {
    let nibbles = (word_at(block + 4u + (i & 15u)) >> ((i >> 4u) * 4u)) & 0x0f0f0f0fu;
    return half_at(block) * codes(nibbles) + half_at(block + 2u);
}
