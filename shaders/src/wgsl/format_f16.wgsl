// F16: four numbers count as a block here.

const $BLOCK_ELEMENTS: u32 = 4u;
const $BLOCK_BYTES: u32 = 8u;

fn $weight4(block: u32, i: u32) -> vec4<f32> {
    let at = block + 2u * i;
    return vec4<f32>(unpack2x16float(word_at(at)), unpack2x16float(word_at(at + 4u)));
}
