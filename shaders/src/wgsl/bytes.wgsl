// Reading blocks that lie at any byte of `weight`, an array of little-endian words.

fn word_at(byte: u32) -> u32 {
    let i = byte >> 2u;
    let shift = (byte & 3u) * 8u;
    if shift == 0u {
        return weight[i];
    }
    return (weight[i] >> shift) | (weight[i + 1u] << (32u - shift));
}

fn half_at(byte: u32) -> f32 {
    return unpack2x16float(word_at(byte)).x;
}

fn byte_at(byte: u32) -> u32 {
    return (weight[byte >> 2u] >> ((byte & 3u) * 8u)) & 0xffu;
}

fn signed_byte_at(byte: u32) -> i32 {
    return bitcast<i32>(byte_at(byte) << 24u) >> 24u;
}

// Four codes of up to 8 bits, as they lie in the bytes of a word.
fn codes(word: u32) -> vec4<f32> {
    return vec4<f32>(unpack4xU8(word));
}
