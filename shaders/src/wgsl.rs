//! WGSL kernels: a source per operation, a decoder per weight format, composed to one module per variant.
//!
//! The sources in `wgsl/` hold no declarations. Parameters, bindings and the entry point are written from the kernel's description
//! ([`Shader`]), which is also what a back-end binds by, so that the two cannot drift apart. Names that begin with `$` get a prefix per
//! matrix (`w_`, `gate_`, ...), so that one module can decode two formats. The tests validate every variant offline.

use std::fmt::Write;
use tierwise_cost::quant::QuantFormat;

/// How a binding is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read-only storage.
    Read,
    /// Storage that the kernel writes.
    ReadWrite,
}

/// One storage binding of group 0. Binding 0 is the parameters; these follow from 1 on in the order given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding {
    /// Name in the source.
    pub name: &'static str,
    /// How the kernel uses it.
    pub access: Access,
    /// Type of its elements: "f32" or "u32".
    pub element: &'static str,
}

/// One parameter: 32 bits of the uniform block, in the order given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Param {
    /// Name in the source.
    pub name: &'static str,
    /// "u32" or "f32".
    pub element: &'static str,
}

/// One compute kernel with all its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shader {
    /// The module's text.
    pub source: String,
    /// The uniform block.
    pub params: &'static [Param],
    /// Storage bindings.
    pub bindings: Vec<Binding>,
    /// Invocations per workgroup.
    pub lanes: u32,
    /// Whether it needs subgroup operations.
    pub subgroups: bool,
}

/// Name of every entry point.
pub const ENTRY_POINT: &str = "main";

/// For how many rows of activations a product is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rows {
    /// One.
    One,
    /// Four at a time: weights are decoded once for them.
    Four,
    /// Tiles of 32: weights are decoded once for them.
    Tile,
}

/// Every kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "named like the operations of the back-ends")]
pub enum Kernel {
    Embed(QuantFormat),
    RmsNorm {
        in_place: bool,
    },
    LayerNorm {
        in_place: bool,
    },
    MatMul(QuantFormat, Rows),
    /// Gate, up and activation of experts.
    ExpertsIn {
        gate: QuantFormat,
        up: QuantFormat,
        tiles: bool,
    },
    /// Down projection of experts.
    ExpertsOut {
        down: QuantFormat,
        tiles: bool,
    },
    Rope,
    CopyColumns,
    /// To a cache in F16 or F32.
    AppendKv {
        half: bool,
    },
    /// Over a cache in F16 or F32; in parts, with a range of the positions for each workgroup.
    Attention {
        half: bool,
        parts: bool,
    },
    /// The parts of attention, put together.
    AttentionJoin,
    Scale,
    Axpy,
    GatedAxpy,
    Activate,
    ScaleCap,
    Route,
    Combine,
}

/// Experts that the router's kernel can choose from.
pub const MAX_ROUTED_EXPERTS: u32 = 1024;
/// Experts that it can choose.
pub const MAX_CHOSEN_EXPERTS: u32 = 64;
/// Width of keys and of values that the attention kernel can take.
pub const MAX_HEAD_DIM: u32 = 1024;
/// Rows of weights, and rows of activations, of a workgroup of [`Rows::Tile`].
pub const TILE: u32 = 32;
/// Rows of weights of a workgroup of [`Rows::One`] and [`Rows::Four`].
pub const ROWS_PER_WORKGROUP: u32 = 4;

macro_rules! params {
    ($($name:ident $element:ident),* $(,)?) => {
        &[$(Param { name: stringify!($name), element: stringify!($element) }),*]
    };
}

const fn read(name: &'static str) -> Binding {
    Binding { name, access: Access::Read, element: "f32" }
}
const fn read_words(name: &'static str) -> Binding {
    Binding { name, access: Access::Read, element: "u32" }
}
const fn write(name: &'static str) -> Binding {
    Binding { name, access: Access::ReadWrite, element: "f32" }
}
const fn write_words(name: &'static str) -> Binding {
    Binding { name, access: Access::ReadWrite, element: "u32" }
}

macro_rules! source {
    ($name:literal) => {
        include_str!(concat!("wgsl/", $name, ".wgsl"))
    };
}

fn decoder(format: QuantFormat) -> &'static str {
    match format {
        QuantFormat::F32 => source!("format_f32"),
        QuantFormat::F16 => source!("format_f16"),
        QuantFormat::BF16 => source!("format_bf16"),
        QuantFormat::Q4_0 => source!("format_q4_0"),
        QuantFormat::Q4_1 => source!("format_q4_1"),
        QuantFormat::Q5_0 => source!("format_q5_0"),
        QuantFormat::Q5_1 => source!("format_q5_1"),
        QuantFormat::Q8_0 => source!("format_q8_0"),
        QuantFormat::Q2_K => source!("format_q2_k"),
        QuantFormat::Q3_K => source!("format_q3_k"),
        QuantFormat::Q4_K => source!("format_q4_k"),
        QuantFormat::Q5_K => source!("format_q5_k"),
        QuantFormat::Q6_K => source!("format_q6_k"),
        QuantFormat::Q8_K => source!("format_q8_k"),
        QuantFormat::IQ4_NL => source!("format_iq4_nl"),
        QuantFormat::IQ4_XS => source!("format_iq4_xs"),
        QuantFormat::MXFP4 => source!("format_mxfp4"),
    }
}

const NORM_PARAMS: &[Param] = params![rows u32, width u32, period u32, has_weight u32, eps f32];
const MATMUL_PARAMS: &[Param] = params![
    rows u32, cols u32, tokens u32, row_bytes u32, first_byte u32, first_row u32, first_head u32,
    x_stride u32, x_head_stride u32, out_stride u32, out_head_stride u32, has_bias u32,
];
const EXPERTS_IN_PARAMS: &[Param] = params![
    num_rows u32, num_tiles u32, num_experts u32, rows u32, cols u32, gate_row_bytes u32, up_row_bytes u32, first_place u32, places u32,
    rows_per_input u32, has_bias u32, clamped u32, alpha f32, limit f32,
];
const EXPERTS_OUT_PARAMS: &[Param] = params![
    num_rows u32, num_tiles u32, num_experts u32, rows u32, cols u32, row_bytes u32, first_place u32, places u32, has_bias u32,
];

/// A module's text in the making.
#[derive(Default)]
struct Text(String);

impl Text {
    fn add(&mut self, source: &str) -> &mut Self {
        self.0.push_str(source);
        self.0.push('\n');
        self
    }

    fn prefixed(&mut self, prefix: &str, sources: &[&str]) -> &mut Self {
        sources.iter().for_each(|s| {
            self.add(&s.replace('$', prefix));
        });
        self
    }

    /// How rows of this format meet activations.
    fn products(&mut self, prefix: &str, format: QuantFormat, rows: Rows) -> &mut Self {
        let meet = if rows == Rows::Tile { source!("tile") } else { source!("rows") };
        self.prefixed(prefix, &[decoder(format), source!("weights"), meet])
    }

    /// Where an expert's matrices are, and its rows if they come in tiles.
    fn experts(&mut self, tiles: bool) -> &mut Self {
        self.add(source!("experts"));
        if tiles { self.add(source!("experts_tiles")) } else { self }
    }

    /// What products of any format need once.
    fn activations(&mut self, rows: Rows) -> &mut Self {
        self.add(source!("bytes")).add(source!("products"));
        match rows {
            Rows::One => self.add("const TOKENS: u32 = 1u;"),
            Rows::Four => self.add("const TOKENS: u32 = 4u;"),
            Rows::Tile => self.add(source!("tile_x")),
        }
    }
}

impl Kernel {
    /// Every variant; gate and up projections with every pair of formats.
    pub fn all() -> Vec<Self> {
        let mut all = vec![
            Self::RmsNorm { in_place: false },
            Self::RmsNorm { in_place: true },
            Self::LayerNorm { in_place: false },
            Self::LayerNorm { in_place: true },
            Self::Rope,
            Self::CopyColumns,
            Self::Scale,
            Self::Axpy,
            Self::GatedAxpy,
            Self::Activate,
            Self::ScaleCap,
            Self::Route,
            Self::Combine,
            Self::AttentionJoin,
        ];
        for half in [false, true] {
            all.push(Self::AppendKv { half });
            all.extend([false, true].map(|parts| Self::Attention { half, parts }));
        }
        for format in QuantFormat::ALL {
            all.push(Self::Embed(*format));
            all.extend([Rows::One, Rows::Four, Rows::Tile].map(|rows| Self::MatMul(*format, rows)));
            for tiles in [false, true] {
                all.push(Self::ExpertsOut { down: *format, tiles });
                all.extend(QuantFormat::ALL.iter().map(|up| Self::ExpertsIn { gate: *format, up: *up, tiles }));
            }
        }
        all
    }

    /// Whether there is a variant with subgroup operations.
    pub const fn has_subgroup_variant(self) -> bool {
        match self {
            Self::RmsNorm { .. } | Self::LayerNorm { .. } | Self::Attention { .. } | Self::GatedAxpy | Self::Route => true,
            Self::MatMul(_, rows) => !matches!(rows, Rows::Tile),
            Self::ExpertsIn { tiles, .. } | Self::ExpertsOut { tiles, .. } => !tiles,
            _ => false,
        }
    }

    /// Invocations per workgroup: norms have long rows; tiles are made for 64.
    pub const fn lanes(self) -> u32 {
        match self {
            Self::RmsNorm { .. } | Self::LayerNorm { .. } => 128,
            _ => 64,
        }
    }

    /// The kernel's module; `subgroups` asks for the variant with subgroup operations where there is one.
    pub fn shader(self, subgroups: bool) -> Shader {
        let subgroups = subgroups && self.has_subgroup_variant();
        let (params, bindings) = self.interface();
        let mut text = Text::default();
        write!(text.0, "const LANES: u32 = {}u;\nstruct Params {{\n", self.lanes()).expect("strings grow");
        for param in params {
            writeln!(text.0, "    {}: {},", param.name, param.element).expect("strings grow");
        }
        text.add("}\n@group(0) @binding(0) var<uniform> p: Params;");
        for (i, b) in bindings.iter().enumerate() {
            let access = if b.access == Access::Read { "read" } else { "read_write" };
            writeln!(text.0, "@group(0) @binding({}) var<storage, {access}> {}: array<{}>;", i + 1, b.name, b.element)
                .expect("strings grow");
        }
        if self.has_subgroup_variant() {
            text.add(if subgroups { source!("lanes_subgroups") } else { source!("lanes") });
        }
        self.body(&mut text);
        text.add(&entry_point(subgroups));
        Shader { source: text.0, params, bindings, lanes: self.lanes(), subgroups }
    }

    /// Parameters and storage bindings.
    fn interface(self) -> (&'static [Param], Vec<Binding>) {
        match self {
            Self::Embed(_) => (
                params![tokens u32, cols u32, row_bytes u32, first_byte u32, first_row u32, rows u32],
                vec![read_words("weight"), read_words("ids"), write("out")],
            ),
            Self::RmsNorm { in_place: true } => (NORM_PARAMS, vec![read("weight"), write("out")]),
            Self::RmsNorm { in_place: false } => (NORM_PARAMS, vec![read("weight"), read("x"), write("out")]),
            Self::LayerNorm { in_place: true } => (NORM_PARAMS, vec![read("weight"), read("bias"), write("out")]),
            Self::LayerNorm { in_place: false } => (NORM_PARAMS, vec![read("weight"), read("bias"), read("x"), write("out")]),
            Self::MatMul(..) => (MATMUL_PARAMS, vec![read_words("weight"), read("bias"), read("x"), write("out")]),
            Self::ExpertsIn { tiles, .. } => {
                let mut bindings = vec![read_words("weight"), read_words("table"), read("gate_bias"), read("up_bias"), read("x")];
                bindings.extend(rows_bindings(tiles));
                bindings.push(write("out"));
                (EXPERTS_IN_PARAMS, bindings)
            }
            Self::ExpertsOut { tiles, .. } => {
                let mut bindings = vec![read_words("weight"), read_words("table"), read("bias"), read("x")];
                bindings.extend(rows_bindings(tiles));
                bindings.push(write("out"));
                (EXPERTS_OUT_PARAMS, bindings)
            }
            Self::Rope => (
                params![tokens u32, heads u32, head_stride u32, first u32, pairs u32, interleaved u32],
                vec![read("cos_sin"), write("x")],
            ),
            Self::CopyColumns => (
                params![rows u32, width u32, x_stride u32, x_start u32, out_stride u32, out_start u32],
                vec![read("x"), write("out")],
            ),
            Self::AppendKv { half } => {
                (params![elements u32, first u32], vec![read("x"), if half { write_words("cache") } else { write("cache") }])
            }
            Self::Attention { half, .. } => {
                let cache = if half { read_words } else { read };
                (
                    params![
                        tokens u32, past u32, heads u32, heads_per_kv_head u32, kv_heads u32, key_dim u32, value_dim u32,
                        value_stride u32, window u32, chunk u32, has_sinks u32, scale f32, softcap f32, ranges u32,
                    ],
                    vec![read("q"), cache("keys"), cache("values"), read("sinks"), write("out")],
                )
            }
            Self::AttentionJoin => (params![rows u32, ranges u32, value_dim u32], vec![read("parts"), write("out")]),
            Self::Scale => (params![elements u32, width u32, has_factors u32, factor f32], vec![read("factors"), write("x")]),
            Self::Axpy => (params![elements u32, factor f32], vec![read("x"), write("y")]),
            Self::GatedAxpy => (params![rows u32, width u32, cols u32], vec![read("x"), read("input"), read("gate"), write("y")]),
            Self::Activate => {
                (params![elements u32, clamped u32, alpha f32, limit f32], vec![read("gate"), read("up"), write("out")])
            }
            Self::ScaleCap => (params![elements u32, factor f32, softcap f32], vec![write("x")]),
            Self::Route => (
                params![
                    tokens u32, num_experts u32, k u32, sigmoid u32, normalize u32, softmax_after_topk u32, has_bias u32, scale f32,
                ],
                vec![read("logits"), read("selection_bias"), write_words("ids"), write("weights")],
            ),
            Self::Combine => {
                (params![tokens u32, k u32, width u32, accumulate u32], vec![read("x"), read("weights"), write("y")])
            }
        }
    }

    fn body(self, text: &mut Text) {
        let x_at =
            |in_place: bool| format!("fn x_at(i: u32) -> f32 {{\n    return {}[i];\n}}\n", if in_place { "out" } else { "x" });
        match self {
            Self::Embed(format) => text.add(source!("bytes")).prefixed("w_", &[decoder(format)]).add(source!("embed")),
            Self::RmsNorm { in_place } => text.add(&x_at(in_place)).add(source!("rms_norm")),
            Self::LayerNorm { in_place } => text.add(&x_at(in_place)).add(source!("layer_norm")),
            Self::MatMul(format, rows) => {
                let body = if rows == Rows::Tile { source!("matmul_tiles") } else { source!("matmul_rows") };
                text.activations(rows).products("w_", format, rows).add(body)
            }
            Self::ExpertsIn { gate, up, tiles } => {
                let rows = if tiles { Rows::Tile } else { Rows::One };
                text.activations(rows).products("gate_", gate, rows).products("up_", up, rows);
                text.add(source!("activation")).experts(tiles);
                text.add(if tiles { source!("experts_in_tiles") } else { source!("experts_in_rows") })
            }
            Self::ExpertsOut { down, tiles } => {
                let rows = if tiles { Rows::Tile } else { Rows::One };
                text.activations(rows).products("down_", down, rows).experts(tiles);
                text.add(if tiles { source!("experts_out_tiles") } else { source!("experts_out_rows") })
            }
            Self::Rope => text.add(source!("rope")),
            Self::CopyColumns => text.add(source!("copy_columns")),
            Self::AppendKv { half } => text.add(if half { source!("append_kv_f16") } else { source!("append_kv_f32") }),
            Self::Attention { half, parts } => {
                let cache = if half { source!("cache_f16") } else { source!("cache_f32") };
                text.add(if parts { "const PARTS: bool = true;" } else { "const PARTS: bool = false;" })
                    .add(cache)
                    .add(source!("softcap"))
                    .add(source!("attention"))
            }
            Self::AttentionJoin => text.add(source!("attention_join")),
            Self::Scale => text.add(source!("scale")),
            Self::Axpy => text.add(source!("axpy")),
            Self::GatedAxpy => text.add(source!("activation")).add(source!("gated_axpy")),
            Self::Activate => text.add(source!("activation")).add(source!("activate")),
            Self::ScaleCap => text.add(source!("softcap")).add(source!("scale_cap")),
            Self::Route => text.add(source!("activation")).add(source!("route")),
            Self::Combine => text.add(source!("combine")),
        };
    }
}

/// What says which expert a row goes through.
fn rows_bindings(tiles: bool) -> Vec<Binding> {
    if tiles { vec![read_words("order"), read_words("tiles")] } else { vec![read_words("ids")] }
}

fn entry_point(subgroups: bool) -> String {
    let (arguments, start) = if subgroups {
        (
            ",\n    @builtin(subgroup_id) subgroup_: u32,\n    @builtin(num_subgroups) subgroups_: u32,\n    \
             @builtin(subgroup_invocation_id) lane_of_subgroup_: u32",
            "    subgroup = subgroup_;\n    subgroups = subgroups_;\n    lane_of_subgroup = lane_of_subgroup_;\n",
        )
    } else {
        ("", "")
    };
    format!(
        "@compute @workgroup_size(LANES)\nfn {ENTRY_POINT}(\n    @builtin(workgroup_id) group: vec3<u32>,\n    \
         @builtin(num_workgroups) groups: vec3<u32>,\n    @builtin(local_invocation_index) lane: u32{arguments},\n) {{\n{start}    \
         run(group, groups, lane);\n}}"
    )
}
