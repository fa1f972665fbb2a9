//! GPU kernel sources with a typed registry.
//!
//! A back-end never spells an entry point or a binding number: it takes them from the registry. [`wgsl`] composes the kernels of any
//! GPU from one source per operation and one per weight format; [`cuda`] has those of NVIDIA devices.

#![forbid(unsafe_code)]

pub mod cuda;
pub mod wgsl;
