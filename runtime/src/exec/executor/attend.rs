//! Operations that look at positions: rotation, attention and states, each row in its own sequence.

use super::Executor;
use crate::exec::attention::{OfSequence, attention_of};
use crate::exec::delta_net::{DeltaInputs, DeltaPart, DeltaWeights, delta_net};
use crate::exec::elementwise::rms_norm_in_place;
use crate::exec::mla::{self, LatentWeights};
use crate::exec::model::Model;
use crate::exec::rope::RopeTable;
use crate::exec::sequences::{Sequences, StepRows};
use crate::exec::threads::for_rows;
use tierwise_cost::model::{DeltaNet, Gqa, Mla, QkNorm, Rope, Temperature, TensorId};
use tierwise_cost::op::Slot;

/// The caches of a step's sequences, with their numbers of rows.
fn caches<'a>(sequences: &'a Sequences, step: &StepRows) -> Vec<OfSequence<'a>> {
    step.parts.iter().map(|p| OfSequence { kv: &sequences.all()[p.place].kv, rows: p.rows }).collect()
}

impl Executor {
    /// Queries at position `p` times `1 + scale * ln(1 + floor((p + 1) / period))`.
    pub(super) fn temper(&mut self, temperature: &Temperature, step: &StepRows) {
        let positions = step.positions();
        let q = self.buffers.get_mut(Slot::Q);
        let width = q.width();
        for_rows(&self.threads, q.as_mut_slice(), width, |i, row| {
            let steps = (positions[i] + 1) / temperature.period as usize;
            let factor = 1.0 + temperature.scale * (steps as f32).ln_1p();
            row.iter_mut().for_each(|x| *x *= factor);
        });
    }

    pub(super) fn qk_norm(&mut self, model: &Model, weight: Option<TensorId>, slot: Slot, span: QkNorm, head_dim: usize) {
        let (weight, eps, kernels) = (weight.map(|w| model.vector(w)), model.spec().norm_eps, self.threads.kernels());
        let x = self.buffers.get_mut(slot);
        let width = x.width();
        let span = if span == QkNorm::FullWidth { width } else { head_dim };
        for_rows(&self.threads, x.as_mut_slice(), width, |_, row| {
            for part in row.chunks_exact_mut(span) {
                rms_norm_in_place(kernels, part, weight, eps);
            }
        });
    }

    /// Place of the table for `rope`, filled for this step.
    fn rope_table(&mut self, rope: &Rope, step: &StepRows) -> usize {
        let known = self.ropes.iter().position(|t| t.rope() == rope);
        known.unwrap_or_else(|| {
            let mut table = RopeTable::new(rope.clone(), self.sequences.context());
            table.fill(&step.ranges());
            self.ropes.push(table);
            self.ropes.len() - 1
        })
    }

    pub(super) fn rope(&mut self, slot: Slot, head_dim: usize, rope: &Rope, step: &StepRows) {
        let index = self.rope_table(rope, step);
        let (table, x) = (&self.ropes[index], self.buffers.get_mut(slot));
        let width = x.width();
        for_rows(&self.threads, x.as_mut_slice(), width, |i, row| table.apply(i, row, head_dim));
    }

    /// Keys and values of the new rows into their sequences' caches, then attention over each.
    pub(super) fn attend(&mut self, layer: Option<u32>, a: &Gqa, sinks: Option<&[f32]>, step: &StepRows) {
        let layer = layer.map_or(0, |l| l as usize);
        let [q, k, v, attended] = self.buffers.get_many_mut([Slot::Q, Slot::K, Slot::V, Slot::Attended]);
        let width = k.width();
        for part in &step.parts {
            let [k, v] = [&*k, &*v].map(|x| part.of(width, x.as_slice()));
            self.sequences.all_mut()[part.place].kv.append(self.threads.kernels(), layer, k, v);
        }
        attended.reshape(q.rows(), q.width());
        let of_step = caches(&self.sequences, step);
        attention_of(&self.threads, a, sinks, layer, &of_step, &q.view(), attended.view_mut());
        self.attended.invalidate();
    }

    /// The same of latents.
    pub(super) fn latent_attention(
        &mut self,
        model: &Model,
        layer: Option<u32>,
        a: &Mla,
        [kv_norm, k_b, v_b]: [TensorId; 3],
        step: &StepRows,
    ) {
        let (index, layer) = (self.rope_table(&a.rope, step), layer.map_or(0, |l| l as usize));
        let weights = LatentWeights { kv_norm: model.vector(kv_norm), k_b: model.matrix(k_b), v_b: model.matrix(v_b) };
        let norm = (weights.kv_norm, model.spec().norm_eps);
        let [q, latent, attended] = self.buffers.get_many_mut([Slot::Q, Slot::KvLatent, Slot::Attended]);
        mla::norm_and_rotate(&self.threads, a, norm, &self.ropes[index], q.as_mut_slice(), latent.as_mut_slice());
        let width = latent.width();
        for part in &step.parts {
            let rows = part.of(width, latent.as_slice());
            self.sequences.all_mut()[part.place].kv.append_latents(self.threads.kernels(), layer, rows);
        }
        attended.reshape(q.rows(), (a.num_heads * a.v_head_dim) as usize);
        let of_step = caches(&self.sequences, step);
        let (q, out) = (q.as_slice(), attended.as_mut_slice());
        mla::attention(&self.threads, a, (layer, &of_step), &weights, &mut self.latent, q, out);
        self.attended.invalidate();
    }

    /// States of the step's sequences go on by their rows.
    pub(super) fn delta_rule(
        &mut self,
        layer: Option<u32>,
        a: &DeltaNet,
        [conv, dt_bias, decay, norm]: [&[f32]; 4],
        norm_eps: f32,
        step: &StepRows,
    ) {
        let layer = layer.map_or(0, |l| l as usize);
        let weights = DeltaWeights { conv, dt_bias, decay, norm, norm_eps };
        let [mixed, gate, beta, alpha, attended] =
            self.buffers.get_many_mut([Slot::Q, Slot::Gate, Slot::Beta, Slot::Alpha, Slot::Attended]);
        attended.reshape(mixed.rows(), a.value_dim() as usize);
        let alpha = (!a.fused_gates).then_some(alpha.as_slice());
        let inputs = DeltaInputs { mixed: mixed.as_slice(), gate: gate.as_slice(), beta: beta.as_slice(), alpha };
        let mut sequences: Vec<_> = self.sequences.all_mut().iter_mut().map(Some).collect();
        let mut parts = Vec::with_capacity(step.parts.len());
        for part in &step.parts {
            let sequence = sequences[part.place].take().expect("a sequence is in a step once");
            parts.push(DeltaPart { state: sequence.kv.state_mut(layer), rows: part.rows });
        }
        delta_net(&self.threads, a, &weights, inputs, parts, &mut self.delta, attended.as_mut_slice());
        self.attended.invalidate();
    }
}
