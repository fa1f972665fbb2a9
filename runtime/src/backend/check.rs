//! What an operation reads and writes, and whether it may be submitted: the part that all back-ends share.
//!
//! Shapes come from a model, which comes from a file: a wrong one must be an error here, not a fault on a device. The rule that written
//! and read parts lie in different buffers is WGSL's; it is checked for every back-end, so that what runs on one runs on all.

use super::device::{BufferId, View};
use super::op::{DeviceAttention, DeviceExperts, DeviceMatrix, DeviceOp, RowGroups, TILE_ROWS};
use crate::error::{Result, RuntimeError};
use tierwise_cost::quant::QuantFormat;

/// What an operation does with a part of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reads it.
    Read,
    /// Writes it.
    Write,
    /// Reads and writes it.
    Update,
}

/// A part of memory that an operation uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operand {
    /// Its field's name.
    pub name: &'static str,
    /// Where it is; an expert arena is only named, by a part of no bytes.
    pub view: View,
    /// Bytes that its shape needs.
    pub needed_bytes: u64,
    /// How it is used.
    pub access: Access,
}

/// Collects operands; products that overflow become sizes that no buffer has.
#[derive(Default)]
struct Operands(Vec<Operand>);

fn product(factors: &[u32]) -> u64 {
    factors.iter().fold(1, |p: u64, f| p.saturating_mul(u64::from(*f)))
}

impl Operands {
    fn add(&mut self, name: &'static str, view: View, needed_bytes: u64, access: Access) -> &mut Self {
        self.0.push(Operand { name, view, needed_bytes, access });
        self
    }

    fn read(&mut self, name: &'static str, view: View, shape: &[u32]) -> &mut Self {
        self.add(name, view, product(shape).saturating_mul(4), Access::Read)
    }

    fn write(&mut self, name: &'static str, view: View, shape: &[u32]) -> &mut Self {
        self.add(name, view, product(shape).saturating_mul(4), Access::Write)
    }

    fn update(&mut self, name: &'static str, view: View, shape: &[u32]) -> &mut Self {
        self.add(name, view, product(shape).saturating_mul(4), Access::Update)
    }

    fn matrix(&mut self, m: &DeviceMatrix) -> Result<&mut Self> {
        let bytes = row_bytes(m.format, m.cols)?.saturating_mul(u64::from(m.rows));
        Ok(self.add("weight", m.view, bytes, Access::Read))
    }

    /// `read` and `write`, or one part in place.
    fn map(&mut self, x: View, out: View, shape: &[u32]) -> &mut Self {
        if x == out { self.update("out", out, shape) } else { self.read("x", x, shape).write("out", out, shape) }
    }
}

/// Bytes of a row of a weight.
pub(super) fn row_bytes(format: QuantFormat, cols: u32) -> Result<u64> {
    format.row_bytes(u64::from(cols)).ok_or_else(|| {
        refuse("a weight", format!("rows of {cols} elements"), format!("a multiple of {} for {format}", format.layout().elems))
    })
}

fn refuse(what: &'static str, found: String, expected: impl Into<String>) -> RuntimeError {
    RuntimeError::BadRequest { what, found, expected: expected.into() }
}

fn demand(what: &'static str, holds: bool, found: impl FnOnce() -> String, expected: &'static str) -> Result<()> {
    if holds { Ok(()) } else { Err(refuse(what, found(), expected)) }
}

impl DeviceOp {
    /// What the operation is called in messages.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Embed { .. } => "embed",
            Self::RmsNorm { .. } => "rms_norm",
            Self::LayerNorm { .. } => "layer_norm",
            Self::MatMul { .. } => "matmul",
            Self::HeadMatMul { .. } => "head_matmul",
            Self::Rope { .. } => "rope",
            Self::CopyColumns { .. } => "copy_columns",
            Self::AppendKv { .. } => "append_kv",
            Self::Attention(_) => "attention",
            Self::Scale { .. } => "scale",
            Self::Axpy { .. } => "axpy",
            Self::GatedAxpy { .. } => "gated_axpy",
            Self::Activate { .. } => "activate",
            Self::ScaleCap { .. } => "scale_cap",
            Self::Route { .. } => "route",
            Self::Experts { .. } => "experts",
            Self::Combine { .. } => "combine",
        }
    }

    /// Weight formats that the operation computes with.
    pub fn formats(&self) -> Vec<QuantFormat> {
        match self {
            Self::Embed { table: m, .. } | Self::MatMul { weight: m, .. } | Self::HeadMatMul { weight: m, .. } => vec![m.format],
            Self::Experts { experts, .. } => experts.formats.to_vec(),
            _ => Vec::new(),
        }
    }

    /// Every part of memory that the operation uses.
    ///
    /// # Errors
    /// [`RuntimeError::BadRequest`] for shapes that contradict each other.
    pub fn operands(&self) -> Result<Vec<Operand>> {
        let mut list = Operands::default();
        match *self {
            Self::Embed { table, ids, out, tokens } => {
                list.matrix(&table)?.read("ids", ids, &[tokens]).write("out", out, &[tokens, table.cols]);
            }
            Self::RmsNorm { x, weight, period, out, rows, width, .. } => {
                demand("rms_norm's period", period > 0, || period.to_string(), "at least 1")?;
                list.map(x, out, &[rows, width]);
                if let Some(weight) = weight {
                    list.read("weight", weight, &[period, width]);
                }
            }
            Self::LayerNorm { x, weight, bias, out, rows, width, .. } => {
                list.map(x, out, &[rows, width]).read("weight", weight, &[width]).read("bias", bias, &[width]);
            }
            Self::MatMul { weight, bias, x, out, tokens } => {
                list.matrix(&weight)?.read("x", x, &[tokens, weight.cols]).write("out", out, &[tokens, weight.rows]);
                if let Some(bias) = bias {
                    list.read("bias", bias, &[weight.rows]);
                }
            }
            Self::HeadMatMul { weight, heads, x, x_stride, out, out_stride, tokens } => {
                demand(
                    "head_matmul's heads",
                    heads > 0 && weight.rows.is_multiple_of(heads),
                    || format!("{heads} heads of {} rows", weight.rows),
                    "whole heads",
                )?;
                demand(
                    "head_matmul's strides",
                    x_stride >= weight.cols && out_stride >= weight.rows / heads,
                    || format!("{x_stride} and {out_stride} for {} x {}", weight.rows / heads, weight.cols),
                    "at least the widths",
                )?;
                list.matrix(&weight)?.read("x", x, &[tokens, heads, x_stride]).update("out", out, &[tokens, heads, out_stride]);
            }
            Self::Rope { x, cos_sin, tokens, heads, head_stride, first, pairs, .. } => {
                demand(
                    "rope's pairs",
                    u64::from(first) + 2 * u64::from(pairs) <= u64::from(head_stride),
                    || format!("{pairs} pairs from element {first} on of a head of {head_stride}"),
                    "pairs inside the head",
                )?;
                list.update("x", x, &[tokens, heads, head_stride]).read("cos_sin", cos_sin, &[tokens, pairs, 2]);
            }
            Self::CopyColumns { x, x_stride, x_start, out, out_stride, out_start, rows, width } => {
                let inside = |start: u32, stride: u32| u64::from(start) + u64::from(width) <= u64::from(stride);
                demand(
                    "copy_columns' columns",
                    inside(x_start, x_stride) && inside(out_start, out_stride),
                    || format!("{width} columns from {x_start} of {x_stride} to {out_start} of {out_stride}"),
                    "columns inside the rows",
                )?;
                list.read("x", x, &[rows, x_stride]).update("out", out, &[rows, out_stride]);
            }
            Self::AppendKv { x, cache, element, tokens, width, position } => {
                demand("append_kv's width", width.is_multiple_of(2), || width.to_string(), "an even number")?;
                let rows = u64::from(position) + u64::from(tokens);
                let bytes = rows.saturating_mul(u64::from(width)).saturating_mul(element.bytes());
                list.read("x", x, &[tokens, width]).add("cache", cache, bytes, Access::Update);
            }
            Self::Attention(a) => attention(&mut list, &a)?,
            Self::Scale { x, factors, rows, width, .. } => {
                list.update("x", x, &[rows, width]);
                if let Some(factors) = factors {
                    list.read("factors", factors, &[rows]);
                }
            }
            Self::Axpy { x, y, elements, .. } => {
                list.read("x", x, &[elements]).update("y", y, &[elements]);
            }
            Self::GatedAxpy { x, input, gate, y, rows, width, cols } => {
                list.read("x", x, &[rows, width]).read("input", input, &[rows, cols]).read("gate", gate, &[cols]);
                list.update("y", y, &[rows, width]);
            }
            Self::Activate { gate, up, out, elements, .. } => {
                list.read("gate", gate, &[elements]).read("up", up, &[elements]).write("out", out, &[elements]);
            }
            Self::ScaleCap { x, elements, .. } => {
                list.update("x", x, &[elements]);
            }
            Self::Route { logits, selection_bias, ids, weights, tokens, num_experts, k, .. } => {
                demand("route's k", 0 < k && k <= num_experts, || format!("{k} of {num_experts} experts"), "1 to all of them")?;
                list.read("logits", logits, &[tokens, num_experts]);
                list.write("ids", ids, &[tokens, k]).write("weights", weights, &[tokens, k]);
                if let Some(bias) = selection_bias {
                    list.read("selection_bias", bias, &[num_experts]);
                }
            }
            Self::Experts { ref experts, x, ids, rows_per_input, inner, out, rows, groups } => {
                demand("experts' rows_per_input", rows_per_input > 0, || rows_per_input.to_string(), "at least 1")?;
                experts_operands(&mut list, experts)?;
                let inputs = rows.div_ceil(rows_per_input);
                list.read("x", x, &[inputs, experts.hidden]).read("ids", ids, &[rows]);
                list.update("inner", inner, &[rows, experts.inner_size]).write("out", out, &[rows, experts.hidden]);
                if let Some(RowGroups { order, tiles, num_tiles }) = groups {
                    list.read("order", order, &[0]).read("tiles", tiles, &[num_tiles, 3]);
                }
            }
            Self::Combine { x, weights, y, tokens, k, width, accumulate } => {
                list.read("x", x, &[tokens, k, width]).read("weights", weights, &[tokens, k]);
                let access = if accumulate { Access::Update } else { Access::Write };
                list.add("y", y, product(&[tokens, width, 4]), access);
            }
        }
        Ok(list.0)
    }

    /// Whether a back-end with these blocks (`bytes_of` a block), alignment and formats may take the operation.
    ///
    /// # Errors
    /// [`RuntimeError::BadRequest`] says what is wrong.
    pub fn check(
        &self,
        alignment_bytes: u64,
        formats: &[QuantFormat],
        bytes_of: impl Fn(BufferId) -> Option<u64>,
    ) -> Result<Vec<Operand>> {
        for format in self.formats() {
            if !formats.contains(&format) {
                let known: Vec<_> = formats.iter().map(|f| f.name()).collect();
                return Err(refuse(self.name(), format!("weights in {format}"), format!("one of {}", known.join(", "))));
            }
        }
        let operands = self.operands()?;
        for o in &operands {
            check_view(o.view, alignment_bytes, &bytes_of)
                .map_err(|e| refuse(self.name(), format!("{} {e}", o.name), "a part of a block"))?;
            if o.needed_bytes > o.view.bytes {
                let found = format!("{} of {} bytes", o.name, o.view.bytes);
                return Err(refuse(self.name(), found, format!("{} bytes", o.needed_bytes)));
            }
        }
        for (i, a) in operands.iter().enumerate() {
            for b in &operands[..i] {
                let read_and_written = (a.access, b.access) != (Access::Read, Access::Read)
                    && (a.access, b.access) != (Access::Write, Access::Write);
                let overlap = a.view.offset_bytes < b.view.offset_bytes + b.view.bytes
                    && b.view.offset_bytes < a.view.offset_bytes + a.view.bytes
                    && a.access != Access::Read;
                if a.view.buffer == b.view.buffer && (read_and_written || overlap) {
                    let found = format!("{} and {} in one block, one of them written", b.name, a.name);
                    return Err(refuse(self.name(), found, "different blocks"));
                }
            }
        }
        Ok(operands)
    }
}

/// Whether a part lies in its block.
pub(super) fn check_view(
    view: View,
    alignment_bytes: u64,
    bytes_of: impl Fn(BufferId) -> Option<u64>,
) -> std::result::Result<(), String> {
    let Some(size) = bytes_of(view.buffer) else { return Err(format!("in unknown block {}", view.buffer.0)) };
    if view.offset_bytes.checked_add(view.bytes).is_none_or(|end| end > size) {
        return Err(format!("of {} bytes from byte {} on of a block of {size}", view.bytes, view.offset_bytes));
    }
    if !view.offset_bytes.is_multiple_of(alignment_bytes) || !view.bytes.is_multiple_of(4) {
        let (offset, bytes) = (view.offset_bytes, view.bytes);
        return Err(format!("at byte {offset} with {bytes} bytes, not a multiple of {alignment_bytes} and of 4"));
    }
    Ok(())
}

fn attention(list: &mut Operands, a: &DeviceAttention) -> Result<()> {
    demand(
        "attention's heads",
        a.kv_heads > 0 && a.heads.is_multiple_of(a.kv_heads),
        || format!("{} over {} key-value heads", a.heads, a.kv_heads),
        "a multiple",
    )?;
    demand(
        "attention's value_stride",
        a.value_stride >= a.value_dim,
        || format!("{} for values of {}", a.value_stride, a.value_dim),
        "at least as much",
    )?;
    demand("attention's window", a.window != Some(0) && a.chunk != Some(0), || "0".into(), "at least 1")?;
    let even = [a.key_dim, a.value_dim, a.value_stride].iter().all(|d| d.is_multiple_of(2));
    demand("attention's widths", even, || format!("{} and {}", a.key_dim, a.value_dim), "even numbers")?;
    let positions = u64::from(a.past) + u64::from(a.tokens);
    let cache = |width: u32| product(&[a.kv_heads, width]).saturating_mul(positions).saturating_mul(a.element.bytes());
    list.read("q", a.q, &[a.tokens, a.heads, a.key_dim]);
    list.add("keys", a.keys, cache(a.key_dim), Access::Read).add("values", a.values, cache(a.value_stride), Access::Read);
    list.write("out", a.out, &[a.tokens, a.heads, a.value_dim]);
    if let Some(sinks) = a.sinks {
        list.read("sinks", sinks, &[a.heads]);
    }
    Ok(())
}

fn experts_operands(list: &mut Operands, e: &DeviceExperts) -> Result<()> {
    for (format, cols) in [(e.formats[0], e.hidden), (e.formats[1], e.hidden), (e.formats[2], e.inner_size)] {
        row_bytes(format, cols)?;
    }
    let arena = View { buffer: e.buffer, offset_bytes: 0, bytes: 0 };
    list.add("experts", arena, 0, Access::Read).read("table", e.table, &[e.num_experts, 3]);
    if let Some(biases) = e.biases {
        let [gate, up, down] = biases;
        list.read("gate bias", gate, &[e.num_experts, e.inner_size]).read("up bias", up, &[e.num_experts, e.inner_size]);
        list.read("down bias", down, &[e.num_experts, e.hidden]);
    }
    Ok(())
}

/// Tiles for [`RowGroups`]: the order of the rows and the tiles, of rows whose expert `takes`.
///
/// ```
/// use tierwise_runtime::backend::check::group_rows;
/// let (order, tiles) = group_rows(&[7, 3, 7, 9], |expert| expert != 9);
/// assert_eq!(order, [1, 0, 2]);
/// assert_eq!(tiles, [[3, 0, 1], [7, 1, 2]]);
/// ```
pub fn group_rows(ids: &[u32] /* [rows] */, takes: impl Fn(u32) -> bool) -> (Vec<u32>, Vec<[u32; 3]>) {
    let mut order: Vec<u32> = (0..ids.len() as u32).filter(|r| takes(ids[*r as usize])).collect();
    order.sort_by_key(|r| (ids[*r as usize], *r));
    let mut tiles: Vec<[u32; 3]> = Vec::new();
    for (place, row) in order.iter().enumerate() {
        let expert = ids[*row as usize];
        match tiles.last_mut() {
            Some(tile) if tile[0] == expert && tile[2] < TILE_ROWS => tile[2] += 1,
            _ => tiles.push([expert, place as u32, 1]),
        }
    }
    (order, tiles)
}
