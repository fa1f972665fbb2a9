//! From an operation to kernel launches: which kernel, grid, shared memory and arguments.
//!
//! No device is touched here, so that the tests launch the same kernels with the same arguments on an emulator. The kernels and what
//! their arguments mean: `shaders/src/cuda`.

use crate::backend::device::View;
use crate::backend::op::{DeviceAttention, DeviceExperts, DeviceMatrix, DeviceOp, DeviceRule, KvElement, RowGroups};
use crate::error::{Result, RuntimeError};
use tierwise_cost::model::{Activation, RopePairing};
use tierwise_cost::quant::QuantFormat;
use tierwise_shaders::cuda::{
    ATTENTION_ROWS, ATTENTION_TILE, CUDA_FORMATS, CudaKernel, CudaModule, CudaType, FEW_ROWS, MANY_ROWS, MANY_TOKENS,
    ROUNDED_COLS, SUM_SHARED_BYTES, attention_shared_bytes, route_shared_bytes, weights_shared_bytes,
};

/// Tokens up to which weights and activations are multiplied without rounding; beyond that both are rounded to bf16 (F32 weights never).
pub const EXACT_TOKENS: u32 = 8;

/// Value of a kernel's parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Argument {
    /// Device address.
    Pointer(u64),
    /// 32-bit number.
    U32(u32),
    /// 64-bit number.
    U64(u64),
    /// Float.
    F32(f32),
}

impl Argument {
    /// Its bytes, little-endian, in the first of eight.
    pub fn bits(self) -> u64 {
        match self {
            Self::Pointer(x) | Self::U64(x) => x,
            Self::U32(x) => u64::from(x),
            Self::F32(x) => u64::from(x.to_bits()),
        }
    }

    const fn kind(self) -> CudaType {
        match self {
            Self::Pointer(_) => CudaType::Pointer,
            Self::U32(_) => CudaType::U32,
            Self::U64(_) => CudaType::U64,
            Self::F32(_) => CudaType::F32,
        }
    }
}

/// A kernel with everything it is started with.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// Where the kernel is.
    pub module: CudaModule,
    /// The kernel.
    pub kernel: &'static CudaKernel,
    /// Blocks.
    pub grid: [u32; 3],
    /// Dynamic shared memory.
    pub shared_bytes: u32,
    /// In the kernel's order.
    pub arguments: Vec<Argument>,
}

/// What launches are planned for.
pub trait Target {
    /// Address of the first of `bytes` bytes of a part. `what` is for the message if it has fewer.
    ///
    /// # Errors
    /// When the part does not exist or is smaller.
    fn address(&self, view: View, bytes: u64, what: &str) -> Result<u64>;

    /// Address of `bytes` bytes for the operation that is planned; the next one gets the same.
    ///
    /// # Errors
    /// When there is no room.
    fn scratch(&mut self, bytes: u64) -> Result<u64>;

    /// Multiprocessors: how many blocks keep the device busy.
    fn multiprocessors(&self) -> u32;

    /// Shared memory that a block may have.
    fn max_shared_bytes(&self) -> u32;
}

fn refuse(reason: String) -> RuntimeError {
    RuntimeError::Device { device: "cuda", reason }
}

/// Plans one operation.
///
/// # Errors
/// When a format or a shape has no kernel, or a part is too small.
pub fn plan(op: &DeviceOp, target: &mut dyn Target, out: &mut Vec<Launch>) -> Result<()> {
    Planner { target, out }.op(op)
}

struct Planner<'a> {
    target: &'a mut dyn Target,
    out: &'a mut Vec<Launch>,
}

/// `[elements]` of f32 or u32.
fn words(elements: &[u32]) -> u64 {
    elements.iter().fold(4, |bytes, n| bytes.saturating_mul(u64::from(*n)))
}

/// Blocks of 256 threads over `elements`.
fn blocks(elements: &[u32]) -> Result<u32> {
    let threads = words(elements) / 4;
    u32::try_from(threads.div_ceil(256))
        .map_err(|_| refuse(format!("an operation over {threads} elements is too large; use a smaller batch")))
}

const fn activation_arguments(activation: Activation) -> [Argument; 3] {
    match activation {
        Activation::Silu => [Argument::U32(0), Argument::F32(0.0), Argument::F32(0.0)],
        Activation::ClampedSwiglu { alpha, limit } => [Argument::U32(1), Argument::F32(alpha), Argument::F32(limit)],
    }
}

/// Bytes of a row; the format has kernels.
fn row_bytes(format: QuantFormat, cols: u32) -> Result<u64> {
    if !CUDA_FORMATS.contains(&format) {
        let known: Vec<_> = CUDA_FORMATS.iter().map(|f| f.name()).collect();
        return Err(refuse(format!(
            "weights in {format} have no CUDA kernels; these have: {}; convert the model or use --device cpu",
            known.join(", ")
        )));
    }
    format.row_bytes(u64::from(cols)).ok_or_else(|| {
        refuse(format!("rows of {cols} elements are not whole blocks of {format} ({} elements)", format.layout().elems))
    })
}

/// A matrix per head, activations and results with their strides.
struct Product {
    weight: DeviceMatrix, // [heads * rows, cols]
    heads: u32,
    bias: Option<View>,
    x: View,
    x_stride: u32,
    x_head: u32,
    out: View,
    out_stride: u32,
    out_head: u32,
    tokens: u32,
}

impl Planner<'_> {
    fn at(&self, view: View, bytes: u64, what: &str) -> Result<Argument> {
        Ok(Argument::Pointer(self.target.address(view, bytes, what)?))
    }

    fn or_null(&self, view: Option<View>, bytes: u64, what: &str) -> Result<Argument> {
        view.map_or(Ok(Argument::Pointer(0)), |v| self.at(v, bytes, what))
    }

    fn launch(
        &mut self,
        module: CudaModule,
        name: &str,
        grid: [u32; 3],
        shared_bytes: u32,
        arguments: Vec<Argument>,
    ) -> Result<()> {
        let kernel = module.kernel(name).expect("names are those of the registry");
        let kinds = kernel.parameters.iter().map(|p| p.0);
        assert!(kinds.eq(arguments.iter().map(|a| a.kind())), "{name} takes {:?}, given {arguments:?}", kernel.parameters);
        if grid.contains(&0) {
            return Ok(());
        }
        // CUDA's limits of the second and third dimension.
        if grid[0] > i32::MAX as u32 || grid[1] > 65535 || grid[2] > 65535 {
            return Err(refuse(format!("{name} over a grid of {grid:?} is too large; use a smaller batch")));
        }
        if shared_bytes > self.target.max_shared_bytes() {
            return Err(refuse(format!(
                "{name} needs {shared_bytes} bytes of shared memory per block, the device has {}; use --device wgpu or cpu",
                self.target.max_shared_bytes()
            )));
        }
        self.out.push(Launch { module, kernel, grid, shared_bytes, arguments });
        Ok(())
    }

    fn elementwise(&mut self, name: &str, grid: [u32; 3], shared_bytes: u32, arguments: Vec<Argument>) -> Result<()> {
        self.launch(CudaModule::Elementwise, name, grid, shared_bytes, arguments)
    }

    fn op(&mut self, op: &DeviceOp) -> Result<()> {
        use Argument::{F32, U32, U64};
        match *op {
            DeviceOp::Embed { table, ids, out, tokens } => {
                let row = row_bytes(table.format, table.cols)?;
                let arguments = vec![
                    self.at(table.view, row * u64::from(table.rows), "embedding table")?,
                    U64(row),
                    U32(table.rows),
                    U32(table.cols),
                    self.at(ids, words(&[tokens]), "token ids")?,
                    self.at(out, words(&[tokens, table.cols]), "embeddings")?,
                ];
                self.launch(CudaModule::Weights(table.format), "embed", [tokens, 1, 1], 0, arguments)
            }
            DeviceOp::RmsNorm { x, weight, period, out, rows, width, eps } => {
                let arguments = vec![
                    self.at(x, words(&[rows, width]), "norm input")?,
                    self.or_null(weight, words(&[period, width]), "norm weight")?,
                    U32(period.max(1)),
                    self.at(out, words(&[rows, width]), "norm output")?,
                    U32(width),
                    F32(eps),
                ];
                self.elementwise("rms_norm", [rows, 1, 1], SUM_SHARED_BYTES, arguments)
            }
            DeviceOp::LayerNorm { x, weight, bias, out, rows, width, eps } => {
                let arguments = vec![
                    self.at(x, words(&[rows, width]), "norm input")?,
                    self.at(weight, words(&[width]), "norm weight")?,
                    self.at(bias, words(&[width]), "norm bias")?,
                    self.at(out, words(&[rows, width]), "norm output")?,
                    U32(width),
                    F32(eps),
                ];
                self.elementwise("layer_norm", [rows, 1, 1], SUM_SHARED_BYTES, arguments)
            }
            DeviceOp::MatMul { weight, bias, x, out, tokens } => self.product(&Product {
                weight,
                heads: 1,
                bias,
                x,
                x_stride: weight.cols,
                x_head: 0,
                out,
                out_stride: weight.rows,
                out_head: 0,
                tokens,
            }),
            DeviceOp::HeadMatMul { weight, heads, x, x_stride, out, out_stride, tokens } => self.product(&Product {
                weight,
                heads,
                bias: None,
                x,
                x_stride: heads * x_stride,
                x_head: x_stride,
                out,
                out_stride: heads * out_stride,
                out_head: out_stride,
                tokens,
            }),
            DeviceOp::Rope { x, cos_sin, tokens, heads, head_stride, first, pairs, pairing } => {
                let arguments = vec![
                    self.at(x, words(&[tokens, heads, head_stride]), "rotated rows")?,
                    self.at(cos_sin, words(&[tokens, pairs, 2]), "angles")?,
                    U32(tokens),
                    U32(heads),
                    U32(head_stride),
                    U32(first),
                    U32(pairs),
                    U32(u32::from(pairing == RopePairing::Interleaved)),
                ];
                self.elementwise("rope", [blocks(&[tokens, heads, pairs])?, 1, 1], 0, arguments)
            }
            DeviceOp::CopyColumns { x, x_stride, x_start, out, out_stride, out_start, rows, width } => {
                if rows == 0 {
                    return Ok(());
                }
                let span = |stride: u32, start: u32| words(&[rows - 1, stride]) + words(&[start]) + words(&[width]);
                let arguments = vec![
                    self.at(x, span(x_stride, x_start), "copied rows")?,
                    U32(x_stride),
                    U32(x_start),
                    self.at(out, span(out_stride, out_start), "copies")?,
                    U32(out_stride),
                    U32(out_start),
                    U32(rows),
                    U32(width),
                ];
                self.elementwise("copy_columns", [blocks(&[rows, width])?, 1, 1], 0, arguments)
            }
            DeviceOp::AppendKv { x, cache, element, tokens, width, position } => {
                let elements = words(&[tokens, width]) / 4;
                let first = words(&[position, width]) / 4;
                let arguments = vec![
                    self.at(x, 4 * elements, "new keys or values")?,
                    self.at(cache, (first + elements) * element.bytes(), "cache")?,
                    U32(u32::from(element == KvElement::F16)),
                    U64(first),
                    U64(elements),
                ];
                self.elementwise("append_kv", [blocks(&[tokens, width])?, 1, 1], 0, arguments)
            }
            DeviceOp::Attention(ref a) => self.attention(a),
            DeviceOp::Scale { x, factor, factors, rows, width } => {
                let arguments = vec![
                    self.at(x, words(&[rows, width]), "scaled rows")?,
                    F32(factor),
                    self.or_null(factors, words(&[rows]), "factors")?,
                    U32(rows),
                    U32(width),
                ];
                self.elementwise("scale_rows", [blocks(&[rows, width])?, 1, 1], 0, arguments)
            }
            DeviceOp::Axpy { x, y, factor, elements } => {
                let arguments = vec![
                    self.at(x, words(&[elements]), "addend")?,
                    self.at(y, words(&[elements]), "sum")?,
                    F32(factor),
                    U32(elements),
                ];
                self.elementwise("axpy", [blocks(&[elements])?, 1, 1], 0, arguments)
            }
            DeviceOp::GatedAxpy { x, input, gate, y, rows, width, cols } => {
                let arguments = vec![
                    self.at(x, words(&[rows, width]), "addend")?,
                    self.at(input, words(&[rows, cols]), "gate input")?,
                    self.at(gate, words(&[cols]), "gate")?,
                    self.at(y, words(&[rows, width]), "sum")?,
                    U32(width),
                    U32(cols),
                ];
                self.elementwise("gated_axpy", [rows, 1, 1], SUM_SHARED_BYTES, arguments)
            }
            DeviceOp::Activate { gate, up, out, elements, activation } => {
                let mut arguments = vec![
                    self.at(gate, words(&[elements]), "gate")?,
                    self.at(up, words(&[elements]), "up")?,
                    self.at(out, words(&[elements]), "activations")?,
                    U32(elements),
                ];
                arguments.extend(activation_arguments(activation));
                self.elementwise("activate_pairs", [blocks(&[elements])?, 1, 1], 0, arguments)
            }
            DeviceOp::ScaleCap { x, elements, factor, softcap } => {
                let arguments = vec![
                    self.at(x, words(&[elements]), "scaled values")?,
                    U32(elements),
                    F32(factor),
                    F32(softcap.unwrap_or(0.0)),
                ];
                self.elementwise("scale_cap", [blocks(&[elements])?, 1, 1], 0, arguments)
            }
            DeviceOp::Route { logits, selection_bias, ids, weights, tokens, num_experts, k, rule } => {
                if k > num_experts {
                    return Err(refuse(format!("{k} experts of {num_experts} cannot be chosen")));
                }
                let DeviceRule { sigmoid, normalize, softmax_after_topk, scale } = rule;
                let arguments = vec![
                    self.at(logits, words(&[tokens, num_experts]), "router logits")?,
                    self.or_null(selection_bias, words(&[num_experts]), "selection bias")?,
                    self.at(ids, words(&[tokens, k]), "expert ids")?,
                    self.at(weights, words(&[tokens, k]), "expert weights")?,
                    U32(num_experts),
                    U32(k),
                    U32(u32::from(sigmoid)),
                    U32(u32::from(normalize)),
                    U32(u32::from(softmax_after_topk)),
                    F32(scale),
                ];
                self.elementwise("route", [tokens, 1, 1], route_shared_bytes(num_experts, k), arguments)
            }
            DeviceOp::Experts { ref experts, x, ids, rows_per_input, inner, out, rows, groups } => {
                if rows == 0 {
                    return Ok(());
                }
                let rounded = ROUNDED_COLS * experts.inner_size.div_ceil(ROUNDED_COLS);
                let exact = experts.formats.contains(&QuantFormat::F32);
                let call = ExpertsCall { experts, x, ids, rows_per_input: rows_per_input.max(1), inner, out, rows };
                match groups {
                    // `inner` holds f32 or, in padded rows, bf16.
                    Some(groups) if !exact && rounded / 2 <= experts.inner_size => self.experts_many(&call, &groups),
                    _ => self.experts_few(&call),
                }
            }
            DeviceOp::Combine { x, weights, y, tokens, k, width, accumulate } => {
                let arguments = vec![
                    self.at(x, words(&[tokens, k, width]), "outputs of experts")?,
                    self.at(weights, words(&[tokens, k]), "expert weights")?,
                    self.at(y, words(&[tokens, width]), "sum")?,
                    U32(tokens),
                    U32(k),
                    U32(width),
                    U32(u32::from(accumulate)),
                ];
                self.elementwise("combine", [blocks(&[tokens, width])?, 1, 1], 0, arguments)
            }
        }
    }

    fn product(&mut self, p: &Product) -> Result<()> {
        use Argument::{U32, U64};
        let DeviceMatrix { format, rows, cols, view } = p.weight;
        if p.tokens == 0 || rows == 0 || p.heads == 0 {
            return Ok(());
        }
        let bytes = row_bytes(format, cols)?;
        let module = CudaModule::Weights(format);
        let rows = rows / p.heads;
        let weight = self.at(view, bytes * u64::from(rows * p.heads), "weights")?;
        let bias = self.or_null(p.bias, words(&[p.heads, rows]), "bias")?;
        let span =
            |stride: u32, head: u32, width: u32| words(&[p.tokens - 1, stride]) + words(&[p.heads - 1, head]) + words(&[width]);
        let x = self.at(p.x, span(p.x_stride, p.x_head, cols), "product input")?;
        let out = self.at(p.out, span(p.out_stride, p.out_head, rows), "product output")?;
        let strides = [out, U32(p.out_stride), U32(p.out_head), U32(p.tokens)];
        if p.tokens <= EXACT_TOKENS || format == QuantFormat::F32 {
            let (name, tokens) = if p.tokens <= 2 { ("matmul_few_2", 2) } else { ("matmul_few_8", 8) };
            let mut arguments = vec![weight, U64(bytes), U32(rows), U32(cols), bias, x, U32(p.x_stride), U32(p.x_head)];
            arguments.extend(strides);
            let grid = [rows.div_ceil(FEW_ROWS), p.heads, p.tokens.div_ceil(tokens)];
            return self.launch(module, name, grid, shared_of(format, name), arguments);
        }
        let (rounded, pitch) = self.round(x, p.x_stride, p.x_head, cols, p.tokens, p.heads)?;
        let mut arguments = vec![weight, U64(bytes), U32(rows), U32(cols), bias, rounded, U32(pitch)];
        arguments.extend(strides);
        let grid = [p.tokens.div_ceil(MANY_TOKENS), rows.div_ceil(MANY_ROWS), p.heads];
        self.launch(module, "matmul_many", grid, shared_of(format, "matmul_many"), arguments)
    }

    /// Rounds rows of activations to bf16 `[heads, tokens, pitch]`.
    fn round(&mut self, x: Argument, stride: u32, head: u32, cols: u32, tokens: u32, heads: u32) -> Result<(Argument, u32)> {
        use Argument::U32;
        let pitch = ROUNDED_COLS * cols.div_ceil(ROUNDED_COLS);
        let rounded = Argument::Pointer(self.target.scratch(words(&[heads, tokens, pitch]) / 2)?);
        let grid = [(pitch / 2).div_ceil(256), tokens, heads];
        self.elementwise("round_rows", grid, 0, vec![x, U32(stride), U32(head), U32(cols), rounded, U32(pitch)])?;
        Ok((rounded, pitch))
    }

    fn attention(&mut self, a: &DeviceAttention) -> Result<()> {
        use Argument::{F32, U32};
        if a.tokens == 0 {
            return Ok(());
        }
        if a.kv_heads == 0 || !a.heads.is_multiple_of(a.kv_heads) {
            return Err(refuse(format!("{} query heads do not divide over {} key-value heads", a.heads, a.kv_heads)));
        }
        let element = match a.element {
            KvElement::F32 => "f32",
            KvElement::F16 => "f16",
        };
        let columns = [64, 128, 256, 512].into_iter().find(|c| a.value_dim <= *c).ok_or_else(|| {
            refuse(format!("values of {} elements per head are too wide for the CUDA kernels (at most 512)", a.value_dim))
        })?;
        let positions = a.past + a.tokens;
        let bytes = u64::from(a.element.bytes() as u32);
        let keys = self.at(a.keys, words(&[positions, a.kv_heads, a.key_dim]) / 4 * bytes, "key cache")?;
        let last = words(&[a.value_dim]) / 4;
        let values = words(&[positions * a.kv_heads - 1, a.value_stride]) / 4 + last;
        let values = self.at(a.values, values * bytes, "value cache")?;
        let shared_values = keys == values;
        let tiles = (a.tokens * (a.heads / a.kv_heads)).div_ceil(ATTENTION_ROWS);
        let ranges = self.ranges(a, tiles);
        let range = positions.div_ceil(ranges).next_multiple_of(ATTENTION_TILE);
        let ranges = positions.div_ceil(range);
        let partial = if ranges > 1 {
            Argument::Pointer(self.target.scratch(words(&[ranges, a.tokens, a.heads, 2 + a.value_dim]))?)
        } else {
            Argument::Pointer(0)
        };
        let out = self.at(a.out, words(&[a.tokens, a.heads, a.value_dim]), "attention output")?;
        let arguments = vec![
            self.at(a.q, words(&[a.tokens, a.heads, a.key_dim]), "queries")?,
            keys,
            values,
            self.or_null(a.sinks, words(&[a.heads]), "sinks")?,
            out,
            partial,
            U32(a.tokens),
            U32(a.past),
            U32(a.heads),
            U32(a.kv_heads),
            U32(a.key_dim),
            U32(a.value_dim),
            U32(a.value_stride),
            U32(a.window.unwrap_or(0)),
            U32(a.chunk.unwrap_or(0)),
            U32(range),
            F32(a.scale),
            F32(a.softcap.unwrap_or(0.0)),
        ];
        let shared = attention_shared_bytes(a.key_dim, a.value_dim, a.element.bytes() as u32, shared_values);
        let name = format!("attention_{element}_{columns}");
        self.launch(CudaModule::Attention, &name, [tiles, a.kv_heads, ranges], shared, arguments)?;
        if ranges > 1 {
            let arguments = vec![partial, out, U32(ranges), U32(a.value_dim)];
            self.launch(CudaModule::Attention, "attention_merge", [a.tokens * a.heads, 1, 1], 0, arguments)?;
        }
        Ok(())
    }

    /// Into how many ranges of positions attention is cut so that the device is busy.
    fn ranges(&self, a: &DeviceAttention, tiles: u32) -> u32 {
        const LEAST_POSITIONS: u32 = 128;
        const MOST_RANGES: u32 = 64;
        let seen =
            (a.past + a.tokens).min(a.window.unwrap_or(u32::MAX).saturating_add(a.tokens)).min(a.chunk.unwrap_or(u32::MAX));
        // Ranges cover the whole cache: with a window most of them would be empty.
        if seen < a.past / 2 {
            return 1;
        }
        (2 * self.target.multiprocessors()).div_ceil(tiles * a.kv_heads).min(seen / LEAST_POSITIONS).clamp(1, MOST_RANGES)
    }

    fn experts_few(&mut self, c: &ExpertsCall<'_>) -> Result<()> {
        use Argument::{U32, U64};
        let e = c.experts;
        let gate_up = self.gate_up(e)?;
        let base = self.at(View { buffer: e.buffer, offset_bytes: 0, bytes: 0 }, 0, "experts")?;
        let table = self.at(e.table, words(&[e.num_experts, 3]), "table of experts")?;
        let ids = self.at(c.ids, words(&[c.rows]), "expert ids")?;
        let x = self.at(c.x, words(&[c.rows.div_ceil(c.rows_per_input), e.hidden]), "input of experts")?;
        let inner = self.at(c.inner, words(&[c.rows, e.inner_size]), "inner activations")?;
        let out = self.at(c.out, words(&[c.rows, e.hidden]), "output of experts")?;
        let [gate_bias, up_bias, down_bias] = self.biases(e)?;
        let mut arguments = vec![base, table, U32(e.num_experts), ids, x, U32(c.rows_per_input), inner, gate_bias, up_bias];
        arguments.extend([U32(e.inner_size), U32(e.hidden), U64(gate_up)]);
        arguments.extend(activation_arguments(e.activation));
        let grid = [c.rows, e.inner_size.div_ceil(FEW_ROWS), 1];
        let name = "experts_few_gate_up";
        self.launch(CudaModule::Weights(e.formats[0]), name, grid, shared_of(e.formats[0], name), arguments)?;
        let down = row_bytes(e.formats[2], e.inner_size)?;
        let arguments =
            vec![base, table, U32(e.num_experts), ids, inner, down_bias, out, U32(e.hidden), U32(e.inner_size), U64(down)];
        let grid = [c.rows, e.hidden.div_ceil(FEW_ROWS), 1];
        let name = "experts_few_down";
        self.launch(CudaModule::Weights(e.formats[2]), name, grid, shared_of(e.formats[2], name), arguments)
    }

    fn experts_many(&mut self, c: &ExpertsCall<'_>, groups: &RowGroups) -> Result<()> {
        use Argument::{U32, U64};
        let e = c.experts;
        let gate_up = self.gate_up(e)?;
        let base = self.at(View { buffer: e.buffer, offset_bytes: 0, bytes: 0 }, 0, "experts")?;
        let table = self.at(e.table, words(&[e.num_experts, 3]), "table of experts")?;
        // Rows of absent experts need not be in it.
        let order = self.at(groups.order, 0, "order of rows")?;
        let tiles = self.at(groups.tiles, words(&[groups.num_tiles, 3]), "tiles")?;
        let inputs = c.rows.div_ceil(c.rows_per_input);
        let x = self.at(c.x, words(&[inputs, e.hidden]), "input of experts")?;
        let (x, x_pitch) = self.round(x, e.hidden, 0, e.hidden, inputs, 1)?;
        let inner = self.at(c.inner, words(&[c.rows, e.inner_size]), "inner activations")?;
        let inner_pitch = ROUNDED_COLS * e.inner_size.div_ceil(ROUNDED_COLS);
        let out = self.at(c.out, words(&[c.rows, e.hidden]), "output of experts")?;
        let [gate_bias, up_bias, down_bias] = self.biases(e)?;
        let mut arguments =
            vec![base, table, U32(e.num_experts), order, tiles, U32(groups.num_tiles), x, U32(x_pitch), U32(c.rows_per_input)];
        arguments.extend([inner, U32(inner_pitch), gate_bias, up_bias, U32(e.inner_size), U32(e.hidden), U64(gate_up)]);
        arguments.extend(activation_arguments(e.activation));
        let name = "experts_many_gate_up";
        let grid = [groups.num_tiles, inner_pitch.div_ceil(MANY_ROWS / 2), 1];
        self.launch(CudaModule::Weights(e.formats[0]), name, grid, shared_of(e.formats[0], name), arguments)?;
        let down = row_bytes(e.formats[2], e.inner_size)?;
        let mut arguments =
            vec![base, table, U32(e.num_experts), order, tiles, U32(groups.num_tiles), inner, U32(inner_pitch), down_bias, out];
        arguments.extend([U32(e.hidden), U32(e.inner_size), U64(down)]);
        let name = "experts_many_down";
        let grid = [groups.num_tiles, e.hidden.div_ceil(MANY_ROWS), 1];
        self.launch(CudaModule::Weights(e.formats[2]), name, grid, shared_of(e.formats[2], name), arguments)
    }

    /// Bytes of a row of gate and up.
    fn gate_up(&self, e: &DeviceExperts) -> Result<u64> {
        if e.formats[0] != e.formats[1] {
            return Err(refuse(format!(
                "gate and up must have one format, found {} and {}; convert the model or use --device cpu",
                e.formats[0], e.formats[1]
            )));
        }
        row_bytes(e.formats[0], e.hidden)
    }

    fn biases(&self, e: &DeviceExperts) -> Result<[Argument; 3]> {
        let Some([gate, up, down]) = e.biases else { return Ok([Argument::Pointer(0); 3]) };
        let inner = words(&[e.num_experts, e.inner_size]);
        Ok([
            self.at(gate, inner, "gate biases")?,
            self.at(up, inner, "up biases")?,
            self.at(down, words(&[e.num_experts, e.hidden]), "down biases")?,
        ])
    }
}

/// [`DeviceOp::Experts`] without its groups.
struct ExpertsCall<'a> {
    experts: &'a DeviceExperts,
    x: View,
    ids: View,
    rows_per_input: u32,
    inner: View,
    out: View,
    rows: u32,
}

fn shared_of(format: QuantFormat, name: &str) -> u32 {
    weights_shared_bytes(format, name).expect("a kernel with shared memory")
}
