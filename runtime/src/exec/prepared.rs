//! An activation buffer in the forms that weight formats multiply with, each made at most once per input.

use super::matmul::prepare;
use super::threads::Threads;
use crate::kernels::ActivationBuf;
use crate::quant::{ActivationFormat, activation_format};
use tierwise_cost::quant::QuantFormat;

/// The forms of one input.
#[derive(Default)]
pub struct Prepared {
    forms: [(bool, ActivationBuf); 3],
}

const fn index(format: ActivationFormat) -> usize {
    match format {
        ActivationFormat::F32 => 0,
        ActivationFormat::Q8_1 => 1,
        ActivationFormat::Q8_K => 2,
    }
}

impl Prepared {
    /// The input changed.
    pub fn invalidate(&mut self) {
        for (valid, _) in &mut self.forms {
            *valid = false;
        }
    }

    /// Makes the form that weights of `format` need, unless it is there.
    pub fn ensure(&mut self, threads: &Threads, format: QuantFormat, x: &[f32] /* [tokens, cols] */, cols: usize) {
        let (valid, form) = &mut self.forms[index(activation_format(format))];
        if !*valid {
            prepare(threads, format, x, cols, form);
            *valid = true;
        }
    }

    /// Makes room for `rows` rows in the form that weights of `format` need, filled by `fill` with rows that were prepared elsewhere.
    pub fn fill(&mut self, format: QuantFormat, rows: usize, cols: usize, fill: impl FnOnce(&mut ActivationBuf)) {
        let (valid, form) = &mut self.forms[index(activation_format(format))];
        form.reset(activation_format(format), rows, cols);
        fill(form);
        *valid = true;
    }

    /// The form for weights of `format`, which must have been made.
    pub fn get(&self, format: QuantFormat) -> &ActivationBuf {
        let (valid, form) = &self.forms[index(activation_format(format))];
        debug_assert!(valid, "ensure comes first");
        form
    }
}
