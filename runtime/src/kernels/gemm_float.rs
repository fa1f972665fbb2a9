//! Products of many tokens with F32, F16 and BF16 weights, for all instruction sets: widened exactly, multiplied and added in f32.
//!
//! A few weight rows are widened piece by piece into memory that stays in the nearest cache while all tokens use it. Two tokens at a
//! time are multiplied with all of these rows, vectors along the columns, as many sums at once as a vector has lanes: then one tree
//! of shuffles makes one vector of results of them. Per result: at most [`PIECE`] / lanes products in a row, the tree, and an
//! addition per piece.

/// Columns that are worked on together: rows of them fit the nearest cache.
pub(super) const PIECE: usize = 512;

/// How many tokens a pass over the weights takes.
pub(super) fn tokens_per_pass(cols: usize) -> usize {
    (super::gemm::PASS_BYTES / (size_of::<f32>() * cols)).max(2).next_multiple_of(2)
}

/// The kernels of one width. `$sums` turns `$lanes` vectors into the vector of their sums; `$widen` makes a vector of `$bytes` bytes
/// per weight.
macro_rules! float_gemm {
    ($features:literal, $lanes:literal, $zero:ident, $fma:ident, $sums:ident, $load:ident, $store:ident:
     $($name:ident $bytes:literal $widen:ident;)*) => {
        const LANES: usize = $lanes;
        const ROWS: usize = LANES / 2;
        type Lanes = [f32; LANES];
        /// On cache lines, so that no vector crosses one.
        #[repr(align(64))]
        struct Wide([[Lanes; PIECE / LANES]; ROWS]);

        $(
            #[target_feature(enable = $features)]
            pub(in crate::kernels) fn $name(task: GemmTask<'_>, _: &mut GemmScratch) {
                let GemmTask { weight, row_bytes, act, tokens, out } = task;
                let (cols, n) = (act.cols(), tokens.len());
                let mut wide = Wide([[[0.0; LANES]; PIECE / LANES]; ROWS]);
                let pass = tokens_per_pass(cols);
                for (tokens, at) in tokens.chunks(pass).zip((0..).step_by(pass)) {
                    for (rows, out) in weight.chunks(ROWS * row_bytes).zip(out.chunks_mut(ROWS * n)) {
                        for first in (0..cols).step_by(PIECE) {
                            let columns = first..cols.min(first + PIECE);
                            for (row, wide) in rows.chunks_exact(row_bytes).zip(&mut wide.0) {
                                let row = &row[$bytes * columns.start..$bytes * columns.end];
                                let (whole, tail) = row.as_chunks::<{ $bytes * LANES }>();
                                let mut padded = [0u8; $bytes * LANES];
                                padded[..tail.len()].copy_from_slice(tail);
                                for (from, to) in whole.iter().chain([&padded]).zip(wide) {
                                    $store(to, $widen(from));
                                }
                            }
                            multiply_all(&wide, act, &columns, tokens, at, out, n);
                        }
                    }
                }
            }
        )*

        /// Adds what the widened rows make of some columns of the tokens, which are `at..` of the `n` in `out`.
        #[inline]
        #[target_feature(enable = $features)]
        fn multiply_all(
            wide: &Wide,
            act: &ActivationBuf,
            columns: &Range<usize>,
            tokens: &[u32],
            at: usize,
            out: &mut [f32], // [up to ROWS, n]
            n: usize,
        ) {
            for (pair, at) in tokens.chunks(2).zip((at..).step_by(2)) {
                // A token without partner is its own; the second results are dropped.
                let x = [pair[0], pair[pair.len() - 1]];
                let x = x.map(|t| &bytemuck::cast_slice::<u8, f32>(act.row(t))[columns.clone()]);
                let mut products: Lanes = [0.0; LANES];
                multiply(wide, x, &mut products);
                for (out, products) in out.chunks_exact_mut(n).zip(products.as_chunks::<2>().0) {
                    for (out, product) in out[at..at + pair.len()].iter_mut().zip(products) {
                        *out = if columns.start == 0 { *product } else { *out + product };
                    }
                }
            }
        }

        /// Products of all rows with two tokens: `[ROWS, 2]`.
        #[inline]
        #[target_feature(enable = $features)]
        fn multiply(wide: &Wide, x: [&[f32]; 2], products: &mut Lanes) {
            let [(a, a_tail), (b, b_tail)] = x.map(|x| x.as_chunks::<LANES>());
            // Known to be inside both, so that nothing is checked in the loop.
            let whole = a.len().min(PIECE / LANES);
            let (a, b) = (&a[..whole], &b[..whole]);
            let mut sums = [$zero(); LANES];
            for i in 0..whole {
                let x = [$load(&a[i]), $load(&b[i])];
                for r in 0..ROWS {
                    let w = $load(&wide.0[r][i]);
                    sums[2 * r] = $fma(w, x[0], sums[2 * r]);
                    sums[2 * r + 1] = $fma(w, x[1], sums[2 * r + 1]);
                }
            }
            if !a_tail.is_empty() {
                let x = [a_tail, b_tail].map(|tail| {
                    let mut padded: Lanes = [0.0; LANES];
                    padded[..tail.len()].copy_from_slice(tail);
                    $load(&padded)
                });
                for r in 0..ROWS {
                    let w = $load(&wide.0[r][whole]);
                    sums[2 * r] = $fma(w, x[0], sums[2 * r]);
                    sums[2 * r + 1] = $fma(w, x[1], sums[2 * r + 1]);
                }
            }
            $store(products, $sums(sums));
        }
    };
}

pub(super) use float_gemm;
