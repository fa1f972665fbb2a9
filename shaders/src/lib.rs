//! GPU kernel sources with a typed registry.
//!
//! A back-end never spells an entry point or a binding number: it takes them from [`Shader`]. The tests hold each description
//! against its source (reflected by naga), so the two cannot drift apart, and validate every source offline.

#![forbid(unsafe_code)]

use tierwise_cost::quant::QuantFormat;

/// How a binding is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// A small block of shapes and constants.
    Uniform,
    /// Read-only storage.
    Read,
    /// Storage that the kernel writes.
    ReadWrite,
}

/// One binding of group 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding {
    /// Name in the source.
    pub name: &'static str,
    /// How the kernel uses it.
    pub access: Access,
}

/// One compute kernel in WGSL. Bindings are numbered from 0 in the order given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shader {
    /// Entry point, also the kernel's name.
    pub entry_point: &'static str,
    /// Source text.
    pub source: &'static str,
    /// Weight format it reads, if it is made for one.
    pub format: Option<QuantFormat>,
    /// Bindings of group 0.
    pub bindings: &'static [Binding],
    /// Invocations per workgroup.
    pub workgroup: [u32; 3],
}

const fn uniform(name: &'static str) -> Binding {
    Binding { name, access: Access::Uniform }
}
const fn read(name: &'static str) -> Binding {
    Binding { name, access: Access::Read }
}
const fn write(name: &'static str) -> Binding {
    Binding { name, access: Access::ReadWrite }
}

/// Every WGSL kernel.
pub const WGSL: &[Shader] = &[
    Shader {
        entry_point: "gemv_q8_0",
        source: include_str!("wgsl/gemv_q8_0.wgsl"),
        format: Some(QuantFormat::Q8_0),
        bindings: &[uniform("shape"), read("weight"), read("x"), write("y")],
        workgroup: [64, 1, 1],
    },
    Shader {
        entry_point: "rms_norm",
        source: include_str!("wgsl/rms_norm.wgsl"),
        format: None,
        bindings: &[uniform("shape"), read("weight"), read("x"), write("y")],
        workgroup: [64, 1, 1],
    },
];

/// The kernel of this name.
pub fn wgsl(entry_point: &str) -> Option<&'static Shader> {
    WGSL.iter().find(|s| s.entry_point == entry_point)
}
