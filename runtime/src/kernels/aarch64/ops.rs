//! Element-wise operations: what the compiler does not make of the scalar versions by itself.

use super::float::widen;
use super::{load_f32, store_f32};
use half::f16;
use std::arch::aarch64::*;

#[target_feature(enable = "neon")]
pub(super) fn axpy_f32(a: f32, x: &[f32], y: &mut [f32]) {
    let (x, x_tail) = x.as_chunks::<4>();
    let (y, y_tail) = y.as_chunks_mut::<4>();
    for (x, y) in x.iter().zip(y) {
        let sum = vfmaq_n_f32(load_f32(y), load_f32(x), a);
        store_f32(y, sum);
    }
    for (x, y) in x_tail.iter().zip(y_tail) {
        *y = x.mul_add(a, *y);
    }
}

/// Four numbers to halves, to nearest even.
#[inline]
#[target_feature(enable = "neon")]
fn narrow(x: float32x4_t) -> u64 {
    let out: uint16x4_t;
    // SAFETY: touches registers only; the instruction belongs to NEON.
    unsafe {
        std::arch::asm!("fcvtn {out:v}.4h, {x:v}.4s", out = out(vreg) out, x = in(vreg) x, options(pure, nomem, nostack, preserves_flags));
    }
    vget_lane_u64::<0>(vreinterpret_u64_u16(out))
}

#[target_feature(enable = "neon")]
pub(super) fn f32_to_f16(src: &[f32], out: &mut [f16]) {
    let (src, src_tail) = src.as_chunks::<4>();
    let (out, out_tail) = out.as_chunks_mut::<4>();
    for (src, out) in src.iter().zip(out) {
        *out = bytemuck::cast(narrow(load_f32(src)));
    }
    for (src, out) in src_tail.iter().zip(out_tail) {
        *out = f16::from_f32(*src);
    }
}

#[target_feature(enable = "neon")]
pub(super) fn f16_to_f32(src: &[f16], out: &mut [f32]) {
    let (src, src_tail) = src.as_chunks::<4>();
    let (out, out_tail) = out.as_chunks_mut::<4>();
    for (src, out) in src.iter().zip(out) {
        store_f32(out, widen(vcreate_u16(bytemuck::cast(*src))));
    }
    for (src, out) in src_tail.iter().zip(out_tail) {
        *out = src.to_f32();
    }
}
