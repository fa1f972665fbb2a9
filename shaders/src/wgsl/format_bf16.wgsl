// BF16, the upper half of an f32: four numbers count as a block here.

const $BLOCK_ELEMENTS: u32 = 4u;
const $BLOCK_BYTES: u32 = 8u;

fn $weight4(block: u32, i: u32) -> vec4<f32> {
    let low = word_at(block + 2u * i);
    let high = word_at(block + 2u * i + 4u);
    return bitcast<vec4<f32>>(vec4<u32>(low << 16u, low & 0xffff0000u, high << 16u, high & 0xffff0000u));
}
