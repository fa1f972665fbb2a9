// Q6_K: nibbles (64 bytes to 128 elements, elements 64 apart share a byte), two upper bits (32 bytes to 128 elements), signed scales for
// runs of 16, f16 scale; minus 32.

const $BLOCK_ELEMENTS: u32 = 256u;
const $BLOCK_BYTES: u32 = 210u;

fn $weight4(block: u32, i: u32) -> vec4<f32> {
    let part = i >> 7u;
    let low = (word_at(block + 64u * part + (i & 63u)) >> (4u * ((i >> 6u) & 1u))) & 0x0f0f0f0fu;
    let high = (word_at(block + 128u + 32u * part + (i & 31u)) >> (2u * ((i >> 5u) & 3u))) & 0x03030303u;
    let scale = half_at(block + 208u) * f32(signed_byte_at(block + 192u + (i >> 4u)));
    return scale * (codes(low | (high << 4u)) - 32.0);
}
