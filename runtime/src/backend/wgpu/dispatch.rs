//! Operations to dispatches of WGSL kernels: which kernel, which parameters, which parts of which buffers, how many workgroups.
//!
//! A device binds only so many bytes at once (128 MiB is common), so matrices are cut into windows of whole rows and arenas of experts
//! into windows that overlap by an expert's greatest size. Nothing here touches a device.

use crate::backend::check::{Operand, row_bytes};
use crate::backend::device::{BufferId, View};
use crate::backend::op::{DeviceAttention, DeviceExperts, DeviceMatrix, DeviceOp, KvElement, RowGroups};
use crate::error::{Result, RuntimeError};
use tierwise_cost::model::{Activation, RopePairing};
use tierwise_shaders::wgsl::{Kernel, MAX_CHOSEN_EXPERTS, MAX_HEAD_DIM, MAX_ROUTED_EXPERTS, ROWS_PER_WORKGROUP, Rows, TILE};

/// From so many rows of activations on tiles are used: half of a tile would be idle below.
const TILE_FROM: u32 = 17;

/// Workgroups of attention that keep a device busy.
const BUSY_WORKGROUPS: u64 = 512;
/// Positions that are worth a workgroup of their own.
const LEAST_POSITIONS: u32 = 256;

/// What a device lets kernels have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Bytes that one binding may have.
    pub binding_bytes: u64,
    /// Multiple of which a binding's first byte is.
    pub alignment_bytes: u64,
    /// Workgroups per dimension.
    pub max_groups: u32,
    /// Bound where an optional operand is absent.
    pub nothing: View,
    /// Where parts of attention wait to be put together.
    pub scratch: View,
}

/// One call of a kernel.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Dispatch {
    pub kernel: Kernel,
    /// In the order of the kernel's description.
    pub params: Vec<u32>,
    /// In the order of the kernel's description.
    pub bindings: Vec<View>,
    pub groups: [u32; 3],
}

impl Limits {
    /// Greatest expert whose bytes one window is sure to hold.
    pub const fn max_expert_bytes(&self) -> u64 {
        self.stride_bytes()
    }

    /// From window to window of an arena.
    const fn stride_bytes(&self) -> u64 {
        self.binding_bytes / 2 / self.alignment_bytes * self.alignment_bytes
    }

    /// A grid of `count` workgroups.
    fn flat(&self, count: u64) -> Result<[u32; 3]> {
        let max = u64::from(self.max_groups);
        let rows = count.div_ceil(max);
        if rows > max {
            return Err(refuse("an operation", format!("{count} workgroups"), format!("at most {} for this device", max * max)));
        }
        Ok([count.min(max) as u32, rows as u32, 1])
    }

    /// A grid of `x` times `count` workgroups.
    fn flat_beside(&self, x: u32, count: u32) -> Result<[u32; 3]> {
        let [y, z, _] = self.flat(u64::from(count))?;
        if x > self.max_groups {
            return Err(refuse("experts", format!("{x} workgroups of rows"), format!("at most {}", self.max_groups)));
        }
        Ok([x, y, z])
    }

    /// A part as far as it can be bound; [`check_sizes`] has seen that this is all that is needed.
    fn bound(&self, view: View) -> View {
        View { bytes: view.bytes.min(self.binding_bytes / 4 * 4), ..view }
    }

    fn or_nothing(&self, view: Option<View>) -> View {
        view.map_or(self.nothing, |v| self.bound(v))
    }

    /// The binding that holds `bytes` bytes from `start` on of a part, and where in it they begin.
    fn window(&self, view: View, start: u64, bytes: u64) -> (View, u32) {
        let skipped = start % self.alignment_bytes;
        // A last row may end inside a word, which is there: parts are whole words.
        let part = view.part(start - skipped, (bytes + skipped).next_multiple_of(4));
        (part, skipped as u32)
    }

    /// Windows of a matrix: (binding, first byte in it, first unit, units), a unit being what must lie in one window.
    fn windows(&self, view: View, units: u32, unit_bytes: u64, max_units: u32) -> Result<Vec<(View, u32, u32, u32)>> {
        let fitting = (self.binding_bytes - self.alignment_bytes - 4) / unit_bytes.max(1);
        let per_window = fitting.min(u64::from(max_units)).min(u64::from(units)) as u32;
        if per_window == 0 {
            let found = format!("{unit_bytes} bytes that must be bound at once");
            return Err(refuse("a weight", found, format!("at most {} for this device", self.binding_bytes)));
        }
        let starts = (0..units).step_by(per_window as usize);
        Ok(starts
            .map(|first| {
                let count = per_window.min(units - first);
                let (binding, first_byte) = self.window(view, u64::from(first) * unit_bytes, u64::from(count) * unit_bytes);
                (binding, first_byte, first, count)
            })
            .collect())
    }
}

fn refuse(what: &'static str, found: String, expected: String) -> RuntimeError {
    RuntimeError::BadRequest { what, found, expected }
}

/// Whether everything that is not windowed can be bound at once.
pub(super) fn check_sizes(op: &DeviceOp, operands: &[Operand], limits: &Limits) -> Result<()> {
    let windowed = |o: &Operand| !op.formats().is_empty() && o.name == "weight";
    match operands.iter().find(|o| !windowed(o) && o.needed_bytes > limits.binding_bytes) {
        Some(o) => Err(refuse(
            op.name(),
            format!("{} of {} bytes", o.name, o.needed_bytes),
            format!(
                "at most {} bytes, which this device can bind at once; use fewer tokens at once or a shorter context",
                limits.binding_bytes
            ),
        )),
        None => Ok(()),
    }
}

/// Parameters of an activation.
fn activation_params(activation: Activation) -> [u32; 3] {
    match activation {
        Activation::Silu => [0, 0, 0],
        Activation::ClampedSwiglu { alpha, limit } => [1, alpha.to_bits(), limit.to_bits()],
    }
}

/// The dispatches of an operation that was checked, in order. `bytes_of` a buffer.
pub(super) fn dispatches(op: &DeviceOp, limits: &Limits, bytes_of: impl Fn(BufferId) -> u64) -> Result<Vec<Dispatch>> {
    let mut list = Vec::new();
    let bound = |view: View| limits.bound(view);
    let mut flat = |kernel: Kernel, count: u64, per_group: u64, params: Vec<u32>, bindings: Vec<View>| -> Result<()> {
        list.push(Dispatch { kernel, params, bindings, groups: limits.flat(count.div_ceil(per_group))? });
        Ok(())
    };
    let lanes = |kernel: Kernel| u64::from(kernel.lanes());
    let area = |a: u32, b: u32| u64::from(a) * u64::from(b);
    match *op {
        DeviceOp::Embed { table, ids, out, tokens } => {
            let kernel = Kernel::Embed(table.format);
            let bytes = row_bytes(table.format, table.cols)?;
            for (binding, first_byte, first, rows) in limits.windows(table.view, table.rows, bytes, u32::MAX)? {
                let params = vec![tokens, table.cols, bytes as u32, first_byte, first, rows];
                flat(kernel, area(tokens, table.cols.div_ceil(4)), lanes(kernel), params, vec![binding, bound(ids), bound(out)])?;
            }
        }
        DeviceOp::RmsNorm { x, weight, period, out, rows, width, eps } => {
            let kernel = Kernel::RmsNorm { in_place: x == out };
            let mut bindings = vec![limits.or_nothing(weight), bound(x), bound(out)];
            if x == out {
                bindings.remove(1);
            }
            flat(kernel, rows.into(), 1, vec![rows, width, period, u32::from(weight.is_some()), eps.to_bits()], bindings)?;
        }
        DeviceOp::LayerNorm { x, weight, bias, out, rows, width, eps } => {
            let kernel = Kernel::LayerNorm { in_place: x == out };
            let mut bindings = vec![bound(weight), bound(bias), bound(x), bound(out)];
            if x == out {
                bindings.remove(2);
            }
            flat(kernel, rows.into(), 1, vec![rows, width, 1, 1, eps.to_bits()], bindings)?;
        }
        DeviceOp::MatMul { weight, bias, x, out, tokens } => return matmul(limits, &weight, bias, x, out, tokens),
        DeviceOp::HeadMatMul { weight, heads, x, x_stride, out, out_stride, tokens } => {
            return head_matmul(limits, &weight, heads, (x, x_stride), (out, out_stride), tokens);
        }
        DeviceOp::Rope { x, cos_sin, tokens, heads, head_stride, first, pairs, pairing } => {
            let interleaved = u32::from(pairing == RopePairing::Interleaved);
            let params = vec![tokens, heads, head_stride, first, pairs, interleaved];
            let count = area(tokens, heads) * u64::from(pairs);
            flat(Kernel::Rope, count, lanes(Kernel::Rope), params, vec![bound(cos_sin), bound(x)])?;
        }
        DeviceOp::CopyColumns { x, x_stride, x_start, out, out_stride, out_start, rows, width } => {
            let params = vec![rows, width, x_stride, x_start, out_stride, out_start];
            flat(Kernel::CopyColumns, area(rows, width), lanes(Kernel::CopyColumns), params, vec![bound(x), bound(out)])?;
        }
        DeviceOp::AppendKv { x, cache, element, tokens, width, position } => {
            let half = element == KvElement::F16;
            let (kernel, elements) = (Kernel::AppendKv { half }, area(tokens, width));
            let threads = if half { elements / 2 } else { elements };
            let first = area(position, width);
            let params = vec![elements as u32, u32::try_from(first).map_err(|_| too_long(first))?];
            flat(kernel, threads, lanes(kernel), params, vec![bound(x), bound(cache)])?;
        }
        DeviceOp::Attention(a) => {
            let ranges = attention_ranges(&a, limits.scratch.bytes);
            let (half, parts, rows) = (a.element == KvElement::F16, ranges > 1, a.tokens * a.heads);
            let out = bound(if parts { limits.scratch } else { a.out });
            let bindings = vec![bound(a.q), bound(a.keys), bound(a.values), limits.or_nothing(a.sinks), out];
            let params = attention_params(&a, ranges)?;
            flat(Kernel::Attention { half, parts }, area(rows, ranges), 1, params, bindings)?;
            if parts {
                let bindings = vec![bound(limits.scratch), bound(a.out)];
                flat(Kernel::AttentionJoin, rows.into(), 1, vec![rows, ranges, a.value_dim], bindings)?;
            }
        }
        DeviceOp::Scale { x, factor, factors, rows, width } => {
            let params = vec![area(rows, width) as u32, width, u32::from(factors.is_some()), factor.to_bits()];
            flat(Kernel::Scale, area(rows, width), lanes(Kernel::Scale), params, vec![limits.or_nothing(factors), bound(x)])?;
        }
        DeviceOp::Axpy { x, y, factor, elements } => {
            flat(Kernel::Axpy, elements.into(), lanes(Kernel::Axpy), vec![elements, factor.to_bits()], vec![bound(x), bound(y)])?;
        }
        DeviceOp::GatedAxpy { x, input, gate, y, rows, width, cols } => {
            let bindings = vec![bound(x), bound(input), bound(gate), bound(y)];
            flat(Kernel::GatedAxpy, rows.into(), 1, vec![rows, width, cols], bindings)?;
        }
        DeviceOp::Activate { gate, up, out, elements, activation } => {
            let params = [elements].into_iter().chain(activation_params(activation)).collect();
            let bindings = vec![bound(gate), bound(up), bound(out)];
            flat(Kernel::Activate, elements.into(), lanes(Kernel::Activate), params, bindings)?;
        }
        DeviceOp::ScaleCap { x, elements, factor, softcap } => {
            let params = vec![elements, factor.to_bits(), softcap.unwrap_or(0.0).to_bits()];
            flat(Kernel::ScaleCap, elements.into(), lanes(Kernel::ScaleCap), params, vec![bound(x)])?;
        }
        DeviceOp::Route { logits, selection_bias, ids, weights, tokens, num_experts, k, rule } => {
            if num_experts > MAX_ROUTED_EXPERTS || k > MAX_CHOSEN_EXPERTS {
                let expected = format!("at most {MAX_CHOSEN_EXPERTS} of {MAX_ROUTED_EXPERTS}");
                return Err(refuse("route", format!("{k} of {num_experts} experts"), expected));
            }
            let [sigmoid, normalize, after] = [rule.sigmoid, rule.normalize, rule.softmax_after_topk].map(u32::from);
            let has_bias = u32::from(selection_bias.is_some());
            let params = vec![tokens, num_experts, k, sigmoid, normalize, after, has_bias, rule.scale.to_bits()];
            let bindings = vec![bound(logits), limits.or_nothing(selection_bias), bound(ids), bound(weights)];
            flat(Kernel::Route, tokens.into(), 1, params, bindings)?;
        }
        DeviceOp::Experts { ref experts, x, ids, rows_per_input, inner, out, rows, groups } => {
            let shape = ExpertRows { x, ids, rows_per_input, inner, out, rows, groups };
            return expert_dispatches(limits, experts, &shape, bytes_of(experts.buffer));
        }
        DeviceOp::Combine { x, weights, y, tokens, k, width, accumulate } => {
            let params = vec![tokens, k, width, u32::from(accumulate)];
            let bindings = vec![bound(x), bound(weights), bound(y)];
            flat(Kernel::Combine, area(tokens, width), lanes(Kernel::Combine), params, bindings)?;
        }
    }
    list.retain(|d| d.groups.iter().all(|g| *g > 0));
    Ok(list)
}

fn too_long(elements: u64) -> RuntimeError {
    refuse("append_kv", format!("element {elements} of a cache"), "fewer than 2^32 elements per layer".into())
}

/// Into how many ranges the positions of every row are cut, each for a workgroup of its own: few rows leave most of a device idle. What
/// they find takes `scratch_bytes` at most.
fn attention_ranges(a: &DeviceAttention, scratch_bytes: u64) -> u32 {
    let rows = (u64::from(a.tokens) * u64::from(a.heads)).max(1);
    let seen = (a.past + a.tokens).min(a.window.unwrap_or(u32::MAX)).min(a.chunk.unwrap_or(u32::MAX));
    let room = scratch_bytes / (rows * (u64::from(a.value_dim) + 2) * 4);
    (BUSY_WORKGROUPS / rows).min(u64::from(seen / LEAST_POSITIONS)).min(room).max(1) as u32
}

fn attention_params(a: &DeviceAttention, ranges: u32) -> Result<Vec<u32>> {
    if a.key_dim.max(a.value_dim) > MAX_HEAD_DIM {
        let found = format!("heads of {} and {} elements", a.key_dim, a.value_dim);
        return Err(refuse("attention", found, format!("at most {MAX_HEAD_DIM}")));
    }
    Ok(vec![
        a.tokens,
        a.past,
        a.heads,
        a.heads / a.kv_heads,
        a.kv_heads,
        a.key_dim,
        a.value_dim,
        a.value_stride,
        a.window.unwrap_or(u32::MAX),
        a.chunk.unwrap_or(0),
        u32::from(a.sinks.is_some()),
        a.scale.to_bits(),
        a.softcap.unwrap_or(0.0).to_bits(),
        ranges,
    ])
}

/// Kernel, rows of weights and rows of activations of a workgroup.
const fn product_shape(tokens: u32) -> (Rows, u32, u32) {
    match tokens {
        0..=1 => (Rows::One, ROWS_PER_WORKGROUP, 1),
        2..TILE_FROM => (Rows::Four, ROWS_PER_WORKGROUP, 4),
        _ => (Rows::Tile, TILE, TILE),
    }
}

fn matmul(limits: &Limits, weight: &DeviceMatrix, bias: Option<View>, x: View, out: View, tokens: u32) -> Result<Vec<Dispatch>> {
    let bytes = row_bytes(weight.format, weight.cols)?;
    let (shape, rows_per_group, tokens_per_group) = product_shape(tokens);
    let max_rows = limits.max_groups.saturating_mul(rows_per_group);
    let dispatch = |(binding, first_byte, first, rows): (View, u32, u32, u32)| Dispatch {
        kernel: Kernel::MatMul(weight.format, shape),
        params: vec![
            rows,
            weight.cols,
            tokens,
            bytes as u32,
            first_byte,
            first,
            0,
            weight.cols,
            0,
            weight.rows,
            0,
            u32::from(bias.is_some()),
        ],
        bindings: vec![binding, limits.or_nothing(bias), limits.bound(x), limits.bound(out)],
        groups: [rows.div_ceil(rows_per_group), tokens.div_ceil(tokens_per_group), 1],
    };
    if tokens == 0 {
        return Ok(Vec::new());
    }
    Ok(limits.windows(weight.view, weight.rows, bytes, max_rows)?.into_iter().map(dispatch).collect())
}

fn head_matmul(
    limits: &Limits,
    weight: &DeviceMatrix,
    heads: u32,
    (x, x_stride): (View, u32),
    (out, out_stride): (View, u32),
    tokens: u32,
) -> Result<Vec<Dispatch>> {
    let bytes = row_bytes(weight.format, weight.cols)?;
    let rows = weight.rows / heads;
    let (shape, rows_per_group, tokens_per_group) = product_shape(tokens);
    let dispatch = |(binding, first_byte, first, count): (View, u32, u32, u32)| Dispatch {
        kernel: Kernel::MatMul(weight.format, shape),
        params: vec![
            rows,
            weight.cols,
            tokens,
            bytes as u32,
            first_byte,
            0,
            first,
            heads * x_stride,
            x_stride,
            heads * out_stride,
            out_stride,
            0,
        ],
        bindings: vec![binding, limits.nothing, limits.bound(x), limits.bound(out)],
        groups: [rows.div_ceil(rows_per_group), tokens.div_ceil(tokens_per_group), count],
    };
    if tokens == 0 {
        return Ok(Vec::new());
    }
    let windows = limits.windows(weight.view, heads, bytes * u64::from(rows), limits.max_groups)?;
    Ok(windows.into_iter().map(dispatch).collect())
}

/// What goes through experts.
struct ExpertRows {
    x: View,
    ids: View,
    rows_per_input: u32,
    inner: View,
    out: View,
    rows: u32,
    groups: Option<RowGroups>,
}

fn expert_dispatches(limits: &Limits, e: &DeviceExperts, r: &ExpertRows, arena_bytes: u64) -> Result<Vec<Dispatch>> {
    let num_tiles = r.groups.map_or(0, |g| g.num_tiles);
    let count = if r.groups.is_some() { num_tiles } else { r.rows };
    if count == 0 || r.rows == 0 {
        return Ok(Vec::new());
    }
    let tiles = r.groups.is_some();
    let rows_per_group = if tiles { TILE } else { ROWS_PER_WORKGROUP };
    let [gate_bytes, up_bytes] = [row_bytes(e.formats[0], e.hidden)? as u32, row_bytes(e.formats[1], e.hidden)? as u32];
    let down_bytes = row_bytes(e.formats[2], e.inner_size)? as u32;
    let has_bias = u32::from(e.biases.is_some());
    let bias = |which: usize| limits.or_nothing(e.biases.map(|b| b[which]));
    let selection = || match r.groups {
        Some(g) => vec![limits.bound(g.order), limits.bound(g.tiles)],
        None => vec![limits.bound(r.ids)],
    };
    let mut list = Vec::new();
    for (arena, first_place, places) in arena_windows(limits, e.buffer, arena_bytes) {
        let counts = [r.rows, num_tiles, e.num_experts];
        let mut params: Vec<u32> = counts.into_iter().chain([e.inner_size, e.hidden, gate_bytes, up_bytes]).collect();
        params.extend([first_place, places, r.rows_per_input, has_bias]);
        params.extend(activation_params(e.activation));
        let mut bindings = vec![arena, limits.bound(e.table), bias(0), bias(1), limits.bound(r.x)];
        bindings.extend(selection());
        bindings.push(limits.bound(r.inner));
        let groups = limits.flat_beside(e.inner_size.div_ceil(rows_per_group), count)?;
        list.push(Dispatch {
            kernel: Kernel::ExpertsIn { gate: e.formats[0], up: e.formats[1], tiles },
            params,
            bindings,
            groups,
        });

        let mut params: Vec<u32> = counts.into_iter().chain([e.hidden, e.inner_size, down_bytes]).collect();
        params.extend([first_place, places, has_bias]);
        let mut bindings = vec![arena, limits.bound(e.table), bias(2), limits.bound(r.inner)];
        bindings.extend(selection());
        bindings.push(limits.bound(r.out));
        let groups = limits.flat_beside(e.hidden.div_ceil(rows_per_group), count)?;
        list.push(Dispatch { kernel: Kernel::ExpertsOut { down: e.formats[2], tiles }, params, bindings, groups });
    }
    Ok(list)
}

/// (binding, its first place, places in which its experts begin), a place being 16 bytes.
fn arena_windows(limits: &Limits, buffer: BufferId, bytes: u64) -> Vec<(View, u32, u32)> {
    if bytes <= limits.binding_bytes {
        return vec![(View { buffer, offset_bytes: 0, bytes }, 0, u32::MAX)];
    }
    let stride = limits.stride_bytes();
    (0..bytes.div_ceil(stride))
        .map(|w| {
            let start = w * stride;
            let view = View { buffer, offset_bytes: start, bytes: (bytes - start).min(limits.binding_bytes / 4 * 4) };
            (view, (start / 16) as u32, (stride / 16) as u32)
        })
        .collect()
}
