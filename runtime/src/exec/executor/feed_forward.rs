//! Routers, routed experts and dense feed-forward parts: rows of all sequences together.

use super::{CapturedRouting, Executor};
use crate::error::Result;
use crate::exec::buffers::Activations;
use crate::exec::driver::{Compute, Driver, Foreseen, Wave};
use crate::exec::elementwise::sigmoid;
use crate::exec::experts::{ExpertBuffers, ExpertBytes, ExpertExtras, weighted_rows};
use crate::exec::foresight::Foresight;
use crate::exec::matmul::{Product, prepare_rows, run_products};
use crate::exec::model::{Matrix, Model};
use crate::exec::prepared::Prepared;
use crate::exec::remote::RoutedLayer;
use crate::exec::route::Rule;
use crate::exec::sequences::StepRows;
use crate::exec::threads::{Threads, for_rows};
use crate::kernels::ActivationBuf;
use tierwise_cost::model::{Moe, TensorId};
use tierwise_cost::op::Slot;
use tierwise_cost::quant::QuantFormat;

#[derive(Default)]
pub(super) struct FfnBuffers {
    /// `[tokens, inner_size]` each.
    gate: Vec<f32>,
    up: Vec<f32>,
    inner: ActivationBuf,
    /// `[tokens, hidden]`
    out: Vec<f32>,
}

impl Executor {
    #[expect(clippy::too_many_arguments, reason = "the fields of one operation")]
    pub(super) fn route(
        &mut self,
        model: &Model,
        weight: TensorId,
        [bias, selection_bias]: [Option<TensorId>; 2],
        moe: &Moe,
        (layer, iteration): (u32, u32),
        step: &StepRows,
        scored: bool,
    ) {
        let rows = (iteration * moe.num_experts) as usize..((iteration + 1) * moe.num_experts) as usize;
        let weight = model.matrix(weight).rows(rows.start, rows.end);
        self.ensure(Slot::Normed, weight.format);
        let form = self.normed.get(weight.format);
        self.router_logits.resize(form.tokens() * weight.rows, 0.0);
        let bias = bias.map(|b| &model.vector(b)[rows.clone()]);
        let product = Product { weight, bias, input: form, tokens: form.all_tokens(), out: &mut self.router_logits };
        run_products(&self.threads, vec![product]);
        let scores = if scored { Some(&mut self.scores) } else { None };
        let rule = Rule { moe, selection_bias: selection_bias.map(|b| &model.vector(b)[rows]) };
        self.routing.choose_scored(self.threads.kernels(), rule, &mut self.router_logits, scores);
        if self.forced.is_on() {
            let moe_layer = model.spec().moe_layers().position(|(l, _)| l == layer).unwrap_or(0);
            // After SelectRows only the kept rows are here.
            let all = self.routing.num_tokens() == step.tokens.len();
            self.forced.apply(&mut self.routing, moe_layer, |row| if all { row } else { step.kept[row] as usize });
        }
        if let Some(captured) = &mut self.captured {
            captured.extend(step.parts.iter().map(|part| CapturedRouting {
                sequence: self.sequences.all()[part.place].id(),
                layer,
                position: part.position,
                routing: self.routing.rows(part.first_row, part.rows),
            }));
        }
    }

    pub(super) fn routed_experts(
        &mut self,
        model: &Model,
        driver: &mut Driver,
        layer: u32,
        tensors: [TensorId; 3],
        extras: &ExpertExtras<'_>,
        step: &StepRows,
    ) -> Result<()> {
        let format = |i: usize| model.spec().tensors[tensors[i].0 as usize].format;
        if extras.weights_on_input {
            // An input row for every choice; weights are 1 from there on.
            let (x, (rows, forms)) = (self.buffers.get(Slot::Normed), &mut self.weighted);
            let width = x.width();
            weighted_rows(x.as_slice(), width, &self.routing, rows);
            forms.invalidate();
            forms.ensure(&self.threads, format(0), rows, width);
            forms.ensure(&self.threads, format(1), rows, width);
            self.routing.weights.fill(1.0);
        } else {
            self.ensure(Slot::Normed, format(0));
            self.ensure(Slot::Normed, format(1));
        }
        let shape = &model.spec().tensors[tensors[2].0 as usize].shape;
        let (hidden, inner_size) = (shape[1] as usize, shape[2] as usize);
        self.experts.arrange(&self.routing, inner_size, hidden, format(2), extras.weights_on_input);
        if let Some(remote) = &mut self.remote {
            let input = if extras.weights_on_input { &self.weighted.1 } else { &self.normed };
            let call = RoutedLayer { layer, tensors, extras, routing: &self.routing, input, threads: &self.threads };
            remote.compute(model, call, &mut self.experts)?;
        } else {
            self.serve(model, driver, layer, tensors, extras, step)?;
        }
        let delta = self.buffers.get_mut(Slot::Delta);
        delta.reshape(self.routing.num_tokens(), hidden);
        self.experts.combine(&self.threads, &self.routing, delta.as_mut_slice(), hidden, |_| true);
        Ok(())
    }

    /// The driver has the layer's experts computed, wave after wave.
    fn serve(
        &mut self,
        model: &Model,
        driver: &mut Driver,
        layer: u32,
        tensors: [TensorId; 3],
        extras: &ExpertExtras<'_>,
        step: &StepRows,
    ) -> Result<()> {
        // Scores are the router's: with choices from elsewhere they would mislead.
        let scores = if driver.loads_experts() && !self.forced.is_on() { self.scores.to_sparse() } else { Vec::new() };
        let demand = self.experts.demand(layer, &self.routing, scores);
        let input = if extras.weights_on_input { &self.weighted.1 } else { &self.normed };
        let (foresight, stream) = (&mut self.foresight, self.buffers.get(Slot::Hidden));
        let (threads, experts) = (&self.threads, &mut self.experts);
        let mut work = OnCpu { model, threads, layer, tensors, extras, input, experts, foresight, stream, kept: &step.kept };
        driver.serve(demand, &mut work)
    }

    pub(super) fn ffn(&mut self, model: &Model, tensors: [TensorId; 3], sigmoid_gate: Option<TensorId>, accumulate: bool) {
        let [gate, up, down] = tensors.map(|t| model.matrix(t));
        self.ensure(Slot::Normed, gate.format);
        self.ensure(Slot::Normed, up.format);
        let (tokens, inner_size) = (self.buffers.get(Slot::Normed).rows(), gate.rows);
        let FfnBuffers { gate: gate_out, up: up_out, inner, out } = &mut self.ffn;
        gate_out.resize(tokens * inner_size, 0.0);
        up_out.resize(tokens * inner_size, 0.0);
        out.resize(tokens * down.rows, 0.0);
        let product = |weight, out| {
            let form = self.normed.get(weight_format(&weight));
            Product { weight, bias: None, input: form, tokens: form.all_tokens(), out }
        };
        run_products(&self.threads, vec![product(gate, gate_out), product(up, up_out)]);
        let (threads, gate_out, up_out) = (&self.threads, &*gate_out, &*up_out);
        prepare_rows(threads, down.format, tokens, inner_size, inner, |i, kernels, row| {
            threads.with_scratch(|s| {
                s.inner.resize(inner_size, 0.0);
                let at = i * inner_size..(i + 1) * inner_size;
                kernels.silu_mul(&gate_out[at.clone()], &up_out[at], &mut s.inner);
                kernels.quantize_activation_row(crate::quant::activation_format(down.format), &s.inner, row);
            });
        });
        run_products(threads, vec![Product { weight: down, bias: None, input: inner, tokens: inner.all_tokens(), out }]);

        let (normed, out, kernels) = (self.buffers.get(Slot::Normed), &*out, threads.kernels());
        let factors: Option<Vec<f32>> = sigmoid_gate.map(|g| {
            let weight = model.vector(g);
            normed.as_slice().chunks_exact(normed.width()).map(|x| sigmoid(kernels.dot_f32(x, weight))).collect()
        });
        let delta = self.buffers.get_mut(Slot::Delta);
        delta.reshape(tokens, down.rows);
        for_rows(threads, delta.as_mut_slice(), down.rows, |i, row| {
            if !accumulate {
                row.fill(0.0);
            }
            let factor = factors.as_ref().map_or(1.0, |f| f[i]);
            kernels.axpy_f32(factor, &out[i * down.rows..(i + 1) * down.rows], row);
        });
    }
}

/// A layer's routed experts, all computed here.
struct OnCpu<'a, 'm> {
    model: &'m Model,
    threads: &'a Threads,
    layer: u32,
    tensors: [TensorId; 3],
    extras: &'a ExpertExtras<'a>,
    input: &'a Prepared,
    experts: &'a mut ExpertBuffers,
    foresight: &'a mut Foresight,
    /// [`Slot::Hidden`]
    stream: &'a Activations,
    /// Rows that the last layer's feed-forward part gets.
    kept: &'a [u32],
}

impl<'m> Compute<'m> for OnCpu<'_, 'm> {
    fn resident(&self, expert: u32) -> ExpertBytes<'m> {
        self.model.expert(self.tensors, expert)
    }

    fn foresee(&mut self) -> Vec<Foreseen> {
        self.foresight.look(self.model, self.threads, self.layer, self.stream, self.kept)
    }

    fn compute(&mut self, wave: Wave<'_>) -> Result<()> {
        match wave {
            Wave::Host(experts) => self.experts.compute(self.threads, self.input, self.extras, experts),
            Wave::Device(_) => unreachable!("the session has checked that its plan computes on the CPU alone"),
        }
        Ok(())
    }

    fn finish_device(&mut self) -> Result<()> {
        Ok(())
    }
}

const fn weight_format(weight: &Matrix<'_>) -> QuantFormat {
    weight.format
}
