//! Code books of the table-driven 4-bit formats.
//!
//! Shared by the scalar blocks, the encoders and the SIMD kernels. Values: `ggml-common.h` (`kvalues_iq4nl`, `kvalues_mxfp4`).

/// Values of the 16 codes of IQ4_NL and IQ4_XS.
pub(crate) const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Twice the values of the 16 FP4 (E2M1) codes of MXFP4, so that they are integers.
pub(crate) const MXFP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
