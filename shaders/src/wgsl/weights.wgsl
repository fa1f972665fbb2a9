// Four weights from column `col` on of a row that starts at byte `row`, with zeros behind the end of the row: a short last block is
// possible only where four numbers count as one.

fn $weights(row: u32, col: u32, cols: u32) -> vec4<f32> {
    let w = $weight4(row + col / $BLOCK_ELEMENTS * $BLOCK_BYTES, col % $BLOCK_ELEMENTS);
    if $BLOCK_ELEMENTS == 4u && cols - col < 4u {
        return select(vec4<f32>(), w, vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(cols - col));
    }
    return w;
}
