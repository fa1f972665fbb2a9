// F32: four numbers count as a block here.

const $BLOCK_ELEMENTS: u32 = 4u;
const $BLOCK_BYTES: u32 = 16u;

fn $weight4(block: u32, i: u32) -> vec4<f32> {
    let at = block + 4u * i;
    return bitcast<vec4<f32>>(vec4<u32>(word_at(at), word_at(at + 4u), word_at(at + 8u), word_at(at + 12u)));
}
